"""Whether a stage of a run is done, judged by the files that it left.

A stage writes its .json last: its figures, and under "made_of" a hash of what they were made of, the files that the
stage left with their sizes, and a hash of the figures themselves.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modeling.checkpoint import fingerprint, read_header
from modeling.errors import UserError
from modeling.files import flush, read_json, write_json

FILES = {"train": "training.json", "evaluate": "evaluation.json", "merge": "merge.json"}
"""Of each stage, the file of its figures."""

LEFT = {
    "train": ("adapter/*",),
    "evaluate": ("predictions.jsonl",),
    "merge": ("merged/*",),
}
"""Of each stage, the other files."""

MADE_OF = "made_of"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def adapter_fingerprint(adapter: Path) -> str:
    """A hash that tells one adapter from another without reading all of it."""
    weights = {path.name: fingerprint(read_header(path)) for path in sorted(adapter.glob("*.safetensors"))}
    settings = {path.name: path.read_bytes().hex() for path in sorted(adapter.glob("adapter_config.json"))}
    return digest([weights, settings])


def write_stage(folder: Path, stage: str, figures: Mapping[str, Any], inputs: str) -> None:
    """Write down that a stage is done. `inputs`: a hash of what it was made of."""
    left = {str(path.relative_to(folder)): path.stat().st_size for path in _left(folder, stage)}
    for path in {*(folder / name for name in left), *((folder / name).parent for name in left)}:
        flush(path)
    made_of = {"inputs": inputs, "files": left, "figures": digest(figures)}
    write_json(folder / FILES[stage], {**figures, MADE_OF: made_of})


def figures_of(folder: Path, stage: str) -> dict[str, Any] | None:
    """What a stage found; None where its file is not there, or not whole."""
    record = _read(folder, stage)
    return None if record is None else {key: value for key, value in record.items() if key != MADE_OF}


def files_of(folder: Path, stage: str) -> list[Path]:
    """The files that a stage left, as far as they are still there."""
    record = _read(folder, stage) or {}
    return [path for name in record.get(MADE_OF, {"files": {}})["files"] if (path := folder / name).is_file()]


def why_not_done(folder: Path, stage: str, inputs: str) -> str | None:
    """Why a stage is to be done (again); None where it is done."""
    file = folder / FILES[stage]
    if not file.exists():
        return f"{file} is not there"
    record = _read(folder, stage)
    if record is None:
        return f"{file} is not whole, or was changed"
    made_of = record[MADE_OF]
    if made_of["inputs"] != inputs:
        return "its settings, its data or the adapter have changed since"
    for name, size in made_of["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is not there any more"
        if path.stat().st_size != size:
            return f"{path} is not as it was left"
    return None


def _left(folder: Path, stage: str) -> Iterator[Path]:
    return (path for pattern in LEFT[stage] for path in sorted(folder.glob(pattern)) if path.is_file())


def _read(folder: Path, stage: str) -> dict[str, Any] | None:
    """A stage's .json, if it is as the stage wrote it."""
    try:
        record = read_json(folder / FILES[stage])
    except UserError:
        return None
    made_of = record and record.get(MADE_OF)
    if not record or not isinstance(made_of, dict) or not isinstance(made_of.get("files"), dict):
        return None
    figures = {key: value for key, value in record.items() if key != MADE_OF}
    inside = all(not {"..", "/"} & set(Path(name).parts) for name in made_of["files"])
    return record if inside and made_of.get("figures") == digest(figures) and "inputs" in made_of else None
