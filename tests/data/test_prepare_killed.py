"""`finetune prepare` with two workers is killed: no process of it is left, and the same command makes the same set."""

import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.fixture
def prepare(write_recipe, tmp_path):
    """prepare(folder) -> a process that prepares a file of at least four shards there."""
    recipe = write_recipe(tmp_path, data={"workers": 2})
    path = recipe.parent / "dialogues.jsonl"
    lines = path.read_text()
    path.write_text(lines * (4 * 2**18 // len(lines) + 1))

    def start(folder):
        command = [sys.executable, "-m", "finetune", "prepare", str(recipe), f"data.prepared={folder}"]
        return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return start


@pytest.mark.slow
def test_killed_prepare_goes_on(prepare, tmp_path):
    assert prepare(tmp_path / "whole").wait() == 0
    process = prepare(tmp_path / "killed")
    wait_until(lambda: parts(tmp_path / "killed"))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not is_running(process.pid))
    assert 1 <= len(parts(tmp_path / "killed")) < 4
    assert prepare(tmp_path / "killed").wait() == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def parts(folder):
    """The parts that are whole."""
    return [path for path in folder.glob(".*.work/parts/*") if not path.suffix]


def content(folder):
    """Path -> bytes, of the only set in a folder, and nothing else is there."""
    sets = [path for path in folder.iterdir() if path.is_dir() and path.name != "run"]
    assert [one.name.partition("-")[0] for one in sets] == ["dialogues.jsonl"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sets[0].rglob("*") if path.is_file()}


def is_running(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
