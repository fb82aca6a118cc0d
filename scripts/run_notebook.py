#!/usr/bin/env python
"""Run the code cells of docs/quickstart.ipynb in order, and store what each prints in the notebook.

    python scripts/run_notebook.py

Runs in the current folder, where it leaves runs/; without Jupyter. Messages on stderr are not stored.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def run_cells(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook with the outputs of its code cells, all run in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("".join(cell["source"]), f"cell {count}", "exec"), namespace)  # noqa: S102
            text = printed.getvalue().splitlines(keepends=True)
            cell = {
                **cell,
                "execution_count": count,
                "outputs": [{"name": "stdout", "output_type": "stream", "text": text}] if text else [],
            }
        cells.append(cell)
    return {**notebook, "cells": cells}


if __name__ == "__main__":
    ran = run_cells(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    NOTEBOOK.write_text(json.dumps(ran, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
