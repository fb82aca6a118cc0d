"""Whether several processes train as one does: one, two and four, DDP and FSDP2, over gloo.

    python scripts/benchmarks/equivalence.py --steps 25

A small IDEFICS, its resampler trained in full, on drawn shapes and on text alone. Each layout is trained from the
weights that one process had at every step, to compare losses and gradients; and by itself, to compare adapters.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from processes import run_processes
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

import finetune.training.trainer
from finetune.data.collate import RowCollator, Rows
from finetune.distributed import collectives
from finetune.recipe.schema import Training
from finetune.training.trainer import IdeficsTrainer
from modeling.adapters import attach, whole

LAYOUTS = ((2, "ddp"), (4, "ddp"), (2, "fsdp2"), (4, "fsdp2"))
"""(processes, training.parallel)."""

PACKS = 4
"""A step: one row on each of four processes, two on each of two, four after each other on one."""

SGD_RATE, ADAMW_RATE = 0.05, 1e-3


class Recorder(TrainerCallback):
    """Writes weights and gradients of each step; or, with `given`, begins each step with those weights."""

    def __init__(self, folder: Path, given: Path | None):
        self.folder, self.given = folder, given

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        parameters = _trained(model)
        if self.given:
            weights = load_file(self.given / f"weights-{state.global_step}.safetensors")
            for name, parameter in parameters.items():
                _put(parameter.data, weights[name])
        else:
            self._save("weights", state, {name: whole(parameter) for name, parameter in parameters.items()})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = {name: whole(one.grad) for name, one in _trained(model).items() if one.grad is not None}
        self._save("gradients", state, gradients)

    def _save(self, what: str, state: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        if collectives.is_main():
            save_file({name: one.clone() for name, one in tensors.items()}, self._path(what, state.global_step))

    def _path(self, what: str, step: int) -> Path:
        return self.folder / f"{what}-{step}.safetensors"


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def _put(place: torch.Tensor, tensor: torch.Tensor) -> None:
    divided = distribute_tensor(tensor, place.device_mesh, place.placements) if isinstance(place, DTensor) else tensor
    place.copy_(divided)


class OnGpus(IdeficsTrainer):
    """On a CPU accelerate passes over FSDP without a word, unless it believes in GPUs; FSDP2 itself runs over gloo."""

    def __init__(self, **kwargs: Any):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(**kwargs)


class Sgd(IdeficsTrainer):
    """AdamW turns rounding of near-zero gradients into steps of full size; SGD keeps it rounding."""

    def create_optimizer(self, model: Any = None) -> Any:
        parameters = [one for one in (model or self.model).parameters() if one.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=SGD_RATE)
        return self.optimizer


def train(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    rows: Rows,
    *,
    kind: str = "ddp",
    sgd: bool = True,
    given: Path | None = None,
    record: bool = True,
    held: RowCollator | None = None,
    every: int = 10**6,
    resume_from: Path | None = None,
) -> tuple[int, str, int]:
    """In one process of several: (processes, what accelerate made of the model, how many parameters are divided)."""
    bases = (*([OnGpus] if kind == "fsdp2" else []), *([Sgd] if sgd else []), IdeficsTrainer)
    finetune.training.trainer.IdeficsTrainer = type("Trainer", bases, {})  # type: ignore[misc] # of this process alone
    folder.mkdir(exist_ok=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # else the gradients of A would be zero
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    options: dict[str, Any] = {"parallel": kind, "checkpoint_every": every, "evaluate_every": 1 if held else None}
    rate = SGD_RATE if sgd else ADAMW_RATE
    settings = Training(
        steps=1, row_tokens=1, tokens_per_step=PACKS, learning_rate=rate, schedule="constant", clip=0.0, **options
    )
    trainer = finetune.training.trainer.train(
        model,
        tokenizer,
        folder,
        settings,
        train_rows=rows,
        eval_rows=held,
        resume_from=resume_from,
        callbacks=[Recorder(folder, given)] if record else [],
    )
    divided = sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return collectives.world_size(), type(trainer.model_wrapped).__name__, divided


def relative_error(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """Of all together: a gradient whose terms cancel has no precision of its own."""
    assert got.keys() == expected.keys()
    difference = sum(float((got[name] - one).double().square().sum()) for name, one in expected.items())
    return (difference / sum(float(one.double().square().sum()) for one in expected.values())) ** 0.5


def gradient_errors(folder: Path, reference: Path) -> list[float]:
    """Step by step."""
    steps = range(len(list(reference.glob("gradients-*"))))
    both = ([load_file(one / f"gradients-{step}.safetensors") for one in (folder, reference)] for step in steps)
    return [relative_error(got, expected) for got, expected in both]


def losses(folder: Path) -> list[float]:
    """Of every step; lines of evaluations have none."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    """file:name -> tensor, of both files of an adapter folder."""
    files = sorted((folder / "adapter").glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


RECIPE = """
model: {{init: tiny, resampler: full, cross_attention: lora, decoder: lora, gates: full, added_tokens: full}}
adapter: {{rank: 4, alpha: 8}}
data:
  sources:
    - {{format: easy_vqa, turns: 10, limit: 600}}
    - {{format: messages, path: text.jsonl}}
  max_length: 256
  prepared: {folder}/prepared
