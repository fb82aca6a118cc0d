"""Greedy generation: the tokens and logits of transformers' `generate`, and an image projected once."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from host_waits import HostWaits
from small_models import stand_in
from transformers import GenerationConfig

from modeling import generation, tiny
from modeling.adapters import attach
from modeling.device import CHOICES
from modeling.generation import ROOM, greedy
from modeling.loading import load
from modeling.packed_forward import image_features
from modeling.quantize import quantized_checkpoint
from modeling.shapes import IDEFICS_9B

ROOT = Path(__file__).parents[2]
TOKENS = 12
END = 2


@pytest.fixture
def model(base_folder):
    return load(str(base_folder)).model


def inputs_of(model, prompts=((3, 20), (1, 9), (0, 5), (2, 14)), *, images=3):
    """Left-padded prompts of so many (images, tokens); as `greedy` and the stock `generate` take them."""
    length = max(tokens for _, tokens in prompts)
    make = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 300, (len(prompts), length), generator=make)
    attended = torch.zeros_like(ids)
    seen = torch.zeros(len(prompts), length, images, dtype=torch.long)
    for row, (count, tokens) in enumerate(prompts):
        attended[row, -tokens:] = 1
        for image in range(count):
            start = length - tokens + 2 + 3 * image
            seen[row, start:, :] = 0
            seen[row, start:, image] = 1
    ids[attended == 0] = 0
    size = model.config.vision_config.image_size
    with torch.no_grad():
        features = image_features(model, torch.randn(len(prompts) * images, 3, size, size, generator=make))
    return {
        "input_ids": ids,
        "attention_mask": attended,
        "image_attention_mask": seen,
        "image_hidden_states": features.unflatten(0, (len(prompts), images)),
    }


def config_of(tokens=TOKENS, **changes):
    settings = {"min_new_tokens": tokens, "max_new_tokens": tokens, "eos_token_id": [END], "pad_token_id": 0}
    return GenerationConfig(**{**settings, **changes}, do_sample=False)


def stock(model, inputs, config):
    """(the tokens that are written, logits fp32 [tokens, B, V])"""
    with torch.no_grad():
        output = model.generate(
            **inputs, generation_config=config, return_dict_in_generate=True, output_logits=True, use_cache=True
        )
    return output.sequences[:, inputs["input_ids"].shape[1] :].tolist(), torch.stack(output.logits).float()


def with_logits(monkeypatch, model, inputs, config, fed):
    """As `stock`, of ours, each step after the tokens `fed` instead of its own: one rounding changes no later one."""
    logits, decoder = [], generation._Decoder

    class Told(decoder):
        @classmethod
        def read(cls, *arguments):
            made, first = super().read(*arguments)
            logits.append(first.clone())
            return made, first

        def step(self, tokens):
            logits.append(super().step(torch.tensor(fed)[:, len(logits) - 1]).clone())
            return logits[-1].clone()

    monkeypatch.setattr(generation, "_Decoder", Told)
    return greedy(model, inputs, config), torch.stack(logits)


def require_equal(monkeypatch, model, inputs, config, **tolerance):
    """Logits as close as `tolerance` at every step, and the tokens the stock ones, or as good as those to rounding."""
    expected, logits = stock(model, inputs, config)
    written, ours = with_logits(monkeypatch, model, inputs, config, expected)
    torch.testing.assert_close(ours, logits, **tolerance)
    values = logits.transpose(0, 1)  # [B, tokens, V]
    chosen, best = (values.gather(2, torch.tensor(tokens)[..., None]) for tokens in (written, expected))
    assert ((best - chosen).abs() <= 2 * (tolerance["atol"] + tolerance["rtol"] * best.abs())).all()
    return expected


def count_calls(model, names):
    """A list to which every run of such a projection of a gated block adds its name."""
    calls = []
    for layer in model.model.gated_cross_attn_layers:
        for name in names:
            module = layer.cross_attn.get_submodule(name)
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


# fp32 sums in another order, over two layers of some hundred terms.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_greedy_equals_stock(model, monkeypatch):
    """Tokens and logits are the stock generate s."""
    written = require_equal(monkeypatch, model, inputs_of(model), config_of(), **CLOSE)
    assert len({tuple(row) for row in written}) == 4


def test_greedy_bf16(model, monkeypatch):
    """And in bf16."""
    model.to(torch.bfloat16)
    # A rounding to 8 bits between any two operations, over twelve tokens.
    require_equal(monkeypatch, model, inputs_of(model), config_of(), rtol=0.05, atol=0.05)


def test_greedy_beyond_room(model, monkeypatch):
    """And beyond the room there was."""
    require_equal(monkeypatch, model, inputs_of(model), config_of(2 * ROOM + 3), **CLOSE)


@pytest.mark.parametrize("prompts", [((2, 14),), ((0, 5),), ((0, 1),), ((0, 5), (0, 9))], ids=str)
def test_greedy_without_padding_or_images(model, monkeypatch, prompts):
    """One prompt without padding and prompts without images."""
    require_equal(monkeypatch, model, inputs_of(model, prompts), config_of(), **CLOSE)


def test_greedy_without_qk_norms(monkeypatch):
    """Without query and key norms."""
    model = tiny.build_model({**stand_in(IDEFICS_9B), "qk_layer_norms": False}, seed=0, packed=True)
    require_equal(monkeypatch, model, inputs_of(model), config_of(), **CLOSE)


def test_greedy_vector_gates(monkeypatch):
    """Gates for every channel."""
    config = {**stand_in(IDEFICS_9B), "alpha_type": "vector", "alpha_initializer": "ones"}
    model = tiny.build_model(config, seed=0, packed=True)
    require_equal(monkeypatch, model, inputs_of(model), config_of(), **CLOSE)


def test_greedy_ends_alike(model):
    """Each prompt at an end of its own, the rest of its line filled up."""
    inputs = inputs_of(model)
    free, _ = stock(model, inputs, config_of(eos_token_id=None))
    ends = [free[0][5], free[1][2]]
    for changes in ({"min_new_tokens": None}, {"min_new_tokens": 4}, {"suppress_tokens": [free[2][0], free[3][1]]}):
        config = config_of(eos_token_id=ends, **changes)
        expected, _ = stock(model, inputs, config)
        assert greedy(model, inputs, config) == expected
    everything = list(range(model.config.vocab_size + model.config.additional_vocab_size))
    at_once = config_of(eos_token_id=everything, min_new_tokens=None)
    assert [len(row) for row in greedy(model, inputs, at_once)] == [1] * 4


def test_greedy_projects_image_once(model):
    """An image is projected with the prompt and once more and not once per token."""
    names = ["k_proj", "v_proj", "k_layer_norm"]
    calls, queries = count_calls(model, names), count_calls(model, ["q_proj"])
    layers = len(model.model.gated_cross_attn_layers)
    assert layers > 1
    greedy(model, inputs_of(model), config_of())
    assert sorted(calls) == sorted(2 * layers * names)
    assert len(queries) == layers * TOKENS


def test_greedy_lora(model, monkeypatch):
    """Adapters take part."""
    inputs, config = inputs_of(model), config_of()
    plain = stock(model, inputs, config)[1]
    wrapped = attach(model, {"cross_attention": "lora", "decoder": "lora"}, lora={"r": 2}, base="")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    wrapped.eval()
    assert not torch.allclose(stock(wrapped.get_base_model(), inputs, config)[1], plain)
    require_equal(monkeypatch, wrapped.get_base_model(), inputs, config, **CLOSE)


def test_greedy_4_bit(bf16_folder, tmp_path, monkeypatch):
    """4 bit projections are multiplied like others."""
    quantized = quantized_checkpoint(bf16_folder, tmp_path, name="base")
    model = load(str(bf16_folder), quantized=quantized).model.eval()
    projected = [layer.cross_attn.get_submodule("k_proj") for layer in model.model.gated_cross_attn_layers]
    assert {type(module) for module in projected} == {Linear4bit}
    require_equal(monkeypatch, model, inputs_of(model), config_of(), **CLOSE)


def test_text_cache_grows():
    """Keys and values move when their room is full and not before."""
    text, places = generation._TextCache(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4)), set()
    for number in range(ROOM):
        keys, values = text.append(torch.full((1, 1, 2, 4), number), torch.full((1, 1, 2, 4), -number))
        places.add((keys.data_ptr(), values.data_ptr()))
    assert len(places) == 1
    keys, values = text.append(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4))
    assert (keys.data_ptr(), values.data_ptr()) not in places
    assert keys[0, 1, :, 3].tolist() == [1.0] * 5 + list(range(ROOM)) + [0.0]
    assert values[0, 0, 5:, 0].tolist() == [-float(number) for number in range(ROOM)] + [0.0]


@pytest.mark.slow
def test_benchmark_compares_tokens():
    """The benchmark compares the tokens of both sides."""
    small = "--images 2 --tokens 3 --batch 2 --repeats 1 --hidden 128 --image-width 32 --vocab 300 --json"
    script = [sys.executable, "scripts/benchmarks/generation.py", *small.split()]
    ran = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, check=True)
    figures = json.loads(ran.stdout)
    assert figures["tokens"] == 3
    assert figures["ratio"] == pytest.approx(figures["stock"] / figures["ours"])


@pytest.mark.parametrize("every", [1, 4, 100])
def test_greedy_looks_every_few_tokens(model, monkeypatch, every):
    """A GPU is asked only now and then whether all answers have ended; the answers are the same, and as long."""
    asked = inputs_of(model)
    ends = sorted({ids[3] for ids in greedy(model, asked, config_of())})
    config = config_of(min_new_tokens=0, eos_token_id=ends)
    expected = greedy(model, asked, config)
    assert len(expected[0]) <= 4
    monkeypatch.setitem(CHOICES, "cpu", replace(CHOICES["cpu"], tokens_between_stops=every))
    with HostWaits() as waits:
        assert greedy(model, asked, config) == expected
    looks = waits.found["modeling/generation.py: greedy: _local_scalar_dense"] - 1  # how long the longest is
    assert looks == {1: len(expected[0]), 4: 1, 100: 0}[every]
