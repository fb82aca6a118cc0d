"""base + adapter -> a standalone instruct checkpoint for plain transformers, a few rows at a time; and its proof.

Everything trained finds its home: LoRA is added to its matrix in fp32, gates and towers trained in full replace the
base's, the added tokens' rows bring the vocabulary to three. A tensor of the adapter that finds none is an error.

    OUT/  *.safetensors (and index) · config.json · tokenizer, processor and generation files · README.md
          provenance.json: what it was made of, hashes, and the proof
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.data.tracking import Track, silently
from finetune.folder import commit, read_json, write_json
from modeling.checkpoint import Planned, Stored, identity, plan_shards, read_checkpoint, write_index, write_shard
from modeling.deltas import BLOCK_ELEMENTS, Adapter
from modeling.errors import UserError
from modeling.loading import generation_config, load_processor, save_processor
from modeling.proof import changed_blocks, compare_block, compare_tensor
from modeling.shapes import read_config, tensor_shapes

SHARD_BYTES = 5 * 10**9
"""Largest weight file."""

NOTE = "finetune.json"
"""Beside the adapter's weights: what it was trained on. An adapter made elsewhere has none."""

PROVENANCE = "provenance.json"

TOLERATED_STEPS = 8
"""Of the merged dtype's precision: sums in fp32 and in fp64 may round to different neighbours."""

SPARE_BYTES = 200_000_000
"""Of disk, beyond the weights."""

Onto = Literal["full", "nf4"]


@dataclass(frozen=True)
class Origin:
    """What an adapter was trained on."""

    base: str
    """Folder or hub id."""
    revision: str | None = None
    instruct: bool = False
    """Whether a base gained `<end_of_utterance>`."""
    quantize: str | None = None
    identity: str | None = None
    """`modeling.checkpoint.identity` of the base."""

    def write(self, adapter: Path) -> None:
        write_json(adapter / NOTE, asdict(self))

    @classmethod
    def of(cls, adapter: Path) -> "Origin":
        """As the note says; of an adapter made elsewhere, as PEFT's own file says. Raises UserError."""
        if note := read_json(adapter / NOTE):
            return cls(**note)
        config = read_json(adapter / "adapter_config.json")
        if config is None:
            found = "a model" if (adapter / "config.json").is_file() else "neither"
            raise UserError(f"{adapter}: expected an adapter folder ({NOTE} or adapter_config.json), found {found}")
        if not config.get("base_model_name_or_path"):
            raise UserError(f"{adapter}: does not say what base it was made for; name it: --base FOLDER_OR_HUB_ID")
        return cls(config["base_model_name_or_path"], config.get("revision"))


@dataclass(frozen=True)
class Comparison:
    """base + adapter against the merged weights, by `modeling.proof`."""

    tensors: int
    largest_tensor_difference: float
    """Of sampled rows from the formula in fp64, relative to their largest value: rounding to the merged dtype."""
    worst_tensor: str
    blocks: int
    largest_block_difference: float
    """Relative to the largest output, for the same input."""
    worst_block: str | None
    tensor_differences: dict[str, float]
    block_differences: dict[str, float]


def merge(
    adapter: Path,
    base: str,
    out: Path,
    *,
    revision: str | None = None,
    instruct: bool = True,
    base_identity: str | None = None,
    onto: Onto = "full",
    provenance: Mapping[str, Any] | None = None,
    card: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    track: Track = silently,
) -> dict[str, Any]:
    """Write the merged model to `out`, which appears only when it is complete and proved; returns provenance.json.

    To `instruct`, a base gains `<end_of_utterance>`, as in training. `onto` nf4 adds to the matrices as training saw
    them, quantised and back. `dtype`: of the merged weights, as the base's if None. In memory are the adapter and a few
    blocks of one matrix. Interrupted, it goes on with the first shard that is not complete. Raises UserError: another
    base, not enough disk, something else in `out`.
    """
    folder = base_folder(base, revision)
    stored, changes = read_checkpoint(folder), Adapter.read(adapter)
    instruct = instruct or changes.added_tokens == 3
    config = {**read_config(base, revision=revision), **_stored_config(folder)}
    if instruct:
        config["additional_vocab_size"] = 3
    config["architectures"] = ["IdeficsForVisionText2Text"]
    made_of = {
        "base": identity(stored),
        "adapter": digests(adapter),
        "instruct": instruct,
        "onto": onto,
        "dtype": str(dtype) if dtype else None,
        "shard_bytes": shard_bytes,
    }
    if base_identity and base_identity != made_of["base"]:
        raise UserError(f"{adapter}: was trained on other weights than those of {base}: same shapes, other content")
    planned = _plan(stored, changes, config, dtype)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if (found := read_json(out / PROVENANCE)) and found.get("made_of") == made_of:
            return found
        raise UserError(f"{out}: is not empty, and not the result of this merge; choose another folder, or delete it")
    partial = _partial_folder(out, made_of)
    shards = plan_shards(planned, shard_bytes)
    _require_disk(partial, shards, planned)
    for file, names in track(list(shards.items()), "merge"):
        if not (partial / file).is_file():
            write_shard(partial / file, {name: planned[name] for name in names})
    write_index(partial, shards, planned)
    write_json(partial / "config.json", config)
    processor = load_processor(base, revision=revision, instruct=instruct)
    save_processor(processor, partial)
    generation_config(processor.tokenizer).save_pretrained(partial)
    if card:
        (partial / "README.md").write_text(card, encoding="utf-8")
    comparison = compare(config, stored, read_checkpoint(partial), changes, track=track)
    record = {
        **(provenance or {}),
        "commit": commit(),
        "sources": {"base": base, "revision": revision, "adapter": str(adapter.resolve())},
        "made_of": made_of,
        "proof": asdict(comparison),
        "sha256": {"base": digests(folder, track), "merged": digests(partial, track)},
    }
    (partial / "made_of.json").unlink()
    write_json(partial / PROVENANCE, record)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return record


