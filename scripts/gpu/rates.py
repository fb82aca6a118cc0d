"""Stage `environment`: what this machine has, and how fast it multiplies and copies."""

import importlib.metadata
import importlib.util
import platform
import tomllib
from pathlib import Path

import torch
from gpu.figures import Figures, seconds

MODULES = {"pillow": "PIL", "pyyaml": "yaml", "easy-vqa": "easy_vqa"}
"""Packages whose module has another name."""

CUBES = {"cuda": (1024, 2048, 4096, 8192), "cpu": (256, 512)}
SHAPES = {"cuda": ((2048, 4096, 11008), (2048, 11008, 4096), (2048, 4096, 32000)), "cpu": ((64, 512, 1376),)}
"""Products of a row of 2,048 tokens in the 9B."""
COPIED = {"cuda": 2 * 2**30, "cpu": 64 * 2**20}
"""Bytes that the memory rate copies."""


def environment(figures: Figures, device: torch.device, *, tiny: bool) -> None:
    figures.add(
        "device", torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    )
    figures.add("python", platform.python_version())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        figures.add("memory", properties.total_memory / 2**30, "GiB")
        figures.add("compute capability", f"{properties.major}.{properties.minor}")
        figures.add("CUDA of torch", torch.version.cuda)
    for name, version in _packages().items():
        figures.add(name, version or "missing")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = []
    for rows, inner, columns in (*((size, size, size) for size in CUBES[device.type]), *SHAPES[device.type]):
        left, right = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, inner), (inner, columns)))
        rates.append(2 * rows * inner * columns / seconds(lambda: left @ right, device) / 1e12)  # noqa: B023
        figures.add(f"product {rows} x {inner} x {columns}", rates[-1], "TFLOP/s")
    figures.add("matrix rate", max(rates), "TFLOP/s")
    source = torch.empty(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    figures.add("memory rate", 2 * len(source) / seconds(lambda: target.copy_(source), device) / 1e12, "TB/s")


def _packages() -> dict[str, str | None]:
    """Version of every package that the toolkit depends on; None where it is missing."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    found: dict[str, str | None] = {}
    for line in tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]:
        name = line.split(">")[0].split("=")[0].split("<")[0].strip()
        if importlib.util.find_spec(MODULES.get(name, name)) is None:
            found[name] = None
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "there"
    return found