training: {{steps: {steps}, row_tokens: 256, tokens_per_step: 1024, learning_rate: 1e-3}}
merge: false
output: {folder}/run
"""


def prepare(folder: Path, steps: int) -> tuple[Callable[[], nn.Module], Any, Rows]:
    """(what makes the model in a process, tokenizer, rows): drawn shapes, and text alone of growing length."""
    from finetune.base_model import open_base
    from finetune.data.rows import train_rows
    from finetune.pipeline import prepare_dataset, resolve_sources
    from finetune.recipe.load import load_recipe

    talk = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "so " * n}] for n in range(1, 30)
    ]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in talk), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder, steps=steps), encoding="utf-8")
    recipe = load_recipe(folder / "recipe.yaml")
    sources = resolve_sources(recipe)
    base = open_base(recipe, sources, folder)
    dataset = prepare_dataset(recipe, sources, base, folder)
    rows = train_rows(
        dataset,
        sources,
        recipe.data,
        recipe.training,
        preprocessing=base.preprocessing,
        tokenizer=base.tokenizer,
        blank_image=recipe.model.trains_image_towers,
    )

    def make() -> nn.Module:
        torch.manual_seed(0)
        return attach(base.load(), recipe.model.modes, lora=recipe.adapter.lora, base=base.name)

    return make, base.tokenizer, rows


def compare(folder: Path, steps: int, layouts: Sequence[tuple[int, str]]) -> bool:
    """Print a line a layout; whether all are as close as they must be."""
    make, tokenizer, rows = prepare(folder, steps)

    def run(processes: int, name: str, **options: Any) -> Path:
        place = folder / name
        run_processes(processes, lambda: train(make(), tokenizer, place, rows, **options), timeout=1800)
        return place

    def end(processes: int, name: str, *, sgd: bool, **options: Any) -> dict[str, torch.Tensor]:
        optimizer = "SGD" if sgd else "AdamW"
        return adapter(run(processes, f"{name}, {optimizer}", sgd=sgd, record=False, **options))

    alone = run(1, "alone")
    by_sgd, by_adamw = end(1, "alone", sgd=True), end(1, "alone", sgd=False)
    bound, good = 2 * ADAMW_RATE * steps, True
    print(f"{steps} steps of {PACKS} rows against one process; largest of all steps, and of the adapters in the end")
    print(f"{'':12}{'loss':>10}{'gradients':>12}{'SGD':>12}{'AdamW, absolute':>18}")
    for processes, kind in layouts:
        name = f"{processes} x {kind}"
        together = run(processes, name, kind=kind, given=alone)
        loss = max(abs(a / b - 1) for a, b in zip(losses(together), losses(alone), strict=True))
        gradients = max(gradient_errors(together, alone))
        sgd = relative_error(end(processes, name, sgd=True, kind=kind), by_sgd)
        ended = end(processes, name, sgd=False, kind=kind)
        adamw = max(float((ended[key] - one).abs().max()) for key, one in by_adamw.items())
        print(f"{name:12}{loss:10.1e}{gradients:12.1e}{sgd:12.1e}{adamw:18.1e}", flush=True)
        good &= max(loss, gradients, sgd) < 1e-5 and adamw < bound
    print(
        f"asked: 1e-5, and for AdamW {bound:.0e}, two rates a step: rounding decides the sign of a gradient near zero"
    )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="equivalence-") as folder:
        sys.exit(not compare(Path(folder), arguments.steps, LAYOUTS))


if __name__ == "__main__":
    main()