def verify(merged: Path, *, track: Track = silently) -> dict[str, Any]:
    """Repeat the proof of a merged folder: its files, its base and its adapter are those it was made of, and agree.

    Returns the comparison. Raises UserError: one of them is not there any more, or has changed.
    """
    record = read_json(merged / PROVENANCE)
    if record is None or "made_of" not in record:
        raise UserError(f"{merged}: expected a merged model with its {PROVENANCE}, found none")
    sources, made_of = record["sources"], record["made_of"]
    adapter = Path(sources["adapter"])
    if digests(merged, track) != record["sha256"]["merged"]:
        raise UserError(f"{merged}: its weights have changed since they were merged")
    folder = base_folder(sources["base"], sources["revision"])
    stored = read_checkpoint(folder)
    if identity(stored) != made_of["base"]:
        raise UserError(f"{folder}: is not the base that {merged} was made of")
    if not adapter.is_dir() or digests(adapter) != made_of["adapter"]:
        raise UserError(f"{adapter}: the adapter that {merged} was made of is gone, or has changed")
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    return asdict(compare(config, stored, read_checkpoint(merged), Adapter.read(adapter), track=track))


def compare(
    config: Mapping[str, Any],
    base: Mapping[str, Stored],
    merged: Mapping[str, Stored],
    adapter: Adapter,
    *,
    track: Track = silently,
) -> Comparison:
    """Tensor by tensor and block by block. Raises UserError for a tensor that is not what it should be."""
    tensors = {name: compare_tensor(name, base, merged, adapter) for name in track(list(merged), "compare")}
    for name, difference in tensors.items():
        if difference.relative > TOLERATED_STEPS * torch.finfo(merged[name].dtype).eps:
            raise UserError(f"{name}: merged differs by {difference.largest:.3g} from base + adapter")
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


def _partial_folder(out: Path, made_of: Mapping[str, Any]) -> Path:
    """Where the merge is written until it is complete; what an interrupted one of the same left there is kept."""
    partial = out.with_name(f".{out.name}.partial")
    if read_json(partial / "made_of.json") != made_of:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(partial / "made_of.json", made_of)
    return partial


def _require_disk(folder: Path, shards: Mapping[str, list[str]], planned: Mapping[str, Planned]) -> None:
    left = [name for file, names in shards.items() if not (folder / file).is_file() for name in names]
    missing = sum(planned[name].nbytes for name in left)
    free = shutil.disk_usage(folder).free
    if missing + SPARE_BYTES > free:
        raise UserError(
            f"{folder.parent}: {free / 1e9:.1f} GB are free, and the merged model needs {missing / 1e9:.1f} GB more"
        )


def digests(folder: Path, track: Track = silently) -> dict[str, str]:
    """SHA-256 of each weight file."""
    digests = {}
    for path in track(sorted(folder.glob("*.safetensors")), "hash"):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _plan(
    base: Mapping[str, Stored], adapter: Adapter, config: Mapping[str, Any], dtype: torch.dtype | None
) -> dict[str, Planned]:
    """Stock name -> tensor of the merged model, in the order of the base's files."""
    expected = tensor_shapes(config)
    if missing := sorted(expected.keys() - base.keys()):
        raise UserError(f"the base lacks {len(missing)} tensors of its own config: {missing[:3]}")
    if strange := sorted(base.keys() - expected.keys()):
        raise UserError(f"{base[strange[0]].file}: {strange[0]} is no tensor of IDEFICS")
    adapter.require_home(expected)
    return {
        name: _planned(name, stored, adapter, dtype or stored.dtype, expected[name], base, config)
        for name, stored in base.items()
    }


def _planned(
    name: str,
    stored: Stored,
    adapter: Adapter,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    base: Mapping[str, Stored],
    config: Mapping[str, Any],
) -> Planned:
    if name in adapter.replaced:
        return Planned(dtype, shape, lambda: [adapter.replaced[name].to(dtype)])
    if name in adapter.lora:
        return Planned(dtype, shape, lambda: adapter.merged_blocks(name, stored, dtype))
    if stored.shape[:1] != shape[:1]:  # `<end_of_utterance>` starts as `</s>`, in training as here
        owner, end = base[name.removesuffix(".weight").rpartition(".")[0] + ".weight"], config["eos_token_id"]
        return Planned(dtype, shape, lambda: [stored.rows().to(dtype), owner.rows(end, end + 1).to(dtype)])
    if dtype == stored.dtype:
        return Planned(dtype, shape, stored)
    return Planned(dtype, shape, lambda: _converted(stored, dtype))


def _converted(stored: Stored, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    if len(stored.shape) < 2:
        yield stored.rows().to(dtype)
        return
    count = max(1, BLOCK_ELEMENTS // max(1, stored.row_bytes // stored.dtype.itemsize))
    for start in range(0, stored.shape[0], count):
        yield stored.rows(start, start + count).to(dtype)


def _stored_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def base_folder(base: str, revision: str | None) -> Path:
    """The base's files on this machine; those of a hub id are where loading it left them."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model"]))
