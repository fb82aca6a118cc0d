"""The tensors of an adapter, and their merge: base tensor -> merged tensor, a few rows at a time.

Merging, chat, evaluation and continued training all read an adapter by `AdapterWeights.read` and `require_fit`: it must
be complete, and every tensor must fit the base; else the error names the tensor.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Literal, TypeVar

import torch
from peft import LoraConfig

from modeling.adapter_files import (
    PEFT_CONFIG,
    TRAINED_FILE,
    has_peft_tensors,
    read_lora_config,
    read_peft_tensors,
    read_trained,
    require_adapter,
)
from modeling.bounded_regex import Pattern, matching
from modeling.errors import UserError
from modeling.quantize import Nf4, quantized_names
from modeling.safetensors_io import Rows, Stored
from modeling.shapes import Config
from modeling.towers import ADDED_WEIGHTS, LORA_TOWERS, lora_pattern, stock_name

BasePrecision = Literal["full", "nf4"]
"""Precision of the base: the released weights (full), or these in NF4, dequantised."""


def weights_of(stored: Mapping[str, Stored], config: Config, base_precision: BasePrecision) -> dict[str, Rows]:
    """Return stock name -> tensor of the base, in the precision that an adapter is added to."""
    names = quantized_names(config) if base_precision == "nf4" else set()
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
        """Return rows in fp32, whatever dtype they are stored in."""
        with _ONE_AT_A_TIME:
            quantized = _quantized(self.stored)
        return quantized.rows(start, stop)


_ONE_AT_A_TIME = Lock()
"""A matrix is quantised once, however many threads ask for its rows."""


@lru_cache(maxsize=2)  # two: threads may still read the last rows of the previous matrix
def _quantized(stored: Stored) -> Nf4:
    return Nf4.of(stored.rows, stored.shape)


_HEADS = {"lm_head.weight", "model.embed_tokens.weight"}
"""Matrices whose rows for added tokens are in a separate module."""


@dataclass
class AdapterWeights:
    """The tensors of an adapter folder by stock name, and their arithmetic."""

    lora: dict[str, dict[str, torch.Tensor]]
    """Stock weight name -> "lora_A" [r, n], "lora_B" [m, r] (, "lora_magnitude_vector" [m]): factors of [m, n]."""
    replaced: dict[str, torch.Tensor]
    """Stock name -> tensor that replaces the base's: gates, added rows, towers trained in full."""
    config: LoraConfig | None
    """PEFT's config; None if there is no LoRA."""
    folder: Path = Path()

    @classmethod
    def read(cls, folder: Path) -> "AdapterWeights":
        """Read a folder. Raises UserError: no adapter, a damaged one, or one whose merge would not be exact."""
        require_adapter(folder)
        config, replaced = read_lora_config(folder), read_trained(folder)
        lora: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in (read_peft_tensors(folder) if config else {}).items():
            module, lora_part, rest = name.partition(".lora_")
            if lora_part:
                lora.setdefault(f"{stock_name(module)}.weight", {})[f"lora_{rest}".removesuffix(".weight")] = tensor
                continue
            stock = stock_name(name)
            if stock in replaced:
                raise UserError(f"{folder}: {stock} is there twice, in PEFT's file and in {TRAINED_FILE}")
            if not stock.startswith(("model.embed_tokens.", "lm_head.")) and not saved_modules(
                config.modules_to_save or [] if config else [], _paths(stock)
            ):
                raise UserError(f"{folder}: holds {stock}, which its {PEFT_CONFIG} does not name in modules_to_save")
            replaced[stock] = tensor
        for name, factors in lora.items():
            _require_factors(folder, name, factors)
        if config and not lora:
            raise UserError(f"{folder}: not whole: {PEFT_CONFIG} is one of LoRA, and no tensor of LoRA is there")
        if not config and has_peft_tensors(folder):
            raise UserError(f"{folder}: adapter_model.* lies there without its {PEFT_CONFIG}; copy that beside it")
        return cls(lora, replaced, config, folder)

    @property
    def names(self) -> set[str]:
        """Return the stock names of all tensors that the adapter changes."""
        return {*self.lora, *self.replaced}

    @property
    def added_tokens(self) -> int | None:
        """Return the number of added tokens that the adapter has rows for, or None."""
        rows = [len(tensor) for name, tensor in self.replaced.items() if name in ADDED_WEIGHTS and tensor.ndim]
        return rows[0] if rows else None

    def require_fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the adapter is complete and fits a model of these `shapes` (by stock name)."""
        if foreign := sorted(self.names - shapes.keys()):
            raise UserError(
                f"{self.folder}: {len(foreign)} tensors of the adapter have no place in the base: {foreign[:3]}; "
                f"it was made for another model"
            )
        for name, tensor in self.replaced.items():
            self._require_shape(name, tuple(tensor.shape), shapes[name])
        for name, factors in self.lora.items():
            self._require_shape(name, (factors["lora_B"].shape[0], factors["lora_A"].shape[1]), shapes[name])
        if both := sorted(self.lora.keys() & self.replaced.keys() - _HEADS):
            raise UserError(
                f"{self.folder}: {both[0]} is there whole, and has LoRA as well: which of them was trained?"
            )
        if self.config:
            self._require_all(self.config, shapes)
            for name in self.lora:
                self.scaling(name)  # matches the patterns now, before anything is written

    def _require_shape(self, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if got != expected:
            raise UserError(
                f"{self.folder}: the adapter was made for another base: {name} is {got} there and {expected} here"
            )

    def _require_all(self, config: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError unless exactly the modules in the config have tensors, of the right rank."""
        if on_head := sorted(self.lora.keys() & _HEADS):
            raise UserError(
                f"{self.folder}: LoRA on {on_head[0]}, which in IDEFICS is two matrices, to which PEFT's LoRA does "
                f"not add: the model would not run; train without it in target_modules"
            )
        where = str(self.folder / PEFT_CONFIG)
        matrices = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1]
        modules = sorted(name.removesuffix(".weight") for name in matrices)
        targets = {f"{module}.weight" for module in lora_targets(config, modules, where=where)}
        if missing := sorted(targets - self.lora.keys()):
            raise UserError(
                f"{self.folder}: not whole: target_modules names {len(targets)} matrices of the base, and there is "
                f"LoRA for {len(targets) - len(missing)} of them, not for {missing[0]}; save the adapter again"
            )
        if surplus := sorted(self.lora.keys() - targets):
            raise UserError(f"{self.folder}: has LoRA for {surplus[0]}, which {where} does not name in target_modules")
        ranks = by_pattern(config.rank_pattern, config.r, modules, where=f"{where}: rank_pattern")
        for name, factors in self.lora.items():
            if (got := len(factors["lora_A"])) != (expected := ranks[name.removesuffix(".weight")]):
                raise UserError(f"{self.folder}: {name} has LoRA of rank {got}, and {where} says {expected}")
            if ("lora_magnitude_vector" in factors) != bool(config.use_dora):
                found = "no magnitude" if config.use_dora else "a magnitude"
                raise UserError(f"{self.folder}: {name} has {found}, and {where} says use_dora {config.use_dora}")
        paths = {path for name in shapes for path in _paths(name)}
        saved = saved_modules(config.modules_to_save or [], paths)
        if foreign := [name for name in config.modules_to_save or [] if not saved_modules([name], paths)]:
            raise UserError(
                f"{self.folder}: modules_to_save names {foreign[0][:80]!r}, which the base does not have; "
                f"it was made for another model"
            )
        expected_names = {name for name in shapes if saved & {*_paths(name)}}
        if missing := sorted(expected_names - self.replaced.keys()):
            raise UserError(
                f"{self.folder}: not whole: modules_to_save names {missing[0]}, which is not there; "
                f"fetch or save the adapter again"
            )

    @cached_property
    def _alphas(self) -> dict[str, float]:
        """Return module -> alpha, for the modules with LoRA."""
        assert self.config is not None
        modules, where = [name.removesuffix(".weight") for name in self.lora], self.folder / PEFT_CONFIG
        return by_pattern(self.config.alpha_pattern, self.config.lora_alpha, modules, where=f"{where}: alpha_pattern")

    def scaling(self, name: str) -> float:
        """Return the scale of a weight's factors: alpha / r, or alpha / sqrt(r) in rsLoRA (Kalajdzievski 2023)."""
        assert self.config is not None
        rank = self.lora[name]["lora_A"].shape[0]
        alpha = self._alphas[name.removesuffix(".weight")]
        return float(alpha / (math.sqrt(rank) if self.config.use_rslora else rank))

    def merge_rows(self, name: str, weight: torch.Tensor, start: int) -> torch.Tensor:
        """Add LoRA to rows of a matrix, from row `start` on: [rows, n] -> fp32 [rows, n], by PEFT's arithmetic."""
        factors, rows = self.lora[name], slice(start, start + len(weight))
        # PEFT's order: the product first, then the scale, then the sum.
        merged = (factors["lora_B"][rows].float() @ factors["lora_A"].float()).mul_(self.scaling(name))
        merged.add_(weight.float())
        if "lora_magnitude_vector" in factors:  # DoRA (Liu et al. 2024): LoRA changes only the direction
            magnitude = factors["lora_magnitude_vector"][rows].float()
            merged.mul_((magnitude / torch.linalg.norm(merged, dim=1)).view(-1, 1))
        return merged


