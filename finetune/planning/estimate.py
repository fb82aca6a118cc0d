"""Recipe -> what it will cost: parameters, memory, disk, steps; whether it fits a GPU, and the least change that helps.

From the recipe and the model's config alone, without torch; where the data is prepared already, from its lengths too.
"""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.console import parse_size, show_size
from finetune.data.formats import FORMATS
from finetune.planning.graph import FP32
from finetune.planning.memory import (
    GPU_RESERVE,
    NF4_BYTES,
    Memory,
    Parameters,
    count,
    estimate,
    feature_bytes,
    fixed_parts,
    optimizer_bytes,
    weight_bytes,
)
from finetune.planning.setup import RowSize, Setup
from finetune.planning.suggest import Change, apply_change, cheapest_changes
from finetune.recipe.schema import Recipe
from modeling.config import read_config
from modeling.shapes import SHAPES, Config

if TYPE_CHECKING:  # it imports torch
    from finetune.planning.lengths import Lengths

CHECKPOINTS_KEPT = 2
"""The newest; the best one is kept besides where the run evaluates."""

UNCOUNTED = ("use_dora", "rank_pattern", "layers_to_transform", "exclude_modules")
"""Fields of LoRA that change what is trained in ways that are not counted."""


def plan(
    recipe: Recipe,
    *,
    gpu: str | None = None,
    processes: int = 1,
    picture: Path | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """The figures of a recipe, shown and drawn where asked. Raises UserError.

    `gpu`: the memory of each, such as 24GiB. `processes`: one a GPU; figures of memory are those of one of them.
    """
    budget = parse_size("--gpu", gpu) if gpu else gpu_memory()
    made = Planner(recipe, on_gpu=budget is not None, processes=processes).result(budget)
    if show or picture:
        from finetune.planning.report import draw, show_plan

        if show:
            show_plan(made)
        if picture:
            draw(made, picture)
    return made


def gpu_memory() -> int | None:
    """Of this machine's smallest GPU, as its driver tells; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
    sizes = [int(one) * 2**20 for one in told if one.isdigit()]
    return min(sizes, default=None)


class Planner:
    """One recipe, its model's config and its rows; changed recipes are judged by the same."""

    def __init__(self, recipe: Recipe, *, on_gpu: bool, processes: int = 1):
        self.recipe, self.on_gpu, self.processes = recipe, on_gpu, processes
        self.config = _config(recipe)
        self.layers: int = self.config["num_hidden_layers"]
        lengths = _prepared(recipe)
        self.steps, self.row, self.row_from = _rows(recipe, lengths)
        self.images = lengths.images if lengths else None

    def result(self, budget: int | None) -> dict[str, Any]:
        """Everything there is to say; "gpu" is None without a `budget` in bytes."""
        setup = self.setup(self.recipe)
        parameters = count(setup)
        training = self.recipe.training
        return {
            "model": self.recipe.model.base or f"init: {self.recipe.model.init}",
            "parameters": {tower: {"mode": setup.mode(tower), **asdict(one)} for tower, one in parameters.items()},
            "totals": _totals(parameters),
            "row": {**asdict(self.row), "from": self.row_from},
            "steps": self.steps,
            "processes": self.processes,
            "rows_per_step": training.rows_per_step,
            "rows_per_process": setup.rows_per_step,
            "tokens_per_step": training.rows_per_step * training.row_tokens,
            "memory": self._memory(self.recipe),
            "checkpointing": {
                "off": self._with(checkpointing=0).total,
                "on": self._with(checkpointing=self.layers).total,
            },
            "disk": _disk(self.recipe, setup, parameters, images=self.images),
            "gpu": None if budget is None else self._judge(budget),
            "notes": self._notes(),
        }

    def setup(self, recipe: Recipe) -> Setup:
        training, model = recipe.training, recipe.model
        bf16 = model.dtype == "bf16" or (model.dtype == "auto" and self.on_gpu)
        return Setup(
            self.config,
            model.modes,
            rank=recipe.adapter.rank,
            dropout=recipe.adapter.dropout,
            item=FP32 // 2 if bf16 else FP32,
            quantize=model.quantize is not None,
            checkpointing=self.layers if training.checkpointing is True else int(training.checkpointing),
            optimizer=training.optimizer,
            rows_per_step=ceil(training.rows_per_step / self.processes),
            processes=self.processes,
            divided=training.parallel == "fsdp2" and self.processes > 1,
            gpu=self.on_gpu,
            cached=recipe.caches_features,
        )

    def estimate(self, recipe: Recipe) -> Memory:
        """Rows of a changed recipe are those of this one, as far as they go."""
        training = recipe.training
        row = RowSize(
            min(self.row.tokens, training.row_tokens),
            min(self.row.supervised, training.row_tokens - 1),
            min(self.row.images, training.row_images),
        )
        return estimate(self.setup(recipe), row)

    def needed(self, recipe: Recipe) -> int:
        """Bytes of a GPU, or of main memory."""
        memory = self.estimate(recipe)
        return memory.on_gpu if self.on_gpu else memory.resident

    def fits(self, recipe: Recipe, budget: int) -> bool:
        fixed = sum(fixed_parts(self.setup(recipe)).values())
        return fixed <= budget and self.needed(recipe) <= budget and self.evaluation(recipe) <= budget

    def evaluation(self, recipe: Recipe) -> int:
        """Bytes of the model that evaluation asks, which each process holds whole; 0 where training holds it, too."""
        setup = self.setup(recipe)
        if recipe.evaluation is None or not setup.divided:
            return 0
        frozen = replace(setup, modes=dict.fromkeys(setup.modes, "frozen"))
        return weight_bytes(frozen, count(frozen)) + GPU_RESERVE

    def changes(self, budget: int, *, number: int = 1, may_divide: bool = True) -> list[Change]:
        """The cheapest changes that make the recipe fit. `may_divide`: among them, over the processes there are."""
        fit, divisible = partial(self.fits, budget=budget), may_divide and self.processes > 1
        return cheapest_changes(self.recipe, fit, layers=self.layers, number=number, divisible=divisible)

    def _with(self, *, checkpointing: int) -> Memory:
        return estimate(replace(self.setup(self.recipe), checkpointing=checkpointing), self.row)

    def _memory(self, recipe: Recipe) -> dict[str, Any]:
        memory = self.estimate(recipe)
        return {
            "status": "predicted",
            "moment": memory.moment,
            "parts": memory.parts,
            "tensors": memory.total,
            **({"gpu": memory.on_gpu} if self.on_gpu else {"resident": memory.resident}),
        }

    def _judge(self, budget: int) -> dict[str, Any]:
        fits = self.fits(self.recipe, budget)
        may_fit = not fits and self.evaluation(self.recipe) <= budget
        change = next(iter(self.changes(budget)), None) if may_fit else None
        changed = change and apply_change(self.recipe, change)
        return {
            "bytes": budget,
            "needed": self.needed(self.recipe),
            "evaluation": self.evaluation(self.recipe),
            "reserve": GPU_RESERVE,
            "fits": fits,
            "change": change and change.overrides,
            "changed": self._memory(changed) if changed else None,
        }

    def _notes(self) -> list[str]:
        used = [field for field in UNCOUNTED if (self.recipe.adapter.model_extra or {}).get(field)]
        notes = [f"adapter.{field} is not counted" for field in used]
        if self.recipe.caches_features and self.images is None:
            image = show_size(feature_bytes(self.setup(self.recipe)))
            notes.append(f"cached features take {image} of disk an image; how many there are, the prepared data tells")
        notes += self.recipe.doubts(self.steps)
        notes += self._notes_of_processes()
        if self.on_gpu:
            notes.append(
                "figures for a GPU are predicted, not measured; where there is one, measure them with "
                "scripts/benchmarks/check_plan.py"
            )
        else:
            notes.append(
                "resident memory is what a run holds with MALLOC_MMAP_THRESHOLD_=1048576 set; faster without it, "
                "and glibc before 2.38 may hold twice as much"
            )
        return notes

    def _notes_of_processes(self) -> list[str]:
        if self.processes == 1:
            return ["memory is that of one process which shares nothing with others"]
        packs = self.recipe.training.rows_per_step
        uneven = f"{packs} rows a step cannot be shared out evenly over {self.processes} processes, and a run says so"
        if self.setup(self.recipe).divided:
            how = (
                f"memory is that of one of {self.processes} processes, each with its share of every tensor; gathered: "
                "two layers, the head and live image towers, whole while they are needed; loading is not counted"
            )
        else:
            how = (
                f"memory is that of one of {self.processes} processes, each with the whole model; gradients count "
                "twice, as DDP sends copies of them"
            )
        return [
            how,
            "with several processes all figures are predicted, not measured",
            *[uneven] * bool(packs % self.processes),
        ]


def _config(recipe: Recipe) -> Config:
    """Of the model that is trained: dialogues extend a base to an instruct vocabulary."""
    model = recipe.model
    config = SHAPES[model.init] if model.init else read_config(str(model.base), revision=model.revision)
    documents = all(
        source.format != "auto" and FORMATS[source.format].documents and not source.prompt
        for source in recipe.data.sources
    )
    return config if documents else {**config, "additional_vocab_size": 3}


def _prepared(recipe: Recipe) -> "Lengths | None":
    if not any(Path(recipe.data.prepared).glob("*/account.json")):
        return None
    from finetune.planning.lengths import prepared_lengths

    return prepared_lengths(recipe)


def _rows(recipe: Recipe, lengths: "Lengths | None") -> tuple[int | None, RowSize, str]:
    """(steps where they are known, the largest row, where that is from)."""
    training = recipe.training
    if lengths:
        return lengths.steps, lengths.largest, "prepared data"
    return training.steps, RowSize(training.row_tokens, training.row_tokens - 1, training.row_images), "full rows"


def _totals(parameters: Mapping[str, Parameters]) -> dict[str, int]:
    names = ("total", "trained", "quantized")
    return {name: sum(getattr(one, name) for one in parameters.values()) for name in names}


def _disk(recipe: Recipe, setup: Setup, parameters: Mapping[str, Parameters], *, images: int | None) -> dict[str, int]:
    """Bytes of what a run leaves; not counted are the base's own files and prepared sets.

    `images`: distinct ones, where they are known; else their features are not counted either.
    """
    totals = _totals(parameters)
    adapter = FP32 * totals["trained"]
    checkpoint = adapter + optimizer_bytes(setup, parameters)
    kept = CHECKPOINTS_KEPT + bool(recipe.training.evaluate_every)
    stored = _stored_item(recipe)
    quantized = round(NF4_BYTES * totals["quantized"]) + stored * (totals["total"] - totals["quantized"])
    disk = {
        "base": stored * totals["total"] if recipe.model.init else 0,
        "quantized": quantized if recipe.model.quantize else 0,
        "features": (images or 0) * feature_bytes(setup) if setup.cached else 0,
        "checkpoints": kept * checkpoint,
        "adapter": adapter,
        "merged": stored * totals["total"] if recipe.merge else 0,
    }
    return {**disk, "total": sum(disk.values())}


def _stored_item(recipe: Recipe) -> int:
    """Bytes of a number in the base's files, and in the merged model: a fresh base is fp32, released ones are bf16."""
    if recipe.model.init:
        return FP32
    folder = Path(str(recipe.model.base))
    config = read_config(str(folder)) if folder.is_dir() else {}
    named = str(config.get("dtype", config.get("torch_dtype", "bfloat16")))
    return FP32 if named.endswith("float32") else FP32 // 2
