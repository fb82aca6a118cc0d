"""The benchmark's two sides read the same tokens, with the same loss and gradients; its figures are whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("mix", "features"), [("llava", "cached"), ("llava", "live"), ("text", "cached")])
def test_both_sides_learn_the_same(mix, features, tmp_path):
    out, picture = tmp_path / "benchmark.json", tmp_path / "benchmark.png"
    options = ["--mix", mix, "--features", features, "--model", "27m", "--examples", "4", "--batch", "2"]
    script = [sys.executable, "scripts/benchmarks/training.py", *options, "--lines", "ours", "random"]
    done = subprocess.run([*script, "--json", out, "--picture", picture], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())[mix]
    assert found["parity"]["tensors"] == 70
    assert found["parity"]["loss"] < 1e-5
    assert found["parity"]["gradient"] < 1e-4
    for line in found["lines"].values():
        assert line["dialogues"] == 4
        assert sum(line["split"].values()) == pytest.approx(1)
        assert 0 < line["of_multiplying_rate"] < 1
    assert found["lines"]["ours"]["padding"] == 0
    assert (found["lines"]["ours"]["filling_seconds"] > 0) == (mix != "text" and features == "cached")
    assert picture.read_bytes().startswith(b"\x89PNG")
