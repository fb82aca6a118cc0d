"""Packed rows of random content and given sizes, as a trainer's collator would make them."""

from itertools import pairwise
from typing import Any

import torch

from finetune.planning.static_memory import RowSize
from modeling.layout import lay_out
from modeling.shapes import Config
from modeling.tokens import IGNORED

SMALLEST_WORDS = 300
"""Ids below it are in every vocabulary."""


def make_row(config: Config, row: RowSize, *, sequence: int, cached: bool = True, seed: int = 0) -> dict[str, Any]:
    """Sequences of so many tokens, which share out the images; the last `row.supervised` tokens are supervised.

    Images are features where `cached`, else pixels.
    """
    rng = torch.Generator().manual_seed(seed)
    starts = [*range(0, row.tokens, sequence), row.tokens]
    ids = torch.randint(3, SMALLEST_WORDS, (1, row.tokens), generator=rng)
    places = torch.arange(row.tokens)
    labels = ids.where(places >= row.tokens - row.supervised, IGNORED)
    image_index = (places * row.images // row.tokens if row.images else torch.full_like(places, -1))[None]
    vision, size = config["vision_config"], config["vision_config"]["image_size"]
    latents = config["perceiver_config"]["resampler_n_latents"]
    shape = (latents, vision["embed_dim"]) if cached else (3, size, size)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(stop - start) for start, stop in pairwise(starts)])[None],
        "image_index": image_index,
        **lay_out(starts, image_index, labels),
        "image_features" if cached else "pixel_values": torch.randn(row.images, *shape, generator=rng),
    }
