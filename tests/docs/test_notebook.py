"""docs/quickstart.ipynb: its cells run in order, and print what is stored in it, but for the figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from run_notebook import NOTEBOOK, run_cells

ROOT = Path(__file__).parents[2]
STORED = json.loads(NOTEBOOK.read_text())


def printed(notebook):
    """The text of every output, without numbers: another processor rounds differently."""
    texts = ["".join(output["text"]) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return [re.sub(r"\d[\d.e-]*%?", "N", text) for text in texts]


def test_run_cells_share_a_namespace():
    cells = [{"cell_type": "code", "source": [line]} for line in ("a = 2\n", "print(a)\nprint(3)\n")]
    first, second = run_cells({"cells": [*cells, {"cell_type": "markdown", "source": ["x"]}]})["cells"][:2]
    assert (first["execution_count"], first["outputs"]) == (1, [])
    assert second["outputs"] == [{"name": "stdout", "output_type": "stream", "text": ["2\n", "3\n"]}]


def test_notebook_stores_what_it_printed():
    code = [cell for cell in STORED["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert len(code) >= 5
    assert all(cell["outputs"] for cell in code)


@pytest.mark.slow
def test_notebook_runs(tmp_path):
    """From data to an answer of the merged model, in a fresh process and an empty folder."""
    script = (
        "import json, sys, run_notebook as n; "
        "print(json.dumps(n.run_cells(json.loads(n.NOTEBOOK.read_text()))), file=sys.stdout)"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *same, _ = printed(STORED)  # the last cell prints answers of a model
    assert printed(json.loads(done.stdout))[:-1] == same
