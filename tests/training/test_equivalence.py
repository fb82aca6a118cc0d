"""One, two and four processes, DDP and FSDP2: the same losses, gradients and adapters."""

import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from equivalence import ADAMW_RATE, LAYOUTS, PACKS, adapter, compare, gradient_errors, relative_error, train
from processes import run_processes
from safetensors.torch import load_file
from test_trainer import attached, logged

from finetune.data.sampling import Row
from finetune.distributed import collectives
from modeling import loading
from modeling.packed_forward import PackedIdefics

GROUPS = [(1, 9), (2,), (0, 8), (9,), (3, 10), (11,), (), (4, 5), (9,), (), (9,), (), (6, 7), (), (), ()]
"""Four steps of the twelve dialogues, of which 9 shows no image: rows of unequal tokens, text alone, nothing at all; a
step without images; three of four processes with nothing."""


@pytest.fixture(scope="module")
def rows(make_rows):
    return replace(make_rows(), rows=[Row(0, group) for group in GROUPS], blank_image=True)


@pytest.fixture(scope="module")
def held(make_rows):
    found = replace(make_rows(row_tokens=192), blank_image=True)
    assert len(found.rows) % 2  # one of two processes has a row more
    return found


@pytest.fixture(scope="module")
def group(shallow_folder, rows):
    """group(processes, {folder: options}) -> what each process returned of each training, one after the other."""
    tokenizer = loading.load_processor(str(shallow_folder)).tokenizer

    def work(trainings):
        return [train(attached(shallow_folder), tokenizer, one, rows, **more) for one, more in trainings.items()]

    return lambda processes, trainings: run_processes(processes, work, trainings)


AT_LENGTH = {"sgd": False, "record": False, "every": 2}
"""AdamW, and a checkpoint to resume from."""


@pytest.fixture(scope="module")
def alone(group, held, tmp_path_factory):
    """What one process makes: sgd/, adamw/ and held/."""
    folder = tmp_path_factory.mktemp("alone")
    evaluated = {"record": False, "held": held}
    group(1, {folder / "sgd": {}, folder / "adamw": AT_LENGTH, folder / "held": evaluated})
    return folder


@pytest.fixture(scope="module")
def together(group, alone, held, tmp_path_factory):
    """together(processes, kind) -> (folder, what each process returned): given/, begun at each step with the weights of
    one process, and sgd/; of two also adamw/ and held/. Once a layout."""

    @cache
    def start(processes, kind):
        folder = tmp_path_factory.mktemp("together")
        trainings = {folder / "given": {"given": alone / "sgd"}, folder / "sgd": {"record": False}}
        if processes == 2:
            trainings |= {folder / "adamw": AT_LENGTH, folder / "held": {"record": False, "held": held}}
        return folder, group(processes, {one: {"kind": kind, **more} for one, more in trainings.items()})

    return start


each_layout = pytest.mark.parametrize(("processes", "kind"), LAYOUTS)
each_kind = pytest.mark.parametrize("kind", ["ddp", "fsdp2"])


@each_layout
def test_processes_have_equal_loss_and_gradients(processes, kind, together, alone):
    """From equal weights every step has the loss and the gradients of one process."""
    folder, returned = together(processes, kind)
    assert len(returned) == processes
    for count, wrapped, divided in (training for trainings in returned for training in trainings):
        assert count == processes
        assert (wrapped == "DistributedDataParallel") == (kind == "ddp")
        assert (divided > 0) == (kind == "fsdp2")
    given, expected = folder / "given", alone / "sgd"
    # sums of some hundred fp32 terms in another order
    assert logged(given, "loss") == pytest.approx(logged(expected, "loss"), rel=1e-5)
    assert logged(given, "tokens") == logged(expected, "tokens")
    errors = gradient_errors(given, expected)
    assert len(errors) == len(GROUPS) / PACKS
    assert max(errors) < 1e-5, errors


@each_layout
def test_processes_end_with_the_same_adapter(processes, kind, together, alone):
    folder, _ = together(processes, kind)
    assert relative_error(adapter(folder / "sgd"), adapter(alone / "sgd")) < 1e-5
    # A step of AdamW is at most about its rate, whatever the gradient: where rounding decides the sign of one near
    # zero, two runs part by two rates a step.
    bounds = {"sgd": 1e-5, "adamw": 2 * ADAMW_RATE * len(GROUPS) / PACKS}
    for name in ("sgd", "adamw") if processes == 2 else ("sgd",):
        reference, got = adapter(alone / name), adapter(folder / name)
        assert got.keys() == reference.keys()
        for key, tensor in reference.items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=bounds[name])


@each_kind
def test_resumed_processes_equal_whole(kind, together, group, tmp_path):
    """Bit for bit."""
    whole, resumed = together(2, kind)[0] / "adamw", tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", resumed)
    group(2, {resumed: {"kind": kind, **AT_LENGTH, "resume_from": resumed / "checkpoint-2"}})
    assert_equal(resumed, whole)
    assert len(logged(whole, "loss")) == len(GROUPS) / PACKS


def assert_equal(one, other):
    """To the last bit."""
    got, reference = adapter(one), adapter(other)
    assert got.keys() == reference.keys()
    assert all(torch.equal(got[name], reference[name]) for name in reference)
    assert logged(one, "loss") == logged(other, "loss")


def test_weights_are_read_by_the_first_process(together, group, tmp_path, monkeypatch):
    load, from_pretrained, readers = loading.load, PackedIdefics.from_pretrained, tmp_path / "readers"

    def read(*given, **options):
        with readers.open("a") as lines:
            lines.write(f"{collectives.rank()}\n")
        return from_pretrained(*given, **options)

    monkeypatch.setattr(loading, "load", lambda base, **options: load(base, weights=collectives.is_main(), **options))
    monkeypatch.setattr(PackedIdefics, "from_pretrained", read)
    group(2, {tmp_path / "one": {"kind": "fsdp2", "record": False}})
    assert readers.read_text() == "0\n"
    assert_equal(tmp_path / "one", together(2, "fsdp2")[0] / "sgd")


@each_kind
def test_processes_have_equal_eval_losses_and_best_adapter(kind, together, alone):
    got, expected = together(2, kind)[0] / "held", alone / "held"
    losses = logged(expected, "eval_loss")
    assert len(losses) == len(GROUPS) / PACKS
    assert logged(got, "eval_loss") == pytest.approx(losses, rel=1e-5)
    assert relative_error(adapter(got), adapter(expected)) < 1e-5
    best = load_file(got / f"checkpoint-{losses.index(min(losses)) + 1}" / "trained.safetensors")
    assert all(torch.equal(one, adapter(got)[f"trained.safetensors:{name}"]) for name, one in best.items())


@pytest.mark.slow
def test_equivalence_script(tmp_path, capsys, monkeypatch):
    """The script prints a line for each layout, and judges it."""
    assert compare(tmp_path, 2, [(2, "ddp")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("2 x")] == [["2", "x", "ddp"]]
    # what is trained is there, and judged again
    monkeypatch.setattr("equivalence.run_processes", lambda *_, **__: None)
    assert compare(tmp_path, 2, [(2, "ddp")])
    monkeypatch.setattr("equivalence.gradient_errors", lambda *_: [2e-5])
    assert not compare(tmp_path, 2, [(2, "ddp")])
