"""What depends on the device: one table of sizes, dtypes, and copies that the host does not wait for.

Every other place that asks for the kind of device is listed in docs/gpu.md, with the check that runs it on a GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Choices:
    """Sizes that a kind of device works best with."""

    head_rows: int
    """Supervised tokens whose logits exist at once."""
    tower_images: int
    """Images that go through vision tower and resampler at once."""
    steps_prefetched: int
    """Optimiser steps whose rows are made while one is trained, beyond the next two rows."""
    tokens_between_stops: int
    """Tokens that generation writes before it looks whether every answer has ended."""


CHOICES = {
    "cpu": Choices(
        head_rows=128,  # enough for a fast product; more would not stay in the caches
        tower_images=4,  # what a few images make on the way fits the caches
        steps_prefetched=0,  # a row is made by the cores that train
        tokens_between_stops=1,  # to look costs nothing, a token costs its products
    ),
    "cuda": Choices(
        # Each piece reads the head (262 MB in bf16) once for each product: with 512 rows an H100 multiplies for twice
        # as long as it reads.
        head_rows=512,
        tower_images=16,  # 4,112 patches a product
        # transformers' trainer collects all rows of a step before it begins; until they are there the GPU is idle.
        steps_prefetched=1,
        # To look is to wait for the GPU, which then has nothing queued; a token of a 9B takes 6 ms of an H100.
        tokens_between_stops=8,
    ),
}


def choices(device_type: str) -> Choices:
    """Return the sizes for "cpu" or "cuda"."""
    return CHOICES[device_type]


def auto_dtype() -> "torch.dtype":
    """Return the dtype of a base where the recipe says auto: bf16 where the hardware has it, else fp32."""
    import torch

    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def compute_dtype() -> "torch.dtype":
    """Return the dtype of products with NF4 matrices: bf16 on GPUs that have it, fp16 on others, fp32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32  # a CPU multiplies bf16 at a hundredth of the speed
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def copy_numbers(numbers: Sequence[int], dtype: "torch.dtype", device: "torch.device") -> "torch.Tensor":
    """Return the numbers as a tensor [len(numbers)] on the device; a GPU copies them from pinned memory in its turn."""
    import torch

    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


def copy_batch(batch: Mapping[str, Any], device: "torch.device") -> dict[str, Any]:
    """Return a batch with its tensors on the device; what is no tensor stays as it is."""
    pinned = pin_batch(batch, device)
    return {name: one.to(device, non_blocking=True) if hasattr(one, "device") else one for name, one in pinned.items()}


def pin_batch(batch: Mapping[str, Any], device: "torch.device") -> dict[str, Any]:
    """Return a batch whose tensors a GPU can copy while the host goes on; for a CPU, the batch itself."""
    if device.type != "cuda":
        return dict(batch)
    return {name: one.pin_memory() if hasattr(one, "device") else one for name, one in batch.items()}
