"""Checkpointing some of the layers."""

import pytest
import torch
from planned import LORA

from finetune.training.trainer import checkpoint_layers
from modeling.adapters import attach
from modeling.packed_forward import packed_loss


@pytest.mark.parametrize(("layers", "kept"), [(True, (0, 0)), (1, (7, 1)), (4, (4, 1)), (5, (3, 0)), (9, (0, 0))])
def test_checkpointing_changes_no_gradient(idefics, make_rows, layers, kept):
    """kept: layers of the decoder and blocks of cross-attention that keep all; of the stand-in's eight and two."""
    batch = make_rows().at(0)
    model = attach(idefics.model, {**LORA, "vision": "lora"}, lora={"r": 4, "lora_alpha": 8}, base="x").train()

    def gradients():
        model.zero_grad()
        loss = packed_loss(model, batch, config=model.config)
        loss.backward()
        return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.requires_grad}

    plain_loss, plain = gradients()
    checkpoint_layers(model, layers)
    inner = idefics.model.model
    parts = inner.layers, inner.gated_cross_attn_layers, inner.vision_model.encoder.layers
    keeping = [[not layer.gradient_checkpointing for layer in part] for part in parts]
    assert tuple(map(sum, keeping)) == (*kept, 0)
    assert all(part == sorted(part) for part in keeping)
    loss, checkpointed = gradients()
    assert loss == plain_loss
    assert plain.keys() == checkpointed.keys()
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in plain.values()) > 50
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
    checkpoint_layers(model, False)
    assert not any(layer.gradient_checkpointing for part in parts for layer in part)
