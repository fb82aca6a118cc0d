"""Merge base + adapter, a few rows at a time, into a standalone checkpoint for plain transformers, and verify it.

LoRA is added to its matrix in fp32; gates and towers trained in full replace the base's; a base's two added tokens
become three. A tensor of the adapter that does not fit the base is an error.

    OUT/  *.safetensors (and index) · config.json · tokenizer, processor and generation files · README.md
          provenance.json: what it was made of, hashes, and its parity with base + adapter
"""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import IdeficsProcessor

from finetune.console import Track, silently
from finetune.distributed.environment import commit
from finetune.distributed.lock import locked
from finetune.export.verify import PROVENANCE, compare, folder_digests, require_rounding, weight_digests
from modeling.adapter_files import ADAPTER_FILES
from modeling.adapter_weights import AdapterWeights, BasePrecision, weights_of
from modeling.atomic_files import digests, flush, read_json, write_json
from modeling.errors import UserError
from modeling.loading import generation_config, load_processor, open_base, require_agreement, save_processor
from modeling.safetensors_io import (
    Planned,
    Rows,
    fingerprint,
    plan_shards,
    read_checkpoint,
    read_header,
    require_shapes,
    write_index,
    write_shard,
)
from modeling.shapes import Config, tensor_shapes
from modeling.towers import is_computed

SHARD_BYTES = 5 * 10**9
"""Largest size of a weight file, in bytes."""

MADE_OF = "made_of.json"
"""Name of the file, beside weights that are still being written, that records base, adapter and settings."""

SPARE_BYTES = 200_000_000
"""Bytes of disk that must stay free beside the weights."""


def merge(
    adapter: Path,
    base: str,
    out: Path,
    *,
    revision: str | None = None,
    instruct: bool = True,
    base_fingerprint: str | None = None,
    base_precision: BasePrecision = "full",
    trained_on: BasePrecision = "full",
    may_replace: Collection[Path] = (),
    provenance: Mapping[str, Any] | None = None,
    card: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    track: Track = silently,
) -> dict[str, Any]:
    """Write the merged model to `out`, which appears only when it is complete and verified; return provenance.json.

    adapter, base: an adapter folder, and the folder or hub id (`revision`) of its base. `instruct`: add
    `<end_of_utterance>` to a base, as in training. `base_fingerprint`: fingerprint of the weights that the adapter was
    trained on, to detect another base of the same shapes.

    `base_precision`: nf4 merges into the dequantised 4-bit matrices, as 4-bit training saw them. If the adapter was
    `trained_on` another precision, the difference to base + adapter in that precision is reported, too.

    `may_replace`: files in `out` from an earlier merge. `provenance`: further entries of provenance.json. `card`: text
    of the model's README.md. `dtype`: dtype of the merged weights; None: the base's.

    Memory holds the adapter and a few blocks of one matrix. After an interruption, the same call continues with the
    first incomplete shard. Raises UserError: another base, not enough disk, something else in `out`.
    """
    out = out.resolve()
    folder, base_config = open_base(base, revision=revision)
    for place, what in ((folder, "base"), (adapter, "adapter")):
        if out == place.resolve():
            raise UserError(f"{out}: is the {what} itself, which a merge leaves as it is; name another folder: --out")
    stored, changes = read_checkpoint(folder), AdapterWeights.read(adapter)
    instruct = instruct or changes.added_tokens == 3
    config = _merged_config(base_config, instruct, dtype)
    made_of = {
        "base": fingerprint(stored),
        "adapter": digests(adapter / name for name in ADAPTER_FILES if (adapter / name).is_file()),
        "instruct": instruct,
        "base_precision": base_precision,
        "dtype": str(dtype) if dtype else None,
        "shard_bytes": shard_bytes,
    }
    left_out = sorted(filter(is_computed, stored))
    stored = {name: one for name, one in stored.items() if not is_computed(name)}
    expected = tensor_shapes(base_config)
    require_shapes(folder, stored, expected)
    if strange := sorted(stored.keys() - expected.keys()):
        raise UserError(f"{stored[strange[0]].file}: {strange[0]} is no tensor of IDEFICS")
    shapes = tensor_shapes(config)
    changes.require_fit(shapes)
    if base_fingerprint and base_fingerprint != made_of["base"]:
        raise UserError(f"{adapter}: was trained on other weights than those of {base}: same shapes, other content")
    weights = weights_of(stored, base_config, base_precision)
    if full := sorted(name for name in changes.replaced if weights[name] is not stored[name]):
        raise UserError(
            f"--base-precision {base_precision}: {full[0]} was trained in full, which no 4-bit training does; "
            f"use --base-precision full"
        )
    planned = {
        name: _planned(name, shapes[name], changes, dtype or stored[name].dtype, weights, config) for name in weights
    }
    processor = load_processor(base, revision=revision, instruct=instruct)
    require_agreement(config, processor, where=base)
    _make_parent(out)
    with locked(out.with_name(f".{out.name}.lock"), what=f"{out}", instead="--out FOLDER"):
        if record := _done(out, made_of, may_replace) or _complete(out, made_of):
            return record
        partial = _write_weights(out, made_of, planned, plan_shards(planned, shard_bytes), track)
        _write_rest(partial, config, processor, card)
        merged = read_checkpoint(partial)
        parity = compare(config, weights, merged, changes, track=track)
        require_rounding(parity, merged)
        others: set[BasePrecision] = {trained_on, "full"} - {base_precision}
        bases = {other: weights_of(stored, base_config, other) for other in others}
        against = {other: asdict(compare(config, bases[other], merged, changes, track=track)) for other in others}
        merged_files = folder_digests(partial, track)
        del merged_files[MADE_OF]
        record = {
            **(provenance or {}),
            "commit": commit(),
            "sources": {
                "base": str(folder.resolve()) if Path(base).is_dir() else base,
                "revision": revision,
                "adapter": str(adapter.resolve()),
            },
            "made_of": made_of,
            "left_out": left_out,
            "parity": asdict(parity),
            "against": against,
            "sha256": {"base": weight_digests(folder, track), "merged": merged_files},
            "files": {path.name: path.stat().st_size for path in _files_in(partial)},
        }
        for path in _files_in(partial):
            flush(path)
        write_json(partial / PROVENANCE, record)
        _put_in_place(out)
        return record


