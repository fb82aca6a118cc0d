"""Recipe -> what a run costs: parameters, memory, disk, steps; whether it fits a GPU, and which change makes it fit.

The recipe and the model's config are enough, and torch is not imported. Where the data is prepared already, the sizes
of its rows are used; else every row is assumed to be full.
"""

import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from finetune.console import parse_size, show_size
from finetune.planning.idefics_graph import forward_operations
from finetune.planning.lengths import prepared_lengths
from finetune.planning.memory_graph import GRADIENTS, peak
from finetune.planning.static_memory import (
    FP32,
    GATHERED,
    INT64,
    LAYERS_GATHERED,
    NF4_BYTES,
    Parameters,
    RowSize,
    Setup,
    count_by_tower,
    feature_bytes,
    fixed_parts,
    optimizer_bytes,
    sharded_layers,
    weight_bytes,
)
from finetune.planning.suggest import Change, apply_change, cheapest_changes
from finetune.recipe.schema import Recipe, need_end_of_utterance
from modeling.config import read_config
from modeling.shapes import SHAPES
from modeling.towers import LORA_TOWERS

PARTS = ("weights", GATHERED, "adapters", "optimizer", GRADIENTS, *LORA_TOWERS, "head", "batch")
"""Parts of the memory at its peak. A tower's part is what its forward keeps and what its backward needs."""

LIBRARIES = 96 * 2**20
"""Bytes of main memory that threads, kernels and the trainer take once a run has begun."""

GPU_RESERVE = 2**30
"""Bytes of a GPU for its context, the libraries' workspaces, and what the allocator loses to rounding."""

PREFETCHED = 2
"""Rows that a thread makes ahead of the one that runs."""

CHECKPOINTS_KEPT = 2
"""The newest checkpoints; where the run evaluates, the best one is kept as well."""

UNCOUNTED = ("use_dora", "rank_pattern", "layers_to_transform", "exclude_modules")
"""Fields of LoRA that change what is trained in ways that are not counted."""


def plan(recipe: Recipe, *, gpu: str | None = None, processes: int = 1) -> dict[str, Any]:
    """Return the figures of a recipe. Raises UserError.

    `gpu`: the memory of each GPU, such as 24GiB; by default that of this machine's smallest one. `processes`: one per
    GPU; memory is that of one of them. "gpu" in the result is None without a GPU.
    """
    budget = parse_size("--gpu", gpu) if gpu else gpu_memory()
    planner = Planner(recipe, on_gpu=budget is not None, processes=processes)
    setup, training = planner.setup(recipe), recipe.training
    parameters = count_by_tower(setup)
    checkpointing = {
        name: estimate(replace(setup, checkpointing=layers), planner.row).total
        for name, layers in (("off", 0), ("on", planner.layers))
    }
    return {
        "model": recipe.model.base or f"init: {recipe.model.init}",
        "parameters": {tower: {"mode": setup.mode(tower), **asdict(one)} for tower, one in parameters.items()},
        "totals": _totals(parameters),
        "row": {**asdict(planner.row), "from": "prepared data" if planner.lengths else "full rows"},
        "steps": planner.steps,
        "processes": processes,
        "rows_per_step": training.rows_per_step,
        "rows_per_process": setup.rows_per_step,
        "tokens_per_step": training.rows_per_step * training.row_tokens,
        "memory": _memory_figures(planner, recipe),
        "checkpointing": checkpointing,
        "disk": _disk(recipe, setup, images=planner.lengths.images if planner.lengths else 0),
        "gpu": None if budget is None else _gpu_figures(planner, budget),
        "notes": _notes(planner, setup),
    }


def gpu_memory() -> int | None:
    """Return the bytes of this machine's smallest GPU, as its driver reports them; None without a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    printed = subprocess.run(query, capture_output=True, text=True, check=False).stdout  # noqa: S603
    return min((int(mebibytes) * 2**20 for mebibytes in printed.split() if mebibytes.isdigit()), default=None)


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds at its peak."""

    parts: dict[str, int]
    """Part -> bytes, see PARTS."""
    moment: str
    """When the peak is: "forward and backward" or "optimiser step"."""

    @property
    def total(self) -> int:
        """Bytes of tensors."""
        return sum(self.parts.values())

    @property
    def resident(self) -> int:
        """Main memory beyond what importing the libraries takes, where freed blocks go back to the system at once."""
        return self.total + LIBRARIES

    @property
    def on_gpu(self) -> int:
        """Bytes that a GPU must have."""
        return self.total + GPU_RESERVE


