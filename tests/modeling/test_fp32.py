"""Gates and added rows are trained in fp32 on a bf16 base, and nothing else changes."""

import pytest
import torch
from small_models import one_row
from torch import nn

from modeling import fp32, loading
from modeling.packed_forward import packed_loss

STEP = 5e-4
"""An update that bf16, with 8 bits, loses at 0.3: its neighbours there are 2e-3 apart."""


def blocks(model):
    return model.model.gated_cross_attn_layers


def hidden_dtypes(model):
    """Of the output of each of the 2 gated blocks and 8 layers, in the order they run."""
    seen = []
    for layer in (*blocks(model), *model.model.layers):
        layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.no_grad():
        packed_loss(model, one_row(), config=model.config)
    return seen


@pytest.fixture
def half(base_folder):
    model = loading.load(str(base_folder), dtype=torch.bfloat16).model.requires_grad_(False)
    for block in blocks(model):
        block.alpha_cross_attn.data.fill_(0.3)
        block.alpha_dense.data.fill_(0.3)
    return model


def test_gate_in_fp32_keeps_small_update(half):
    """A bf16 gate loses a small update and a held one keeps it."""
    gate = blocks(half)[0].alpha_dense
    start = gate.clone()
    assert torch.equal(gate + STEP, start)
    fp32.keep_gates_in_fp32(half)
    held = blocks(half)[0].alpha_dense
    start = held.detach().clone()
    held.data += STEP
    # fp32 keeps 0.3 to 3e-8.
    assert (held - start).item() == pytest.approx(STEP, abs=1e-7)


def test_gates_in_fp32_hidden_states_bf16(half):
    """Every gate is in fp32 and hidden states stay bf16."""
    fp32.keep_gates_in_fp32(half)
    names = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert names == {
        f"model.gated_cross_attn_layers.{block}.{gate}"
        for block in (0, 1)
        for gate in ("alpha_cross_attn", "alpha_dense")
    }
    assert hidden_dtypes(half) == [torch.bfloat16] * 10


def test_plain_fp32_gate_promotes(half):
    """Why `Gate` hands its result back in bf16."""
    blocks(half)[1].alpha_dense.data = blocks(half)[1].alpha_dense.data.float()
    assert hidden_dtypes(half) == [torch.bfloat16] * 5 + [torch.float32] * 5


def test_gate_computed_in_fp32():
    """tanh(0.047) is 0.04697: bf16 has 0.046875 and 0.047119, and takes the second one of a gate that it rounded."""
    got = fp32.Gate(torch.bfloat16)(torch.tensor([0.047]))
    assert (got.dtype, got.item()) == (torch.bfloat16, 0.046875)
    assert torch.tanh(torch.tensor([0.047]).bfloat16()).item() == pytest.approx(0.047119, abs=1e-6)


def test_added_head_multiplied_in_fp32():
    """1 + 2^-8 is 1 in bf16: a product of rounded rows would lose all of the difference."""
    head = fp32.AddedHead(2, 1, bias=False)
    head.weight.data = torch.tensor([[1 + 2.0**-8, 1.0]])
    got = head(torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16))
    assert (got.dtype, got.item()) == (torch.bfloat16, 2.0**-8)


def test_gate_gradient(half):
    """A held gate has the gradient of a plain one."""
    for block in blocks(half):
        block.alpha_cross_attn.requires_grad_(True)
    packed_loss(half, one_row(), config=half.config).backward()
    plain = [block.alpha_cross_attn.grad.item() for block in blocks(half)]
    half.zero_grad()
    fp32.keep_gates_in_fp32(half)
    packed_loss(half, one_row(), config=half.config).backward()
    held = [block.alpha_cross_attn.grad for block in blocks(half)]
    assert all(gradient.dtype == torch.float32 for gradient in held)
    # The plain one is rounded to bf16's 8 bits, and so is every tanh on the way.
    assert [gradient.item() for gradient in held] == pytest.approx(plain, rel=2**-6)
    assert all(plain)


def test_fp32_model_unchanged(idefics):
    """In fp32 nothing changes to the last bit."""
    with torch.no_grad():
        for block in blocks(idefics.model):
            block.alpha_cross_attn.fill_(0.3)
        before = packed_loss(idefics.model, one_row(), config=idefics.model.config)
        fp32.keep_gates_in_fp32(idefics.model)
        fp32.keep_added_rows_in_fp32(idefics.model)
        after = packed_loss(idefics.model, one_row(), config=idefics.model.config)
    assert torch.equal(before, after)
    assert isinstance(blocks(idefics.model)[0].act_dense, fp32.Gate)
    assert type(idefics.model.lm_head.additional_fc) is nn.Linear


def test_added_rows_trained_on_bf16_base(half):
    """Added rows are held and trained on a bf16 base."""
    rows = [half.model.embed_tokens.additional_embedding.weight, half.lm_head.additional_fc.weight]
    before = [row.float() for row in rows]
    fp32.keep_added_rows_in_fp32(half)
    held = [half.model.embed_tokens.additional_embedding.weight, half.lm_head.additional_fc.weight]
    assert all(torch.equal(row, old) and row.dtype == torch.float32 for row, old in zip(held, before, strict=True))
    for row in held:
        row.requires_grad_(True)
    loss = packed_loss(half, one_row(), config=half.config)
    loss.backward()
    assert loss.isfinite()
    for row in held:
        assert row.grad.dtype == torch.float32
        assert row.grad.isfinite().all()
        assert row.grad.any(dim=1).all()
    torch.optim.SGD(held, lr=0.1).step()
    assert packed_loss(half, one_row(), config=half.config) < loss


def test_added_rows_logits(half):
    """Held rows give the logits of bf16 to its precision."""
    with torch.no_grad():
        before = packed_loss(half, one_row(), config=half.config)
        fp32.keep_added_rows_in_fp32(half)
        after = packed_loss(half, one_row(), config=half.config)
        embedded = half.model.embed_tokens(torch.tensor([[300, 17]]))
    assert embedded.dtype == torch.bfloat16
    # Only 3 of 303 logits are rounded elsewhere, each by at most bf16's 2^-8.
    assert after.item() == pytest.approx(before.item(), rel=2**-8)


@pytest.mark.parametrize("images", [0, 1])
def test_gate_gradient_with_and_without_images(half, images):
    """A gate on a row with or without images has a gradient."""
    fp32.keep_gates_in_fp32(half)
    for block in blocks(half):
        block.alpha_cross_attn.requires_grad_(True)
        block.alpha_dense.requires_grad_(True)
    packed_loss(half, one_row(images=images), config=half.config).backward()
    for block in blocks(half):
        assert bool(block.alpha_cross_attn.grad.any()) == bool(images)
        assert block.alpha_dense.grad.any()
