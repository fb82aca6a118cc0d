"""A merged folder -> what can be proved of it: its files by their hashes, its weights by `modeling.proof`."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.data.tracking import Track, silently
from modeling.checkpoint import Rows, Stored, read_checkpoint
from modeling.deltas import Adapter, weights_of
from modeling.errors import UserError
from modeling.files import read_json
from modeling.loading import open_base
from modeling.proof import changed_blocks, compare_block, compare_tensor
from modeling.shapes import Config, read_config
from modeling.towers import is_computed

PROVENANCE = "provenance.json"
"""In a merged folder: what it was made of, hashes, and the proof."""


@dataclass(frozen=True)
class Comparison:
    """base + adapter against the merged weights, by `modeling.proof`."""

    tensors: int
    largest_tensor_difference: float
    """Of rows from the formula in fp64, to what rounding to the merged dtype explains: at most 1 in an honest merge."""
    worst_tensor: str
    blocks: int
    largest_block_difference: float
    """Relative to the largest output, for the same input."""
    worst_block: str | None
    """None where no block holds LoRA."""
    tensor_differences: dict[str, float]
    """Of the tensors that differ at all."""
    block_differences: dict[str, float]


def verify(merged: Path, *, track: Track = silently) -> dict[str, Any]:
    """Repeat the proof of a merged folder: its files, its base and its adapter are those it was made of, and agree.

    Returns the comparison. Raises UserError: one of them is not there any more, or has changed.
    """
    record = read_json(merged / PROVENANCE)
    if record is None or "made_of" not in record:
        raise UserError(f"{merged}: expected a merged model with its {PROVENANCE}, found none")
    sources, made_of, hashes = record["sources"], record["made_of"], record["sha256"]
    adapter = Path(sources["adapter"])
    if weight_digests(merged, track) != hashes["merged"]:
        raise UserError(f"{merged}: its weights have changed since they were merged")
    if not adapter.is_dir() or digests(adapter / name for name in made_of["adapter"]) != made_of["adapter"]:
        raise UserError(f"{adapter}: the adapter that {merged} was made of is gone, or has changed")
    folder, base_config = open_base(sources["base"], revision=sources["revision"])
    if weight_digests(folder, track) != hashes["base"]:
        raise UserError(f"{folder}: is not the base that {merged} was made of")
    stored = {name: one for name, one in read_checkpoint(folder).items() if not is_computed(name)}
    weights, tensors = weights_of(stored, base_config, made_of["onto"]), read_checkpoint(merged)
    comparison = compare(read_config(str(merged)), weights, tensors, Adapter.read(adapter), track=track)
    require_rounding(comparison, tensors)
    return asdict(comparison)


def compare(
    config: Config,
    base: Mapping[str, Rows],
    merged: Mapping[str, Stored],
    adapter: Adapter,
    *,
    track: Track = silently,
) -> Comparison:
    """Tensor by tensor and block by block; `config` is that of the merged model."""
    tensors = {name: compare_tensor(name, config, base, merged, adapter) for name in track(list(merged), "compare")}
    blocks = {
        block: compare_block(block, config, base, merged, adapter) for block in track(changed_blocks(adapter), "prove")
    }
    worst_tensor = max(tensors, key=lambda name: tensors[name].relative)
    worst_block = max(blocks, key=lambda name: blocks[name].relative, default=None)
    return Comparison(
        tensors=len(tensors),
        largest_tensor_difference=tensors[worst_tensor].relative,
        worst_tensor=worst_tensor,
        blocks=len(blocks),
        largest_block_difference=blocks[worst_block].relative if worst_block else 0.0,
        worst_block=worst_block,
        tensor_differences={name: one.relative for name, one in tensors.items() if one.largest},
        block_differences={name: one.relative for name, one in blocks.items()},
    )


def require_rounding(comparison: Comparison, merged: Mapping[str, Stored]) -> None:
    """Raises UserError for a tensor that is not base + adapter, and for a block that gives no numbers."""
    for name, difference in comparison.tensor_differences.items():
        if not difference <= 1:
            raise UserError(
                f"{merged[name].file}: {name} is {difference:.3g} times as far from base + adapter as rounding "
                f"explains; delete the file, and merge again"
            )
    for block, difference in comparison.block_differences.items():
        if not math.isfinite(difference):
            raise UserError(f"{block}: its outputs are not numbers: the base or the adapter holds infinite values")


def weight_digests(folder: Path, track: Track = silently) -> dict[str, str]:
    """SHA-256 of each weight file of a model."""
    return digests(track(sorted(folder.glob("*.safetensors")), "hash"))


def digests(files: Iterable[Path]) -> dict[str, str]:
    """File name -> SHA-256; of a file that is not there, an empty one."""
    found = {}
    for path in files:
        found[path.name] = ""
        if path.is_file():
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