def estimate(setup: Setup, row: RowSize) -> Memory:
    """Return the peak of training on such rows, once the optimiser has its states.

    >>> from modeling.shapes import TINY
    >>> estimate(Setup(TINY, {"decoder": "lora"}), RowSize(tokens=128, supervised=64, images=1)).moment
    'forward and backward'
    """
    gradients = FP32 * sum(one.trained for one in count_by_tower(setup).values())
    accumulates = setup.rows_per_step > 1
    fixed = Counter(fixed_parts(setup)) + Counter(batch=_batch_bytes(setup, row))
    running = Counter(peak(forward_operations(setup, row), accumulated=accumulates or setup.sharded))
    if setup.sharded:
        running[GRADIENTS] += setup.share(gradients)
        if accumulates:  # gradients are sharded after the last row of a step
            running[GRADIENTS] += gradients
        else:  # one row's are, layer by layer
            layers, counts = sharded_layers(setup), count_by_tower(setup)
            layer = max(FP32 * counts[tower].trained // number for tower, number in layers.items())
            running[GRADIENTS] += LAYERS_GATHERED * layer
    else:
        running[GRADIENTS] += gradients if accumulates else 0
        fixed[GRADIENTS] += gradients if setup.processes > 1 else 0  # DDP sends copies of them
    moment, stepping = "forward and backward", setup.share(gradients)
    if stepping > running.total():
        moment, running = "optimiser step", Counter({GRADIENTS: stepping})
    parts = fixed + running
    assert set(parts) <= set(PARTS), sorted(set(parts) - set(PARTS))
    return Memory({part: parts[part] for part in PARTS}, moment)


def _batch_bytes(setup: Setup, row: RowSize) -> int:
    """Return the bytes of the rows that exist at once: the trainer collects all rows of a step before its first, the
    loader reads one more, and `PREFETCHED` follow."""
    rows = setup.rows_per_step + 1 + PREFETCHED
    ids_labels_positions_images = 4
    tokens = rows * row.tokens * ids_labels_positions_images * INT64
    if setup.cached:  # the features of the row that runs are counted in its forward
        return tokens + (rows - 1) * row.images * feature_bytes(setup)
    pixels = FP32 * 3 * setup.config["vision_config"]["image_size"] ** 2
    return tokens + rows * row.images * pixels


class Planner:
    """The machine and the rows that a recipe is planned for; changed recipes are judged for the same ones."""

    def __init__(self, recipe: Recipe, *, on_gpu: bool, processes: int = 1):
        self.recipe, self.on_gpu, self.processes = recipe, on_gpu, processes
        model = recipe.model
        self.config = SHAPES[model.init] if model.init else read_config(str(model.base), revision=model.revision)
        if need_end_of_utterance(recipe.data.sources):  # training adds it
            self.config = {**self.config, "additional_vocab_size": 3}
        self.layers: int = self.config["num_hidden_layers"]
        self.lengths = prepared_lengths(recipe)
        training = recipe.training
        self.steps = self.lengths.steps if self.lengths else training.steps
        full_row = RowSize(training.row_tokens, training.row_tokens - 1, training.row_images)
        self.row = self.lengths.largest if self.lengths else full_row

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
            sharded=training.parallel == "fsdp2" and self.processes > 1,
            gpu=self.on_gpu,
            cached=recipe.caches_features,
        )

    def estimate(self, recipe: Recipe) -> Memory:
        """Return the peak of a recipe, whose rows are this planner's, cut to what the recipe allows."""
        training = recipe.training
        row = RowSize(
            min(self.row.tokens, training.row_tokens),
            min(self.row.supervised, training.row_tokens - 1),
            min(self.row.images, training.row_images),
        )
        return estimate(self.setup(recipe), row)

    def needed(self, recipe: Recipe) -> int:
        """Return the bytes that training needs of a GPU, or of main memory."""
        memory = self.estimate(recipe)
        return memory.on_gpu if self.on_gpu else memory.resident

    def evaluation(self, recipe: Recipe) -> int:
        """Return the bytes of the whole model that each process evaluates; 0 where training holds it anyway."""
        setup = self.setup(recipe)
        if recipe.evaluation is None or not setup.sharded:
            return 0
        frozen = replace(setup, modes=dict.fromkeys(setup.modes, "frozen"))
        return weight_bytes(frozen, count_by_tower(frozen)) + GPU_RESERVE

    def fits(self, recipe: Recipe, budget: int) -> bool:
        """Whether training and evaluation fit into so many bytes."""
        fixed = sum(fixed_parts(self.setup(recipe)).values())  # known at once; the peak takes time
        return fixed <= budget and self.needed(recipe) <= budget and self.evaluation(recipe) <= budget

    def changes(self, budget: int, *, number: int = 1, may_shard: bool = True) -> list[Change]:
        """Return the cheapest changes that make the recipe fit. `may_shard`: over the processes that there are, too."""
        fits, may_shard = partial(self.fits, budget=budget), may_shard and self.processes > 1
        return cheapest_changes(self.recipe, fits, layers=self.layers, number=number, may_shard=may_shard)


