"""LoRA added in place equals PEFT's own layer: results, gradients, and in all that is left to PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

from modeling.adapters import attach
from modeling.lora import FusedLoraLinear, fuse_linears

# fp32 sums in another order: 1e-7 of terms as large as 100.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


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


def run(model, shape, *, dtype=torch.float32):
    """(result, gradients of the input and of every factor); dropout draws the same numbers each time."""
    torch.manual_seed(2)
    inputs = torch.randn(shape, dtype=dtype, requires_grad=True)
    output = model.train()(inputs)
    weights = torch.randn(output.shape, dtype=output.dtype)
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
def test_results_and_gradients_are_those_of_peft(options, shape):
    dtype = options.get("dtype", torch.float32)
    ours, theirs = (run(adapted(fused=fused, **options), shape, dtype=dtype) for fused in (True, False))
    assert len(ours) >= 4
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_disabled_merged_and_second_adapters_are_those_of_peft():
    inputs = torch.randn(3, 12, generator=torch.Generator().manual_seed(3))
    ours, theirs = (adapted(fused=fused) for fused in (True, False))
    plain = ours(inputs)
    for model in (ours, theirs):
        torch.manual_seed(4)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    for both in (["default"], ["default", "second"]):
        for model in (ours, theirs):
            model.base_model.set_adapter(both)
        torch.testing.assert_close(ours(inputs), theirs(inputs), **CLOSE)
    ours.base_model.set_adapter(["default"])
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(inputs), theirs(inputs))
        assert not torch.allclose(ours(inputs), plain)
    ours.delete_adapter("second")
    torch.testing.assert_close(ours.merge_and_unload()(inputs), plain, **CLOSE)


def test_a_model_is_attached_with_them(idefics):
    model = attach(idefics.model, {"decoder": "lora"}, lora={"r": 4}, base="x")
    adapters = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(adapters) > 20
    assert all(isinstance(module, FusedLoraLinear) for module in adapters)
