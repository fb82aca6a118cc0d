"""Compute packed attention with variable-length kernels: one launch for all sequences of a row, one for all its images.

The kernels are torch's FlashAttention (Dao 2023; torch.nn.attention.varlen), on GPUs that have it. `modeling.attention`
is the documented reference: same arguments, same result. Axes: H heads, T tokens, D head size, L latents of an image, R
runs.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch.nn.attention.varlen import varlen_attn

from modeling.device import copy_numbers

AMPERE = (8, 0)
"""Lowest compute capability that has the kernels."""

LARGEST_HEAD, HEAD_STEP = 256, 8
"""Supported head sizes: multiples of 8 up to 256."""


def serves(query_BHTD: torch.Tensor, dropout: float) -> bool:
    """Return whether the kernels support this query: a GPU from Ampere on, half precision, head size, no dropout."""
    size = query_BHTD.shape[-1]
    return (
        query_BHTD.is_cuda
        and query_BHTD.dtype in (torch.bfloat16, torch.float16)
        and size <= LARGEST_HEAD
        and size % HEAD_STEP == 0
        and not dropout
        and torch.cuda.get_device_capability(query_BHTD.device) >= AMPERE
    )


def attend_sequences(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: Sequence[int], scaling: float | None
) -> torch.Tensor:
    """Compute causal attention inside each sequence: [1, H, T, D] -> [1, T, H, D]."""
    bounds = _int32(tuple(starts), query.device)
    longest = max(stop - start for start, stop in pairwise(starts))
    rows = map(_by_token, (query, key, value))
    return varlen_attn(*rows, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))[None]


def attend_images(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Sequence[tuple[int, int, int]],
    latents: int,
    scaling: float | None,
) -> torch.Tensor:
    """Let each run (start, stop, image) attend to its one image; tokens without an image get zeros.

    query [1, H, T, D], key and value [1, H, N * L, D] -> [1, T, H, D]. There is at least one run.
    """
    tokens, images, of_runs, of_images = _places(tuple(runs), latents, query.device)
    longest = max(stop - start for start, stop, _ in runs)
    every = _by_token(query)
    shown = (_by_token(one).unflatten(0, (-1, latents))[images].flatten(0, 1) for one in (key, value))
    seen = varlen_attn(every[tokens], *shown, of_runs, of_images, longest, latents, scale=scaling)
    return torch.zeros_like(every).index_copy(0, tokens, seen)[None]


def _by_token(tensor_BHTD: torch.Tensor) -> torch.Tensor:
    """Return a view [T, H, D] of [1, H, T, D], in the memory order of the projections' results."""
    return tensor_BHTD[0].transpose(0, 1)


@lru_cache(maxsize=4)
def _int32(numbers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the numbers on the device, copied once for all layers."""
    return copy_numbers(numbers, torch.int32, device)


@lru_cache(maxsize=4)
def _places(
    runs: tuple[tuple[int, int, int], ...], latents: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (tokens that see an image, image of each run, cumulative lengths of runs, and of images' latents)."""
    tokens = [token for start, stop, _ in runs for token in range(start, stop)]
    lengths = accumulate((stop - start for start, stop, _ in runs), initial=0)
    return (
        copy_numbers(tokens, torch.int64, device),
        copy_numbers([image for _, _, image in runs], torch.int64, device),
        _int32(tuple(lengths), device),
        _int32(tuple(range(0, (len(runs) + 1) * latents, latents)), device),
    )
