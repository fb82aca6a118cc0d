"""Keys and values of images computed once, those of text seldom copied: the same answers, the model as it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers.cache_utils import DynamicLayer

from modeling import tiny
from modeling.adapters import attach
from modeling.generation import ROOM, GrowingLayer, Remembered, growing_cache, remembered_images
from modeling.loading import load
from modeling.quantize import quantized_checkpoint
from modeling.shapes import IDEFICS_9B, stand_in

ROOT = Path(__file__).parent.parent
TOKENS = 12


class Counted(nn.Module):
    """Doubles, and counts how often."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, tensor):
        self.calls += 1
        return 2 * tensor


@pytest.fixture
def model(base_folder):
    return load(str(base_folder)).model


@pytest.fixture
def inputs(model):
    """Four prompts, left-padded, of three images, one, none and two; as the stock `generate` takes them."""
    prompts, images, length = [(3, 20), (1, 9), (0, 5), (2, 14)], 3, 20
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
    config = model.config.vision_config
    pixels = torch.randn(len(prompts), images, 3, config.image_size, config.image_size, generator=make)
    return {"input_ids": ids, "attention_mask": attended, "image_attention_mask": seen, "pixel_values": pixels}


def write(model, inputs):
    """(int64 [B, T], logits fp32 [TOKENS, B, V]): what is generated, exactly TOKENS of them, and how sure of it."""
    length = {"min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "do_sample": False}
    with torch.no_grad():
        output = model.generate(**inputs, **length, return_dict_in_generate=True, output_logits=True)
    return output.sequences, torch.stack(output.logits)


def count_calls(model, names):
    """A list to which every run of such a projection of a gated block adds its name."""
    calls = []
    for layer in model.model.gated_cross_attn_layers:
        for name in names:
            module = layer.cross_attn.get_submodule(name)
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["pixels", "features"])
def test_every_logit_is_the_stock_generate_s(model, inputs, given, dtype):
    model.to(dtype)
    if given == "features":  # as `finetune/generate.py` does
        with torch.no_grad():
            hidden = model.model.vision_model(inputs.pop("pixel_values").flatten(0, 1).to(dtype)).last_hidden_state
            inputs["image_hidden_states"] = model.model.perceiver_resampler(hidden).unflatten(0, (4, 3))
    tokens, logits = write(model, inputs)
    with remembered_images(model):
        ours, our_logits = write(model, inputs)
    assert torch.equal(ours, tokens)
    assert torch.equal(our_logits, logits)
    assert len({tuple(row[-TOKENS:]) for row in tokens.tolist()}) == 4


def test_an_image_is_projected_once_and_not_once_per_token(model, inputs):
    names = ["k_proj", "v_proj", "k_layer_norm"]
    calls, queries = count_calls(model, names), count_calls(model, ["q_proj"])
    layers = len(model.model.gated_cross_attn_layers)
    assert layers > 1
    write(model, inputs)
    assert len(calls) == 3 * layers * TOKENS
    calls.clear()
    queries.clear()
    with remembered_images(model):
        write(model, inputs)
        assert sorted(calls) == sorted(layers * names)
        assert len(queries) == layers * TOKENS
        write(model, {**inputs, "pixel_values": inputs["pixel_values"].flip(0)})
    assert sorted(calls) == sorted(2 * layers * names)


def test_other_images_are_other_images(model, inputs):
    others = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    expected = [write(model, one)[1] for one in (inputs, others, inputs)]
    assert not torch.equal(expected[0], expected[1])
    with remembered_images(model):
        for one, logits in zip((inputs, others, inputs), expected, strict=True):
            assert torch.equal(write(model, one)[1], logits)


def test_without_query_and_key_norms(inputs):
    model = tiny.build_model({**stand_in(IDEFICS_9B), "qk_layer_norms": False}, seed=0)
    tokens, logits = write(model, inputs)
    calls = count_calls(model, ["k_proj"])
    with remembered_images(model):
        ours, our_logits = write(model, inputs)
    assert torch.equal(ours, tokens)
    assert torch.equal(our_logits, logits)
    assert len(calls) == len(model.model.gated_cross_attn_layers)


def test_adapters_are_part_of_what_is_remembered(model, inputs):
    plain = write(model, inputs)[1]
    wrapped = attach(model, {"cross_attention": "lora"}, lora={"r": 2}, base="")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    wrapped.eval()
    tokens, logits = write(model, inputs)
    assert not torch.equal(logits, plain)
    calls = count_calls(model, ["k_proj", "k_proj.lora_A.default", "k_proj.base_layer"])
    with remembered_images(model):
        ours, our_logits = write(wrapped.get_base_model(), inputs)
    assert torch.equal(ours, tokens)
    assert torch.equal(our_logits, logits)
    assert len(calls) == 3 * len(model.model.gated_cross_attn_layers)


def test_4_bit_projections_are_remembered_like_others(bf16_folder, inputs, tmp_path):
    quantized = quantized_checkpoint(bf16_folder, tmp_path, name="base")
    model = load(str(bf16_folder), quantized=quantized).model.eval()
    projected = [layer.cross_attn.get_submodule("k_proj") for layer in model.model.gated_cross_attn_layers]
    assert {type(module) for module in projected} == {Linear4bit}
    tokens, logits = write(model, inputs)
    calls = count_calls(model, ["k_proj", "v_proj"])
    with remembered_images(model):
        ours, our_logits = write(model, inputs)
    assert torch.equal(ours, tokens)
    assert torch.equal(our_logits, logits)
    assert len(calls) == 2 * len(projected)


