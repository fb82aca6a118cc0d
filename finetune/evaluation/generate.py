"""Dialogue -> answer: prompts by the template of training, batches of similar length, greedy decoding."""

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
from modeling.generation import greedy
from modeling.loading import generation_config
from modeling.packed_forward import image_features

PADDING = 32
"""Largest difference in length, in tokens, between prompts of one batch."""


@dataclass(frozen=True)
class Answer:
    """An answer of the model."""

    text: str
    stopped: bool
    """Whether it ended by itself (`<end_of_utterance>` or `</s>`) within the limit."""


@dataclass(frozen=True)
class Assistant:
    """A model with its tokenizer and preprocessing. `model` may be wrapped by PEFT."""

    model: nn.Module
    tokenizer: Any
    preprocessing: Preprocessing
    features: Callable[[Sequence[Image]], torch.Tensor] | None = None
    """Function from images to their features [N, latents, D], for a model without image towers."""

    @property
    def idefics(self) -> IdeficsForVisionText2Text:
        """Return the unwrapped model, which contains the adapter layers."""
        return self.model if isinstance(self.model, IdeficsForVisionText2Text) else self.model.get_base_model()


def features_by_image(rows: RowCollator) -> Callable[[Sequence[Image]], torch.Tensor] | None:
    """Return a function from images to their cached features, or None if `rows` has no features."""
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
    """Answer each prompt (a dialogue that ends with the user) greedily; answers are in the order of the prompts.

    `together`: all processes call this, each answers its share of the batches, and all get all answers.
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
    """Yield (index of a prompt, answer) as soon as an answer is made."""
    batches, answer = _batches(assistant, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    for batch in batches:
        yield from zip(batch, answer(batch), strict=True)


def _batches(
    assistant: Assistant, prompts: Sequence[Dialogue], *, max_new_tokens: int, batch_size: int
) -> tuple[list[list[int]], Callable[[list[int]], list[Answer]]]:
    """Return batches of prompts (by index), and the function that answers one batch."""
    rendered = [render(prompt) for prompt in prompts]
    examples = [tokenize(text, assistant.tokenizer) for text in rendered]
    # Sort by length to pad little; similar lengths stay in order, so that neighbours share an image's features.
    order = sorted(range(len(prompts)), key=lambda index: len(examples[index]) // PADDING)
    config = generation_config(assistant.tokenizer)
    config.max_new_tokens = max_new_tokens

    def answer(batch: list[int]) -> list[Answer]:
        inputs = make_inputs(assistant, [examples[index] for index in batch], [rendered[index] for index in batch])
        answers = []
        for ids in greedy(assistant.idefics.eval(), inputs, config):
            length = next((index for index, token in enumerate(ids) if token in config.eos_token_id), None)
            text = assistant.tokenizer.decode(
                ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            answers.append(Answer(text.strip(), stopped=length is not None))
        return answers

    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)], answer


def make_inputs(
    assistant: Assistant, examples: Sequence[Example], rendered: Sequence[Rendered]
) -> dict[str, torch.Tensor]:
    """Return left-padded inputs of `modeling.generation.greedy` for B prompts of at most T tokens and N images.

    input_ids, attention_mask int64 [B, T]; image_attention_mask int64 [B, T, N], one-hot: a token sees the last image
    before it; image_hidden_states [B, N, latents, D], zeros where a prompt has fewer images. Without
    any image N is 1, and the mask is zero.
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
    """Return image features [B, width, latents, D]; an image that several prompts show is computed once."""
    model = assistant.idefics.eval()
    distinct = {image: index for index, image in enumerate(dict.fromkeys(image for row in images for image in row))}
    config = model.config
    shape = (len(images), width, config.perceiver_config.resampler_n_latents, config.vision_config.embed_dim)
    features = torch.zeros(shape, dtype=model.dtype, device=model.device)
    if not distinct:
        return features
    if assistant.features is not None:
        computed = assistant.features(list(distinct)).to(model.device)
    else:
        pixels = np.stack([assistant.preprocessing.pixels(open_image(image)) for image in distinct])
        computed = image_features(model, torch.from_numpy(pixels).to(model.device))
    for row, shown in enumerate(images):
        for column, image in enumerate(shown):
            features[row, column] = computed[distinct[image]]
    return features
