"""Load recipe.yaml and key=value overrides. All errors are raised at once, each with its key, got and expected.

Paths in the file are relative to the file; paths in key=value are relative to the current folder. Paths of results
(`output`, `data.prepared`) are relative to the current folder in both, and stay as they are.
"""

import difflib
import errno
import os
import re
import types
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune.console import log
from finetune.recipe.plain_yaml import DEEPEST, MOST_BYTES, parse_yaml
from finetune.recipe.schema import Recipe
from finetune.recipe.urls import is_url
from modeling.atomic_files import open_regular
from modeling.errors import UserError

LISTED_ERRORS = 20
"""Largest number of errors that are listed; further errors are only counted."""

_SOURCES = (("data", "sources"), ("data", "eval_sources"), ("evaluation", "documents"))
_PATHS = {("model", "continue_from"), *((*source, key) for source in _SOURCES for key in ("path", "image_root"))}
_PATHS_OR_HUB_IDS = {("model", "base"), *((*source, "hub") for source in _SOURCES)}
_RESULTS = {("output",), ("data", "prepared")}


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe: a file, or the name of one that ships; `overrides` are "section.key=value" with YAML values.

    Raises UserError with every error found.
    """
    path = find_recipe(path)
    try:
        document = absolute_paths(_read(path), (), path.resolve().parent)
    except OSError as error:
        raise UserError(f"{path}: {error.filename!r:.200}: {error.strerror}") from error
    problems = [problem for override in overrides or [] if (problem := _apply(document, override))]
    _replace_steps_or_epochs(document, {override.partition("=")[0] for override in overrides or []})
    document.setdefault("output", f"runs/{path.stem}")
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems += [_explain(details) for details in error.errors(include_url=False)]
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        listed = [f"  {problem}" for problem in problems[:LISTED_ERRORS]]
        more = [f"  and {len(problems) - LISTED_ERRORS} more"] if len(problems) > LISTED_ERRORS else []
        raise UserError("\n".join([f"{path}: {count}", *listed, *more]))
    return recipe


def shipped_folder() -> Path:
    """Return the folder of the recipes that ship: inside the installed package, or recipes/ in a clone."""
    installed = Path(__file__).with_name("shipped")
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def find_recipe(path: Path | str) -> Path:
    """Return the path of a recipe. A name such as `quickstart` means a recipe that ships, unless such a file exists."""
    path = Path(path)
    if path.suffix or len(path.parts) != 1 or path.is_file():
        return path
    shipped = shipped_folder() / f"{path}.yaml"
    return shipped if shipped.is_file() else path


def absolute_paths(value: Any, keys: tuple[str, ...], folder: Path) -> Any:
    """Return the part of a recipe at `keys` with its paths absolute. Raises OSError: a path that no file can have.

    >>> absolute_paths({"sources": [{"path": "a.jsonl", "limit": 5}]}, ("data",), Path("/home/me"))
    {'sources': [{'path': '/home/me/a.jsonl', 'limit': 5}]}
    """
    if isinstance(value, dict):
        return {
            key: absolute_paths(inner, (*keys, key if isinstance(key, str) else "?"), folder)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [absolute_paths(inner, keys, folder) for inner in value]
    where = tuple(key for key in keys if not key.isdecimal())
    if not isinstance(value, str) or not value or where not in _PATHS | _PATHS_OR_HUB_IDS | _RESULTS:
        return value
    if is_url(value):
        return value
    try:
        path = Path(value).expanduser()
    except RuntimeError:  # no such user: a folder may be called ~x
        path = Path(value)
    if where in _RESULTS or (where in _PATHS_OR_HUB_IDS and not (folder / path).is_dir()):
        return str(path) if value.startswith("~") else value
    path = folder / path
    try:  # only the parents are resolved: the images of a linked data file are beside the link
        return str(path.resolve() if path.name in ("", "..") else path.parent.resolve() / path.name)
    except RuntimeError as error:  # pathlib's error for a loop of links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        shipped = difflib.get_close_matches(path.stem, [other.stem for other in shipped_folder().glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        hint = hint or (f"; did you mean {shipped[0]}, which ships?" if shipped else "; `finetune recipes` lists some")
        raise UserError(f"{path}: no such recipe{hint}") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(path)!r:.200}: cannot be read as a recipe: {reason}") from error
    try:
        document = parse_yaml(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        got = type(document).__name__
        raise UserError(f"{path}: expected a mapping (model:, data:, training: ...), got {got}")
    return document


def _apply(document: dict[str, Any], override: str) -> str | None:
    """Set one "section.key=value" in place; a number is an index into a list. Return an error message, or None."""
    keys, equals, text = override.partition("=")
    if not equals or not keys:
        return f"{override!r:.200}: expected key=value, such as training.steps=10"
    try:
        value = absolute_paths(parse_yaml(text), tuple(keys.split(".")), Path.cwd())
    except UserError as error:
        return f"{override!r:.200}: the value is {error}"
    except OSError as error:
        return f"{override!r:.200}: {error.strerror}"
    *parents, last = keys.split(".")
    section: Any = document
    try:
        if len(parents) > DEEPEST:
            raise IndexError(keys)
        for key in parents:
            if isinstance(section, dict) and section.get(key) is None:
                section[key] = {}
            section = section[int(key) if isinstance(section, list) else key]
        section[int(last) if isinstance(section, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        return f"{override!r:.200}: the recipe has no {keys:.200} to set"
    return None


def _replace_steps_or_epochs(document: dict[str, Any], overridden: set[str]) -> None:
    """Let an override of `training.steps` replace the file's `epochs`, and vice versa: a recipe has only one."""
    training = document.get("training")
    if not isinstance(training, dict):
        return
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        both = training.get(given) is not None and training.get(other) is not None
        if both and f"training.{given}" in overridden and f"training.{other}" not in overridden:
            replaced = f"training.{other}: {training[other]!s:.80} of the recipe"
            log(f"training.{given}={training[given]!s:.80} replaces {replaced}")
            training[other] = None


def _explain(details: ErrorDetails) -> str:
    """Format one of pydantic's errors as "key: expected, got, nearest valid key"."""
    # Some parts are pydantic's names for the types of a union, not keys.
    types_alone = r"(function-|constrained-|literal\[|list\[|dict\[)"
    keys = [part for part in details["loc"] if not (isinstance(part, str) and re.match(types_alone, part))]
    location = ".".join(f"{key!s:.80}" for key in keys)[:200] or "recipe"
    kind, message = details["type"], details["msg"].removeprefix("Value error, ")[:400]
    if kind == "extra_forbidden":
        key, known = str(details["loc"][-1])[:80], keys_at(details["loc"][:-1])
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
    return f"{location}: {message[0].lower()}{message[1:]}, got {got!r:.80} ({type(got).__name__}){hint}"


def keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys of a section: () -> model, adapter, ...; ("data", "sources", 0) -> format, path, ..."""

    def section_in(annotation: Any) -> type[BaseModel] | None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        if typing.get_origin(annotation) in (list, typing.Union, types.UnionType, Annotated):
            return next((found for inner in typing.get_args(annotation) if (found := section_in(inner))), None)
        return None

    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            section = section_in(section.model_fields[part].annotation) or section
    return list(section.model_fields)
