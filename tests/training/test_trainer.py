"""Training by equivalence: rows x accumulation, resumed x whole, and against sums taken one dialogue at a time."""

import json
import math
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from training_settings import training

from finetune.data.sampling import Row
from finetune.recipe.schema import Augment
from finetune.training.checkpoints import last_checkpoint, mark_complete
from finetune.training.trainer import IdeficsTrainer, parameter_groups, train
from modeling import loading
from modeling.adapters import attach, load_adapter_weights
from modeling.packed_forward import packed_loss

MODES = {"cross_attention": "lora", "decoder": "lora", "resampler": "full", "gates": "full", "added_tokens": "full"}
LORA = {"r": 4, "lora_alpha": 8}


def attached(base_folder, *, modes=None, dtype=torch.float32, **lora):
    torch.manual_seed(0)
    model = loading.load(str(base_folder), dtype=dtype).model
    return attach(model, modes or MODES, lora={**LORA, **lora}, base=str(base_folder))


def trained(folder):
    files = sorted((folder / "adapter").glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


def logged(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


PLAIN = ("autocast", "unused_parameters", "rate_cuts")


def run(base_folder, folder, rows, *, eval_rows=None, resume_from=None, model=None, **settings):
    options = {name: settings.pop(name) for name in PLAIN if name in settings}
    tokenizer = loading.load_processor(str(base_folder)).tokenizer
    return train(
        model or attached(base_folder),
        tokenizer,
        folder,
        training(**settings),
        train_rows=rows,
        eval_rows=eval_rows,
        resume_from=resume_from,
        **options,
    )


@pytest.fixture
def sgd(monkeypatch):
    """AdamW turns rounding of near-zero gradients into steps of full size; SGD keeps it rounding."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        return self.optimizer

    monkeypatch.setattr(IdeficsTrainer, "create_optimizer", create_optimizer)


def rows_of(rows, *groups):
    """The same examples, laid out as these packs."""
    return type(rows)(**{**rows.__dict__, "rows": [Row(0, tuple(group)) for group in groups]})


def test_rows_times_accumulation(base_folder, make_rows, tmp_path, sgd):
    """They do not change loss, gradient or result."""
    rows = make_rows()
    layouts = {
        "1 row of 4": (1, [(0, 1, 8, 9), (2, 3, 10, 11)]),
        "2 rows of 2": (2, [(0, 9), (1, 8), (10, 11), (2, 3)]),
        "4 rows of 1": (4, [(9,), (8,), (1,), (0,), (2,), (3,), (10,), (11,)]),
        "with fillers": (3, [(9, 0), (8, 1), (), (), (2, 3, 10), (11,)]),
    }
    for name, (packs, groups) in layouts.items():
        run(base_folder, tmp_path / name, rows_of(rows, *groups), rows_per_step=packs, learning_rate=0.05)
    first = tmp_path / "1 row of 4"
    reference = trained(first)
    assert len(reference) > 100
    for name in list(layouts)[1:]:
        # fp32 sums of some hundred terms in another order
        assert logged(tmp_path / name, "loss") == pytest.approx(logged(first, "loss"), rel=1e-5)
        assert logged(tmp_path / name, "grad_norm") == pytest.approx(logged(first, "grad_norm"), rel=1e-4)
        for key, tensor in trained(tmp_path / name).items():
            torch.testing.assert_close(tensor, reference[key], rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_over_the_step_s_tokens(base_folder, make_rows, tmp_path):
    """The loss is the mean over the supervised tokens of the whole step."""
    rows = make_rows(rows_per_step=3, row_tokens=128)
    model = attached(base_folder)
    total = supervised = 0
    with torch.no_grad():
        for row in rows.rows[:3]:
            for index in row.examples:
                batch = rows.batch(Row(0, (index,)))
                total += float(packed_loss(model, batch, config=model.config))
                supervised += int((batch["labels"] != -100).sum())
    run(base_folder, tmp_path, type(rows)(**{**rows.__dict__, "rows": rows.rows[:3]}), rows_per_step=3)
    # dropout is 0, the first step has not changed a weight, and sums are fp32
    assert logged(tmp_path, "loss")[0] == pytest.approx(total / supervised, rel=1e-5)


def test_resumed_equals_whole(base_folder, make_rows, tmp_path):
    """Bit for bit, across epochs, with dropout and augmentation."""
    rows = make_rows(epochs=3, rows_per_step=2, row_tokens=192, augment=Augment(flip=True, shift=3))
    assert rows.rows[-1].epoch == 2
    middle = len(rows.rows) // 4 + 1
    settings = {"rows_per_step": 2, "checkpoint_every": middle, "schedule": "cosine", "learning_rate": 1e-2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(base_folder, whole, rows, model=attached(base_folder, lora_dropout=0.1), **settings)
    shutil.copytree(whole / f"checkpoint-{middle}", resumed / f"checkpoint-{middle}")
    shutil.copy(whole / "metrics.jsonl", resumed)
    run(
        base_folder,
        resumed,
        rows,
        model=attached(base_folder, lora_dropout=0.1),
        resume_from=last_checkpoint(resumed),
        **settings,
    )
    reference, got = trained(whole), trained(resumed)
    assert reference.keys() == got.keys()
    assert all(torch.equal(got[key], reference[key]) for key in reference)
    assert logged(resumed, "step") == logged(whole, "step") == list(range(1, len(rows.rows) // 2 + 1))


def test_eval_loss_and_best_checkpoint(base_folder, make_rows, tmp_path):
    """The eval loss weighs tokens, and the best checkpoint becomes the adapter."""
    rows, held = make_rows(), make_rows(row_tokens=192)
    # a rate that ruins more with every step
    trainer = run(base_folder, tmp_path, rows, learning_rate=0.3, evaluate_every=1, eval_rows=held)
    losses = logged(tmp_path, "eval_loss")
    best = min(range(len(losses)), key=losses.__getitem__) + 1
    assert trainer.state.best_global_step == best < len(losses)
    kept = load_file(tmp_path / f"checkpoint-{best}" / "trained.safetensors")
    adapter = load_file(tmp_path / "adapter" / "trained.safetensors")
    assert all(torch.equal(kept[name], adapter[name]) for name in kept)
    total = supervised = 0
    model = trainer.model.eval()
    load_adapter_weights(model, tmp_path / "adapter")
    with torch.no_grad():
        for index in range(12):
            batch = held.batch(Row(0, (index,)))
            total += float(packed_loss(model, batch, config=model.config))
            supervised += int((batch["labels"] != -100).sum())
    assert losses[best - 1] == pytest.approx(total / supervised, rel=1e-5)


def test_early_stop(base_folder, make_rows, tmp_path):
    settings = {"learning_rate": 10.0, "evaluate_every": 1, "early_stop": 2}
    trainer = run(base_folder, tmp_path, make_rows(epochs=30), eval_rows=make_rows(), **settings)
    assert trainer.state.global_step < 30


@pytest.mark.parametrize("tower", ["none", "vision", "resampler", "cross_attention", "decoder", "embeddings_and_head"])
def test_bf16_base_is_trained_in_fp32(base_folder, make_rows, tmp_path, tower):
    lora = {"cross_attention": "lora", "decoder": "lora", "gates": "full", "added_tokens": "full"}
    modes = {**lora, **({} if tower == "none" else {tower: "full"})}
    model = attached(base_folder, modes=modes, dtype=torch.bfloat16)
    trainer = run(base_folder, tmp_path, make_rows(), model=model, autocast=tower != "none")
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in trainer.model.parameters() if not parameter.requires_grad}
    assert dtypes == {torch.float32}
    assert torch.bfloat16 in frozen
    assert all(map(math.isfinite, logged(tmp_path, "loss")))


def test_parameter_groups(base_folder):
    """Groups have their own rates, and decay pulls at no scale."""
    settings = training(learning_rate=1e-3, weight_decay=0.1, gates_learning_rate=1e-2)
    groups = parameter_groups(attached(base_folder), settings=settings)
    sizes = {(group["lr"], group["weight_decay"]): sum(p.numel() for p in group["params"]) for group in groups}
    assert sizes.keys() == {(1e-3, 0.1), (1e-3, 0.0), (1e-2, 0.0)}
    assert sizes[1e-2, 0.0] == 4


def test_rows_in_order_of_the_schedule(base_folder, make_rows, tmp_path):
    """Rows come in the order of the schedule."""
    trainer = run(base_folder, tmp_path, make_rows())
    assert isinstance(trainer._get_train_sampler(trainer.train_dataset), SequentialSampler)


def test_checkpoint_files(base_folder, make_rows, tmp_path):
    """No pickled arguments; only complete checkpoints count."""
    run(base_folder, tmp_path, make_rows(epochs=2), checkpoint_every=1)
    names = {path.name for path in last_checkpoint(tmp_path).iterdir()}
    assert "training_args.bin" not in names
    assert {"trained.safetensors", "adapter_model.safetensors", "trainer_state.json", "optimizer.pt"} <= names
    newest = last_checkpoint(tmp_path)
    (newest / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) != newest


class Opened:
    """A pickle that makes a file where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_checkpoint_pickles_are_not_run(base_folder, make_rows, tmp_path):
    """A checkpoint's pickles are opened without running them."""
    run(base_folder, tmp_path / "run", make_rows(epochs=2), checkpoint_every=1)
    checkpoint = last_checkpoint(tmp_path / "run")
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        content = (checkpoint / file).read_bytes()
        torch.save(Opened(tmp_path / "made"), checkpoint / file)
        mark_complete(checkpoint)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            run(base_folder, tmp_path / "run", make_rows(epochs=3), checkpoint_every=1, resume_from=checkpoint)
        (checkpoint / file).write_bytes(content)
    assert not (tmp_path / "made").exists()
