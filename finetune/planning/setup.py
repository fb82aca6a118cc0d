"""What a plan is made for: a model and how one process trains it, and the largest row it trains on. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.planning.graph import FP32
from modeling.shapes import Config


@dataclass(frozen=True)
class Setup:
    """A model and how it is trained, as one of its processes holds it."""

    config: Config
    modes: Mapping[str, str]
    """Tower -> frozen | lora | full."""
    rank: int = 16
    dropout: float = 0.0
    item: int = FP32
    """Bytes of a number that is neither trained nor quantised: 4 in fp32, 2 in bf16."""
    quantize: bool = False
    checkpointing: int = 0
    """Layers of the decoder of which only inputs are kept, and of the cross-attention before them."""
    optimizer: str = "adamw"
    rows_per_step: int = 1
    """Of this process."""
    processes: int = 1
    divided: bool = False
    """Each process holds a share of every tensor, and whole layers only while they run (fsdp2); else all (ddp)."""
    gpu: bool = False
    cached: bool = False
    """Image features come from disk: the model has neither vision tower nor resampler."""

    @property
    def autocast(self) -> bool:
        """Towers trained in full are fp32; on a bf16 base they are multiplied in bf16."""
        matrices = {mode for tower, mode in self.modes.items() if tower not in ("gates", "added_tokens")}
        return self.item < FP32 and "full" in matrices

    @property
    def shares(self) -> int:
        """How many processes a tensor is divided over."""
        return self.processes if self.divided else 1

    @property
    def has_lora(self) -> bool:
        return "lora" in self.modes.values()

    def mode(self, tower: str) -> str:
        return self.modes.get(tower, "frozen")

    def is_full(self, tower: str) -> bool:
        return self.mode(tower) == "full"

    def item_of(self, tower: str) -> int:
        """Bytes of a number of a tower's weights: fp32 where it, or what meets it, is trained in full."""
        meets = {"resampler": "vision", "added_tokens": "embeddings_and_head"}
        return FP32 if self.is_full(tower) or self.is_full(meets.get(tower, tower)) else self.item


@dataclass(frozen=True)
class RowSize:
    """The largest row of a run; every token of it sees an image where there is one."""

    tokens: int
    supervised: int
    images: int
