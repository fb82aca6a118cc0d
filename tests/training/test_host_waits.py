"""A step waits for its device once: nothing of ours reads a number back in between."""

from collections import Counter

import pytest
import torch
from host_waits import HostWaits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from training_settings import training
from transformers import TrainerCallback

from finetune.training.trainer import train
from modeling import flash, loading
from modeling.adapters import attach
from modeling.packed_forward import packed_loss

LORA = {"cross_attention": "lora", "decoder": "lora", "gates": "full", "added_tokens": "full"}
FULL = {"cross_attention": "lora", "decoder": "lora", "resampler": "full", "gates": "full", "added_tokens": "full"}


def attached(base_folder, modes, dropout=0.05):
    model = loading.load(str(base_folder)).model
    return attach(model, modes, lora={"r": 4, "lora_alpha": 8, "lora_dropout": dropout}, base=str(base_folder))


class Steps(TrainerCallback):
    """What each step waits for, from its first row to the end of the optimiser's work."""

    def __init__(self):
        self.found = []

    def on_step_begin(self, *args, **kwargs):
        self.mode = HostWaits()
        self.mode.__enter__()

    def on_step_end(self, *args, **kwargs):
        self.mode.__exit__(None, None, None)
        self.found.append(self.mode.found)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("modes", [LORA, FULL], ids=["lora", "resampler in full"])
def test_step_waits_once(base_folder, make_rows, tmp_path, modes, checkpointing):
    """The loss and the gradient's size are read together, before the step is taken; libraries read nothing."""
    steps = Steps()
    train(
        attached(base_folder, modes),
        loading.load_processor(str(base_folder)).tokenizer,
        tmp_path,
        training(rows_per_step=2, checkpointing=checkpointing),
        train_rows=make_rows(rows_per_step=2, row_tokens=192, epochs=2),
        eval_rows=None,
        callbacks=[steps],
    )
    assert len(steps.found) > 2
    assert steps.found == [Counter({"finetune/training/trainer.py: _get_grad_norm: tolist": 1})] * len(steps.found)


@pytest.mark.parametrize("name", ["item", "tolist", "nonzero", "mask"])
def test_waits_are_counted(name):
    """The counter itself: what it must find, and that it blames this file."""
    ones = torch.ones(3)
    asks = {
        "item": (lambda: float(ones.sum()), "_local_scalar_dense"),
        "tolist": (lambda: ones.tolist(), "tolist"),
        "nonzero": (lambda: (ones > 0).nonzero(), "nonzero"),
        "mask": (lambda: ones[ones > 0], "index"),
    }
    ask, what = asks[name]
    with HostWaits() as waits:
        ask()
        ones[torch.tensor([0, 2])]  # numbers that an operator reads on the device
    assert waits.found == Counter({f"tests/training/test_host_waits.py: <lambda>: {what}": 1})


def without_numbers(model, batch, **changes):
    """A model and a row whose tensors have a shape and a device and no numbers: whoever reads one raises."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, one in held.items():
                if one is not None:
                    held[name] = torch.empty_like(one, **changes).requires_grad_(one.requires_grad)
    moved = {name: torch.empty_like(one, **changes) for name, one in batch.items() if torch.is_tensor(one)}
    return model, batch | moved


def test_forward_and_backward_need_no_numbers(base_folder, make_rows):
    model, batch = attached(base_folder, LORA).train(), make_rows(row_tokens=512).at(0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, row = without_numbers(model, batch)
        packed_loss(model, row, config=model.config).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch that was built with CUDA, but no GPU")
def test_forward_on_a_gpu_that_is_not_there(base_folder, make_rows, monkeypatch):
    """The variable-length kernels check dtypes and devices also of tensors without numbers."""
    called = []

    def kernel(*arguments, **options):
        called.append(options)
        return varlen_attn(*arguments, **options)

    monkeypatch.setattr(flash, "varlen_attn", kernel)
    monkeypatch.setattr(flash, "copy_numbers", lambda numbers, dtype, device: torch.empty(len(numbers), dtype=dtype))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model, batch = attached(base_folder, LORA, dropout=0.0).bfloat16(), make_rows(row_tokens=512).at(0)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"), torch.no_grad():
        model, row = without_numbers(model, batch, device="cuda")
        loss = packed_loss(model, row, config=model.config)
    assert loss.device.type == "cuda"
    layers, blocks = len(model.get_base_model().model.layers), len(model.get_base_model().model.gated_cross_attn_layers)
    assert len(called) == layers + blocks
