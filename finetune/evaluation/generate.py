"""Dialogue in, text out: the same template as in training."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import IdeficsForVisionText2Text

from finetune.console import Track, silently
from finetune.data.chat_template import Rendered, render
from finetune.data.collate import RowCollator
from finetune.data.conversation import Dialogue, Image
from finetune.data.images import Preprocessing, open_image
from finetune.data.tokenize import Example, tokenize
from finetune.distributed import collectives
from modeling.forward import image_features
from modeling.generation import greedy
from modeling.loading import generation_config

PADDING = 32
"""Most tokens by which two prompts of one batch differ in length."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and whether it ended by itself within the limit."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Assistant:
    """A model with all it needs to be asked. `model` may be wrapped by PEFT."""

    model: nn.Module
    tokenizer: Any
    preprocessing: Preprocessing
    features: Callable[[Sequence[Image]], torch.Tensor] | None = None
    """Of these images, [N, latents, D]: for a model without its image towers."""

    @property
    def idefics(self) -> IdeficsForVisionText2Text:
        """The plain model; adapters are inside it."""
        return self.model if isinstance(self.model, IdeficsForVisionText2Text) else self.model.get_base_model()


def features_by_image(rows: RowCollator) -> Callable[[Sequence[Image]], torch.Tensor] | None:
    """Return what looks up the features of images that rows show, by image instead of by number; None without any."""
    features = rows.features
    if features is None:
        return None
    numbers = {rows.images[number]: number for images in rows.image_ids for number in images}
    return lambda images: features([numbers[image] for image in images])


def generate(
    assistant: Assistant,
    prompts: Sequence[Dialogue],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    together: bool = False,
    track: Track = silently,
) -> list[Answer]:
    """Answer each prompt (a dialogue that ends with the user), greedily; answers in the order of the prompts.

    `together`: all processes ask the same, answer their share of the batches, and get all answers.
    """
    batches, answer = _batches(assistant, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    if together:
        answered = collectives.share_out("answer", batches, answer, track=track)
    else:
        answered = [answer(batch) for batch in track(batches, "answer")]
    by_prompt = dict(zip(chain.from_iterable(batches), chain.from_iterable(answered), strict=True))
    return [by_prompt[index] for index in range(len(prompts))]


def generate_each(
    assistant: Assistant, prompts: Sequence[Dialogue], *, max_new_tokens: int, batch_size: int
) -> Iterator[tuple[int, Answer]]:
    """(index of a prompt, its answer), as they are made."""
    batches, answer = _batches(assistant, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    for batch in batches:
        yield from zip(batch, answer(batch), strict=True)


def _batches(
    assistant: Assistant, prompts: Sequence[Dialogue], *, max_new_tokens: int, batch_size: int
) -> tuple[list[list[int]], Callable[[list[int]], list[Answer]]]:
    """(indices of prompts that are answered together, what answers them)."""
    rendered = [render(prompt) for prompt in prompts]
    examples = [tokenize(text, assistant.tokenizer) for text in rendered]
    # Similar lengths together, so that little is padded; else in order, so that neighbours share an image's features.
    order = sorted(range(len(prompts)), key=lambda index: len(examples[index]) // PADDING)

    def answer(batch: list[int]) -> list[Answer]:
        inputs = _inputs(assistant, [examples[index] for index in batch], [rendered[index] for index in batch])
        return [_answer(assistant.tokenizer, ids) for ids in _continue(assistant, inputs, max_new_tokens)]

    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)], answer


def _continue(assistant: Assistant, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[list[int]]:
    config = generation_config(assistant.tokenizer)
    config.max_new_tokens = max_new_tokens
    return greedy(assistant.idefics.eval(), inputs, config)


def _answer(tokenizer: Any, ids: list[int]) -> Answer:
    ends = set(generation_config(tokenizer).eos_token_id)
    length = next((index for index, token in enumerate(ids) if token in ends), None)
    text = tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Answer(text.strip(), stopped=length is not None)


def _inputs(assistant: Assistant, examples: Sequence[Example], rendered: Sequence[Rendered]) -> dict[str, torch.Tensor]:
    """Left-padded inputs of the stock `generate` for B prompts of at most T tokens and N images.

    input_ids, attention_mask int64 [B, T]; image_attention_mask int64 [B, T, N], one-hot: a token sees the last image
    before it; image_hidden_states [B, N, latents, D], zeros where a prompt has fewer images (or none at all, which
    the stock model needs to be told by a mask of zeros).
    """
    length = max(len(example) for example in examples)
    images = max(1, *(len(text.images) for text in rendered))
    ids = np.full((len(examples), length), assistant.tokenizer.pad_token_id)
    attended = np.zeros((len(examples), length), dtype=np.int64)
    seen = np.zeros((len(examples), length, images), dtype=np.int64)
    for row, example in enumerate(examples):
        pad = length - len(example)
        ids[row, pad:], attended[row, pad:] = example.input_ids, 1
        tokens = np.flatnonzero(example.image_index >= 0)
        seen[row, pad + tokens, example.image_index[tokens]] = 1
    device = assistant.idefics.device
    return {
        "input_ids": torch.from_numpy(ids).to(device),
        "attention_mask": torch.from_numpy(attended).to(device),
        "image_attention_mask": torch.from_numpy(seen).to(device),
        "image_hidden_states": _features(assistant, [text.images for text in rendered], images),
    }


@torch.no_grad()
def _features(assistant: Assistant, images: Sequence[Sequence[Image]], width: int) -> torch.Tensor:
    """[B, width, latents, D]; an image that several prompts show is run once."""
    model = assistant.idefics.eval()
    distinct = {image: index for index, image in enumerate(dict.fromkeys(image for row in images for image in row))}
    config = model.config
    shape = (len(images), width, config.perceiver_config.resampler_n_latents, config.vision_config.embed_dim)
    features = torch.zeros(shape, dtype=model.dtype, device=model.device)
    if distinct:
        computed = _compute(assistant, list(distinct)).to(model.device)
        for row, shown in enumerate(images):
            for column, image in enumerate(shown):
                features[row, column] = computed[distinct[image]]
    return features


def _compute(assistant: Assistant, images: Sequence[Image]) -> torch.Tensor:
    """[N, latents, D]"""
    if assistant.features is not None:
        return assistant.features(images)
    pixels = np.stack([assistant.preprocessing.pixels(open_image(image)) for image in images])
    return image_features(assistant.idefics, torch.from_numpy(pixels).to(assistant.idefics.device))
