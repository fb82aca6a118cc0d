"""What an adapter changes, and onto what: base tensor in, merged tensor out, in blocks of rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Literal

import torch
from peft import LoraConfig, load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file

from modeling.adapters import PEFT_CONFIG, TRAINED_FILE
from modeling.checkpoint import Rows, Stored
from modeling.errors import UserError
from modeling.quantize import Nf4, quantized_names
from modeling.shapes import Config
from modeling.towers import EXACT_LORA, stock_name, tower_of

Onto = Literal["full", "nf4"]
"""The released weights, or these as a model in NF4 computes with them."""


def weights_of(stored: Mapping[str, Stored], config: Config, onto: Onto) -> dict[str, Rows]:
    """Stock name -> tensor of the base that an adapter is added to."""
    names = quantized_names(config) if onto == "nf4" else set()
    return {name: Dequantized(one) if name in names else one for name, one in stored.items()}


@dataclass(frozen=True)
class Dequantized:
    """A stored matrix as a model in NF4 computes with it: dequant(NF4(W))."""

    stored: Stored

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """fp32, whatever `dtype` it is stored in."""
        with _ONE_AT_A_TIME:
            quantized = _quantized(self.stored)
        return quantized.rows(start, stop)


_ONE_AT_A_TIME = Lock()
"""A matrix is quantised once, however many threads ask for its rows."""


@lru_cache(maxsize=2)  # of the matrix before, threads may still ask for the last rows
def _quantized(stored: Stored) -> Nf4:
    return Nf4.of(stored.rows, stored.shape)


def rounded(name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the tensor `name` in another dtype. Raises UserError: a value too large for fp16."""
    converted = rows.to(dtype)
    if dtype == torch.float16 and not torch.equal(converted.isfinite(), rows.isfinite()):
        largest, most = float(rows.abs().max()), torch.finfo(dtype).max
        raise UserError(f"{name}: holds {largest:,.0f}, and fp16 ends at {most:,.0f}; merge with --dtype bf16 or fp32")
    return converted


@dataclass
class Adapter:
    """An adapter folder's tensors by stock name."""

    lora: dict[str, dict[str, torch.Tensor]]
    """Stock weight name -> "lora_A" [r, n], "lora_B" [m, r] (, "lora_magnitude_vector" [m]): factors of [m, n]."""
    replaced: dict[str, torch.Tensor]
    """Stock name -> gates, added rows, towers trained in full."""
    config: LoraConfig | None
    """None where there is no LoRA."""

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
        if not isinstance(config, LoraConfig):
            raise UserError(f"{folder}: expected LoRA, got an adapter of PEFT's type {config.peft_type.value}")
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
        for name, factors in lora.items():
            _require_factors(folder, name, factors)
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

    def require_home(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every tensor of the adapter must fit one of the model's `shapes`, by stock name. Raises UserError."""
        homeless = sorted(self.names - shapes.keys())
        if homeless:
            raise UserError(f"{len(homeless)} tensors of the adapter have no place in the base: {homeless[:3]}")
        for name, tensor in self.replaced.items():
            _require_shape(name, tuple(tensor.shape), shapes[name])
        for name, factors in self.lora.items():
            _require_shape(name, (factors["lora_B"].shape[0], factors["lora_A"].shape[1]), shapes[name])

    def scaling(self, name: str) -> float:
        """By which the product of a weight's factors is multiplied (LoRA: alpha / r; rsLoRA: alpha / sqrt(r))."""
        assert self.config is not None
        module, rank = name.removesuffix(".weight"), self.lora[name]["lora_A"].shape[0]
        patterns = self.config.alpha_pattern
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), self.config.lora_alpha)
        return float(alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    def merge_rows(self, name: str, weight: torch.Tensor, start: int) -> torch.Tensor:
        """Rows of a LoRA-adapted matrix, from row `start` on -> fp32 of the same shape: PEFT's own arithmetic."""
        factors, rows = self.lora[name], slice(start, start + len(weight))
        # PEFT's order: the product first, then the scale, then the sum.
        merged = (factors["lora_B"][rows].float() @ factors["lora_A"].float()).mul_(self.scaling(name))
        merged.add_(weight.float())
        if "lora_magnitude_vector" in factors:  # DoRA, Liu et al. 2024: the direction is what LoRA changes
            magnitude = factors["lora_magnitude_vector"][rows].float()
            merged.mul_((magnitude / torch.linalg.norm(merged, dim=1)).view(-1, 1))
        return merged


def _require_factors(folder: Path, name: str, factors: dict[str, torch.Tensor]) -> None:
    """Two matrices of one rank, and DoRA's magnitudes or nothing else. Raises UserError."""
    shapes = {key: tuple(tensor.shape) for key, tensor in factors.items()}
    known = shapes.keys() - {"lora_magnitude_vector"} == {"lora_A", "lora_B"}
    if known and all(tensor.ndim == 2 for key, tensor in factors.items() if key != "lora_magnitude_vector"):
        (rows, rank), magnitudes = shapes["lora_B"], shapes.get("lora_magnitude_vector")
        if shapes["lora_A"][0] == rank and magnitudes in (None, (rows,)):
            return
    raise UserError(f"{folder}: {name}: expected LoRA of a linear layer, lora_A [r, n] and lora_B [m, r], got {shapes}")


def _require_shape(name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if got != expected:
        raise UserError(f"the adapter was made for another base: {name} is {got} there and {expected} here")
