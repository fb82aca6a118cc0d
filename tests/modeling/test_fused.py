"""Norms, rotations and gated products are transformers' own, forward and backward."""

from collections import Counter

import pytest
import torch
from small_models import one_row
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import (
    IdeficsAttention,
    IdeficsMLP,
    IdeficsRMSNorm,
    apply_rotary_pos_emb,
)

from modeling import attention, fused, tiny
from modeling.packed_forward import packed_loss
from modeling.shapes import TINY

WIDTH, INNER = 48, 80


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def compare(ours, stock, inputs, *, rtol=None, atol=None):
    """Outputs, and gradients of everything that is trained, for a gradient of uneven numbers."""
    expected, got = stock(), ours()
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    weights = randn(*expected.shape, seed=9, dtype=expected.dtype).detach()
    expected, got = (torch.autograd.grad(one, inputs, weights) for one in (expected, got))
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [(1, 1, WIDTH), (1, 7, WIDTH), (2, 3, 4, WIDTH)], ids=str)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_rms_norm_equals_stock(shape, trained, dtypes):
    """The norm is the stock one."""
    of_hidden, of_weight = (getattr(torch, name) for name in dtypes)
    stock = IdeficsRMSNorm(WIDTH)
    stock.weight = torch.nn.Parameter(randn(WIDTH, seed=1, dtype=of_weight).detach(), requires_grad=trained)
    ours = fused.RMSNorm(WIDTH)
    ours.weight = stock.weight
    hidden = randn(*shape, seed=2, dtype=of_hidden)
    inputs = [hidden, *([stock.weight] if trained else [])]
    # In bf16 the stock backward rounds between its operations, and ours once: some halves of 2^-8.
    loose = {"rtol": 3e-2, "atol": 3e-2} if of_hidden == torch.bfloat16 else {}
    compare(lambda: ours(hidden), lambda: stock(hidden), inputs, **loose)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_eps_of_config(grad, dtype):
    """The 80B has 1e-5, the 9B 1e-6: of hidden states of 1/512, whose mean square is 3.8e-6, most is eps."""
    for eps, expected in ((1e-5, 0.5256), (1e-6, 0.8899)):
        config = {**TINY, "additional_vocab_size": 2, "vocab_size": 300, "rms_norm_eps": eps}
        model = tiny.build_model(config, seed=0, packed=True).to(dtype).model
        norms = [module for module in model.modules() if isinstance(module, fused.RMSNorm)]
        assert len(norms) == 2 * 4 + 2 * 2 + 1 + 2 * 2
        with torch.set_grad_enabled(grad):
            for norm in norms:
                norm.weight.data.fill_(1)
                got = norm(torch.full((1, 2, len(norm.weight)), 2.0**-9, dtype=dtype))
                # bf16 has 8 bits, fp32 more than the four digits written here.
                assert got.float().flatten().tolist() == pytest.approx([expected] * got.numel(), rel=2.0**-8)


