"""Config, what is trained, sizes of a row -> bytes: weights, adapters, gradients, optimiser, activations. No torch."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, prod

from finetune.planning.graph import FP32, GRADIENTS, peak
from finetune.planning.operations import INT64, NF4_GROUP, record
from finetune.planning.setup import RowSize, Setup
from modeling.shapes import count_lora, tensor_shapes
from modeling.towers import IMAGE_TOWERS, LORA_TOWERS, QUANTIZED_TOWERS, TOWERS, lora_pattern, tower_of

NF4_BYTES = 0.5 + 1 / NF4_GROUP + 4 / (NF4_GROUP * 256)
"""Of a weight: 4 bits, one byte of scale a group, and a fp32 scale for 256 of those: 4.127 bits."""

STATE_BYTES = {"adamw": 2 * 4.0, "adamw_8bit": 2 * (1 + 4 / 256), "paged_adamw_8bit": 2 * (1 + 4 / 256)}
"""Of a trained number: two moments; in 8 bits, 256 of them share a fp32 scale."""

GIB = 2**30
LIBRARIES = 96 * 2**20
"""Main memory that threads, kernels and the trainer take once a run has begun."""

PREFETCHED = 2
"""finetune/data/prefetch.py"""

GPU_RESERVE = GIB
"""Of a GPU's memory: its context, the libraries' workspaces, and what the allocator loses to rounding."""

LAYERS_GATHERED = 2
"""Of a model that is divided: whole at a time, the layer that runs and the next one, fetched while it does."""

GATHERED = "gathered"
"""The part that layers and others belong to while they are whole."""

PARTS = ("weights", GATHERED, "adapters", "optimizer", GRADIENTS, *LORA_TOWERS, "head", "batch")
"""Of the memory at its peak. A tower's part is what its forward keeps and what its backward needs."""


