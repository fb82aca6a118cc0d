"""What this process runs on: its device, the type of its numbers, how much memory is free, and which versions."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from modeling.loading import CPU

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")


def device() -> torch.device:
    """Return the device of this process; of several GPUs, its own one."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else CPU


def gpu_memory() -> int | None:
    """Return the bytes of this process's GPU in all; None without a GPU."""
    return torch.cuda.get_device_properties(device()).total_memory if torch.cuda.is_available() else None


def free_memory() -> int:
    """Return the bytes that a model may take: of the GPU, or of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(device())[0]
    return psutil.virtual_memory().available


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that do the work."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def commit() -> str | None:
    """Return the commit of the toolkit's own checkout, or None where it was installed from elsewhere."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout.strip() or None
