"""A model and how it is trained -> the bytes that one process holds whatever the rows are. No torch.

Weights, adapters and optimiser states follow from the config; `graph.py` and `idefics_graph.py` add what a row takes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil, prod

from modeling.shapes import Config, count_lora, tensor_shapes
from modeling.towers import (
    IMAGE_TOWERS,
    LORA_TOWERS,
    QUANTIZED_TOWERS,
    TOWERS,
    lora_pattern,
    matrices_trained_in_full,
    tower_of,
)

FP32, INT64 = 4, 8
"""Bytes of a number."""

NF4_GROUP = 64
"""Weights that share a scale; a matrix whose rows are not a multiple of it is not quantised."""

NF4_BYTES = 0.5 + 1 / NF4_GROUP + 4 / (NF4_GROUP * 256)
"""Bytes of a quantised weight: 4 bits, one byte of scale per group, and a fp32 scale for 256 of those: 4.127 bits."""

STATE_BYTES = {"adamw": 2 * 4.0, "adamw_8bit": 2 * (1 + 4 / 256), "paged_adamw_8bit": 2 * (1 + 4 / 256)}
"""Bytes of optimiser state per trained number: two moments; in 8 bits, 256 of them share a fp32 scale."""

LAYERS_GATHERED = 2
"""Layers of a sharded model that are whole at a time: the one that runs, and the next, which is fetched meanwhile."""

GATHERED = "gathered"
"""The part of memory for what a process gathers from the others, whole while it is used."""


@dataclass(frozen=True)
class Setup:
    """A model and how it is trained, as one of its processes holds it."""

    config: Config
    modes: Mapping[str, str]
    """Tower -> frozen | lora | full; a tower not named is frozen."""
    rank: int = 16
    dropout: float = 0.0
    item: int = FP32
    """Bytes of a number that is neither trained nor quantised: 4 in fp32, 2 in bf16."""
    quantize: bool = False
    checkpointing: int = 0
    """Decoder layers that keep only their input; cross-attention blocks before these layers do so, too."""
    optimizer: str = "adamw"
    rows_per_step: int = 1
    """Rows that this process trains on in one optimiser step."""
    processes: int = 1
    sharded: bool = False
    """Whether each process holds a share of every tensor, and whole layers only while they run (fsdp2)."""
    gpu: bool = False
    cached: bool = False
    """Whether image features come from disk, so that neither vision tower nor resampler is loaded."""

    @property
    def autocast(self) -> bool:
        """Whether autocast runs: matrices trained in full are fp32, and on a bf16 base they are multiplied in bf16."""
        return self.item < FP32 and bool(matrices_trained_in_full(self.modes))

    def mode(self, tower: str) -> str:
        return self.modes.get(tower, "frozen")

    def is_full(self, tower: str) -> bool:
        return self.mode(tower) == "full"

    def item_of(self, tower: str) -> int:
        """Return the bytes of a number of a tower's weights: fp32 where it, or what it reads, is trained in full."""
        reads = {"resampler": "vision", "added_tokens": "embeddings_and_head"}
        return FP32 if self.is_full(tower) or self.is_full(reads.get(tower, tower)) else self.item

    def share(self, nbytes: int) -> int:
        """Return the bytes that this process holds of tensors that the processes share."""
        return ceil(nbytes / (self.processes if self.sharded else 1))