def _totals(parameters: Mapping[str, Parameters]) -> dict[str, int]:
    names = ("total", "trained", "quantized")
    return {name: sum(getattr(one, name) for one in parameters.values()) for name in names}


def _memory_figures(planner: Planner, recipe: Recipe) -> dict[str, Any]:
    memory = planner.estimate(recipe)
    return {
        "status": "predicted",
        "moment": memory.moment,
        "parts": memory.parts,
        "tensors": memory.total,
        **({"gpu": memory.on_gpu} if planner.on_gpu else {"resident": memory.resident}),
    }


def _gpu_figures(planner: Planner, budget: int) -> dict[str, Any]:
    """Return whether the recipe fits into `budget` bytes, and where it does not, the change that makes it fit."""
    recipe, change, changed = planner.recipe, None, None
    fits = planner.fits(recipe, budget)
    if not fits and planner.evaluation(recipe) <= budget:
        change = next(iter(planner.changes(budget)), None)
        changed = change and apply_change(recipe, change)
    return {
        "bytes": budget,
        "needed": planner.needed(recipe),
        "evaluation": planner.evaluation(recipe),
        "reserve": GPU_RESERVE,
        "fits": fits,
        "change": change and change.overrides,
        "changed": changed and _memory_figures(planner, changed),
    }


def _disk(recipe: Recipe, setup: Setup, *, images: int) -> dict[str, int]:
    """Return the bytes that a run leaves, without the base's own files and prepared sets.

    `images`: the distinct ones, where their number is known; else 0.
    """
    parameters = count_by_tower(setup)
    totals = _totals(parameters)
    adapter = FP32 * totals["trained"]
    checkpoint = adapter + optimizer_bytes(setup, parameters)
    kept = CHECKPOINTS_KEPT + bool(recipe.training.evaluate_every)
    stored = _stored_item(recipe)
    quantized = round(NF4_BYTES * totals["quantized"]) + stored * (totals["total"] - totals["quantized"])
    disk = {
        "base": stored * totals["total"] if recipe.model.init else 0,
        "quantized": quantized if recipe.model.quantize else 0,
        "features": images * feature_bytes(setup) if setup.cached else 0,
        "checkpoints": kept * checkpoint,
        "adapter": adapter,
        "merged": stored * totals["total"] if recipe.merge else 0,
    }
    return {**disk, "total": sum(disk.values())}


def _stored_item(recipe: Recipe) -> int:
    """Return the bytes of a number in the files of the base and of the merged model.

    A fresh base is fp32; released ones are bf16.
    """
    if recipe.model.init:
        return FP32
    folder = Path(str(recipe.model.base))
    config = read_config(str(folder)) if folder.is_dir() else {}
    named = str(config.get("dtype", config.get("torch_dtype", "bfloat16")))
    return FP32 if named.endswith("float32") else FP32 // 2


def _notes(planner: Planner, setup: Setup) -> list[str]:
    """Return what a reader must know of these figures, one sentence each."""
    recipe, processes = planner.recipe, planner.processes
    rows = recipe.training.rows_per_step
    used = [field for field in UNCOUNTED if (recipe.adapter.model_extra or {}).get(field)]
    notes = [f"adapter.{field} is not counted" for field in used]
    if setup.cached and planner.lengths is None:
        image = show_size(feature_bytes(setup))
        notes.append(f"cached features take {image} of disk per image; preparing the data counts the images")
    notes += recipe.doubts(planner.steps)
    if processes == 1:
        notes.append("memory is that of a run in one process")
    else:
        if setup.sharded:
            share = (
                "a share of every tensor; two layers, the head and image towers that run live are gathered: whole "
                "while they are used; loading the model is not counted"
            )
        else:
            share = "the whole model; gradients count twice, because DDP sends copies of them"
        notes.append(f"memory is that of one of {processes} processes, which holds {share}")
        notes.append("with several processes all figures are predicted, not measured")
        if rows % processes:
            notes.append(
                f"{rows} rows of a step cannot be divided evenly over {processes} processes: a run refuses to start"
            )
    if planner.on_gpu:
        notes.append("figures for a GPU are predicted; scripts/benchmarks/check_plan.py measures them on one")
    else:
        notes.append(
            "resident memory is that of a run with MALLOC_MMAP_THRESHOLD_=1048576 in its environment; without it a run "
            "is faster, but glibc before 2.38 may hold twice as much"
        )
    return notes
