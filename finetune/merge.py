"""base + adapter -> a standalone instruct checkpoint for plain transformers, one tensor at a time; and its proof.

Everything trained finds its home: LoRA is added to its matrix in fp32, gates and towers trained in full replace the
base's, the added tokens' rows bring the vocabulary to three. A tensor of the adapter that finds none is an error.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.data.collate import Batch
from finetune.data.dialogue import Dialogue
from finetune.data.tracking import Track, silently
from finetune.generate import Assistant, generate
from modeling.checkpoint import Planned, Stored, plan_shards, read_checkpoint, write_index, write_shard
from modeling.deltas import BLOCK_ELEMENTS, Adapter
from modeling.errors import UserError
from modeling.forward import forward_arguments
from modeling.loading import generation_config, load_processor, save_processor
from modeling.shapes import read_config, tensor_shapes

SHARD_BYTES = 5 * 10**9
"""Largest weight file."""


@dataclass(frozen=True)
class Proof:
    """base + adapter against the merged model, on rows of real dialogues."""

    tokens: int
    """Tokens compared."""
    largest_difference: float
    """Largest absolute difference between their logits; rounding alone in fp32."""
    largest_difference_to_base: float
    """The same between base and merged: what the training did."""
    answers: int
    same_answers: int
    """Of `answers` greedy answers, how many are equal."""


def merge(
    adapter: Path,
    base: str,
    out: Path,
    *,
    revision: str | None = None,
    instruct: bool = True,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    track: Track = silently,
) -> None:
    """Write the merged model to `out`, which appears only when it is complete. Raises UserError.

    To `instruct`, a base gains `<end_of_utterance>`, as in training. `provenance` goes into provenance.json beside the
    weights, with the adapter's digest. `dtype`: of the merged weights, as the base's if None. In memory are the adapter
    and a few blocks of one matrix.
    """
    config = {**read_config(base, revision=revision), **_stored_config(base, revision)}
    if instruct:
        config["additional_vocab_size"] = 3
    planned = _plan(read_checkpoint(_folder(base, revision)), Adapter.read(adapter), config, dtype)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards = plan_shards(planned, shard_bytes)
    for file, names in track(list(shards.items()), "merge"):
        write_shard(partial / file, {name: planned[name] for name in names})
    write_index(partial, shards, planned)
    config["architectures"] = ["IdeficsForVisionText2Text"]
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor = load_processor(base, revision=revision, instruct=instruct)
    save_processor(processor, partial)
    generation_config(processor.tokenizer).save_pretrained(partial)
    record = {**(provenance or {}), "adapter_sha256": _digest(adapter)}
    (partial / "provenance.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


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


def _stored_config(base: str, revision: str | None) -> dict[str, Any]:
    return json.loads((_folder(base, revision) / "config.json").read_text(encoding="utf-8"))


def _folder(base: str, revision: str | None) -> Path:
    """The base's files on this machine; those of a hub id are where loading it left them."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model"]))


def prove(
    *,
    base: Callable[[], Assistant],
    tuned: Callable[[], Assistant],
    merged: Callable[[], Assistant],
    batches: Sequence[Batch],
    prompts: Sequence[Dialogue],
    max_new_tokens: int = 32,
) -> Proof:
    """Compare logits on `batches` and greedy answers to `prompts`; one model at a time is in memory."""

    def observe(make: Callable[[], Assistant]) -> tuple[list[torch.Tensor], list[str]]:
        assistant = make()
        answers = generate(assistant, prompts, max_new_tokens=max_new_tokens)
        return _logits(assistant, batches), [answer.text for answer in answers]

    before, _ = observe(base)
    expected, asked = observe(tuned)
    got, answered = observe(merged)
    return Proof(
        tokens=sum(len(logits) for logits in got),
        largest_difference=_largest_difference(got, expected),
        largest_difference_to_base=_largest_difference(got, before),
        answers=len(answered),
        same_answers=sum(one == other for one, other in zip(asked, answered, strict=True)),
    )


@torch.no_grad()
def _logits(assistant: Assistant, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """fp32 [T, V + added] of every batch, on the CPU."""
    device, config = assistant.idefics.device, assistant.idefics.config
    logits = []
    for batch in batches:
        moved = {name: tensor.to(device) for name, tensor in batch.items()}  # type: ignore[attr-defined]
        logits.append(assistant.model.eval()(**forward_arguments(moved, config)).logits[0].float().cpu())
    return logits


def _largest_difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
