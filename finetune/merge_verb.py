"""`finetune merge FOLDER`: a run's adapter or any other -> a merged model, its card, and what was proved of it."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData

from finetune.folder import read_json
from finetune.merge import PROVENANCE, Onto, Origin, merge, verify
from finetune.progress import console, say, table, track
from modeling.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def merge_folder(
    what: Path,
    *,
    base: str | None,
    out: Path | None,
    onto: str | None,
    dtype: str | None,
    shard_size: str,
    show: bool,
) -> dict[str, Any]:
    """Merge a run folder's adapter, or an adapter folder, and return its provenance. Raises UserError."""
    run = what if (what / "recipe.yaml").is_file() else None
    adapter = what / "adapter" if run else what
    if not adapter.is_dir():
        raise UserError(f"{adapter}: no such adapter folder" + ("; first: finetune train" if run else ""))
    origin = Origin.of(adapter)
    out = out or (run or adapter.parent) / "merged"
    record = merge(
        adapter,
        base or origin.base,
        out,
        revision=None if base else origin.revision,
        instruct=origin.instruct,
        base_identity=origin.identity,
        onto=_onto(onto, origin),
        dtype=None if dtype is None else _choose("--dtype", dtype, DTYPES),
        shard_bytes=parse_size(shard_size),
        card=model_card(out.name, base or origin.base, run),
        track=track,
    )
    if show:
        _show(out, record)
    return record


def verify_folder(merged: Path, *, show: bool) -> dict[str, Any]:
    """Repeat the proof of a merged folder."""
    comparison = verify(merged, track=track)
    if show:
        _show(merged, {"proof": comparison})
    return comparison


def _onto(asked: str | None, origin: Origin) -> Onto:
    """As asked; else as training saw the base."""
    choices: dict[str, Onto] = {"full": "full", "nf4": "nf4"}
    if asked:
        return _choose("--onto", asked, choices)
    return "nf4" if origin.quantize == "nf4" else "full"


def _choose(option: str, got: str, choices: dict[str, Any]) -> Any:
    if got not in choices:
        raise UserError(f"{option}: expected {' or '.join(choices)}, got {got!r}")
    return choices[got]


def parse_size(text: str) -> int:
    """ "5GB" -> 5_000_000_000; "2GiB" -> 2_147_483_648. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in SIZES or not float(match[1]):
        raise UserError(f"--shard-size: expected a size such as 5GB or 2GiB, got {text!r}")
    return int(float(match[1]) * SIZES[match[2].upper()])


def model_card(name: str, base: str, run: Path | None) -> str:
    """README.md of the merged model: base, data and figures as far as the run folder knows them, and the licences."""
    header = ModelCardData(
        base_model=base if "/" in base and not Path(base).exists() else None,
        library_name="transformers",
        license="other",
        pipeline_tag="image-text-to-text",
        tags=["idefics", "instruction-tuning"],
    )
    data = (read_json(run / "data.json") if run else None) or {"sources": []}
    figures = (read_json(run / "evaluation.json") if run else None) or {}
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        f"IDEFICS, fine-tuned from `{base}`, with everything that was trained merged into its weights. `{PROVENANCE}` "
        "holds what it was made of, hashes, and the proof that it is base + adapter.",
    ]
    if data["sources"]:
        lines = [f"- `{source['source']}`: {source['examples']:,} examples" for source in data["sources"]]
        sections += ["## Data", "\n".join(lines)]
    if tuned := figures.get("tuned"):
        before = figures["base"]
        rows = [f"| {key} | {before[key]} | {value} |" for key, value in tuned.items() if value is not None]
        sections += ["## Held-out figures", "\n".join(["| | base | this model |", "| --- | --- | --- |", *rows])]
    if run:
        sections += ["## Recipe", f"```yaml\n{(run / 'recipe.yaml').read_text(encoding='utf-8')}```"]
    sections += [
        "## Licence",
        "The language model inside IDEFICS is LLaMA, whose weights are for non-commercial research; CLIP's weights, and "
        "those that IDEFICS added, are MIT. What was trained on has licences of its own. Merging lifts none of them.",
    ]
    return "\n\n".join(sections) + "\n"


def _show(out: Path, record: dict[str, Any]) -> None:
    proof = record["proof"]
    rows = [
        ("tensors compared with the formula, by sampled rows", proof["tensors"]),
        ("largest relative difference of one", proof["largest_tensor_difference"]),
        ("blocks run: base + adapter against merged", proof["blocks"]),
        ("largest relative difference of one", proof["largest_block_difference"]),
    ]
    console.print(table("the proof", ("", ""), rows))
    say(f"the model: {out} ({PROVENANCE} has every figure)")
