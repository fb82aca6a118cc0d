"""LoRA added in place equals PEFT's own layer: results, gradients, and in all that is left to PEFT."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from modeling.adapters import attach
from modeling.fused import FusedLoraLinear, fuse_linears

UNIT = 2.0**-24
"""The largest error of one fp32 rounding, relative to the number."""

TERMS = 80
"""Additions and products behind one number of `run` at most: 60 outputs of a gradient's rows, and the two factors."""


def adapted(*, fused, bias=False, dtype=torch.float32, **options):
    """A net of one linear layer with an adapter that is not zero; the same weights whether fused or not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20, bias=bias)).to(dtype)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], **options)
    if fused:
        fuse_linears(config)
    torch.manual_seed(1)
    model = get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert sum(isinstance(module, FusedLoraLinear) for module in model.modules()) == fused
    return model


def without_signs(model):
    """A copy that adds the sizes of its terms: what rounding is relative to."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.abs_()
    return copied


def require_equal_up_to_order(got, expected, size):
    """In whatever order a processor adds, each side is within so many roundings of the exact sum."""
    assert got.shape == expected.shape == size.shape
    assert ((got - expected).abs() <= 2 * TERMS * UNIT * size).all()


def run(model, shape, *, dtype=torch.float32, positive=False):
    """(result, gradients of the input and of every factor); dropout draws the same numbers each time.

    `positive`: of the absolute values of inputs and parameters, so that each number is the sum of its terms' sizes.
    """
    torch.manual_seed(2)
    inputs, weights = torch.randn(shape, dtype=dtype), torch.randn((*shape[:-1], 20), dtype=dtype)
    if positive:
        model, inputs, weights = without_signs(model), inputs.abs(), weights.abs()
    inputs.requires_grad_()
    output = model.train()(inputs)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [output, *torch.autograd.grad((output * weights).sum(), [inputs, *trained])]


OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "dropout": {"lora_dropout": 0.5},
    "rank-stabilised": {"use_rslora": True},
    "dora, left to PEFT": {"use_dora": True},
    "factor with a bias, left to PEFT": {"lora_bias": True},
    "bf16 under fp32 factors, left to PEFT": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("shape", [(1, 7, 12), (7, 12), (1, 1, 12), (2, 3, 5, 12), (1, 0, 12)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fused_lora_equals_peft(options, shape):
    """Results and gradients are those of PEFT."""
    dtype = options.get("dtype", torch.float32)
    ours, theirs = (run(adapted(fused=fused, **options), shape, dtype=dtype) for fused in (True, False))
    sizes = run(adapted(fused=False, **options), shape, dtype=dtype, positive=True)
    assert len(ours) >= 4
    for got, expected, size in zip(ours, theirs, sizes, strict=True):
        require_equal_up_to_order(got, expected, size)


def test_fused_lora_disabled_merged_second():
    """Disabled merged and second adapters are those of PEFT."""
    inputs = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))
    ours, theirs = (adapted(fused=fused) for fused in (True, False))
    plain = ours(inputs)
    for model in (ours, theirs):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    for both in (["default"], ["default", "second"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(both)
        require_equal_up_to_order(ours(inputs), theirs(inputs), without_signs(theirs)(inputs.abs()))
    ours.base_model.set_adapter(["default"])
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(inputs), theirs(inputs))
        assert not torch.allclose(ours(inputs), plain)
    ours.delete_adapter("second")
    size = without_signs(ours)(inputs.abs())
    require_equal_up_to_order(ours.merge_and_unload()(inputs), plain, size)


def test_attach_uses_fused_lora(idefics):
    """A model is attached with them."""
    model = attach(idefics.model, {"decoder": "lora"}, lora={"r": 4}, base="x")
    adapters = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(adapters) > 20
    assert all(isinstance(module, FusedLoraLinear) for module in adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_lora_autocast(dtype):
    """Seen before any product is made: the layer underneath runs once."""
    ours, theirs = (adapted(fused=fused, dtype=dtype).to(dtype) for fused in (True, False))
    calls = []
    ours.base_model.model[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = (run(model, (3, 12), dtype=dtype) for model in (ours, theirs))
    assert len(calls) == 1
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert got[0].dtype == torch.bfloat16
