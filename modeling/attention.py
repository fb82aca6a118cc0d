"""Attention for packed rows, through transformers' attention interface: every sequence and every image runs alone.

A row of three sequences, two images (a, b); `.` marks tokens that have seen no image:

    tokens            A A A A A  B B B  C C C C
    sequence_starts   0          5      8        12
    images seen       . a a a a  . . .  . b b b

    self-attention    [0,5) [5,8) [8,12)          causal, each slice alone
    cross-attention   [1,5) -> a   [9,12) -> b    `image_runs`; the rest is zero

No padding and no neighbour is ever multiplied, so no mask exists. Without `sequence_starts` (generation, the vision
tower) the function is transformers' own sdpa. Axes: B batch (1 when packed), H heads, T tokens, D head size,
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

PACKED = "packed"
"""The name to pass as `attn_implementation`."""

ImageRun = tuple[int, int, int]
"""(start, stop, image): tokens [start, stop) of the row see this image of the row."""


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
    """Attention over one packed row. Returns ([B, T, H, D], None), as transformers' interface asks.

    `sequence_starts` holds the S + 1 cumulative lengths; `image_runs` are sorted and disjoint; `image_latents` is the
    number of latents L of one image.
    """
    if sequence_starts is None:
        return sdpa_attention_forward(
            module, query_BHTD, key_BHSD, value_BHSD, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if module.is_cross_attention:
        output = _attend_images(query_BHTD, key_BHSD, value_BHSD, image_runs, image_latents, scaling, dropout)
    else:
        output = _attend_sequences(query_BHTD, key_BHSD, value_BHSD, sequence_starts, scaling, dropout)
    return output.transpose(1, 2), None


def _attend_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: Sequence[int],
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Causal attention inside each sequence. [1, H, T, D] -> [1, H, T, D]."""
    outputs = [
        scaled_dot_product_attention(
            query[:, :, start:stop],
            key[:, :, start:stop],
            value[:, :, start:stop],
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
        )
        for start, stop in pairwise(starts)
    ]
    return torch.cat(outputs, dim=2)


def _attend_images(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Sequence[ImageRun],
    latents: int,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Each run of tokens attends to the latents of its one image; tokens that see none get zeros.

    query [1, H, T, D], key and value [1, H, N * L, D]. Everything is reached by the graph even when nothing is
    attended to, so that a rank whose row has no image still has a gradient (of zero) for every parameter: without it
    DistributedDataParallel waits for ever.
    """
    outputs, done = [], 0
    for start, stop, image in runs:
        if done < start:
            outputs.append(query[:, :, done:start] * 0)
        span = slice(image * latents, (image + 1) * latents)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, start:stop], key[:, :, span], value[:, :, span], dropout_p=dropout, scale=scaling
            )
        )
        done = stop
    if done < query.shape[2]:
        outputs.append(query[:, :, done:] * 0)
    return torch.cat(outputs, dim=2) + 0 * (key.sum() + value.sum())


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
