"""Compare a merged model with base + adapter: files by hashes, weights by `modeling.merge_parity`, and answers."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.console import Track, silently
from finetune.data.collate import Batch
from finetune.data.conversation import Dialogue
from finetune.evaluation.generate import Assistant, generate
from modeling.adapter_files import ADAPTER_FILES
from modeling.adapter_weights import AdapterWeights, BasePrecision, weights_of
from modeling.atomic_files import digests, is_text, read_json
from modeling.config import read_config
from modeling.device import copy_batch
from modeling.errors import UserError
from modeling.loading import open_base
from modeling.merge_parity import changed_blocks, compare_block, compare_tensor
from modeling.packed_forward import forward_arguments
from modeling.safetensors_io import Rows, Stored, read_checkpoint, require_shapes
from modeling.shapes import Config, tensor_shapes
from modeling.towers import is_computed

PROVENANCE = "provenance.json"
"""The file of a merged folder that records base, adapter, hashes and parity."""

NOT_HASHED = (PROVENANCE, "README.md")
"""Files of a merged folder that are not hashed, besides hidden ones: users may edit the model card."""


@dataclass(frozen=True)
class Comparison:
    """Parity of merged weights with base + adapter, by `modeling.merge_parity`."""

    tensors: int
    largest_tensor_difference: float
    """Largest difference from the formula in fp64, divided by the rounding error of the merged dtype: at most 1 if the
    merge is correct."""
    worst_tensor: str
    blocks: int
    largest_block_difference: float
    """Largest difference of a block's outputs for the same input, divided by its largest output."""
    worst_block: str | None
    """Module path of the block with the largest difference; None if no block has LoRA."""
    tensor_differences: dict[str, float]
    """Tensor name -> difference, for tensors that differ."""
    block_differences: dict[str, float]


def verify(merged: Path, *, track: Track = silently) -> dict[str, Any]:
    """Verify a merged folder again: files, base and adapter are unchanged, and the weights agree.

    Return its parity. Raises UserError: a file is missing, or has changed.
    """
    made = _read_provenance(merged)
    if changed := _changes(made.merged, folder_digests(merged, track)):
        raise UserError(f"{merged}: has changed since it was merged: {', '.join(changed[:5])}")
    adapter = made.adapter
    present = [adapter / name for name in ADAPTER_FILES if (adapter / name).is_file()]
    if digests(present) != made.adapter_files:
        raise UserError(f"{adapter}: the adapter that {merged} was made of is gone, or has changed")
    folder, base_config = open_base(made.base, revision=made.revision)
    if weight_digests(folder, track) != made.base_files:
        raise UserError(f"{folder}: is not the base that {merged} was made of")
    stored = {name: one for name, one in read_checkpoint(folder).items() if not is_computed(name)}
    weights, tensors = weights_of(stored, base_config, made.base_precision), read_checkpoint(merged)
    config, changes = read_config(str(merged)), AdapterWeights.read(adapter)
    for place, found, expected in ((folder, stored, base_config), (merged, tensors, config)):
        require_shapes(place, found, tensor_shapes(expected))
    changes.require_fit(tensor_shapes(config))
    comparison = compare(config, weights, tensors, changes, track=track)
    require_rounding(comparison, tensors)
    return asdict(comparison)


@dataclass(frozen=True)
class _Made:
    """The values of a provenance.json that `verify` reads."""

    base: str
    revision: str | None
    adapter: Path
    adapter_files: dict[str, str]
    base_precision: BasePrecision
    base_files: dict[str, str]
    merged: dict[str, str]


def _read_provenance(merged: Path) -> _Made:
    """Read provenance.json, every value checked: the folder may come from anywhere. Raises UserError."""
    path = merged / PROVENANCE
    record = read_json(path, repair="merge again")
    if record is None:
        raise UserError(f"{merged}: expected a merged model with its {PROVENANCE}, found none")

    def value(*keys: str, is_right: Callable[[Any], bool]) -> Any:
        found: Any = record
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if not is_right(found):
            raise UserError(f"{path}: {'.'.join(keys)}: unexpected {repr(found)[:80]}; merge again")
        return found

    return _Made(
        base=value("sources", "base", is_right=is_text),
        revision=value("sources", "revision", is_right=lambda found: found is None or is_text(found)),
        adapter=Path(value("sources", "adapter", is_right=is_text)),
        adapter_files=value("made_of", "adapter", is_right=lambda found: _are_hashes(found, ADAPTER_FILES)),
        base_precision=value("made_of", "base_precision", is_right=lambda found: found in ("full", "nf4")),
        base_files=value("sha256", "base", is_right=_are_hashes),
        merged=value("sha256", "merged", is_right=_are_hashes),
    )


