"""What a recipe says of rates, warm-up, betas, decay and clipping is what the optimiser does in every step."""

import math

import pytest
import torch
from test_trainer import logged, rows_of, run
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetune.recipe.schema import Training
from finetune.training import arguments

STEPS = 8


@pytest.fixture
def taken():
    """Of every step, as the optimiser is about to take it: its groups without their parameters, the gradient's norm."""
    steps = []

    def note(optimizer, *_):
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        gradients = [one.grad.norm() for group in optimizer.param_groups for one in group["params"]]
        steps.append((groups, float(torch.stack(gradients).norm())))

    handle = register_optimizer_step_pre_hook(note)
    yield steps
    handle.remove()


def train_steps(shallow_folder, make_rows, folder, **settings):
    rows = rows_of(make_rows(), *[(number,) for number in range(STEPS)])
    return run(shallow_folder, folder, rows, rows_per_step=1, **settings)


def cosine(step, peak, final, warmup):
    if step < warmup:
        return peak * step / warmup
    return final + (peak - final) * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2


def linear(step, peak, final, warmup):
    if step < warmup:
        return peak * step / warmup
    return final + (peak - final) * (STEPS - step) / (STEPS - warmup)


def constant(step, peak, final, warmup):
    return peak * min(1.0, step / warmup) if warmup else peak


@pytest.mark.parametrize(
    ("schedule", "formula", "final", "warmup"),
    [
        ("cosine", cosine, 1e-4, 3),
        ("cosine", cosine, 0.0, 0),
        ("linear", linear, 2e-4, 2),
        ("constant", constant, 0.0, 2),
    ],
)
def test_schedule_equals_its_formula(shallow_folder, make_rows, tmp_path, taken, schedule, formula, final, warmup):
    peak, gates = 1e-3, 5e-3
    options = {"learning_rate": peak, "final_learning_rate": final, "warmup_steps": warmup}
    train_steps(shallow_folder, make_rows, tmp_path, schedule=schedule, gates_learning_rate=gates, **options)
    expected = [formula(step, peak, final, warmup) for step in range(STEPS)]
    rates = [[group["lr"] for group in groups] for groups, _ in taken]
    for step, (of_groups, rate) in enumerate(zip(rates, expected, strict=True)):
        # Every group's rate has the schedule's shape. Relative to the peak, as a cosine near its end is a difference.
        assert sorted(set(of_groups)) == pytest.approx(sorted({rate, rate * gates / peak}), abs=1e-9 * peak), step


def test_betas_decay_and_clipping_reach_the_optimiser(shallow_folder, make_rows, tmp_path, taken):
    options = {"betas": (0.8, 0.97), "weight_decay": 0.03}
    train_steps(shallow_folder, make_rows, tmp_path / "clipped", clip=0.01, **options)
    assert {group["betas"] for groups, _ in taken for group in groups} == {(0.8, 0.97)}
    assert {group["weight_decay"] for groups, _ in taken for group in groups} == {0.03, 0.0}
    assert [norm for _, norm in taken] == pytest.approx([0.01] * STEPS, rel=1e-3)  # clipping adds 1e-6 to the norm
    taken.clear()
    train_steps(shallow_folder, make_rows, tmp_path / "free", clip=0.0, **options)
    norms = [norm for _, norm in taken]
    assert norms == pytest.approx(logged(tmp_path / "free", "grad_norm"), rel=1e-4)  # a norm of fp32 norms
    assert min(norms) > 0.01


def test_training_keys_reach_the_trainer(tmp_path, monkeypatch):
    """Rates of towers, instability and checkpointing are no arguments of it, and are tested where they act."""
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    settings = Training(
        epochs=2,
        row_tokens=512,
        tokens_per_step=2048,
        learning_rate=3e-4,
        final_learning_rate=1e-5,
        schedule="linear",
        warmup_steps=7,
        weight_decay=0.02,
        optimizer="adamw_8bit",
        betas=(0.8, 0.95),
        clip=0.5,
        seed=11,
        checkpoint_every=40,
        evaluate_every=20,
        trackers=["tensorboard"],
    )
    expected = {
        "max_steps": 400,
        "gradient_accumulation_steps": 4,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 1.0},
        "warmup_steps": 7,
        "weight_decay": 0.02,
        "optim": "adamw_8bit",
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.5,
        "seed": 11,
        "save_steps": 40,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "report_to": ["tensorboard"],
    }
    got = arguments.training_arguments(tmp_path, settings, steps=400)
    assert {key: getattr(got, key) for key in expected} == expected


@pytest.mark.parametrize(("evaluate_every", "every"), [(None, 40), (20, 20)])
def test_checkpoint_interval_default(tmp_path, evaluate_every, every):
    """A tenth of the run, or the interval of the evaluations."""
    settings = Training(steps=400, evaluate_every=evaluate_every)
    assert arguments.training_arguments(tmp_path, settings, steps=400).save_steps == every
