"""`finetune merge FOLDER`: a run's adapter or any other -> a merged model, its card, and what was proved of it."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

from finetune.console import display, parse_size, table, track
from finetune.distributed.lock import working_in
from finetune.distributed.writable import check_place
from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.merge import SHARD_BYTES, merge
from finetune.export.verify import PROVENANCE, verify
from finetune.run_dir import files_of
from modeling.adapter_weights import BasePrecision
from modeling.errors import UserError
from modeling.files import read_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASE_PRECISIONS: dict[str, BasePrecision] = {"full": "full", "nf4": "nf4"}


def merge_folder(
    what: Path,
    *,
    base: str | None,
    out: Path | None,
    base_precision: str | None,
    dtype: str | None,
    shard_size: str | None,
    show: bool,
) -> dict[str, Any]:
    """Merge a run folder's adapter, or an adapter folder, and return its provenance. Raises UserError."""
    run = what if (what / "recipe.yaml").is_file() else None
    adapter = what / "adapter" if run else what
    if not adapter.is_dir():
        raise UserError(f"{adapter}: no such adapter folder" + ("; first: finetune train" if run else ""))
    out = out or (run or adapter.parent) / "merged"
    check_place("--out", out, folder=True)
    in_a_run = (adapter.parent / "recipe.yaml").is_file()
    with working_in(adapter.parent) if in_a_run else nullcontext():  # whoever trains there writes the adapter, too
        metadata = AdapterMetadata.read(adapter, base)
        record = merge(
            adapter,
            base or metadata.base,
            out,
            revision=None if base else metadata.revision,
            instruct=metadata.instruct,
            base_fingerprint=metadata.fingerprint,
            base_precision=metadata.base_precision
            if base_precision is None
            else _choose("--base-precision", base_precision, BASE_PRECISIONS),
            trained_on=metadata.base_precision,
            may_replace=files_of(run, "merge") if run and out == run / "merged" else (),
            dtype=None if dtype is None else _choose("--dtype", dtype, DTYPES),
            shard_bytes=SHARD_BYTES if shard_size is None else parse_size("--shard-size", shard_size),
            card=model_card(base or metadata.base, out, run),
            track=track,
        )
    if show:
        _show(out, record)
    return record


def verify_folder(merged: Path, *, show: bool) -> dict[str, Any]:
    """Repeat the proof of a merged folder."""
    comparison = verify(merged, track=track)
    if show:
        _show(merged, {"parity": comparison})
    return comparison


def _choose(option: str, got: str, choices: dict[str, Any]) -> Any:
    if got not in choices:
        raise UserError(f"{option}: expected {' or '.join(choices)}, got {got!r}")
    return choices[got]


def model_card(base: str, out: Path, run: Path | None) -> str:
    """README.md of the merged model: base, data and figures as far as the run folder knows them, and the licences."""
    header = ModelCardData(
        base_model=None if Path(base).is_dir() else base,
        library_name="transformers",
        license="other",
        pipeline_tag="image-text-to-text",
        tags=["idefics", "instruction-tuning"],
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {_code((run or out).resolve().name)}",
        f"IDEFICS, fine-tuned from {_code(base)}, with everything that was trained merged into its weights. "
        f"{_code(PROVENANCE)} holds what it was made of, hashes, and the proof that it is base + adapter.",
    ]
    if run:
        sections += [*_described(run / "data.json", _data), *_described(run / "evaluation.json", _figures)]
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8", errors="backslashreplace")
        fence = _backticks(recipe, least=3)
        sections += ["## Recipe", f"{fence}yaml\n{recipe}{fence}"]
    sections += [
        "## Licence",
        "The language model inside IDEFICS is LLaMA, whose weights are for non-commercial research; CLIP's weights, "
        "and those that IDEFICS added, are MIT. What it was trained on has licences of its own. Merging lifts none.",
    ]
    return "\n\n".join(sections) + "\n"


def _described(path: Path, describe: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    """What the card says of a file of the run folder. Raises UserError where it is not as it was written."""
    repair = "delete it, and the card does without"
    values = read_json(path, repair=repair) or {}
    try:
        return describe(values)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: not as this toolkit writes it ({error!r:.100}); {repair}") from error


def _data(data: dict[str, Any]) -> list[str]:
    lines = [f"- {_code(source['source'])}: {source['examples']:,} examples" for source in data.get("sources", [])]
    return ["## Data", "\n".join(lines)] if lines else []


def _figures(figures: dict[str, Any]) -> list[str]:
    if not (tuned := figures.get("tuned")):
        return []
    before = figures["base"]
    rows = [f"| {key} | {before[key]} | {value} |" for key, value in tuned.items() if value is not None]
    return ["## Held-out figures", "\n".join(["| | base | this model |", "| --- | --- | --- |", *rows])]


def _code(text: str) -> str:
    """Inline code, whatever a file may be called."""
    fence, line = _backticks(text, least=1), " ".join(text.split())
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _backticks(text: str, *, least: int) -> str:
    """More of them than the text has in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _show(out: Path, record: dict[str, Any]) -> None:
    proof = record["parity"]
    rows = [
        ("tensors compared with the formula, by sampled rows", proof["tensors"]),
        ("largest difference of one, to what rounding explains", proof["largest_tensor_difference"]),
        ("blocks run: base + adapter against merged", proof["blocks"]),
        ("largest difference of one, to its largest output", proof["largest_block_difference"]),
        *(
            (f"the same, to base + adapter with the base as {base_precision}", other["largest_block_difference"])
            for base_precision, other in record.get("against", {}).items()
        ),
    ]
    display(table("the proof", ("", ""), rows))
    display(f"the model: {out} ({PROVENANCE} has every figure)")
