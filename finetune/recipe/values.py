"""What a value of a recipe can be: numbers that are numbers, names, places."""

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

MOST = 10**15
"""The largest whole number of a recipe: more than anything there is to count, and far from where 64 bits end."""


def _number(value: Any) -> Any:
    """True and yes are no numbers, although Python counts with them."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value} (bool)")
    return value


def _whole_number(value: Any) -> Any:
    """1e3 and 1000.0 are 1000; what is no whole number is left to be refused."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else _number(value)


Whole = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, le=MOST)]
Positive = Annotated[int, BeforeValidator(_whole_number), Field(gt=0, le=MOST)]
Real = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1, allow_inf_nan=False)]
Seed = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, lt=2**32)]
"""numpy takes no larger one."""

Name = Annotated[str, Field(min_length=1, max_length=4096)]


def _listed(value: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"expected a path or a list of paths, got {value!r:.80}")
    return (value,) if isinstance(value, str) else value


def _named(value: Any) -> Any:
    if not isinstance(value, str | list | tuple):
        raise ValueError(f"expected a key or a list of keys, got {value!r:.80}")
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[Name, ...], BeforeValidator(_named)]
"""One key, or a list of them."""

Places = Annotated[tuple[Name, ...], BeforeValidator(_listed)]
"""One path, or a list of them."""


def _prompts(value: Any) -> Any:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(one, str) and one.strip() for one in values):
        raise ValueError(f"expected what a user asks, or a list of such texts, got {value!r:.80}")
    return tuple(values)


Prompts = Annotated[tuple[str, ...], BeforeValidator(_prompts)]
"""One text, or a list of them."""
