"""`finetune merge FOLDER`: merge the adapter of a run, or any adapter, verify the model, and write its card."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from finetune.console import display, parse_size, table, track
from finetune.distributed.lock import working_in
from finetune.distributed.writable import check_place
from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.cards import model_card
from finetune.export.merge import SHARD_BYTES, merge
from finetune.export.verify import PROVENANCE, verify
from finetune.run_dir import files_of
from modeling.adapter_weights import BasePrecision
from modeling.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge_folder(
    what: Path,
    *,
    base: str | None = None,
    out: Path | None = None,
    base_precision: BasePrecision | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    shard_size: str | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Merge the adapter of a run folder, or an adapter folder, and return provenance.json. Raises UserError.

    `base`: the base, if the adapter's files do not name it; `out`: default is the folder merged/ beside the adapter;
    `shard_size`: size of the largest weight file, such as "5GB"; `show`: also print the parity.
    """
    run = what if (what / "recipe.yaml").is_file() else None
    adapter = what / "adapter" if run else what
    if not adapter.is_dir():
        raise UserError(f"{adapter}: no such adapter folder" + ("; first: finetune train" if run else ""))
    out = out or (run or adapter.parent) / "merged"
    check_place("--out", out, folder=True)
    in_a_run = (adapter.parent / "recipe.yaml").is_file()
    # A training run in this folder would overwrite the adapter.
    with working_in(adapter.parent) if in_a_run else nullcontext():
        metadata = AdapterMetadata.read(adapter, base)
        record = merge(
            adapter,
            base or metadata.base,
            out,
            revision=None if base else metadata.revision,
            instruct=metadata.instruct,
            base_fingerprint=metadata.fingerprint,
            base_precision=base_precision or metadata.base_precision,
            trained_on=metadata.base_precision,
            may_replace=files_of(run, "merge") if run and out == run / "merged" else (),
            dtype=None if dtype is None else DTYPES[dtype],
            shard_bytes=SHARD_BYTES if shard_size is None else parse_size("--shard-size", shard_size),
            card=model_card(base or metadata.base, out, run),
            track=track,
        )
    if show:
        _show(out, record)
    return record


def verify_folder(merged: Path, *, show: bool) -> dict[str, Any]:
    """Verify a merged folder again, and return its parity. Raises UserError."""
    comparison = verify(merged, track=track)
    if show:
        _show(merged, {"parity": comparison})
    return comparison


def _show(out: Path, record: dict[str, Any]) -> None:
    parity = record["parity"]
    rows = [
        ("tensors compared with base + adapter, by sampled rows", parity["tensors"]),
        ("largest difference of a tensor / what rounding explains", parity["largest_tensor_difference"]),
        ("blocks run, merged and as base + adapter", parity["blocks"]),
        ("largest difference of a block / its largest output", parity["largest_block_difference"]),
        *(
            (f"that of a block, with the base in {_PRECISIONS[other]}", found["largest_block_difference"])
            for other, found in record.get("against", {}).items()
        ),
    ]
    display(table("parity with base + adapter", ("", ""), rows))
    display(f"the model: {out} ({PROVENANCE} has every figure)")


_PRECISIONS = {"full": "full precision", "nf4": "NF4"}
