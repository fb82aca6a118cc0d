"""Cross-attention that projects its images once per generated text, not once per token.

transformers 5.23 has a cache for self-attention only: for every token that IDEFICS generates, each gated block
multiplies the latents of all images by k_proj and v_proj again, and normalises the keys again. Five images in the 9B
are 320 rows for each of these matrices, where a token is one row for each of the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import IdeficsForVisionText2Text


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