@dataclass(frozen=True)
class Parameters:
    """Of one tower; factors of LoRA are trained, and no part of the total."""

    total: int
    trained: int
    quantized: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the moment when it holds most."""

    parts: dict[str, int]
    """See PARTS."""
    moment: str

    @property
    def total(self) -> int:
        """Of tensors."""
        return sum(self.parts.values())

    @property
    def resident(self) -> int:
        """Main memory beyond what importing the libraries takes, where blocks that are freed go back at once."""
        return self.total + LIBRARIES

    @property
    def on_gpu(self) -> int:
        """What a GPU must have."""
        return self.total + GPU_RESERVE


def count(setup: Setup) -> dict[str, Parameters]:
    """Tower -> its parameters."""
    return {tower: _count(setup, tower, sizes) for tower, sizes in _sizes(json.dumps(setup.config)).items()}


def _count(setup: Setup, tower: str, sizes: "_Sizes") -> Parameters:
    trained = {"frozen": 0, "lora": setup.rank * sizes.lora, "full": sizes.total}[setup.mode(tower)]
    return Parameters(sizes.total, trained, sizes.grouped if setup.quantize and tower in QUANTIZED_TOWERS else 0)


@dataclass(frozen=True)
class _Sizes:
    """Parameters of a tower: all, those of linear layers that NF4 could hold, and those of LoRA of rank 1."""

    total: int
    grouped: int
    lora: int


@cache
def _sizes(config_json: str) -> dict[str, _Sizes]:
    config = json.loads(config_json)
    linear_weight = re.compile(rf"({lora_pattern(LORA_TOWERS)})\.weight")
    totals, grouped = dict.fromkeys(TOWERS, 0), dict.fromkeys(TOWERS, 0)
    for name, shape in tensor_shapes(config).items():
        tower = tower_of(name)
        totals[tower] += prod(shape)
        if linear_weight.fullmatch(name) and shape[1] % NF4_GROUP == 0:
            grouped[tower] += prod(shape)
    lora = {tower: count_lora(config, (tower,), 1)[1] if tower in LORA_TOWERS else 0 for tower in TOWERS}
    return {tower: _Sizes(totals[tower], grouped[tower], lora[tower]) for tower in TOWERS}


def estimate(setup: Setup, row: RowSize) -> Memory:
    """What training on such rows holds at most, once the optimiser has its states."""
    gradients = FP32 * sum(one.trained for one in count(setup).values())
    always = Counter(fixed_parts(setup)) + Counter(batch=_batches(setup, row))
    if setup.processes > 1 and not setup.divided:
        always[GRADIENTS] += gradients  # DDP sends copies of them
    accumulated = setup.rows_per_step > 1
    running = Counter(peak(record(setup, row), accumulated=accumulated or setup.divided))
    if setup.divided:
        running[GRADIENTS] += _share(setup, gradients) + _whole_gradients(setup, gradients)
    elif accumulated:
        running[GRADIENTS] += gradients
    stepping = _share(setup, gradients)
    if stepping > running.total():
        return _memory(always + Counter({GRADIENTS: stepping}), "optimiser step")
    return _memory(always + running, "forward and backward")


def _whole_gradients(setup: Setup, gradients: int) -> int:
    """Rows before a step's last add to gradients that are not divided yet; one row's are, a layer after the other."""
    if setup.rows_per_step > 1:
        return gradients
    layers, parameters = _layers(setup), count(setup)
    return LAYERS_GATHERED * max(FP32 * parameters[tower].trained // number for tower, number in layers.items())


def _share(setup: Setup, nbytes: int) -> int:
    """Of this process."""
    return ceil(nbytes / setup.shares)


def _layers(setup: Setup) -> dict[str, int]:
    """Tower -> how many layers it is divided by."""
    layers: int = setup.config["num_hidden_layers"]
    return {"decoder": layers, "cross_attention": layers // setup.config["cross_layer_interval"]}


def fixed_parts(setup: Setup) -> dict[str, int]:
    """Part -> bytes, of what is there whatever the rows."""
    parameters = count(setup)
    parts = {
        "weights": weight_bytes(setup, parameters),
        "adapters": adapter_bytes(setup, parameters),
        "optimizer": optimizer_bytes(setup, parameters),
    }
    if not setup.divided:
        return parts
    return {part: _share(setup, nbytes) for part, nbytes in parts.items()} | {GATHERED: gathered_bytes(setup)}


def gathered_bytes(setup: Setup) -> int:
    """What a process that holds a share of everything holds whole besides, as `training.arguments` divides a model.

    Two of the largest layers; the head, and the image towers where they are loaded, from forward to backward.
    """
    parameters = count(setup)

    def whole(tower: str) -> int:
        alone = {tower: parameters[tower]}
        factors = FP32 * parameters[tower].trained if setup.mode(tower) == "lora" else 0
        return weight_bytes(setup, alone) + factors

    layer = max(ceil(whole(tower) / number) for tower, number in _layers(setup).items())
    return LAYERS_GATHERED * layer + whole("embeddings_and_head") // 2 + sum(whole(tower) for tower in IMAGE_TOWERS)


def weight_bytes(setup: Setup, parameters: Mapping[str, Parameters]) -> int:
    """The model as it lies in memory, before anything is adapted."""
    loaded = {tower for tower in parameters if not (setup.cached and tower in IMAGE_TOWERS)}
    plain = sum(
        setup.item_of(tower) * (one.total - one.quantized) for tower, one in parameters.items() if tower in loaded
    )
    return plain + round(NF4_BYTES * sum(one.quantized for one in parameters.values()))


def adapter_bytes(setup: Setup, parameters: Mapping[str, Parameters]) -> int:
    """Factors of LoRA, and the copy of the added tokens that PEFT trains."""
    factors = sum(one.trained for tower, one in parameters.items() if setup.mode(tower) == "lora")
    copies = parameters["added_tokens"].trained if setup.has_lora else 0
    return FP32 * (factors + copies)


def optimizer_bytes(setup: Setup, parameters: Mapping[str, Parameters]) -> int:
    return round(STATE_BYTES[setup.optimizer] * sum(one.trained for one in parameters.values()))


def _memory(parts: Mapping[str, int], moment: str) -> Memory:
    assert set(parts) <= set(PARTS), sorted(set(parts) - set(PARTS))
    return Memory({part: parts.get(part, 0) for part in PARTS}, moment)


def _batches(setup: Setup, row: RowSize) -> int:
    """The trainer collects all rows of a step before its first, the loader reads one ahead, and `PREFETCHED` follow.

    Features of the row that runs are part of its forward.
    """
    ids_labels_positions_images = 4
    rows = setup.rows_per_step + 1 + PREFETCHED
    shown = (rows - setup.cached) * row.images * _image_bytes(setup)
    return rows * row.tokens * ids_labels_positions_images * INT64 + shown


def _image_bytes(setup: Setup) -> int:
    """Of one image in a batch: its pixels, or its features."""
    if setup.cached:
        return feature_bytes(setup)
    return FP32 * 3 * setup.config["vision_config"]["image_size"] ** 2


def feature_bytes(setup: Setup) -> int:
    """Of one image's features, in memory and on disk."""
    latents, width = setup.config["perceiver_config"]["resampler_n_latents"], setup.config["vision_config"]["embed_dim"]
    return latents * width * setup.item
