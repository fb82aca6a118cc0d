"""Device-dependent choices: a table of sizes, dtypes, and copies that do not block the host.

Every other place that asks for the kind of device is listed in docs/gpu.md, with the check that runs it on a GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Choices:
    """Sizes that suit a kind of device."""

    head_rows: int
    """Number of supervised tokens whose logits are in memory at once."""
    tower_images: int
    """Number of images per batch of the vision tower and the resampler."""
    steps_prefetched: int
    """Number of optimiser steps whose rows are prefetched, beyond the next two rows."""
    tokens_between_stops: int
    """Number of tokens that generation writes between checks whether all answers have ended."""


CHOICES = {
    "cpu": Choices(
        head_rows=128,  # enough for a fast product; more would not fit the caches
        tower_images=4,  # the intermediate results of a few images fit the caches
        steps_prefetched=0,  # rows are made by the same cores that train
        tokens_between_stops=1,  # the check costs nothing
    ),
    "cuda": Choices(
        # Each piece reads the head (262 MB in bf16) once per product: with 512 rows, an H100 computes for twice as
        # long as it reads.
        head_rows=512,
        tower_images=16,  # 4,112 patches per product
        # transformers' trainer collects all rows of a step before it starts; the GPU is idle until then.
        steps_prefetched=1,
        # A check waits for the GPU, whose queue is then empty; a token of a 9B takes 6 ms on an H100.
        tokens_between_stops=8,
    ),
}


def choices(device_type: str) -> Choices:
    """Return the sizes for "cpu" or "cuda"."""
    return CHOICES[device_type]


def auto_dtype() -> "torch.dtype":
    """Return the dtype of a base for `dtype: auto`: bf16 if the hardware has it, else fp32."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def compute_dtype() -> "torch.dtype":
    """Return the dtype of products with NF4 matrices: bf16 on GPUs that have it, fp16 on other GPUs, fp32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32  # a CPU multiplies bf16 at a hundredth of the speed
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def copy_numbers(numbers: Sequence[int], dtype: "torch.dtype", device: "torch.device") -> "torch.Tensor":
    """Return the numbers as a tensor [len(numbers)] on the device; to a GPU, they are copied asynchronously."""
    import torch

    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


def copy_batch(batch: Mapping[str, Any], device: "torch.device") -> dict[str, Any]:
    """Return a batch with its tensors on the device; other values are unchanged."""
    pinned = pin_batch(batch, device)
    return {name: one.to(device, non_blocking=True) if hasattr(one, "device") else one for name, one in pinned.items()}


def pin_batch(batch: Mapping[str, Any], device: "torch.device") -> dict[str, Any]:
    """Return a batch with pinned tensors, which a GPU copies asynchronously; for a CPU, the batch itself."""
    if device.type != "cuda":
        return dict(batch)
    return {name: one.pin_memory() if hasattr(one, "device") else one for name, one in batch.items()}
