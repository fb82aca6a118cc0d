"""One, two and four processes, DDP and FSDP2: the same losses, gradients and adapters."""

import shutil
from dataclasses import replace

import pytest
import torch
from equivalence import ADAMW_RATE, LAYOUTS, PACKS, adapter, compare, gradient_errors, relative_error, train
from processes import run_processes
from safetensors.torch import load_file
from test_train import attached, logged

from finetune import ranks
from finetune.data.schedule import Row
from modeling import loading
from modeling.forward import PackedIdefics

GROUPS = [(1, 9), (2,), (0, 8), (9,), (3, 10), (11,), (), (4, 5), (9,), (), (9,), (), (6, 7), (), (), ()]
"""Four steps of the twelve dialogues, of which 9 shows no image: rows of unequal tokens, text alone, nothing at all; a
step without images; three of four processes with nothing."""


@pytest.fixture
def rows(make_rows):
    return replace(make_rows(), rows=[Row(0, group) for group in GROUPS], blank_image=True)


@pytest.fixture
def groups(base_folder, rows, tmp_path):
    """groups(processes, name, **options) -> (folder, what each process returned)"""

    def start(processes, name, **options):
        folder = tmp_path / name
        tokenizer = loading.load_processor(str(base_folder)).tokenizer
        return folder, run_processes(
            processes, lambda: train(attached(base_folder), tokenizer, folder, rows, **options)
        )

    return start


def test_from_equal_weights_every_step_has_equal_loss_and_gradients(groups):
    alone, _ = groups(1, "alone")
    for processes, kind in LAYOUTS:
        folder, returned = groups(processes, f"{processes}-{kind}", kind=kind, given=alone)
        for count, wrapped, divided in returned:
            assert count == processes
            assert (wrapped == "DistributedDataParallel") == (kind == "ddp")
            assert (divided > 0) == (kind == "fsdp2")
        # sums of some hundred fp32 terms in another order
        assert logged(folder, "loss") == pytest.approx(logged(alone, "loss"), rel=1e-5)
        assert logged(folder, "tokens") == logged(alone, "tokens")
        errors = gradient_errors(folder, alone)
        assert len(errors) == len(GROUPS) / PACKS
        assert max(errors) < 1e-5, (processes, kind, errors)


def test_the_adapter_in_the_end(groups):
    for sgd in (True, False):
        alone, _ = groups(1, f"alone-{sgd}", sgd=sgd, record=False)
        reference = adapter(alone)
        for processes, kind in LAYOUTS if sgd else [(2, "ddp"), (2, "fsdp2")]:
            folder, _ = groups(processes, f"{processes}-{kind}-{sgd}", kind=kind, sgd=sgd, record=False)
            got = adapter(folder)
            assert got.keys() == reference.keys()
            if sgd:
                assert relative_error(got, reference) < 1e-5
            # A step of AdamW is at most about its rate, whatever the gradient: where rounding decides the sign of one
            # near zero, two runs part by two rates a step.
            bound = 1e-5 if sgd else 2 * ADAMW_RATE * len(GROUPS) / PACKS
            for name, tensor in reference.items():
                torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=bound)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_resumed_equals_whole_bit_for_bit(groups, kind, tmp_path):
    options = {"kind": kind, "sgd": False, "record": False, "every": 2}
    whole, _ = groups(2, "whole", **options)
    checkpoint = tmp_path / "resumed" / "checkpoint-2"
    shutil.copytree(whole / "checkpoint-2", checkpoint)
    shutil.copy(whole / "metrics.jsonl", tmp_path / "resumed")
    resumed, _ = groups(2, "resumed", resume_from=checkpoint, **options)
    reference, got = adapter(whole), adapter(resumed)
    assert reference.keys() == got.keys()
    assert all(torch.equal(got[name], reference[name]) for name in reference)
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert len(logged(whole, "loss")) == len(GROUPS) / PACKS


def test_only_the_first_process_reads_the_weights(groups, tmp_path, monkeypatch):
    expected, _ = groups(2, "all", kind="fsdp2")
    load, from_pretrained, readers = loading.load, PackedIdefics.from_pretrained, tmp_path / "readers"

    def read(*given, **options):
        with readers.open("a") as lines:
            lines.write(f"{ranks.rank()}\n")
        return from_pretrained(*given, **options)

    monkeypatch.setattr(loading, "load", lambda base, **options: load(base, weights=ranks.is_main(), **options))
    monkeypatch.setattr(PackedIdefics, "from_pretrained", read)
    folder, _ = groups(2, "one", kind="fsdp2")
    assert readers.read_text() == "0\n"
    assert logged(folder, "loss") == logged(expected, "loss")
    assert all(torch.equal(one, adapter(expected)[name]) for name, one in adapter(folder).items())


def test_held_out_losses_and_the_best_adapter(groups, make_rows):
    held = replace(make_rows(row_tokens=192), blank_image=True)
    assert len(held.rows) % 2  # one process has a row more
    alone, _ = groups(1, "alone", record=False, held=held)
    losses = logged(alone, "eval_loss")
    assert len(losses) == len(GROUPS) / PACKS
    for processes, kind in [(2, "ddp"), (2, "fsdp2")]:
        folder, _ = groups(processes, f"{processes}-{kind}", kind=kind, record=False, held=held)
        assert logged(folder, "eval_loss") == pytest.approx(losses, rel=1e-5)
        assert relative_error(adapter(folder), adapter(alone)) < 1e-5
        best = load_file(folder / f"checkpoint-{losses.index(min(losses)) + 1}" / "trained.safetensors")
        assert all(torch.equal(one, adapter(folder)[f"trained.safetensors:{name}"]) for name, one in best.items())


@pytest.mark.slow
def test_the_script_prints_a_line_a_layout_and_judges(tmp_path, capsys, monkeypatch):
    assert compare(tmp_path, 2, [(2, "ddp")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("2 x")] == [["2", "x", "ddp"]]
    monkeypatch.setattr("equivalence.gradient_errors", lambda *_: [2e-5])
    (tmp_path / "again").mkdir()
    assert not compare(tmp_path / "again", 2, [(2, "ddp")])