@dataclass(frozen=True)
class RowSize:
    """The largest row of a run; where it has an image, every token sees one."""

    tokens: int
    supervised: int
    images: int


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of one tower; LoRA factors count as trained, but not in the total."""

    total: int
    trained: int
    quantized: int


def count_by_tower(setup: Setup) -> dict[str, Parameters]:
    """Return tower -> its parameters."""
    counts = {}
    for tower, (total, quantizable, lora) in _sizes(json.dumps(setup.config)).items():
        trained = {"frozen": 0, "lora": setup.rank * lora, "full": total}[setup.mode(tower)]
        counts[tower] = Parameters(total, trained, quantizable if setup.quantize and tower in QUANTIZED_TOWERS else 0)
    return counts


@cache
def _sizes(config_json: str) -> dict[str, tuple[int, int, int]]:
    """Return tower -> numbers of all its parameters, of those that NF4 can hold, and of LoRA factors of rank 1."""
    config = json.loads(config_json)
    linear_weight = re.compile(rf"({lora_pattern(LORA_TOWERS)})\.weight")
    total, quantizable = dict.fromkeys(TOWERS, 0), dict.fromkeys(TOWERS, 0)
    for name, shape in tensor_shapes(config).items():
        tower = tower_of(name)
        total[tower] += prod(shape)
        if linear_weight.fullmatch(name) and shape[1] % NF4_GROUP == 0:
            quantizable[tower] += prod(shape)
    lora = {tower: count_lora(config, (tower,), 1)[1] if tower in LORA_TOWERS else 0 for tower in TOWERS}
    return {tower: (total[tower], quantizable[tower], lora[tower]) for tower in TOWERS}


def fixed_parts(setup: Setup) -> dict[str, int]:
    """Return part -> bytes of what is held before the first row comes."""
    parameters = count_by_tower(setup)
    factors = sum(one.trained for tower, one in parameters.items() if setup.mode(tower) == "lora")
    # PEFT trains a copy of the added tokens where there is LoRA.
    copies = parameters["added_tokens"].trained if "lora" in setup.modes.values() else 0
    parts = {
        "weights": weight_bytes(setup, parameters),
        "adapters": FP32 * (factors + copies),
        "optimizer": optimizer_bytes(setup, parameters),
    }
    if not setup.sharded:
        return parts
    return {part: setup.share(nbytes) for part, nbytes in parts.items()} | {GATHERED: gathered_bytes(setup)}


def weight_bytes(setup: Setup, parameters: Mapping[str, Parameters]) -> int:
    """Return the bytes of the model as it is loaded, before LoRA factors are added."""
    loaded = {tower: one for tower, one in parameters.items() if not (setup.cached and tower in IMAGE_TOWERS)}
    plain = sum(setup.item_of(tower) * (one.total - one.quantized) for tower, one in loaded.items())
    return plain + round(NF4_BYTES * sum(one.quantized for one in parameters.values()))


def optimizer_bytes(setup: Setup, parameters: Mapping[str, Parameters]) -> int:
    return round(STATE_BYTES[setup.optimizer] * sum(one.trained for one in parameters.values()))


def gathered_bytes(setup: Setup) -> int:
    """Return the bytes that a process of a sharded model holds whole besides its share.

    Two of the largest layers at a time; and from forward to backward the head, and the image towers where they are
    loaded. `training.arguments` shards a model by the same modules.
    """
    parameters = count_by_tower(setup)

    def whole(tower: str) -> int:
        factors = FP32 * parameters[tower].trained if setup.mode(tower) == "lora" else 0
        return weight_bytes(setup, {tower: parameters[tower]}) + factors

    layer = max(ceil(whole(tower) / number) for tower, number in sharded_layers(setup).items())
    return LAYERS_GATHERED * layer + whole("embeddings_and_head") // 2 + sum(whole(tower) for tower in IMAGE_TOWERS)


def sharded_layers(setup: Setup) -> dict[str, int]:
    """Return tower -> the number of layers that are gathered one by one."""
    layers: int = setup.config["num_hidden_layers"]
    return {"decoder": layers, "cross_attention": layers // setup.config["cross_layer_interval"]}


def feature_bytes(setup: Setup) -> int:
    """Return the bytes of one image's features, in memory and on disk."""
    latents, width = setup.config["perceiver_config"]["resampler_n_latents"], setup.config["vision_config"]["embed_dim"]
    return latents * width * setup.item
