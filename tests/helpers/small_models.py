"""Configurations of the structure of a released model that train in a second, and a packed row for such a model."""

from typing import Any

import torch

from modeling.layout import Layout
from modeling.shapes import TINY, Config


def stand_in(config: Config) -> Config:
    """A config of the same structure (intervals, resampler, added rows) that trains in a second: for tests."""
    interval = config["cross_layer_interval"]
    return {
        **config,
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2 * interval,
        "num_attention_heads": 4,
        "alpha_initializer": "ones",
        "vision_config": {**config["vision_config"], **TINY["vision_config"], "num_hidden_layers": 2},
        "perceiver_config": {**config["perceiver_config"], **TINY["perceiver_config"], "resampler_depth": 2},
    }


def one_row(*, images: int = 1) -> dict[str, Any]:
    """Return a packed row of one dialogue, 8 tokens and an image of 64 pixels that the last five see, or no image."""
    return {
        "input_ids": torch.tensor([[1, 17, 300, 301, 300, 18, 302, 2]]),
        "labels": torch.tensor([[-100, -100, -100, -100, -100, 18, 302, 2]]),
        "position_ids": torch.arange(8)[None],
        "supervised_positions": torch.tensor([4, 5, 6]),
        "targets": torch.tensor([18, 302, 2]),
        "layout": Layout((0, 8), ((3, 8, 0),) if images else ()),
        "image_index": torch.tensor([[-1, -1, -1, 0, 0, 0, 0, 0] if images else [-1] * 8]),
        "pixel_values": torch.randn(images, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    }
