"""base + adapter -> a standalone instruct checkpoint for plain transformers, one tensor at a time; and its proof.

Everything trained finds its home: LoRA is added to its matrix in fp32, gates and towers trained in full replace the
base's, the added tokens' rows bring the vocabulary to three. A tensor of the adapter that finds none is an error.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.data.collate import Batch
from finetune.data.dialogue import Dialogue
from finetune.generate import Assistant, generate
from modeling.adapters import PEFT_CONFIG, TRAINED_FILE
from modeling.errors import UserError
from modeling.forward import forward_arguments
from modeling.loading import generation_config, load_processor, save_processor
from modeling.shapes import read_config, tensor_shapes
from modeling.towers import EXACT_LORA, stock_name

SHARD_BYTES = 2 * 1024**3
"""Largest weight file; also the most memory the merge holds, besides the adapter and one tensor."""


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
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the merged model to `out`, which appears only when it is complete. Raises UserError.

    To `instruct`, a base gains `<end_of_utterance>`, as in training. `provenance` goes into provenance.json beside the
    weights, with the adapter's digest.
    """
    config = {**read_config(base, revision=revision), **_stored_config(base, revision)}
    if instruct:
        config["additional_vocab_size"] = 3
    files = _weight_files(base, revision)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_shards(_merged_tensors(files, Adapter.read(adapter), config), partial, shard_bytes)
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


@dataclass
class Adapter:
    """An adapter folder's tensors by stock name, taken out as they find their home."""

    lora: dict[str, dict[str, torch.Tensor]]
    """Stock weight name -> "lora_A", "lora_B" (, "lora_magnitude_vector") -> factor."""
    replaced: dict[str, torch.Tensor]
    """Stock name -> gates, added rows, towers trained in full."""
    config: LoraConfig | None

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        replaced = load_file(folder / TRAINED_FILE) if (folder / TRAINED_FILE).is_file() else {}
        if not (folder / PEFT_CONFIG).is_file():
            if not replaced:
                raise UserError(
                    f"{folder}: expected an adapter folder ({PEFT_CONFIG} or {TRAINED_FILE}), found neither"
                )
            return cls({}, replaced, None)
        config = LoraConfig.from_pretrained(str(folder))
        for key, values in EXACT_LORA.items():
            if getattr(config, key) not in values:
                raise UserError(f"{folder}: cannot be merged exactly: {key} is {getattr(config, key)!r}")
        lora: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_peft_weights(str(folder), device="cpu").items():
            home, mark, rest = name.partition(".lora_")
            if mark:
                lora.setdefault(f"{stock_name(home)}.weight", {})[f"lora_{rest}".removesuffix(".weight")] = tensor
            else:
                replaced[stock_name(name)] = tensor
        return cls(lora, replaced, config)

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The tensor `name` of the merged model, in the dtype of the base's `weight`."""
        if name in self.replaced:
            return self.replaced.pop(name).to(weight.dtype)
        if name not in self.lora:
            return weight
        factors, merged = self.lora.pop(name), weight.float()
        merged = merged + self._scaling(name, factors) * (factors["lora_B"].float() @ factors["lora_A"].float())
        if "lora_magnitude_vector" in factors:  # DoRA, Liu et al. 2024: the direction is what LoRA changes
            merged *= (factors["lora_magnitude_vector"].float() / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)

    def _scaling(self, name: str, factors: dict[str, torch.Tensor]) -> float:
        assert self.config is not None
        module, rank = name.removesuffix(".weight"), factors["lora_A"].shape[0]
        alpha = self.config.alpha_pattern.get(
            get_pattern_key(self.config.alpha_pattern.keys(), module), self.config.lora_alpha
        )
        return float(alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    def require_empty(self) -> None:
        left = [*self.lora, *self.replaced]
        if left:
            raise UserError(f"{len(left)} tensors of the adapter have no place in the base: {left[:3]}")


def _merged_tensors(
    files: dict[str, Path], adapter: Adapter, config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(stock name, tensor) of the merged model, in the order of the base's files."""
    expected = tensor_shapes(config)
    if missing := sorted(expected.keys() - files.keys()):
        raise UserError(f"the base lacks {len(missing)} tensors of its own config: {missing[:3]}")
    for path in dict.fromkeys(files.values()):
        with safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                if name not in expected:
                    raise UserError(f"{path}: {name} is no tensor of IDEFICS")
                weight = tensors.get_tensor(name)
                if len(weight) < expected[name][0] and name not in adapter.replaced:
                    weight = torch.cat([weight, _end_row(name, files, config)])
                yield name, adapter.apply(name, weight)
    adapter.require_empty()


def _end_row(name: str, files: dict[str, Path], config: dict[str, Any]) -> torch.Tensor:
    """[1, hidden]: the row of `</s>`, from which a base's `<end_of_utterance>` starts."""
    owner = name.removesuffix(".weight").rpartition(".")[0] + ".weight"
    with safe_open(files[owner], framework="pt") as tensors:
        end = config["eos_token_id"]
        return tensors.get_slice(owner)[end : end + 1]


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int) -> None:
    """Weight files of at most `shard_bytes` (or one tensor), and the index where there are several."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal pending, size
        if pending:
            save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(pending))
            pending, size = {}, 0

    for name, tensor in tensors:
        if size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    names = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for number, name in enumerate(names):
        (folder / f"shard-{number}").rename(folder / name)
        (folder / name).chmod(0o644)  # safetensors writes files that nobody else may read
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stored_config(base: str, revision: str | None) -> dict[str, Any]:
    return json.loads((_folder(base, revision) / "config.json").read_text(encoding="utf-8"))


def _weight_files(base: str, revision: str | None) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it."""
    folder = _folder(base, revision)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise UserError(f"{base}: expected safetensors weights (model.safetensors, or its index), found none")
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


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
