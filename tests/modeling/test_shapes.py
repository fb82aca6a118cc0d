"""Configurations as literals agree with transformers' own model, and with the published counts."""

import json
import subprocess
import sys

import pytest
import torch
from small_models import stand_in
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from modeling.config import read_config, require_idefics
from modeling.errors import UserError
from modeling.shapes import IDEFICS_9B, IDEFICS_80B, TINY, count_lora, count_parameters, tensor_shapes

CONFIGS = {
    "tiny": TINY,
    "9b": IDEFICS_9B,
    "9b-instruct": {**IDEFICS_9B, "additional_vocab_size": 3},
    "80b": IDEFICS_80B,
    "stand-in of the 9b": stand_in(IDEFICS_9B),
    "stand-in of the 80b": stand_in(IDEFICS_80B),
    "gates as vectors": {**TINY, "alpha_type": "vector"},
    "no norms of queries and keys": {
        **TINY,
        "qk_layer_norms": False,
        "perceiver_config": {**TINY["perceiver_config"], "qk_layer_norms_perceiver": False},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_equal_stock(name):
    """Shapes are those of the stock model."""
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig(**CONFIGS[name]))
    assert tensor_shapes(CONFIGS[name]) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_parameters_of_9b():
    """The 9B has the published number of parameters."""
    counts = count_parameters(IDEFICS_9B)
    assert counts == {
        "vision": 630_766_080,
        "resampler": 125_961_984,
        "cross_attention": 1_434_519_568 - 16,
        "decoder": 6_476_271_616,
        "gates": 16,
        "added_tokens": 16_384,
        "embeddings_and_head": 2 * 131_072_000,
    }
    assert sum(counts.values()) == 8_929_679_632
    assert sum(count_parameters(CONFIGS["9b-instruct"]).values()) == 8_929_687_824


def test_parameters_of_80b():
    """The 80B has the published number of parameters."""
    counts = count_parameters(IDEFICS_80B)
    assert counts == {
        "vision": 630_766_080,
        "resampler": 125_961_984,
        "cross_attention": 13_925_422_120 - 40,
        "decoder": 64_761_372_672,
        "gates": 40,
        "added_tokens": 32_768,
        "embeddings_and_head": 2 * 262_144_000,
    }
    assert sum(counts.values()) == 79_967_843_624


@pytest.mark.parametrize(
    ("config", "towers", "layers", "parameters"),
    [
        (IDEFICS_9B, ("decoder",), 224, 39_976_960),
        (IDEFICS_9B, ("cross_attention",), 56, 9_273_344),
        (IDEFICS_9B, ("decoder", "cross_attention"), 280, 49_250_304),
        (IDEFICS_80B, ("decoder",), 560, 199_884_800),
        (IDEFICS_80B, ("cross_attention",), 140, 45_547_520),
        (IDEFICS_80B, ("decoder", "cross_attention"), 700, 245_432_320),
        (IDEFICS_9B, ("vision",), 192, 11_796_480),
        (IDEFICS_80B, ("resampler",), 36, 2_310_144),
        (IDEFICS_9B, (), 0, 0),
    ],
)
def test_lora_rank_16_count(config, towers, layers, parameters):
    """LoRA of rank 16 has the published count."""
    assert count_lora(config, towers, 16) == (layers, parameters)


def test_lora_count_grows_with_rank():
    """LoRA counts grow with the rank."""
    assert count_lora(IDEFICS_9B, ("decoder",), 1) == (224, 39_976_960 // 16)


@pytest.mark.parametrize("config", [IDEFICS_9B, IDEFICS_80B])
def test_stand_in_structure(config):
    """A stand in keeps the structure and leaves the original alone."""
    before = json.dumps(config)
    small = stand_in(config)
    assert small["cross_layer_interval"] == 4
    assert small["num_hidden_layers"] == 8
    assert (small["additional_vocab_size"], small["rms_norm_eps"]) == (2, config["rms_norm_eps"])
    assert small["alpha_initializer"] == "ones"
    assert sum(count_parameters(small).values()) < 1_000_000
    assert json.dumps(config) == before


@pytest.mark.parametrize("module", ["modeling.shapes", "modeling.towers", "modeling.errors"])
def test_shapes_need_no_torch(module):
    """Planning needs no torch."""
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _write(folder, **changes):
    (folder / "config.json").write_text(json.dumps({"model_type": "idefics", **TINY, **changes}))
    return str(folder)


def test_config_of_folder(tmp_path):
    """The config of a folder is read."""
    expected = {"model_type": "idefics", **TINY, "vision_config": {**TINY["vision_config"], "num_channels": 3}}
    assert read_config(_write(tmp_path)) == expected


@pytest.mark.parametrize(
    ("base", "config", "added"),
    [
        ("HuggingFaceM4/idefics-9b", IDEFICS_9B, 2),
        ("HuggingFaceM4/idefics-9b-instruct", IDEFICS_9B, 3),
        ("HuggingFaceM4/idefics-80b", IDEFICS_80B, 2),
        ("HuggingFaceM4/idefics-80b-instruct", IDEFICS_80B, 3),
    ],
)
def test_released_models_need_no_hub(base, config, added):
    """The released models need no hub."""
    assert read_config(base) == {**config, "additional_vocab_size": added}


def test_folder_without_config(tmp_path):
    """A folder without a config is refused."""
    with pytest.raises(UserError, match=r"expected a model folder with a config\.json, found none"):
        read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"model_type": "idef', "not JSON .*Unterminated string.*fetch the file again"),
        (b"", "not JSON .*Expecting value"),
        (b"\xff", "not JSON .*codec"),
        (b'{"a":' * 100_000, "not JSON .*recursion"),
        (b"[]", "expected a JSON object, got list"),
    ],
)
def test_config_cut_short(tmp_path, content, told):
    """A config cut short is refused by name."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_config(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize("base", ["nobody/no-such-model", "not a name at all", "HuggingFaceM4/idefics-9b@main"])
def test_unknown_base(base):
    """A base that nobody has is refused."""
    with pytest.raises(UserError, match=r"is neither a folder here nor a (hub id|model the hub gave)"):
        read_config(base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "idefics2"}, "expected an IDEFICS model .* got model_type 'idefics2'"),
        ({"use_resampler": False}, "without a perceiver resampler"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"additional_vocab_size": 0}, "expected additional_vocab_size 2 .* got 0"),
        ({"additional_vocab_size": 4}, "expected additional_vocab_size 2 .* got 4"),
    ],
)
def test_config_not_trainable(tmp_path, changes, message):
    """A config that cannot be trained is refused."""
    base = _write(tmp_path, **changes)
    with pytest.raises(UserError, match=message) as error:
        read_config(base)
    assert "config.json" in str(error.value)


def test_config_missing_fields():
    """A config without these fields is refused."""
    config = dict(TINY)
    del config["use_resampler"]
    with pytest.raises(UserError, match="without a perceiver resampler"):
        require_idefics(config, where="here")
    config = dict(TINY)
    del config["additional_vocab_size"]
    with pytest.raises(UserError, match="got 0"):
        require_idefics(config, where="here")
