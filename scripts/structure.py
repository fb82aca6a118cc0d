#!/usr/bin/env python
"""Print how finely a tree of Python files is cut.

    python scripts/structure.py                                 finetune and modeling, as they are
    python scripts/structure.py 15369f5:finetune finetune       a commit beside the working tree
    python scripts/structure.py finetune --folders              also the files of each folder

A function's length is counted from its `def` to its last line, docstring included. Methods and nested functions count.
A private function starts with one underscore; it is called once where its name occurs once besides its definition, in
the file that defines it.
"""

import argparse
import ast
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

SHORT, HELPER = 4, 6
"""Lines of a function that is hardly more than a name, and of a private one that could stand in its caller."""

REFERENCE = {
    "nanochat": (14, 13, 47, 100, "22%"),
    "lingua": (14, 9, 40, 89, "26%"),
    "torchtune, peft + fusion": (9, 11, 45, 94, "13%"),
}
"""The same figures of code that reads well: files, median, 90th percentile, longest, share of short functions."""


@dataclass(frozen=True)
class Structure:
    """What a tree is cut into."""

    folders: Counter[str]
    """Folder -> Python files directly in it."""
    lines: int
    """Lines of all files."""
    lengths: list[int]
    """Lines of every function."""
    called_once: list[int]
    """Lines of every private function that is called once."""


def read_files(tree: str) -> dict[str, str]:
    """Return path -> text of the Python files of a folder, or of a folder as a commit has it (`COMMIT:folder`)."""
    commit, _, folder = tree.rpartition(":")
    if commit:
        listed = _git("ls-tree", "-r", "--name-only", commit, "--", folder)
        return {path: _git("show", f"{commit}:{path}") for path in listed.splitlines() if path.endswith(".py")}
    listed = _git("ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", "--", folder)
    found = {}
    for path in listed.splitlines():
        if path.endswith(".py"):
            try:
                with open(path, encoding="utf-8") as file:  # noqa: PTH123 - the paths are git's, relative to here
                    found[path] = file.read()
            except FileNotFoundError:
                continue  # deleted, and not committed yet
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout  # noqa: S603, S607


def measure(files: dict[str, str]) -> Structure:
    """Return the figures of some files, path -> text."""
    lengths, called_once = [], []
    for text in files.values():
        tree = ast.parse(text)
        nodes = list(ast.walk(tree))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        names = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        names.update(node.attr for node in nodes if isinstance(node, ast.Attribute))
        for function in functions:
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            lengths.append(length)
            private = function.name.startswith("_") and not function.name.startswith("__")
            if private and names[function.name] == 1:
                called_once.append(length)
    folders = Counter(str(PurePosixPath(path).parent) for path in files)
    return Structure(folders, sum(text.count("\n") for text in files.values()), lengths, called_once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", default=["finetune", "modeling"], metavar="TREE")
    parser.add_argument("--folders", action="store_true", help="print the number of files of each folder, too")
    arguments = parser.parse_args()

    head = "tree", "files", "lines", "functions", "median", "p90", "max", f"<= {SHORT}", "called once", f"<= {HELPER}"
    rows = [head]
    for tree in arguments.trees:
        found = measure(read_files(tree))
        if len(found.lengths) < 2:
            sys.exit(f"{tree}: no Python functions there; expected a folder of this repository, or COMMIT:folder")
        median, p90 = statistics.median(found.lengths), statistics.quantiles(found.lengths, n=10)[-1]
        short = sum(length <= SHORT for length in found.lengths) / len(found.lengths)
        helpers = sum(length <= HELPER for length in found.called_once)
        figures = len(found.lengths), f"{median:g}", f"{p90:.0f}", max(found.lengths), f"{short:.0%}"
        rows.append((tree, sum(found.folders.values()), found.lines, *figures, len(found.called_once), helpers))
        if arguments.folders:
            rows += [(f"  {folder}", count, *[""] * 8) for folder, count in sorted(found.folders.items())]
    for name, (files, median, p90, longest, share) in REFERENCE.items():
        rows.append((name, files, "", "", median, p90, longest, share, "", ""))

    widths = [max(len(str(row[column])) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print(row[0].ljust(widths[0]), *cells, sep="  ")


if __name__ == "__main__":
    main()
