"""recipe.yaml + key=value overrides -> Recipe. All errors at once, each with its place, what was got and expected."""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune.console import log
from finetune.recipe.paths import anchored
from finetune.recipe.plain_yaml import DEEPEST, MOST_BYTES, parse_yaml
from finetune.recipe.schema import Recipe
from modeling.errors import UserError
from modeling.files import open_regular

MOST_PROBLEMS = 20
"""So many are listed; more are counted."""


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; `overrides` are "section.key=value" with YAML values. Raises UserError with every error found."""
    try:
        document = anchored(_read_yaml(path), (), path.resolve().parent)
    except OSError as error:
        raise UserError(f"{path}: {error.filename!r:.200}: {error.strerror}") from error
    problems = [problem for override in overrides or [] if (problem := _apply(document, override))]
    _replace_length(document, {override.partition("=")[0] for override in overrides or []})
    document.setdefault("output", f"runs/{path.stem}")
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems += [_explain(details) for details in error.errors(include_url=False)]
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        listed = [f"  {problem}" for problem in problems[:MOST_PROBLEMS]]
        more = [f"  and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise UserError("\n".join([f"{path}: {count}", *listed, *more]))
    return recipe


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: no such recipe{hint}") from error
    except (OSError, ValueError) as error:  # a name that no file can have is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(path)!r:.200}: no recipe can be read here: {reason}") from error
    try:
        document = parse_yaml(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping (model:, data:, training: ...), got {_kind(document)}")
    return document


def _apply(document: dict[str, Any], override: str) -> str | None:
    """Set one "section.key=value" in place; an index selects from a list. Returns what is wrong, if anything."""
    keys, equals, text = override.partition("=")
    if not equals or not keys:
        return f"{override!r:.200}: expected key=value, such as training.steps=10"
    try:
        value = anchored(parse_yaml(text), tuple(keys.split(".")), Path.cwd())
    except UserError as error:
        return f"{override!r:.200}: the value is {error}"
    except OSError as error:
        return f"{override!r:.200}: {error.strerror}"
    *parents, last = keys.split(".")
    place: Any = document
    try:
        if len(parents) > DEEPEST:
            raise IndexError(keys)
        for key in parents:
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        return f"{override!r:.200}: the recipe has no {keys:.200} to set"
    return None


def _replace_length(document: dict[str, Any], overridden: set[str]) -> None:
    """A recipe has either steps or epochs: the one that is given in the command replaces the other of the file."""
    training = document.get("training")
    if not isinstance(training, dict):
        return
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        both = training.get(given) is not None and training.get(other) is not None
        if both and f"training.{given}" in overridden and f"training.{other}" not in overridden:
            was = f"training.{other}: {training[other]!s:.80} of the recipe"
            log(f"training.{given}={training[given]!s:.80} replaces {was}")
            training[other] = None


def _explain(details: ErrorDetails) -> str:
    """One error of pydantic's as "key path: what was expected, what was got, the nearest valid key"."""
    location = ".".join(f"{part!s:.80}" for part in details["loc"] if not _is_of_pydantic(part))[:200] or "recipe"
    kind, message = details["type"], details["msg"].removeprefix("Value error, ")[:400]
    if kind == "extra_forbidden":
        key, known = str(details["loc"][-1])[:80], _keys_at(details["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{location}: unknown key; {hint}"
    if kind == "missing":
        return f"{location}: missing"
    if kind == "value_error":
        return f"{location}: {message}"
    got = details["input"]
    named = str(details.get("ctx", {}).get("expected", "")).split("'")[1::2]
    near = difflib.get_close_matches(got[:80], named, n=1) if isinstance(got, str) else []
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{location}: {message[0].lower()}{message[1:]}, got {got!r:.80} ({_kind(got)}){hint}"


def _is_of_pydantic(part: int | str) -> bool:
    """Whether a part of an error's place names one of several types that a key may have, and no key."""
    return isinstance(part, str) and bool(re.match(r"(function-|constrained-|literal\[|list\[|dict\[)", part))


def _kind(value: Any) -> str:
    return type(value).__name__


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys a recipe may have at a place: () -> model, adapter, ...; ("data", "sources", 0) -> format, path, ..."""
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = _section_in(section.model_fields[part].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, Annotated):
        return next((found for inner in typing.get_args(annotation) if (found := _section_in(inner))), None)
    return None
