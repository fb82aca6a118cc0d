"""Every parameter has one tower, every LoRA target its linear layer, every PEFT name its stock name."""

import re

import pytest
import torch
from small_models import stand_in
from torch import nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from modeling.shapes import IDEFICS_9B
from modeling.towers import _PARAMETERS, LORA_TOWERS, TOWERS, is_lora, lora_pattern, no_decay, stock_name, tower_of

PREFIXES = {
    "vision": "model.vision_model.",
    "resampler": "model.perceiver_resampler.",
    "cross_attention": "model.gated_cross_attn_layers.",
    "decoder": "model.layers.",
}


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return IdeficsForVisionText2Text(IdeficsConfig(**stand_in(IDEFICS_9B)))


def test_every_parameter_in_one_tower(model):
    """Every parameter matches exactly one tower once the cross attention has given up its gates."""
    for name, _ in model.named_parameters():
        matching = [tower for tower, pattern in _PARAMETERS.items() if re.fullmatch(pattern, name)]
        assert matching in ([tower_of(name)], ["gates", "cross_attention"]), name
    assert {tower_of(name) for name, _ in model.named_parameters()} == set(TOWERS)


@pytest.mark.parametrize(
    ("parameter", "tower"),
    [
        ("model.gated_cross_attn_layers.7.alpha_cross_attn", "gates"),
        ("model.gated_cross_attn_layers.7.alpha_dense", "gates"),
        ("model.gated_cross_attn_layers.7.cross_attn.q_layer_norm.weight", "cross_attention"),
        ("model.gated_cross_attn_layers.0.mlp.up_proj.weight", "cross_attention"),
        ("model.embed_tokens.additional_embedding.weight", "added_tokens"),
        ("lm_head.additional_fc.weight", "added_tokens"),
        ("model.embed_tokens.weight", "embeddings_and_head"),
        ("lm_head.weight", "embeddings_and_head"),
        ("model.norm.weight", "decoder"),
        ("model.layers.31.input_layernorm.weight", "decoder"),
        ("model.vision_model.embeddings.class_embedding", "vision"),
        ("model.perceiver_resampler.latents", "resampler"),
    ],
)
def test_tower_of(parameter, tower):
    """A parameter belongs to its tower."""
    assert tower_of(parameter) == tower


@pytest.mark.parametrize(
    "parameter",
    ["", "model.norm", "model.layers", "lm_head.bias", "model.layers.0.mlp.up_proj.weight\n", "x.model.norm.weight"],
)
def test_tower_of_unknown_name(parameter):
    """A name that IDEFICS does not have is refused."""
    with pytest.raises(KeyError, match="is not a parameter of IDEFICS"):
        tower_of(parameter)


@pytest.mark.parametrize("tower", LORA_TOWERS)
def test_lora_pattern_of_tower(model, tower):
    """The pattern of a tower matches its linear layers and no other module."""
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(PREFIXES[tower])
    }
    pattern = lora_pattern((tower,))
    assert {name for name, _ in model.named_modules() if re.fullmatch(pattern, name)} == expected
    assert len(expected) == {"vision": 12, "resampler": 12, "cross_attention": 14, "decoder": 56}[tower]


def test_lora_pattern_of_several(model):
    """The pattern of several towers is their union."""
    names = [name for name, _ in model.named_modules()]
    union = {name for name in names for tower in LORA_TOWERS if re.fullmatch(lora_pattern((tower,)), name)}
    assert {name for name in names if re.fullmatch(lora_pattern(LORA_TOWERS), name)} == union
    assert len(union) == 94


@pytest.mark.parametrize(
    ("peft", "stock"),
    [
        (
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight",
            "model.layers.0.mlp.up_proj.weight",
        ),
        (
            "base_model.model.model.layers.10.self_attn.q_proj.lora_B.other.weight",
            "model.layers.10.self_attn.q_proj.weight",
        ),
        (
            "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight",
            "model.layers.0.mlp.up_proj.weight",
        ),
        (
            "base_model.model.model.vision_model.encoder.layers.0.mlp.fc1.base_layer.bias",
            "model.vision_model.encoder.layers.0.mlp.fc1.bias",
        ),
        (
            "base_model.model.model.embed_tokens.additional_embedding.modules_to_save.default.weight",
            "model.embed_tokens.additional_embedding.weight",
        ),
        (
            "base_model.model.lm_head.additional_fc.original_module.weight",
            "lm_head.additional_fc.weight",
        ),
        (
            "base_model.model.model.gated_cross_attn_layers.0.alpha_dense",
            "model.gated_cross_attn_layers.0.alpha_dense",
        ),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_stock_name_of_peft_name(peft, stock):
    """A PEFT name gives the stock name."""
    assert stock_name(peft) == stock


def test_is_lora():
    """Only LoRA factors are LoRA."""
    assert is_lora("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    assert not is_lora("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")


def test_no_decay(model):
    """No decay for exactly the scales and offsets."""
    matrices = {name for name, p in model.named_parameters() if p.dim() >= 2}
    tables = {
        "model.perceiver_resampler.latents",
        "model.vision_model.embeddings.position_embedding.weight",
        "model.embed_tokens.additional_embedding.weight",
        "lm_head.additional_fc.weight",
    }
    decayed = {name for name, _ in model.named_parameters() if not no_decay(name)}
    assert tables < matrices
    assert decayed == matrices - tables
