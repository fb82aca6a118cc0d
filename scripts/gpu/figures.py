"""What a stage of scripts/check_gpu.py found, printed and written at once: what comes later can lose nothing."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from modeling.atomic_files import write_json


class Figures:
    """The figures of one stage, in FOLDER/STAGE.json: [{"name", "value", "unit", "bound", "holds", "required"}]."""

    def __init__(self, folder: Path, stage: str):
        self.folder, self.path = folder, folder / f"{stage}.json"
        self.found: list[dict[str, Any]] = []

    def add(self, name: str, value: object, unit: str = "", *, least: float | None = None, most: float | None = None):
        """A measurement, with its target if there is one; a target that is missed is no failure."""
        self._write(name, value, unit, least, most, required=False)

    def check(self, name: str, value: float, *, most: float) -> None:
        """A difference, and the most that rounding explains; more is a failure of the stage."""
        self._write(name, value, "", None, most, required=True)

    @property
    def failed(self) -> list[str]:
        return [one["name"] for one in self.found if one["required"] and not one["holds"]]

    def _write(self, name: str, value: Any, unit: str, least: float | None, most: float | None, *, required: bool):
        bound = f">= {least:.4g}" if least is not None else f"<= {most:.4g}" if most is not None else ""
        # A value that is not a number holds no bound.
        holds = (least is None or value >= least) and (most is None or value <= most) if bound else None
        one = {"name": name, "value": value, "unit": unit, "bound": bound, "holds": holds, "required": required}
        self.found.append(one)
        write_json(self.path, self.found)
        mark = "" if holds is None else "  ok" if holds else "  WRONG" if required else "  missed"
        print(f"  {name:58} {show(value):>12} {unit:8} {bound}{mark}", flush=True)

    def earlier(self, stage: str, name: str) -> Any:
        """A figure of a stage that ran before; None if it did not get so far."""
        path = self.folder / f"{stage}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return next((one["value"] for one in found if one["name"] == name), None)


def show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], Any], device: torch.device, *, repeats: int = 10) -> float:
    """Median seconds of `work`, after one call that warms up."""
    work()
    found = []
    for _ in range(repeats):
        started = now(device)
        work()
        found.append(now(device) - started)
    return sorted(found)[len(found) // 2]
