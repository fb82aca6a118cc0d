"""The section `adapter`: LoRA's rank, alpha and dropout, and the fields of PEFT whose results can be merged."""

import difflib
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from finetune.recipe.values import Positive, Share
from modeling.towers import EXACT_LORA


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 2**31


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, OverflowError, RecursionError):
        return False
    return isinstance(value, str)


def _is_by_pattern(value: Any, *, types: tuple[type, ...]) -> bool:
    """Return whether a value is a mapping of patterns to numbers of these types."""
    if not isinstance(value, dict) or not all(map(_is_pattern, value)):
        return False
    return all(_is_number(one) and type(one) in types for one in value.values())


def _is_pattern_or_names(value: Any) -> bool:
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value is None or names or _is_pattern(value)


_FLAG = ("true or false", lambda value: isinstance(value, bool))
_NULL = ("null", lambda value: value is None)
_CONFIG = ("null: its settings are objects that a recipe cannot hold", _NULL[1])
_OF_LISTS = (
    "null: PEFT takes it only beside a list of modules, and the towers are a pattern; see exclude_modules",
    _NULL[1],
)

LORA_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), _FLAG
    ),
    **dict.fromkeys(("megatron_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"), _CONFIG),
    **dict.fromkeys(("monteclora_config", "runtime_config", "arrow_config", "kasa_config", "use_bdlora"), _CONFIG),
    **dict.fromkeys(("layers_to_transform", "layers_pattern"), _OF_LISTS),
    **dict.fromkeys(("trainable_token_indices", "alora_invocation_tokens", "layer_replication"), _NULL),
    "target_parameters": _NULL,
    "bias": ("text", lambda value: isinstance(value, str)),
    "megatron_core": ("text", lambda value: isinstance(value, str)),
    "init_lora_weights": ("true, false or text", lambda value: isinstance(value, bool | str)),
    "rank_pattern": ("{pattern of names: rank}", partial(_is_by_pattern, types=(int,))),
    "alpha_pattern": ("{pattern of names: alpha}", partial(_is_by_pattern, types=(int, float))),
    "exclude_modules": ("a pattern, or a list of names", _is_pattern_or_names),
    "loftq_config": ("{}: the matrices of the base stay as they are", lambda value: value in (None, {})),
    "qalora_group_size": ("a whole number", lambda value: type(value) is int and _is_number(value)),
}
"""Fields of peft.LoraConfig that a recipe may set, and their accepted values. They are listed here because importing
peft takes seconds; a test compares them with peft."""


class Adapter(BaseModel):
    """LoRA. Any other field of `peft.LoraConfig` is passed through to it."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    rank: Positive = 16
    """Rank of the two factors of each adapted matrix."""
    alpha: Positive = 32
    """The product of the factors is scaled by alpha / rank."""
    dropout: Share = 0.0
    """Dropout of the input of the factors, in training."""

    @model_validator(mode="after")
    def _known_fields(self) -> Self:
        ours = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        ours |= dict.fromkeys(("target_modules", "modules_to_save"), "the towers under model")
        for key, value in (self.model_extra or {}).items():
            if key in ours:
                raise ValueError(f"{key} is set by {ours[key]}")
            if key not in LORA_FIELDS:
                near = difflib.get_close_matches(key[:80], ("rank", "alpha", "dropout", *LORA_FIELDS), n=1)
                raise ValueError(f"{key[:80]}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
            expected, fits = LORA_FIELDS[key]
            if key in EXACT_LORA and (value not in EXACT_LORA[key] or not fits(value)):
                raise ValueError(f"{key}: {value!r:.80} could not be merged exactly; expected one of {EXACT_LORA[key]}")
            if not fits(value):
                raise ValueError(f"{key}: expected {expected}, got {value!r:.80} ({type(value).__name__})")
        return self

    @property
    def lora(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig`."""
        return {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **(self.model_extra or {})}