def _require_factors(folder: Path, name: str, factors: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless there are two matrices of equal rank and, optionally, DoRA's magnitudes."""
    shapes = {key: tuple(tensor.shape) for key, tensor in factors.items()}
    known = shapes.keys() - {"lora_magnitude_vector"} == {"lora_A", "lora_B"}
    if known and all(tensor.ndim == 2 for key, tensor in factors.items() if key != "lora_magnitude_vector"):
        (rows, rank), magnitudes = shapes["lora_B"], shapes.get("lora_magnitude_vector")
        if shapes["lora_A"][0] == rank and magnitudes in (None, (rows,)):
            return
    raise UserError(f"{folder}: {name}: expected LoRA of a linear layer, lora_A [r, n] and lora_B [m, r], got {shapes}")


def _paths(name: str) -> list[str]:
    """Return the modules that a tensor lies in: of `a.b.weight`, `a` and `a.b`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


Number = TypeVar("Number", int, float)

OWN = frozenset(
    lora_pattern(towers) for count in range(1, len(LORA_TOWERS) + 1) for towers in combinations(LORA_TOWERS, count)
)
"""Patterns for the targets of our own adapters, which are fast to match."""

NO_PLAIN_LINEAR = ("embed_tokens", "additional_embedding", "position_embedding", "patch_embedding", "lm_head")
"""Last names of modules with a matrix that PEFT's `all-linear` leaves out."""


def lora_targets(config: LoraConfig, modules: Sequence[str], *, where: str) -> set[str]:
    """Return the modules that a config puts LoRA on. Raises UserError, whose message begins with `where`.

    The rules are those of `peft.tuners.tuners_utils.check_target_module_exists` in PEFT 0.21: exclude_modules and
    modules_to_save come first; a name in a list means every module whose path ends with it, unless
    layers_to_transform excludes its layer.
    """
    excluded = _named(config.exclude_modules or [], modules, where=f"{where}: exclude_modules")
    whole = [Pattern(name, r"(^|.*\.)", r"($|\..*)") for name in config.modules_to_save or []]
    for found in matching(whole, modules, where=f"{where}: modules_to_save"):
        excluded |= found.keys()
    targets = _named(config.target_modules or [], modules, where=f"{where}: target_modules")
    chosen = config.layers_to_transform
    if chosen is not None and chosen != []:
        patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or [""]
        around = [
            Pattern(text, r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.") if text else Pattern("", r".*?\.[^.]*\.(?P<idx>\d+)\.")
            for text in patterns
        ]
        places = matching(around, modules, where=f"{where}: layers_pattern")
        layer = {module: idx for hits in reversed(places) for module, idx in hits.items()}
        layers = {chosen} if isinstance(chosen, int) else set(chosen)
        exact = set(config.target_modules or [])
        targets = {one for one in targets if one in exact or (one in layer and int(layer[one]) in layers)}
    return targets - excluded


def _named(names: Collection[str], modules: Sequence[str], *, where: str) -> set[str]:
    """Return the modules that a pattern matches completely, or whose path ends with one of the names."""
    if isinstance(names, str) and names.lower() == "all-linear":
        return {module for module in modules if module.rpartition(".")[2] not in NO_PLAIN_LINEAR}
    if isinstance(names, str):
        return set(matching([Pattern(names, whole=True)], modules, where=where, known=OWN)[0])
    exact, endings = set(names), tuple(f".{name}" for name in names)
    return {module for module in modules if module in exact or module.endswith(endings)}


def by_pattern(
    patterns: Mapping[str, Number], default: Number, modules: Sequence[str], *, where: str
) -> dict[str, Number]:
    """Return module -> rank or alpha: that of the first pattern that matches the end of its path, or `default`."""
    keys = list(patterns)
    values = dict.fromkeys(modules, default)
    found = matching([Pattern(key, r"(.*\.)?(", r")$") for key in keys], modules, where=where)
    for key, hits in reversed(list(zip(keys, found, strict=True))):
        values.update(dict.fromkeys(hits, patterns[key]))
    return values


def saved_modules(names: Collection[str], modules: Collection[str]) -> set[str]:
    """Return the modules that PEFT saves in full for `modules_to_save`: those whose path ends with a name."""
    return {module for module in modules if module.endswith(tuple(names))}
