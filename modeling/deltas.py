"""What an adapter changes: base tensor in, merged tensor out, in blocks of rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from modeling.adapters import PEFT_CONFIG, TRAINED_FILE
from modeling.checkpoint import Stored
from modeling.errors import UserError
from modeling.towers import EXACT_LORA, stock_name, tower_of

BLOCK_ELEMENTS = 16 * 2**20
"""Of a matrix that are in memory at once, in fp32, a few times over."""


@dataclass
class Adapter:
    """An adapter folder's tensors by stock name."""

    lora: dict[str, dict[str, torch.Tensor]]
    """Stock weight name -> "lora_A", "lora_B" (, "lora_magnitude_vector") -> factor."""
    replaced: dict[str, torch.Tensor]
    """Stock name -> gates, added rows, towers trained in full."""
    config: LoraConfig | None

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """Raises UserError: no adapter folder, or one whose merge would not be exact."""
        replaced = load_file(folder / TRAINED_FILE) if (folder / TRAINED_FILE).is_file() else {}
        if not (folder / PEFT_CONFIG).is_file():
            if not replaced:
                found = "a model" if (folder / "config.json").is_file() else "neither"
                expected = f"an adapter folder ({PEFT_CONFIG} or {TRAINED_FILE})"
                raise UserError(f"{folder}: expected {expected}, found {found}")
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

    @property
    def names(self) -> set[str]:
        """Stock names of all that is changed."""
        return {*self.lora, *self.replaced}

    @property
    def added_tokens(self) -> int | None:
        """How many added tokens it has rows for; None where it has none."""
        rows = [len(tensor) for name, tensor in self.replaced.items() if tower_of(name) == "added_tokens"]
        return rows[0] if rows else None

    def require_home(self, base: dict[str, tuple[int, ...]]) -> None:
        """Every tensor of the adapter must fit one of the base's, by name and shape. Raises UserError."""
        homeless = sorted(self.names - base.keys())
        if homeless:
            raise UserError(f"{len(homeless)} tensors of the adapter have no place in the base: {homeless[:3]}")
        for name, tensor in self.replaced.items():
            self._require_shape(name, tuple(tensor.shape), base[name])
        for name, factors in self.lora.items():
            shape = (factors["lora_B"].shape[0], factors["lora_A"].shape[1])
            self._require_shape(name, shape, base[name])

    def _require_shape(self, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if got != expected:
            raise UserError(f"the adapter was made for another base: {name} is {got} there and {expected} here")

    def scaling(self, name: str) -> float:
        """By which the product of a weight's factors is multiplied (LoRA: alpha / r; rsLoRA: alpha / sqrt(r))."""
        assert self.config is not None
        module, rank = name.removesuffix(".weight"), self.lora[name]["lora_A"].shape[0]
        patterns = self.config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), self.config.lora_alpha)
        return float(alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    def merge_rows(self, name: str, weight: torch.Tensor, start: int) -> torch.Tensor:
        """Rows of a LoRA-adapted matrix, from row `start` on, merged in fp32: the arithmetic of PEFT's own merge."""
        factors, weight = self.lora[name], weight.float()
        rows = slice(start, start + len(weight))
        # PEFT's order: the product first, then the scale, then the sum.
        merged = weight + (factors["lora_B"][rows].float() @ factors["lora_A"].float()) * self.scaling(name)
        if "lora_magnitude_vector" in factors:  # DoRA, Liu et al. 2024: the direction is what LoRA changes
            magnitude = factors["lora_magnitude_vector"][rows].float()
            merged = (magnitude / torch.linalg.norm(merged, dim=1)).view(-1, 1) * merged
        return merged

    def merged_blocks(self, name: str, stored: Stored, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A LoRA-adapted matrix, merged, block by block of its rows."""
        count = max(1, BLOCK_ELEMENTS // stored.shape[1])
        for start in range(0, stored.shape[0], count):
            yield self.merge_rows(name, stored.rows(start, start + count), start).to(dtype)
