"""Generation that computes the keys and values of an image once, and copies those of the text seldom.

transformers 5.23 has a cache for self-attention only: for every token that IDEFICS generates, each gated block
multiplies the latents of all images by k_proj and v_proj again, and normalises the keys again. Five images in the 9B
are 320 rows for each of these matrices, where a token is one row for each of the others. And its cache is a new tensor
for every token, into which all earlier ones are copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import IdeficsForVisionText2Text
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Tokens for which the cache has room each time it grows."""


class Remembered(nn.Module):
    """A module of one input, which is not run again as long as the input is the tensor it was.

    The same means the same memory read the same way (dtype, shape, strides), written to by nobody since. With gradients
    enabled, and for tensors of inference mode (which do not count their writes), every call is a call.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped
        self._known: tuple[object, ...] = ()
        # The input is kept too: as long as it lives, no other tensor gets its memory.
        self._kept: tuple[torch.Tensor, ...] = ()

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or tensor.is_inference():
            return self.wrapped(tensor)
        state = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor._version, tensor.device)
        if state != self._known:
            self._known, self._kept = state, (tensor, self.wrapped(tensor))
        return self._kept[1]


@contextmanager
def remembered_images(model: IdeficsForVisionText2Text) -> Iterator[None]:
    """Inside, every gated block keeps the keys and values of the last images it saw; outside, `model` is as it was.

    `model` may hold LoRA or 4-bit layers. What a forward returns is the same bit for bit. Per image of the batch and
    gated block this holds three tensors [latents, hidden] in the model's dtype: keys, normalised keys, values.
    """
    places = [
        (layer.cross_attn, name, getattr(layer.cross_attn, name))
        for layer in model.model.gated_cross_attn_layers
        for name in ("k_proj", "v_proj", *(("k_layer_norm",) if layer.cross_attn.qk_layer_norms else ()))
    ]
    try:
        for attention, name, module in places:
            setattr(attention, name, Remembered(module))
        yield
    finally:
        for attention, name, module in places:
            setattr(attention, name, module)


def growing_cache() -> Cache:
    """An empty `past_key_values` for `generate` or a forward, in place of the stock DynamicCache."""
    return Cache(layer_class_to_replicate=GrowingLayer)


class GrowingLayer(DynamicLayer):
    """The stock layer, whose keys and values [B, H, T, D] are views of tensors with room for up to ROOM more tokens.

    Written in place, hence not to be trained through.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._buffers: dict[str, torch.Tensor] = {}
        self.keys: torch.Tensor
        self.values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values so far, these included: [B, H, t, D] twice -> [B, H, T + t, D] twice."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        self.keys = self._append("keys", self.keys, key_states, length)
        self.values = self._append("values", self.values, value_states, length)
        return self.keys, self.values

    def _append(self, name: str, known: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
        stop = length + new.shape[-2]
        buffer = self._buffers.get(name)
        # Beam search and the like put other tensors in the place of our views.
        ours = buffer is not None and known.data_ptr() == buffer.data_ptr() and len(known) == len(buffer)
        if buffer is None or not ours or buffer.shape[-2] < stop:
            buffer = new.new_empty(*new.shape[:2], stop + ROOM, new.shape[-1])
            if length:
                buffer[..., :length, :] = known
            self._buffers[name] = buffer
        buffer[..., length:stop, :] = new
        return buffer[..., :stop, :]
