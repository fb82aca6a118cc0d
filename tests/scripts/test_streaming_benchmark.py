"""The benchmark of streaming runs, from the first row to a resumed one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_rows_are_waited_for_and_resumed(tmp_path):
    script = [sys.executable, "scripts/benchmarks/streaming.py", "--out", tmp_path, "--workers", "0", "2"]
    small = ["--rows", "3", "--images", "128", "--records", "300", "--step", "0.01"]
    done = subprocess.run([*script, *small], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "streaming.json").read_text())
    assert [(one["code"], one["workers"]) for one in found["waiting"]] == [("now", 0), ("now", 2)]
    for waiting in found["waiting"]:
        assert waiting["images_per_second"] == pytest.approx(32 * waiting["rows_per_second"])
        assert 0 <= waiting["waiting"] <= 1
    for resuming in found["resuming"]:
        assert resuming["records"] >= 300
        assert resuming["rows"] % 8 == 0
    assert len(found["resuming"]) == 2
