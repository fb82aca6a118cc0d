"""The types of a recipe's values: numbers (no booleans), names, paths, texts; lists that accept a single value."""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

MOST = 10**15
"""Largest whole number of a recipe: larger than any sensible count, and far below the limit of 64 bits."""


def _number(value: Any) -> Any:
    """Refuse booleans, which Python treats as 0 and 1."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value} (bool)")
    return value


def _whole_number(value: Any) -> Any:
    """Return 1000 for 1e3 and 1000.0, and any other value as it is, for pydantic to accept or refuse."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else _number(value)


Whole = Annotated[int, Field(ge=0, le=MOST), BeforeValidator(_whole_number)]
Positive = Annotated[int, Field(gt=0, le=MOST), BeforeValidator(_whole_number)]
Real = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_number)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), BeforeValidator(_number)]
Seed = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_whole_number)]
"""A random seed below 2**32, numpy's limit."""

Name = Annotated[str, Field(min_length=1, max_length=4096)]


def _one_or_list(expected: str) -> BeforeValidator:
    """Return a validator that accepts one text in place of a list of one."""

    def listed(value: Any) -> Any:
        if not isinstance(value, str | list | tuple):
            raise ValueError(f"expected {expected}, got {value!r:.80}")
        return (value,) if isinstance(value, str) else value

    return BeforeValidator(listed, json_schema_input_type=str | list[str])


def _not_blank(value: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(one, str) and one.strip() for one in values):
        raise ValueError(f"expected a prompt or a list of prompts, got {value!r:.80}")
    return value


Keys = Annotated[tuple[Name, ...], _one_or_list("a key or a list of keys")]
Paths = Annotated[tuple[Name, ...], _one_or_list("a path or a list of paths")]
Prompts = Annotated[
    tuple[str, ...],
    _one_or_list("a text or a list of texts"),
    BeforeValidator(_not_blank, json_schema_input_type=str | list[str]),
]
