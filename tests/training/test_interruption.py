"""Killed, told to stop, out of disk: the run goes on, and ends as if nothing had happened."""

import errno
import os
import random
import shutil
import signal
import time
from collections import namedtuple
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_processes, start_processes
from test_pipeline import metrics
from test_trainer import trained

from finetune.pipeline import run
from finetune.recipe.load import load_recipe
from finetune.training import checkpoints, signals
from finetune.training.checkpoints import (
    COMPLETE,
    find_damage,
    last_checkpoint,
    mark_complete,
    remove_incomplete,
    step_of,
)
from finetune.training.training_stage import checkpoint_to_resume
from modeling.errors import Interrupted, UserError

STEPS = 6


@pytest.fixture(scope="module")
def write_in(write_recipe):
    """write_in(folder) -> a recipe with a checkpoint every step, dropout, features to be computed: much to be lost."""
    return lambda folder: write_recipe(folder, training={"steps": STEPS, "checkpoint_every": 1})


@pytest.fixture
def recipe_file(write_in, tmp_path):
    return write_in(tmp_path)


def train(recipe_file, *overrides):
    run(load_recipe(recipe_file, list(overrides)), ("train",))


def assert_same(one, other):
    ours, theirs = trained(one), trained(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    keys = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens")
    lines, expected = ([[line.get(key) for key in keys] for line in metrics(folder)] for folder in (one, other))
    assert lines == expected
    assert len(lines) == STEPS


@pytest.fixture(scope="module")
def whole(write_in, tmp_path_factory):
    """whole(processes) -> the folder of an uninterrupted run, with data and features of its own; and its seconds."""

    @cache
    def run(processes):
        folder = tmp_path_factory.mktemp("whole")
        recipe, started = write_in(folder), time.monotonic()
        run_processes(processes, lambda: train(recipe))
        return folder / "run", time.monotonic() - started

    return run


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in(monkeypatch, place, *, call):
    """A function that writes a file: at its `call`-th call it writes half of something, and is killed."""
    module, name = place.rsplit(".", 1)
    original, calls = getattr(__import__(module, fromlist=[name]), name), []

    def dying(content, file, *args, **kwargs):
        calls.append(file)
        if len(calls) == call:
            Path(file).write_bytes(b"half of it")
            die()
        return original(content, file, *args, **kwargs)

    monkeypatch.setattr(place, dying)


WRITERS = [
    ("finetune.training.image_features.save_file", 1),
    ("modeling.adapters.save_file", 2),
    ("torch.save", 5),  # optimiser, scheduler, random states; of the second checkpoint, the scheduler
]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_resumes(recipe_file, tmp_path, whole, processes):
    """Killed at any moment, the run goes on and ends the same."""
    expected, seconds = whole(processes)
    chance = random.Random(processes)

    def killed_while_writing(place, call):
        patch = pytest.MonkeyPatch()
        dies_in(patch, place, call=call)
        train(recipe_file)

    for place, call in WRITERS:
        group = start_processes(processes, killed_while_writing, place, call)
        deadline = time.monotonic() + 60
        while all(one.is_alive() for one in group) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert -signal.SIGKILL in [one.exitcode for one in group], place
        kill(group)
    for _ in range(3):
        group = start_processes(processes, train, recipe_file)
        time.sleep(chance.uniform(0, seconds))
        kill(group)
    assert not (tmp_path / "run" / "training.json").exists() or last_checkpoint(tmp_path / "run")
    run_processes(processes, train, recipe_file)
    assert_same(tmp_path / "run", expected)
    left = [path for path in (tmp_path / "run").glob("checkpoint-*") if find_damage(path)]
    assert left == []
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) <= 2


def kill(group):
    """As a launcher does when one of them has died."""
    for process in group:
        process.kill()
        process.join()


def tell(recipe_file, number, *, which, step=3):
    """Trains; process `which` sends itself a signal in the middle of a step. Returns what Interrupted says."""
    from finetune.distributed import collectives
    from finetune.training.trainer import IdeficsTrainer

    original, calls = IdeficsTrainer.compute_loss, []

    def telling(self, *args, **kwargs):
        calls.append(1)
        if self.state.global_step == step - 1 and collectives.rank() == which and not self.stop_signal.received:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    IdeficsTrainer.compute_loss = telling
    try:
        train(recipe_file)
    except Interrupted as told:
        return str(told), told.signal
    finally:
        IdeficsTrainer.compute_loss = original
    return None


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_saves_and_resumes(recipe_file, tmp_path, whole, processes, number):
    """The run says how to go on, and ends the same."""
    expected, _ = whole(processes)
    last = processes - 1
    told = run_processes(processes, lambda: tell(recipe_file, number, which=last))
    saved = tmp_path / "run" / "checkpoint-3"
    message = f"{number.name}: saved as {saved}; the same command goes on from there"
    assert told == [(message, number)] * processes
    assert last_checkpoint(tmp_path / "run") == saved
    run_processes(processes, train, recipe_file)
    assert_same(tmp_path / "run", expected)