def test_rms_norm_weight_gradient_alone():
    """The norm of what is not trained hands on the gradient of its weight alone."""
    norm = IdeficsRMSNorm(WIDTH)
    hidden = randn(1, 5, WIDTH).detach()
    (expected,) = torch.autograd.grad(norm(hidden).sum(), norm.weight)
    ours = fused.RMSNorm(WIDTH)
    ours.weight = norm.weight
    (got,) = torch.autograd.grad(ours(hidden).sum(), norm.weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tokens", [1, 7])
def test_gated_product_equals_stock(tokens):
    """The gated product is the stock one."""
    stock = IdeficsMLP(WIDTH, INNER, "silu")
    ours = fused.GatedMLP(WIDTH, INNER, "silu")
    ours.gate_proj, ours.up_proj, ours.down_proj = stock.gate_proj, stock.up_proj, stock.down_proj
    hidden = randn(1, tokens, WIDTH)
    compare(lambda: ours(hidden), lambda: stock(hidden), [hidden, *stock.parameters()])


@pytest.mark.parametrize("shape", [(1, 1, 2, 8), (2, 5, 3, 8)], ids=str)
def test_rotation_equals_stock(shape):
    """The rotation is the stock one."""
    batch, tokens, _, width = shape
    attention = IdeficsAttention(width, 1, config=IdeficsConfig(hidden_size=width, num_attention_heads=1), layer_idx=0)
    places, states = torch.arange(tokens).expand(batch, -1) + 3, randn(*shape)
    turned = fused.angles(attention, states, places)
    compare(
        lambda: fused._Rotation.apply(states, *turned),
        lambda: apply_rotary_pos_emb(states, states, *attention.rotary_emb(states, places), unsqueeze_dim=2)[0],
        [states],
    )


def test_fused_modules_replace_stock():
    """Names, their order, values and buffers: PEFT, NF4, FSDP and checkpoints see what they see of a stock model."""
    config = {**TINY, "additional_vocab_size": 2, "vocab_size": 300}
    stock, packed = tiny.build_model(config, seed=0), tiny.build_model(config, seed=0, packed=True)
    expected, got = stock.state_dict(), packed.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    for kind in ("named_modules", "named_parameters", "named_buffers"):
        assert [name for name, _ in getattr(packed, kind)()] == [name for name, _ in getattr(stock, kind)()]
    assert not any(tensor.is_meta for tensor in (*packed.parameters(), *packed.buffers()))
    layers, gated = len(packed.model.layers), len(packed.model.gated_cross_attn_layers)
    kinds = (IdeficsRMSNorm, IdeficsMLP, IdeficsAttention)
    assert Counter(type(module) for module in packed.model.modules() if isinstance(module, kinds)) == {
        fused.RMSNorm: 2 * layers + 2 * gated + 1 + 2 * gated * config["qk_layer_norms"],
        fused.GatedMLP: layers + gated,
        fused.SelfAttention: layers,
        IdeficsAttention: gated,
    }


def test_other_activation_stays_stock():
    """Another activation is left to transformers."""
    config = {**TINY, "additional_vocab_size": 2, "vocab_size": 300, "hidden_act": "gelu"}
    packed = tiny.build_model(config, seed=0, packed=True)
    assert type(packed.model.layers[0].mlp) is IdeficsMLP


@pytest.mark.parametrize("training", [True, False])
def test_attention_dropout_in_training_alone(training, monkeypatch):
    """Two layers of vision, four of decoder, two gated blocks whose tokens see an image."""
    config = {**TINY, "additional_vocab_size": 3, "vocab_size": 300, "dropout": 0.5}
    config["vision_config"] = {**TINY["vision_config"], "num_hidden_layers": 2, "attention_dropout": 0.25}
    model, seen = tiny.build_model(config, seed=0, packed=True).train(training), []
    attend = torch.nn.functional.scaled_dot_product_attention

    def recorded(*tensors, dropout_p=0.0, **options):
        seen.append(dropout_p)
        return attend(*tensors, dropout_p=dropout_p, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    row = one_row()
    packed_loss(model, row, config=model.config)
    assert Counter(seen) == ({0.25: 2, 0.5: 4 + 2} if training else {0.0: 2 + 4 + 2})


def kept(run):
    """Shapes of what the backward of `run()` will read."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: shapes.append(tuple(one.shape)) or one, lambda one: one):
        run()
    return sorted(shapes)


def test_rms_norm_saved_tensors():
    """A norm keeps its input and a root for each vector."""
    norm, hidden = fused.RMSNorm(WIDTH).requires_grad_(False), randn(1, 6, WIDTH)
    assert kept(lambda: norm(hidden)) == [(1, 6, 1), (1, 6, WIDTH), (WIDTH,)]


def test_gated_product_saved_tensors():
    """A gated product keeps its two inputs."""
    gate, up = randn(1, 6, INNER), randn(1, 6, INNER, seed=1)
    assert kept(lambda: fused._GatedProduct.apply(gate, up)) == [(1, 6, INNER)] * 2
