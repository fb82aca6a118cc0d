"""LoraConfig -> the modules that PEFT adapts by it, with rank and alpha of each: PEFT's rules, in bounded time."""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import TypeVar

from peft import LoraConfig

from modeling.patterns import Pattern, matching
from modeling.towers import LORA_TOWERS, lora_pattern

Number = TypeVar("Number", int, float)

OWN = frozenset(
    lora_pattern(towers) for count in range(1, len(LORA_TOWERS) + 1) for towers in combinations(LORA_TOWERS, count)
)
"""Patterns that our own adapters name their targets by."""

NO_PLAIN_LINEAR = ("embed_tokens", "additional_embedding", "position_embedding", "patch_embedding", "lm_head")
"""Last names of modules with a matrix that PEFT's `all-linear` leaves out."""


def lora_targets(config: LoraConfig, modules: Sequence[str], *, where: str) -> set[str]:
    """Those of `modules` that a config puts LoRA on. Raises UserError, which begins with `where`.

    The rules of `peft.tuners.tuners_utils.check_target_module_exists`, of PEFT 0.21: exclude_modules and
    modules_to_save come first; a name out of a list stands for every module whose path ends with it, unless
    layers_to_transform leaves its layer out.
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
    """Modules that a pattern matches in full, or that end with one of a list of names."""
    if isinstance(names, str) and names.lower() == "all-linear":
        return {module for module in modules if module.rpartition(".")[2] not in NO_PLAIN_LINEAR}
    if isinstance(names, str):
        return set(matching([Pattern(names, whole=True)], modules, where=where, known=OWN)[0])
    exact, endings = set(names), tuple(f".{name}" for name in names)
    return {module for module in modules if module in exact or module.endswith(endings)}


def by_pattern(
    patterns: Mapping[str, Number], default: Number, modules: Sequence[str], *, where: str
) -> dict[str, Number]:
    """Module -> its value in a rank_pattern or alpha_pattern: that of the first key which its path ends with."""
    keys = list(patterns)
    values = dict.fromkeys(modules, default)
    found = matching([Pattern(key, r"(.*\.)?(", r")$") for key in keys], modules, where=where)
    for key, hits in reversed(list(zip(keys, found, strict=True))):
        values.update(dict.fromkeys(hits, patterns[key]))
    return values


def saved_modules(names: Collection[str], modules: Collection[str]) -> set[str]:
    """Modules that PEFT saves whole for `modules_to_save`: every one whose path ends with one of these letters."""
    return {module for module in modules if module.endswith(tuple(names))}
