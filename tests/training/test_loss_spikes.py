"""Steps that must not be taken: why, whose fault it is by name, and what the run does about it."""

import json
import math
import random
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_processes
from test_pipeline import metrics
from test_trainer import trained

from finetune.pipeline import open_dataset, run
from finetune.recipe.load import load_recipe
from finetune.training import trainer as module
from finetune.training.loss_spikes import (
    FEWEST,
    LEAST_RISE,
    WINDOW,
    Event,
    StepDialogue,
    read_events,
    spike_limit,
    suspects,
    why_unstable,
    write_events,
)
from modeling.errors import UserError

POISONED = 17
"""The line of the file that holds the poison."""


@pytest.fixture
def recipe_file(write_recipe, tmp_path):
    """Dialogues that are soon learnt, but for one, whose answer is like no other."""
    training = {"steps": None, "epochs": 2, "checkpoint_every": 3}
    path = write_recipe(tmp_path, data={"eval_split": 0}, training=training, evaluation=None, merge=False)
    letters = random.Random(0)
    lines = []
    for number in range(1, 41):
        answer = "yes " * 30
        if number == POISONED:
            answer = "".join(letters.choice("qwxzkvjpy") for _ in range(180))
        messages = [{"role": "user", "content": f"is it {number}?"}, {"role": "assistant", "content": answer.strip()}]
        lines.append(json.dumps({"messages": messages}))
    path.with_name("dialogues.jsonl").write_text("\n".join(lines))
    return path


def train(recipe_file, *overrides):
    return run(load_recipe(recipe_file, list(overrides)), ("train",))["train"]


PLACE = f"dialogues.jsonl:{POISONED}"


def test_spike_is_found_and_skipped(recipe_file, tmp_path):
    """A planted poison is found by name, and the run goes on without it."""
    result = train(recipe_file)
    (event,) = read_events(tmp_path / "run")
    assert [one.record_id for one in event.dialogues if one.blamed] == [PLACE]
    (poison,) = (one for one in event.dialogues if one.blamed)
    assert poison.source.endswith("dialogues.jsonl[train]")
    assert len(event.dialogues) > 1
    assert poison.loss > 2 + max(one.loss for one in event.dialogues if not one.blamed)
    assert event.reason.startswith("loss ")
    assert event.step > FEWEST
    assert 0 < event.back_to < event.step
    assert event.back_to % 3 == 0
    assert result["rollbacks"] == 1
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == result["steps"]
    assert max(losses[FEWEST:]) < LEAST_RISE + min(losses)
    again = train(recipe_file, f"output={tmp_path / 'again'}")
    assert {**again, "seconds": 0, "waiting_for_data": 0} == {**result, "seconds": 0, "waiting_for_data": 0}
    one, other = trained(tmp_path / "run"), trained(tmp_path / "again")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_spike_found_alike_by_two_processes(recipe_file, tmp_path):
    train(recipe_file, "adapter.dropout=0")
    overrides = ("adapter.dropout=0", f"output={tmp_path / 'two'}")
    run_processes(2, lambda: train(recipe_file, *overrides))
    (alone,), (together,) = read_events(tmp_path / "run"), read_events(tmp_path / "two")
    assert (together.step, together.back_to) == (alone.step, alone.back_to)
    assert {one.record_id: one.blamed for one in together.dialogues} == {
        one.record_id: one.blamed for one in alone.dialogues
    }


def poison_is_not_a_number(monkeypatch, rows_of_poison):
    """The loss of rows that hold the poison is not finite: as images, weights or kernels that are broken make it."""
    original = module.packed_loss

    def broken(model, batch, *, config):
        loss = original(model, batch, config=config)
        return loss * rows_of_poison(batch)

    monkeypatch.setattr(module, "packed_loss", broken)


def holds_poison(recipe_file):
    """Whether a batch holds the poison: by a token id that no other dialogue has."""
    elsewhere = recipe_file.parent.with_name("elsewhere")
    _, prepared, _ = open_dataset(load_recipe(recipe_file, [f"output={elsewhere}"]))
    dataset = prepared.train
    ids = [set(dataset.examples[number].input_ids.tolist()) for number in range(len(dataset))]
    poison = list(dataset.record_ids).index(PLACE)
    (own, *_) = ids[poison] - set().union(*ids[:poison], *ids[poison + 1 :])
    return lambda batch: bool((batch["input_ids"] == own).any())


def test_loss_not_finite(recipe_file, tmp_path, monkeypatch):
    """Found by name from the first step on."""
    poisoned = holds_poison(recipe_file)
    poison_is_not_a_number(monkeypatch, lambda batch: math.nan if poisoned(batch) else 1.0)
    train(recipe_file, "training.instability.spike=null")
    (event,) = read_events(tmp_path / "run")
    assert event.reason == "loss nan"
    assert [(one.record_id, one.loss) for one in event.dialogues if one.blamed] == [(PLACE, None)]
    assert all(map(math.isfinite, (line["loss"] for line in metrics(tmp_path / "run"))))


def test_gradient_not_finite(recipe_file, tmp_path, monkeypatch):
    """A gradient that is not finite."""

    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    poisoned, original = holds_poison(recipe_file), module.packed_loss

    def broken(model, batch, *, config):
        loss = original(model, batch, config=config)
        return Explodes.apply(loss) if poisoned(batch) else loss

    monkeypatch.setattr(module, "packed_loss", broken)
    train(recipe_file, "training.instability.spike=null", "training.epochs=1")
    (event,) = read_events(tmp_path / "run")
    assert event.reason in ("gradient norm inf", "gradient norm nan")
    assert all(one.blamed for one in event.dialogues)  # by their losses none stands out
    assert PLACE in [one.record_id for one in event.dialogues]