def test_stop_signal_in_the_last_step(recipe_file, tmp_path, whole):
    """The run ends, too, and the same command finishes it."""
    expected, _ = whole(1)
    (told,) = run_processes(1, lambda: tell(recipe_file, signal.SIGTERM, which=0, step=STEPS))
    assert told[1] == signal.SIGTERM
    assert not (tmp_path / "run" / "training.json").exists()
    run_processes(1, train, recipe_file)
    assert_same(tmp_path / "run", expected)


def test_stop_signal_twice(monkeypatch):
    """The second one ends it at once; an echo of the first one does not."""
    before, told = signal.getsignal(signal.SIGTERM), []

    def tell_three_times():
        with signals.catch_stop_signals() as stop:
            for pause in (0, 0, 2 * signals.ECHO):
                told.append(stop.received)
                monkeypatch.setattr(signals.time, "monotonic", lambda pause=pause: 100.0 + pause)
                os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        tell_three_times()
    assert told == [0, signal.SIGTERM, signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


Usage = namedtuple("Usage", "total used free")


def test_checkpoint_without_room(recipe_file, tmp_path, monkeypatch):
    """The last one stays, and the message says what is needed."""
    original = checkpoints.require_room
    sizes = []

    def fills_up(folder, needed):
        sizes.append(needed)
        free = 10 if len(sizes) == 3 else 10**12
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
        original(folder, needed)

    monkeypatch.setattr("finetune.training.trainer.require_room", fills_up)
    with pytest.raises(UserError, match=r"a checkpoint takes 0.3 MiB, and 0.0 MiB are free\n.*from checkpoint-2"):
        train(recipe_file)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    written = sum(path.stat().st_size for path in last_checkpoint(tmp_path / "run").glob("*.*"))
    assert sizes[2] == pytest.approx(written, rel=0.5)


def test_checkpoint_on_a_disk_that_fills_up(recipe_file, tmp_path, monkeypatch):
    """A disk that fills up while a checkpoint is written."""
    original, calls = torch.save, []

    def full(content, file, *args, **kwargs):
        calls.append(file)
        if "checkpoint-3" in str(file):
            Path(file).write_bytes(b"half of it")
            monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10))
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"and 0\.0 MiB are free"):
        train(recipe_file)
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-2"
    monkeypatch.undo()
    train(recipe_file)
    assert last_checkpoint(tmp_path / "run").name == f"checkpoint-{STEPS}"


def make_checkpoint(folder, step, files):
    checkpoint = folder / f"checkpoint-{step}"
    for name, size in files.items():
        path = checkpoint / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return checkpoint


FILES = {"trained.safetensors": 7, "optimizer.pt": 5, "trainer_state.json": 3, "optimizer_0/.metadata": 2}


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from([*FILES, COMPLETE]), change=st.sampled_from(["gone", "shorter", "longer"]))
def test_checkpoint_incomplete(tmp_path_factory, name, change):
    """What is not as it was written is no checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    older, newer = make_checkpoint(folder, 9, FILES), make_checkpoint(folder, 10, FILES)
    assert last_checkpoint(folder) is None
    for checkpoint in (older, newer):
        mark_complete(checkpoint)
    assert last_checkpoint(folder) == newer
    assert step_of(newer) == 10
    path = newer / name
    content = path.read_bytes()
    path.unlink() if change == "gone" else path.write_bytes(
        content[: len(content) // 2] if change == "shorter" else content + b"}"
    )
    assert last_checkpoint(folder) == older
    remove_incomplete(folder)
    assert [one.name for one in folder.iterdir()] == ["checkpoint-9"]


@pytest.mark.parametrize(("size", "seen_by"), [(300, "every listing"), (2**20 + 5, "going on")])
def test_checkpoint_flipped_byte(tmp_path, size, seen_by):
    """A flipped byte of a checkpoint is noticed."""
    older, newer = (make_checkpoint(tmp_path, step, {"optimizer.pt": size, "rng_state.pth": 9}) for step in (9, 10))
    for checkpoint in (older, newer):
        mark_complete(checkpoint)
    assert find_damage(newer, hash_all=True) is None
    content = bytearray((newer / "optimizer.pt").read_bytes())
    content[size // 2] ^= 4
    (newer / "optimizer.pt").write_bytes(content)
    assert last_checkpoint(tmp_path) == (older if seen_by == "every listing" else newer)
    assert find_damage(newer, hash_all=True) == "optimizer.pt"
    assert find_damage(older, hash_all=True) is None


def test_checkpoint_changed_is_not_resumed(tmp_path):
    """A run does not go on from a checkpoint whose bytes have changed."""
    checkpoint = make_checkpoint(tmp_path, 3, {"optimizer.pt": 2**20 + 5})
    mark_complete(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(bytes(2**20 + 5))
    with pytest.raises(UserError, match=r"optimizer\.pt: is not what was written: .*\n  delete .*checkpoint-3, and"):
        checkpoint_to_resume(tmp_path)
