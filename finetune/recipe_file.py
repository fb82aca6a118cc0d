"""recipe.yaml + key=value overrides -> Recipe. All errors at once, each with its place, what was got and expected."""

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune.recipe import Recipe, Source
from modeling.errors import UserError


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; `overrides` are "section.key=value" with YAML values. Raises UserError with every error found."""
    document = _read_yaml(path)
    problems = [problem for override in overrides or [] if (problem := _apply(document, override))]
    document.setdefault("output", f"runs/{path.stem}")
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems += [_explain(details) for details in error.errors()]
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        raise UserError("\n".join([f"{path}: {count}", *(f"  {problem}" for problem in problems)]))
    return _anchor(recipe, path.resolve().parent)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.yaml")], n=1)
        raise UserError(f"{path}: no such recipe" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a mapping (model:, data:, training: ...), got {type(document).__name__}")
    return document


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose second mention of a key is an error, not a silent replacement."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _apply(document: dict[str, Any], override: str) -> str | None:
    """Set one "section.key=value" in place; an index selects from a list. Returns what is wrong, if anything."""
    keys, equals, value = override.partition("=")
    if not equals or not keys:
        return f"{override!r}: expected key=value, such as training.steps=10"
    *parents, last = keys.split(".")
    place: Any = document
    try:
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place.setdefault(key, {})
        place[int(last) if isinstance(place, list) else last] = yaml.safe_load(value)
    except (ValueError, IndexError, TypeError, AttributeError):
        return f"{override!r}: the recipe has no {keys} to set"
    except yaml.YAMLError:
        return f"{override!r}: the value is not YAML"
    return None


def _explain(details: ErrorDetails) -> str:
    """One error of pydantic's as "key path: what was expected, what was got, the nearest valid key"."""
    location = ".".join(str(part) for part in details["loc"]) or "recipe"
    kind, message = details["type"], details["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        key, known = str(details["loc"][-1]), _keys_at(details["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{location}: unknown key; {hint}"
    if kind == "missing":
        return f"{location}: missing"
    if kind == "value_error":
        return f"{location}: {message}"
    got = details["input"]
    near = difflib.get_close_matches(str(got), str(details.get("ctx", {}).get("expected", "")).split("'")[1::2], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{location}: {message[0].lower()}{message[1:]}, got {got!r:.80} ({type(got).__name__}){hint}"


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


def _anchor(recipe: Recipe, folder: Path) -> Recipe:
    """Make paths (data, and a base or adapter that is a folder) absolute: relative ones mean the recipe's folder."""

    def anchored(path: str) -> str:
        return str((folder / path).resolve())

    def source(found: Source) -> Source:
        places: dict[str, Any] = {
            name: tuple(anchored(path) for path in getattr(found, name)) for name in ("path", "image_root")
        }
        if found.hub and (folder / found.hub).is_dir():
            places["hub"] = anchored(found.hub)
        return found.model_copy(update=places)

    model = recipe.model
    if model.continue_from:
        model = model.model_copy(update={"continue_from": anchored(model.continue_from)})
    if model.base and (folder / model.base).is_dir():
        model = model.model_copy(update={"base": anchored(model.base)})
    data = recipe.data.model_copy(
        update={
            "sources": [source(found) for found in recipe.data.sources],
            "eval_sources": [source(found) for found in recipe.data.eval_sources],
        }
    )
    evaluation = recipe.evaluation and recipe.evaluation.model_copy(
        update={"documents": [source(found) for found in recipe.evaluation.documents]}
    )
    return recipe.model_copy(update={"model": model, "data": data, "evaluation": evaluation})