def test_afterwards_the_model_is_as_it_was_even_after_an_error(model, inputs):
    def state():
        return list(model.named_modules()), list(model.state_dict()), list(model.named_parameters())

    before = state()
    with remembered_images(model):
        inside = dict(model.named_modules())
        assert isinstance(inside["model.gated_cross_attn_layers.0.cross_attn.k_proj"], Remembered)
        write(model, inputs)
    assert state() == before
    with pytest.raises(ValueError, match="Exactly 1 of pixel_values"), remembered_images(model):
        write(model, {name: tensor for name, tensor in inputs.items() if name != "pixel_values"})
    assert state() == before


def test_gradients_are_those_of_the_stock_model_even_inside(model, inputs):
    def gradients():
        model.zero_grad()
        for _ in range(2):  # a second backward needs a second forward
            model(**inputs).logits.square().mean().backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    expected = gradients()
    with remembered_images(model):
        write(model, inputs)
        found = {name.replace(".wrapped.", "."): gradient for name, gradient in gradients().items()}
    assert found.keys() == expected.keys()
    assert any("cross_attn.k_proj" in name for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_same_tensor_is_the_same_memory_unwritten():
    inner = Counted()
    remembered, tensor = Remembered(inner), torch.arange(6.0).view(1, 2, 3)
    with torch.no_grad():
        first = remembered(tensor)
        assert remembered(tensor.view(2, 3).view(1, 2, 3)) is first  # as the stock forward hands it over
        assert inner.calls == 1
        assert remembered(tensor.view(1, 3, 2)).shape == (1, 3, 2)  # another shape
        assert torch.equal(remembered(tensor.view(1, 3, 2).transpose(1, 2)), 2 * tensor.view(1, 3, 2).mT)  # strides
        assert inner.calls == 3
        assert torch.equal(remembered(tensor.clone()), 2 * tensor)  # other memory
        remembered(tensor)
        tensor[0, 0, 0] = 7
        assert torch.equal(remembered(tensor), 2 * tensor)  # written to
        assert inner.calls == 6
    with torch.inference_mode():
        counted = torch.ones(2)
        remembered(counted)
        counted += 1
        assert remembered(counted).tolist() == [4, 4]


def test_memory_that_is_used_again_is_not_the_tensor_that_was():
    remembered = Remembered(Counted())
    with torch.no_grad():
        for value in range(20):
            tensor = torch.full((1000,), float(value))
            assert remembered(tensor)[0] == 2 * value
            del tensor


@pytest.mark.parametrize("beams", [1, 3])
def test_a_growing_cache_changes_no_logit(model, inputs, beams):
    def logits(**cache):
        length = {"min_new_tokens": ROOM + 4, "max_new_tokens": ROOM + 4, "do_sample": False, "num_beams": beams}
        with torch.no_grad():
            output = model.generate(**inputs, **cache, **length, return_dict_in_generate=True, output_logits=True)
        return output.sequences, torch.stack(output.logits)

    tokens, expected = logits()
    cache = growing_cache()
    with remembered_images(model):
        ours, found = logits(past_key_values=cache)
    assert torch.equal(ours, tokens)
    assert torch.equal(found, expected)
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * model.config.num_hidden_layers


def test_a_growing_layer_is_a_dynamic_layer():
    """Through everything that the stock layer may be asked for between two tokens."""
    make = torch.Generator().manual_seed(0)
    ours, stock = GrowingLayer(), DynamicLayer()

    def append(batch, tokens):
        keys, values = torch.randn(2, batch, 2, tokens, 4, generator=make)
        found, expected = ours.update(keys, values), stock.update(keys, values)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert ours.get_seq_length() == stock.get_seq_length()
        assert ours.get_mask_sizes(1) == stock.get_mask_sizes(1)

    append(3, 5)
    for step, change in enumerate(
        [
            lambda layer: layer.crop(-2),
            lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])),
            lambda layer: layer.crop(-layer.get_seq_length()),
            lambda layer: layer.batch_repeat_interleave(2),
            lambda layer: layer.batch_select_indices(torch.arange(3)),
            lambda layer: layer.reset(),
        ]
    ):
        change(ours), change(stock)
        for tokens in (1, 1, ROOM + 1, 1):
            append(6 if step == 3 else 3, tokens)


def test_a_growing_layer_keeps_its_memory_until_it_is_full():
    layer, places = GrowingLayer(), set()
    for tokens in [5, *[1] * ROOM]:
        keys, _ = layer.update(torch.ones(1, 2, tokens, 4), torch.ones(1, 2, tokens, 4))
        places.add(keys.data_ptr())
    assert len(places) == 1
    layer.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
    assert layer.keys.data_ptr() not in places


@pytest.mark.slow
def test_the_benchmark_compares_the_tokens_of_both_sides():
    small = "--images 2 --tokens 3 --batch 2 --repeats 1 --hidden 128 --image-width 32 --vocab 300 --json"
    script = [sys.executable, "scripts/benchmark_generation.py", *small.split()]
    ran = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, check=True)
    figures = json.loads(ran.stdout)
    assert figures["tokens"] == 3
    assert figures["ratio"] == pytest.approx(figures["stock"] / figures["ours"])
