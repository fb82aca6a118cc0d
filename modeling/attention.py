"""Attention for packed rows, through transformers' attention interface: every sequence and every image runs alone.

A row of three sequences, two images (a, b); `.` marks tokens that have seen no image:

    tokens            A A A A A  B B B  C C C C
    sequence_starts   0          5      8        12
    images seen       . a a a a  . . .  . b b b

    self-attention    [0,5) [5,8) [8,12)          causal, each slice alone
    cross-attention   [1,5) -> a   [9,12) -> b    `image_runs`; the rest is zero

There is no padding, and sequences are never multiplied with each other, so no mask is needed. Where a GPU supports
them, variable-length kernels compute the same (`modeling.flash`). Without `sequence_starts` (generation, the vision
tower), the function is transformers' own sdpa. Axes: B batch (1 when packed), H heads, T tokens, D head size,
N images, L latents of an image.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from modeling import flash
from modeling.layout import ImageRun

PACKED = "packed"
"""The name to pass as `attn_implementation`."""


def packed_attention(
    module: nn.Module,
    query_BHTD: torch.Tensor,
    key_BHSD: torch.Tensor,
    value_BHSD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_starts: Sequence[int] | None = None,
    image_runs: Sequence[ImageRun] = (),
    image_latents: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention over one packed row. Return ([B, T, H, D], None), as transformers' interface requires.

    `sequence_starts` holds the S + 1 cumulative lengths; `image_runs` are sorted and disjoint; `image_latents` is the
    number of latents L of one image.
    """
    if sequence_starts is None:
        return sdpa_attention_forward(
            module, query_BHTD, key_BHSD, value_BHSD, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    fast = flash.serves(query_BHTD, dropout)
    if module.is_cross_attention and fast and image_runs:
        output = flash.attend_images(query_BHTD, key_BHSD, value_BHSD, image_runs, image_latents, scaling)
    elif module.is_cross_attention:
        output = _attend_images(query_BHTD, key_BHSD, value_BHSD, image_runs, image_latents, scaling, dropout)
    elif fast:
        output = flash.attend_sequences(query_BHTD, key_BHSD, value_BHSD, sequence_starts, scaling)
    else:
        output = _attend_sequences(query_BHTD, key_BHSD, value_BHSD, sequence_starts, scaling, dropout)
    return output, None


def _attend_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: Sequence[int],
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Compute causal attention inside each sequence: [1, H, T, D] -> [1, T, H, D]."""
    lengths = [stop - start for start, stop in pairwise(starts)]
    sequences = zip(*(_split(tensor, lengths) for tensor in (query, key, value)), strict=True)
    return _join(
        [
            scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True, scale=scaling)
            for queries, keys, values in sequences
        ]
    )


def _attend_images(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Sequence[ImageRun],
    latents: int,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Let each run of tokens attend to the latents of its one image; tokens without an image get zeros.

    query [1, H, T, D], key and value [1, H, N * L, D] -> [1, T, H, D]. The result depends on all inputs even if no
    token sees an image, so that every parameter has a gradient (of zero) on every rank: without it,
    DistributedDataParallel would wait for ever.
    """
    if not runs:
        return (query * 0 + 0 * (key.sum() + value.sum())).transpose(1, 2)
    bounds = [0, *(bound for start, stop, _ in runs for bound in (start, stop)), query.shape[2]]
    parts = _split(query, [stop - start for start, stop in pairwise(bounds)])  # gap, run, gap, ..., run, gap
    keys, values = (_split(tensor, [latents] * (tensor.shape[2] // latents)) for tensor in (key, value))
    outputs = [torch.zeros_like(parts[0])]
    for part, gap, (_, _, image) in zip(parts[1::2], parts[2::2], runs, strict=True):
        seen = scaled_dot_product_attention(part, keys[image], values[image], dropout_p=dropout, scale=scaling)
        outputs += [seen, torch.zeros_like(gap)]
    return _join(outputs)


def _split(tensor_BHTD: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Split [1, H, T, D] into views [1, H, t, D]. The backward is one concatenation; each slice would allocate T zeros.

    It splits [1, T, H, D], the memory order of the projections' results, so that joining copies contiguous blocks.
    """
    return [part.transpose(1, 2) for part in tensor_BHTD.transpose(1, 2).split(list(lengths), dim=1)]


def _join(parts_BHTD: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join parts [1, H, t, D] to a contiguous [1, T, H, D]."""
    return torch.cat([part.transpose(1, 2) for part in parts_BHTD], dim=1)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