def _are_hashes(value: Any, names: Collection[str] | None = None) -> bool:
    return isinstance(value, dict) and all(
        isinstance(digest, str) and (names is None or name in names) for name, digest in value.items()
    )


def _changes(expected: Mapping[str, str], got: Mapping[str, str]) -> list[str]:
    """Return a description of each change; weights come last, because there are many."""
    found = [(name, "is gone") for name in expected.keys() - got.keys()]
    found += [(name, "is new") for name in got.keys() - expected.keys()]
    found += [(name, "is another") for name in expected.keys() & got.keys() if expected[name] != got[name]]
    return [f"{name} {what}" for name, what in sorted(found, key=lambda one: (one[0].endswith(".safetensors"), one))]


def compare(
    config: Config,
    base: Mapping[str, Rows],
    merged: Mapping[str, Stored],
    adapter: AdapterWeights,
    *,
    track: Track = silently,
) -> Comparison:
    """Compare tensor by tensor and block by block; `config` is that of the merged model."""
    tensors = {name: compare_tensor(name, config, base, merged, adapter) for name in track(list(merged), "compare")}
    blocks = {
        block: compare_block(block, config, base, merged, adapter)
        for block in track(changed_blocks(adapter), "run blocks")
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
    """Raise UserError if a tensor is not base + adapter, or a block's outputs are not finite."""
    for name, difference in comparison.tensor_differences.items():
        if not difference <= 1:
            raise UserError(
                f"{merged[name].file}: {name} is {difference:.3g} times as far from base + adapter as rounding "
                f"explains; delete the file, and merge again"
            )
    for block, difference in comparison.block_differences.items():
        if not math.isfinite(difference):
            raise UserError(f"{block}: its outputs are not numbers: the base or the adapter holds infinite values")


def folder_digests(folder: Path, track: Track = silently) -> dict[str, str]:
    """Return path -> SHA-256 of each file of a merged folder, except NOT_HASHED."""
    found = {}
    for path in track(sorted(folder.rglob("*")), "hash"):
        name = path.relative_to(folder).as_posix()
        if name in NOT_HASHED or name.startswith(".") or path.is_dir():
            continue
        found[name] = digests([path])[path.name]
    return found


def weight_digests(folder: Path, track: Track = silently) -> dict[str, str]:
    """Return the SHA-256 of each weight file of a model."""
    return digests(track(sorted(folder.glob("*.safetensors")), "hash"))


@dataclass(frozen=True)
class AnswerParity:
    """Comparison of the merged model with base + adapter on the same prompts; differences of logits are absolute."""

    tokens: int
    """Number of tokens whose logits were compared."""
    largest_difference: float
    """Largest difference between base + adapter and merged: only rounding, in fp32."""
    largest_difference_to_base: float
    """Largest difference between base and merged: the effect of training."""
    answers: int
    same_answers: int
    """Number of equal greedy answers."""


def compare_answers(
    *,
    base: Callable[[], Assistant],
    tuned: Callable[[], Assistant],
    merged: Callable[[], Assistant],
    batches: Sequence[Batch],
    prompts: Sequence[Dialogue],
    max_new_tokens: int = 32,
) -> AnswerParity:
    """Compare logits on `batches` and greedy answers to `prompts`; one model at a time is in memory."""

    def observe(make: Callable[[], Assistant]) -> tuple[list[torch.Tensor], list[str]]:
        assistant = make()
        answers = generate(assistant, prompts, max_new_tokens=max_new_tokens)
        return _logits(assistant, batches), [answer.text for answer in answers]

    before, _ = observe(base)
    expected, asked = observe(tuned)
    got, answered = observe(merged)
    return AnswerParity(
        tokens=sum(len(logits) for logits in got),
        largest_difference=_largest_difference(got, expected),
        largest_difference_to_base=_largest_difference(got, before),
        answers=len(answered),
        same_answers=sum(one == other for one, other in zip(asked, answered, strict=True)),
    )


@torch.no_grad()
def _logits(assistant: Assistant, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Return the logits of every batch: fp32 [T, V + added], on the CPU."""
    device, config = assistant.idefics.device, assistant.idefics.config
    logits = []
    for batch in batches:
        arguments = forward_arguments(copy_batch(batch, device), config)
        logits.append(assistant.model.eval()(**arguments).logits[0].float().cpu())
    return logits


def _largest_difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
