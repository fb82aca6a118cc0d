#!/usr/bin/env python
"""Write the parts of README and docs/ that are made from the code: the tree, the recipe reference, what commands print.

    python scripts/make_docs.py              rewrite what has changed, and print the names of those pages
    python scripts/make_docs.py --check      exit with status 1 instead, where a page is out of date

Such a part stands between two comments of its page, `<!-- made by scripts/make_docs.py: NAME -->` and `<!-- end -->`.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import sys
import unittest.mock
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune.data.formats import FORMATS
from finetune.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- made by scripts/make_docs\.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def make_tree(root: Path = ROOT) -> str:
    """Return a table for each package: its files with their links, and the first sentence of each file's docstring."""
    parts = []
    for package in sorted(
        path.parent for name in ("finetune", "modeling") for path in (root / name).rglob("__init__.py")
    ):
        name = package.relative_to(root)
        lines = [
            f"### {name}/",
            "",
            f"{_first_sentence(package / '__init__.py')}.",
            "",
            "| file | what it is |",
            "| --- | --- |",
        ]
        for path in sorted(package.glob("*.py")):
            if path.name not in ("__init__.py", "__main__.py"):
                lines.append(f"| [{path.name}](../{path.relative_to(root)}) | {_cell(_first_sentence(path))} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _first_sentence(path: Path) -> str:
    paragraph = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
    return re.split(r"(?<=\.)\s", " ".join(paragraph.split()), maxsplit=1)[0].rstrip(".")


def _cell(text: str) -> str:
    """Return a text as the cell of a table; `<image>` outside of code would be taken for HTML."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def make_reference() -> str:
    """Return every key of a recipe, section by section, with its values, its default and what it does."""
    schema = Recipe.model_json_schema()
    sections = schema["$defs"]
    parts = []

    def add(title: str, name: str, keys: Mapping[str, Any], required: list[str]) -> None:
        lines = [f"### {title}", "", sections[name]["description"].split("\n\n")[0] if name else "", ""]
        lines += ["| key | values | default | what it does |", "| --- | --- | --- | --- |"]
        for key, value in keys.items():
            default = "required" if key in required else f"`{_yaml(value.get('default'))}`"
            default = "`runs/NAME`" if (name, key) == ("", "output") else default  # recipe.load fills it in
            lines.append(f"| `{key}` | {_values(value)} | {default} | {_cell(value.get('description', ''))} |")
        parts.append("\n".join(lines))

    plain = {key: value for key, value in schema["properties"].items() if not _section_of(value, sections)}
    add("At the top", "", plain, schema["required"])
    names = {"data.sources[]": "Source", "data.augment": "Augment", "training.instability": "Instability"}
    for key, value in schema["properties"].items():
        if name := _section_of(value, sections):
            add(f"`{key}`", name, sections[name]["properties"], sections[name].get("required", []))
            for inner in (inner for inner in names if inner.startswith(f"{key}.")):
                section = sections[names[inner]]
                add(f"`{inner}`", names[inner], section["properties"], section.get("required", []))
    return "\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def _section_of(value: Mapping[str, Any], sections: Mapping[str, Any]) -> str | None:
    """Return the name of the class of a key that holds a section."""
    references = [part["$ref"] for part in (value, *value.get("anyOf", ())) if "$ref" in part]
    names = [reference.rsplit("/", 1)[1] for reference in references]
    return next((name for name in names if sections[name].get("properties")), None)


def _values(value: Mapping[str, Any]) -> str:
    """Return the values that a key of the schema takes, in words."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(_values(part) for part in value["anyOf"]))
    if "$ref" in value:
        return "a section"
    if "enum" in value or "const" in value:
        return ", ".join(f"`{_yaml(one)}`" for one in value.get("enum", [value.get("const")]))
    kind = value.get("type")
    if kind in ("integer", "number"):
        least = value.get("exclusiveMinimum", value.get("gt", value.get("minimum", value.get("ge"))))
        above = " above" if "exclusiveMinimum" in value or "gt" in value else " from"
        most = value.get("exclusiveMaximum", value.get("lt"))
        bounds = f"{above} {least}" if least is not None else ""
        bounds += f", below {most}" if most is not None and most < 2**32 else ""
        return ("whole number" if kind == "integer" else "number") + bounds
    if kind == "array":
        return "list of sources" if "$ref" in value.get("items", {}) else "list"
    return {"string": "text", "boolean": "`true`, `false`", "object": "keys with values", "null": "`null`"}[kind or ""]


def _yaml(value: object) -> str:
    """Return a value as YAML writes it on one line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def make_fields() -> str:
    """Return the fields that each format reads; of several names of one field, the first that a record has counts."""
    from finetune.data.formats.fields import CAPTIONS, IMAGES

    words = {"IMAGE": "|".join(IMAGES), "CAPTION": "|".join(CAPTIONS)}
    lines = ["| format | fields |", "| --- | --- |"]
    for name, family in FORMATS.items():
        fields = [
            next((word for word, names in words.items() if names == field), _names(field)) for field in family.reads
        ]
        if fields:
            lines.append(f"| `{name}` | {' · '.join(fields)} |")
    for word, names in words.items():
        lines.append(f"| {word} is | {_names(names)} |")
    return "\n".join(lines) + "\n"


def _names(field: str) -> str:
    return " or ".join(f"`{name}`" for name in field.split("|"))


def show_quickstart() -> str:
    """Return what the quickstart prints at its end, of the measured run in recipes/quickstart.result.json."""
    from finetune.reporting.summary import show_result

    result = json.loads((ROOT / "recipes" / "quickstart.result.json").read_text())
    out = io.StringIO()
    with contextlib.redirect_stdout(out), unittest.mock.patch.dict(os.environ, {"COLUMNS": "100"}):
        show_result(Path("runs/quickstart"), result)
    return _block(out.getvalue())


def show_plan() -> str:
    """Return what `finetune plan` prints of a recipe that does not fit, from its table of memory on."""
    from typer.testing import CliRunner

    from finetune.cli import app

    command = ["plan", str(ROOT / "recipes" / "idefics-9b_lora_1x80gb.yaml"), "--gpu", "24GiB"]
    printed = CliRunner().invoke(app, command, env={"COLUMNS": "100"}).stdout
    return _block(printed[printed.index("memory at its peak") :])


def _block(printed: str) -> str:
    return "```\n" + "".join(f"{line.rstrip()}\n" for line in printed.splitlines()) + "```\n"


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

PARTS: Mapping[str, Callable[[], str]] = {
    "tree": make_tree,
    "reference": make_reference,
    "fields": make_fields,
    "quickstart": show_quickstart,
    "plan": show_plan,
}


def rewrite(text: str) -> str:
    """Return a page with its parts made anew."""
    return PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    outdated = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (made := rewrite(text)) != text:
            outdated.append(page)
            print(page.relative_to(ROOT))
            if not check:
                page.write_text(made, encoding="utf-8")
    if check and outdated:
        sys.exit("out of date: run python scripts/make_docs.py")


if __name__ == "__main__":
    main()