def _make_parent(out: Path) -> None:
    """Make the parent folder of `out`. Raises UserError: it cannot be made, or the name is not valid UTF-8."""
    try:
        str(out).encode()  # tokenizers and safetensors accept only UTF-8 names
        out.parent.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError as error:
        raise UserError(f"{out}: the name is not UTF-8, and a model cannot be written there; choose --out") from error
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror} ({error.filename})") from error


def _merged_config(base_config: Config, instruct: bool, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return config.json of the merged model, whose `dtype` is the one that transformers loads weights in."""
    config = {**base_config, "architectures": ["IdeficsForVisionText2Text"]}
    if instruct:
        config["additional_vocab_size"] = 3
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def _done(out: Path, made_of: Mapping[str, Any], may_replace: Collection[Path]) -> dict[str, Any] | None:
    """Return provenance.json if the same merge was done before, or None if `out` is free.

    If files of the same merge are missing or truncated, the others are reused by the new merge. Raises UserError:
    something else is in `out`.
    """
    if out.is_mount():
        raise UserError(f"{out}: is a mount point, and is to appear as a whole; name a folder inside it")
    occupied = UserError(f"{out}: is not empty, and not the result of this merge; choose another folder, or delete it")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not out.is_dir():
        raise occupied
    record = _record_of(out)
    if record and record["made_of"] == made_of and _is_whole(out, record):
        return record
    if (record or {}).get("made_of") == made_of or _read(out / MADE_OF) == made_of:
        write_json(out / MADE_OF, made_of)
        (out / PROVENANCE).unlink(missing_ok=True)
        shutil.rmtree(_partial(out), ignore_errors=True)
        out.rename(_partial(out))
        return None
    for path in may_replace:
        path.unlink(missing_ok=True)
    if any(out.iterdir()):
        raise occupied
    return None


def _complete(out: Path, made_of: Mapping[str, Any]) -> dict[str, Any] | None:
    """Finish the same merge if only its renaming is missing, and return its provenance.json; else return None."""
    record = _record_of(_partial(out))
    if record is None or record["made_of"] != made_of or not _is_whole(_partial(out), record):
        return None
    _put_in_place(out)
    return record


def _put_in_place(out: Path) -> None:
    (_partial(out) / MADE_OF).unlink(missing_ok=True)
    flush(_partial(out))
    if out.exists():
        out.rmdir()
    _partial(out).rename(out)
    flush(out.parent)


def _partial(out: Path) -> Path:
    """Return the hidden folder beside `out` in which the merged model is written."""
    return out.with_name(f".{out.name}.partial")


def _record_of(folder: Path) -> dict[str, Any] | None:
    """Return provenance.json, or None if there is none with the merge's inputs."""
    record = _read(folder / PROVENANCE)
    return record if record and isinstance(record.get("made_of"), dict) else None


def _read(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if it cannot be read."""
    try:
        return read_json(path)
    except UserError:
        return None


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in (MADE_OF, PROVENANCE))


def _is_whole(folder: Path, record: Mapping[str, Any]) -> bool:
    """Return whether every file exists with its recorded size."""
    files = record.get("files")
    there = {path.name: path.stat().st_size for path in _files_in(folder)}
    return isinstance(files, dict) and files.items() <= there.items()


def _planned(
    name: str,
    shape: tuple[int, ...],
    adapter: AdapterWeights,
    dtype: torch.dtype,
    weights: Mapping[str, Rows],
    config: Config,
) -> Planned:
    """Plan a merged tensor, to be computed a few rows at a time."""
    base = weights[name]

    def rows(start: int, stop: int) -> torch.Tensor:
        if name in adapter.replaced:
            return adapter.replaced[name][start:stop]
        if name in adapter.lora:
            return adapter.merge_rows(name, base.rows(start, stop), start)
        if base.shape == shape:
            return base.rows(start, stop)
        # `<end_of_utterance>` starts as `</s>`, in training as here
        owner, end = weights[name.removesuffix(".weight").rpartition(".")[0] + ".weight"], config["eos_token_id"]
        return torch.cat([base.rows(), owner.rows(end, end + 1)])[start:stop]

    return Planned(dtype, shape, lambda start, stop: _rounded(name, rows(start, stop), dtype))


def _rounded(name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of the tensor `name` in another dtype. Raises UserError: a value too large for fp16."""
    converted = rows.to(dtype)
    if dtype == torch.float16 and not torch.equal(converted.isfinite(), rows.isfinite()):
        largest, most = float(rows.abs().max()), torch.finfo(dtype).max
        raise UserError(f"{name}: holds {largest:,.0f}, and fp16 ends at {most:,.0f}; merge with --dtype bf16 or fp32")
    return converted


def _write_weights(
    out: Path,
    made_of: Mapping[str, Any],
    planned: Mapping[str, Planned],
    shards: Mapping[str, list[str]],
    track: Track,
) -> Path:
    """Write all weights to the hidden folder, and return it; shards from an interrupted merge are kept."""
    partial = _partial(out)
    try:
        if partial.exists() and _read(partial / MADE_OF) != made_of:
            shutil.rmtree(partial)
        for path in partial.glob("*.safetensors"):
            try:
                read_header(path)
            except UserError:  # cut short
                path.unlink()
        left = [name for file, names in shards.items() if not (partial / file).is_file() for name in names]
        missing = sum(planned[name].nbytes for name in left)
        disk = next(place for place in (partial, *partial.parents) if place.exists())
        free = shutil.disk_usage(disk).free
        if missing + SPARE_BYTES > free:
            needed = f"the merged model needs {missing / 1e9:.1f} GB more"
            raise UserError(f"{disk}: {free / 1e9:.1f} GB are free, and {needed}")
        partial.mkdir(parents=True, exist_ok=True)
        write_json(partial / MADE_OF, made_of)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror} ({error.filename})") from error
    for file, names in track(list(shards.items()), "merge"):
        if not (partial / file).is_file():
            write_shard(partial / file, {name: planned[name] for name in names})
    write_index(partial, shards, planned)
    return partial


def _write_rest(folder: Path, config: Mapping[str, Any], processor: IdeficsProcessor, card: str | None) -> None:
    write_json(folder / "config.json", config)
    save_processor(processor, folder)
    generation_config(processor.tokenizer).save_pretrained(folder)
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")
