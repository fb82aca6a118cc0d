"""Measurements in processes of their own, with the code of this folder or of any git revision."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def code_of(revision: str, out: Path) -> Path:
    """Return a folder below `out` with the packages of a git revision."""
    folder = (out / f"code-{revision.replace('/', '-')}").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    archive = ["git", "-C", str(ROOT), "archive", revision, "finetune", "modeling"]
    made = subprocess.run(archive, check=True, stdout=subprocess.PIPE)  # noqa: S603
    subprocess.run(["tar", "-x"], cwd=folder, check=True, input=made.stdout)  # noqa: S607
    return folder


def start(script: str, *arguments: object, code: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """Start a script of this folder, with the packages `finetune` and `modeling` in the folder `code`."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(code), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **variables}
    return subprocess.Popen(  # noqa: S603
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the JSON in the last line that a script prints. Raises RuntimeError: it failed."""
    printed, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a measurement ended with status {process.returncode}:\n{errors}")
    return json.loads(printed.splitlines()[-1])