def test_lower_rate_halves_every_rate(recipe_file, tmp_path, monkeypatch):
    """Lower rate halves every rate from there on."""
    calls, poisoned = [], holds_poison(recipe_file)

    def once(batch):
        calls.extend([1] * poisoned(batch))
        return math.nan if poisoned(batch) and len(calls) == 1 else 1.0

    options = ("training.epochs=1", "training.learning_rate=1e-3")
    train(recipe_file, f"output={tmp_path / 'plain'}", "training.instability.spike=null", *options)
    poison_is_not_a_number(monkeypatch, once)
    train(recipe_file, "training.instability={spike: null, action: lower_rate}", *options)
    (event,) = read_events(tmp_path / "run")
    assert event.action == "lower_rate"
    assert event.back_to > 0
    plain, lowered = ([line["learning_rate"] for line in metrics(tmp_path / name)] for name in ("plain", "run"))
    expected = [rate if step <= event.back_to else rate / 2 for step, rate in enumerate(plain, start=1)]
    assert lowered == pytest.approx(expected, rel=1e-9)
    tokens = [[line["tokens"] for line in metrics(tmp_path / name)] for name in ("plain", "run")]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("instability", "said", "events"),
    [
        ("{action: stop}", "training.instability says stop", 1),
        ("{rollbacks: 2}", "allows 2 rollbacks, and that was one", 3),
    ],
)
def test_instability_ends_with_the_reason(recipe_file, tmp_path, monkeypatch, instability, said, events):
    poison_is_not_a_number(monkeypatch, lambda batch: math.nan)
    with pytest.raises(UserError, match=said):
        train(recipe_file, f"training.instability={instability}")
    assert len(read_events(tmp_path / "run")) == events
    assert not (tmp_path / "run" / "training.json").exists()


def test_rollback_behind_a_checkpoint_that_did_not_help(recipe_file, tmp_path, monkeypatch):
    calls = []

    def from_step_8_on(batch):
        calls.append(1)
        return math.nan if 15 <= len(calls) < 20 else 1.0

    poison_is_not_a_number(monkeypatch, from_step_8_on)
    train(recipe_file, "training.instability={spike: null, action: lower_rate}", "training.epochs=1")
    events = read_events(tmp_path / "run")
    assert [event.back_to for event in events][:2] == [6, 3]


@given(st.lists(st.floats(0.5, 1.5), min_size=FEWEST, max_size=100), st.floats(0, 1.9))
def test_spike_rises_by_a_nat_at_least(before, loss):
    """What is less than a nat above the median is no spike."""
    assert why_unstable(min(loss, statistics.median(before[-WINDOW:]) + 0.99), 1.0, before, spike=0.01) is None


def test_spike_window_holds_the_last_64_losses():
    """As many low as high: one more on either side, and the median would be that side's value."""
    low, high = [1.0] * 32, [9.0] * 32
    between = 5.0 + 20.0 * 1.4826 * 4.0
    assert spike_limit([9.0, *low, *high], spike=20.0) == pytest.approx(between, rel=1e-12)
    assert spike_limit([*low, *high][1:], spike=20.0) == 9.0 + 1.0
    assert spike_limit([9.0] * 15, spike=20.0) == math.inf
    assert spike_limit([9.0] * 16, spike=20.0) == 9.0 + 1.0


def test_why_unstable():
    calm = [1.0, 1.1, 0.9, 1.05] * 8
    assert why_unstable(2.5, 1.0, calm, spike=20.0) is None  # 20 x 1.4826 x 0.05 = 1.48 above 1.025
    assert why_unstable(2.6, 1.0, calm, spike=20.0) == "loss 2.6, after 32 steps with a median of 1.025"
    assert why_unstable(100.0, 1.0, calm[: FEWEST - 1], spike=20.0) is None
    assert why_unstable(100.0, 1.0, calm, spike=None) is None
    assert why_unstable(math.nan, 1.0, [], spike=20.0) == "loss nan"
    assert why_unstable(1.0, math.inf, [], spike=20.0) == "gradient norm inf"
    assert why_unstable(2.6, 1.0, [50.0] * 100 + calm * 2, spike=20.0) is not None  # only the last 64 count


def test_suspects():
    calm = [1.0, 1.1, 0.9, 1.05] * 8
    assert suspects([1.0, 2.6, 9.0, 2.4], calm, spike=20.0) == [False, True, True, False]
    assert suspects([1.0, math.nan, 9.0], calm, spike=20.0) == [False, True, False]
    assert suspects([1.0, math.inf], [], spike=20.0) == [False, True]
    assert suspects([1.0, 1.1, 0.9], calm, spike=20.0) == [True, True, True]
    assert suspects([], calm, spike=20.0) == []
    assert suspects([1.0, 100.0], calm, spike=None) == [True, True]


def test_unstable_events_round_trip(tmp_path):
    seen = (
        StepDialogue("a.jsonl[train]", "a.jsonl:3", None, True),
        StepDialogue("a.jsonl[train]", "a.jsonl:4", 0.5, False),
    )
    events = [Event(7, "loss nan", "skip", 6, seen), Event(9, "loss inf", "stop", 0, ())]
    assert read_events(tmp_path) == []
    write_events(tmp_path, events)
    assert read_events(tmp_path) == events
    assert events[0].skipped == {("a.jsonl[train]", "a.jsonl:3")}
    assert events[1].skipped == frozenset()
