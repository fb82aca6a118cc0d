"""What this process computes on: its device, the type of its numbers, and how much memory is free."""

import os

import psutil
import torch

from modeling.loading import CPU


def device() -> torch.device:
    """Of several GPUs, the one of this process."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else CPU


def auto_dtype() -> torch.dtype:
    """bf16 where the hardware has it, else fp32."""
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def gpu_memory() -> int | None:
    """Bytes of this process's GPU in all; None without one."""
    return torch.cuda.get_device_properties(device()).total_memory if torch.cuda.is_available() else None


def free_memory() -> int:
    """Bytes that a model may take: of the GPU, or of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(device())[0]
    return psutil.virtual_memory().available
