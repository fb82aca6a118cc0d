"""One, two and four processes, DDP and FSDP2: the same losses, gradients and adapters."""

import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from processes import run_processes
from safetensors.torch import load_file, save_file
from test_train import attached, logged, trained
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from finetune import ranks
from finetune.data.schedule import Row
from finetune.train import IdeficsTrainer, Plan, train
from modeling import loading
from modeling.adapters import whole
from modeling.forward import PackedIdefics

PACKS = 4
"""A step: one row on each of four processes, two on each of two, four after each other on one."""

GROUPS = [(1, 9), (2,), (0, 8), (9,), (3, 10), (11,), (), (4, 5), (9,), (), (9,), (), (6, 7), (), (), ()]
"""Four steps of the twelve dialogues, of which 9 shows no image: rows of unequal tokens, text alone, nothing at all; a
step without images; three of four processes with nothing."""

RATE = 0.05


class Recorder(TrainerCallback):
    """Writes weights and gradients of each step; or, with `given`, begins each step with those weights."""

    def __init__(self, folder, given):
        self.folder, self.given = folder, given

    def on_step_begin(self, args, state, control, model, **kwargs):
        parameters = trained_of(model)
        if self.given:
            weights = load_file(self.given / f"weights-{state.global_step}.safetensors")
            for name, parameter in parameters.items():
                put(parameter.data, weights[name])
        else:
            self.save("weights", state, {name: whole(parameter) for name, parameter in parameters.items()})

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.save("gradients", state, {name: whole(one.grad) for name, one in trained_of(model).items()})

    def save(self, what, state, tensors):
        if ranks.is_main():
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            save_file(tensors, self.folder / f"{what}-{state.global_step}.safetensors")


def trained_of(model):
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def put(place, tensor):
    divided = distribute_tensor(tensor, place.device_mesh, place.placements) if isinstance(place, DTensor) else tensor
    place.copy_(divided)


class OnGpus(IdeficsTrainer):
    """On a CPU accelerate passes over FSDP without a word, unless it believes in GPUs; FSDP2 itself runs over gloo."""

    def __init__(self, **kwargs):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().__init__(**kwargs)


class Sgd(IdeficsTrainer):
    def create_optimizer(self, model=None):
        parameters = [one for one in (model or self.model).parameters() if one.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=RATE)
        return self.optimizer


def work(
    base_folder,
    folder,
    rows,
    *,
    kind="ddp",
    sgd=True,
    given=None,
    record=True,
    every=100,
    resume_from=None,
    held=None,
    monkeypatch,
):
    """Training in one process of several; returns what accelerate made of the model."""
    bases = (*([OnGpus] if kind == "fsdp2" else []), *([Sgd] if sgd else []), IdeficsTrainer)
    monkeypatch.setattr("finetune.train.IdeficsTrainer", type("Trainer", bases, {}))
    folder.mkdir(exist_ok=True)
    model = attached(base_folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # else the gradients of A would be zero
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    plan = Plan(
        PACKS,
        RATE if sgd else 1e-3,
        clip=0.0,
        parallel=kind,
        checkpoint_every=every,
        evaluate_every=1 if held else None,
    )
    trainer = train(
        model,
        loading.load_processor(str(base_folder)).tokenizer,
        folder,
        train_rows=rows,
        eval_rows=held,
        plan=plan,
        resume_from=resume_from,
        callbacks=[Recorder(folder, given)] if record else [],
    )
    divided = sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    return ranks.count(), type(trainer.model_wrapped).__name__, divided


@pytest.fixture
def rows(make_rows):
    return replace(make_rows(), rows=[Row(0, group) for group in GROUPS], blank_image=True)


LAYOUTS = [(2, "ddp"), (4, "ddp"), (2, "fsdp2"), (4, "fsdp2")]


def relative_error(got, expected):
    """Of all together: a gradient whose terms cancel has no precision of its own."""
    difference = sum(float((got[name] - expected[name]).double().square().sum()) for name in expected)
    return (difference / sum(float(one.double().square().sum()) for one in expected.values())) ** 0.5


@pytest.fixture
def groups(base_folder, rows, tmp_path, monkeypatch):
    """groups(processes, name, **options) -> (folder, what each process returned)"""

    def start(processes, name, **options):
        folder = tmp_path / name
        options |= {"monkeypatch": monkeypatch}
        return folder, run_processes(processes, lambda: work(base_folder, folder, rows, **options))

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
        for step in range(len(GROUPS) // PACKS):
            got, expected = (load_file(one / f"gradients-{step}.safetensors") for one in (folder, alone))
            assert got.keys() == expected.keys()
            assert relative_error(got, expected) < 1e-5, (processes, kind, step)
            for name, gradient in expected.items():
                torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1))


def test_the_adapter_in_the_end(groups):
    for sgd in (True, False):
        alone, _ = groups(1, f"alone-{sgd}", sgd=sgd, record=False)
        reference = trained(alone)
        for processes, kind in LAYOUTS if sgd else [(2, "ddp"), (2, "fsdp2")]:
            folder, _ = groups(processes, f"{processes}-{kind}-{sgd}", kind=kind, sgd=sgd, record=False)
            got = trained(folder)
            assert got.keys() == reference.keys()
            if sgd:
                assert relative_error(got, reference) < 1e-5
            # A step of AdamW is at most about its rate, whatever the gradient: where rounding decides the sign of one
            # near zero, two runs part by two rates a step.
            bound = 1e-5 if sgd else 2 * 1e-3 * len(GROUPS) / PACKS
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
    reference, got = trained(whole), trained(resumed)
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
    assert all(torch.equal(one, trained(expected)[name]) for name, one in trained(folder).items())


def test_held_out_losses_and_the_best_adapter(groups, make_rows):
    held = replace(make_rows(row_tokens=192), blank_image=True)
    assert len(held.rows) % 2  # one process has a row more
    alone, _ = groups(1, "alone", record=False, held=held)
    losses = logged(alone, "eval_loss")
    assert len(losses) == len(GROUPS) / PACKS
    for processes, kind in [(2, "ddp"), (2, "fsdp2")]:
        folder, _ = groups(processes, f"{processes}-{kind}", kind=kind, record=False, held=held)
        assert logged(folder, "eval_loss") == pytest.approx(losses, rel=1e-5)
        assert relative_error(trained(folder), trained(alone)) < 1e-5
        best = load_file(folder / f"checkpoint-{losses.index(min(losses)) + 1}" / "trained.safetensors")
        assert all(torch.equal(one, trained(folder)[f"trained.safetensors:{name}"]) for name, one in best.items())
