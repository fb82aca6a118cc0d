"""What a recipe says of rates, warm-up, betas, decay and clipping is what the optimiser does in every step."""

import math

import pytest
import torch
from test_trainer import logged, rows_of, run
from torch.optim.optimizer import register_optimizer_step_pre_hook

from finetune.pipeline import _plan
from finetune.recipe.schema import Recipe
from finetune.training.arguments import Plan
from finetune.training.loss_spikes import Watch

STEPS = 8
FSDP2, DDP = {"parallel": "fsdp2", "optimizer": "adamw"}, {"parallel": "ddp"}


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
    return run(shallow_folder, folder, rows, packs_per_step=1, **settings)


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
def test_rate_of_every_step_is_the_formula_s(
    shallow_folder, make_rows, tmp_path, taken, schedule, formula, final, warmup
):
    peak, gates = 1e-3, 5e-3
    options = {"learning_rate": peak, "final_learning_rate": final, "warmup_steps": warmup}
    train_steps(shallow_folder, make_rows, tmp_path, schedule=schedule, tower_rates={"gates": gates}, **options)
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


def test_every_key_of_a_recipe_s_training_reaches_the_plan():
    training = {
        "epochs": 2,
        "row_tokens": 512,
        "tokens_per_step": 2048,
        "learning_rate": 3e-4,
        "final_learning_rate": 1e-5,
        "schedule": "linear",
        "warmup_steps": 7,
        "weight_decay": 0.02,
        "optimizer": "adamw_8bit",
        "betas": [0.8, 0.95],
        "clip": 0.5,
        "checkpointing": 3,
        "gates_learning_rate": 1e-3,
        "added_tokens_learning_rate": 2e-3,
        "seed": 11,
        "checkpoint_every": 40,
        "evaluate_every": 20,
        "early_stop": 4,
        "trackers": ["tensorboard"],
    }
    model, data = {"base": "base"}, {"sources": [{"path": "d.jsonl"}], "max_length": 512, "eval_split": 0.1}
    recipe = Recipe.model_validate({"model": model, "data": data, "training": training | FSDP2, "output": "run"})
    watch = Watch(spike=5.0)
    assert _plan(recipe, 400, autocast=True, watch=watch, rate_cuts=[30]) == Plan(
        packs_per_step=4,
        learning_rate=3e-4,
        final_learning_rate=1e-5,
        schedule="linear",
        warmup_steps=7,
        weight_decay=0.02,
        optimizer="adamw",
        betas=(0.8, 0.95),
        clip=0.5,
        tower_rates={"gates": 1e-3, "added_tokens": 2e-3},
        seed=11,
        checkpoint_every=40,
        evaluate_every=20,
        early_stop=4,
        trackers=["tensorboard"],
        unused_parameters=False,
        autocast=True,
        checkpointing=3,
        parallel="fsdp2",
        watch=watch,
        rate_cuts=[30],
    )
    eighth = Recipe.model_validate({"model": model, "data": data, "training": training | DDP, "output": "run"})
    assert _plan(eighth, 400, autocast=False, watch=watch, rate_cuts=[]).optimizer == "adamw_8bit"
