"""Parity finds what is wrong with a merge, in every precision, and nothing in a right one."""

import math
import shutil

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from merging import EVERYTHING, FOUR_TOWERS, adapter_for, spoil
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from finetune.export.merge import merge
from finetune.export.verify import Comparison, compare
from modeling import merge_parity, safetensors_io
from modeling.adapter_weights import AdapterWeights, weights_of
from modeling.config import read_config
from modeling.merge_parity import build_block, changed_blocks, compare_block, compare_tensor, feed
from modeling.safetensors_io import read_checkpoint, read_header

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LORA = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
BLOCKS = [
    "model.gated_cross_attn_layers.0",
    "model.gated_cross_attn_layers.1",
    *(f"model.layers.{layer}" for layer in range(8)),
    "model.perceiver_resampler",
    "model.vision_model.encoder.layers.0",
    "model.vision_model.encoder.layers.1",
]
UP = "model.layers.3.mlp.up_proj.weight"  # LoRA
NORM = "model.layers.3.input_layernorm.weight"  # copied
GATE = "model.gated_cross_attn_layers.1.alpha_dense"  # replaced
ROWS = "lm_head.additional_fc.weight"  # grown by </s>
UNTOUCHED = "model.embed_tokens.weight"
REPLACED = "model.vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def adapters(base_folder, tmp_path_factory):
    """Name -> adapter folder."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, lora in LORA.items():
        adapter_for(base_folder, folder / name, FOUR_TOWERS, lora)
    adapter_for(base_folder, folder / "everything", EVERYTHING)
    return folder


@pytest.fixture(scope="module")
def merges(base_folder, adapters, tmp_path_factory):
    """adapter, dtype -> merged folder."""
    folder = tmp_path_factory.mktemp("merges")

    def merged(adapter, dtype="fp32"):
        out = folder / f"{adapter}-{dtype}"
        if not out.exists():
            merge(adapters / adapter, str(base_folder), out, dtype=DTYPES[dtype])
        return out

    return merged


@pytest.fixture
def compared(base_folder, adapters, merges, tmp_path):
    """compared(change, ...) -> what parity says of a merge whose weights were changed."""

    def comparison(change=lambda tensors: None, *, adapter="lora", dtype="fp32", against=None) -> Comparison:
        merged = tmp_path / "merged"
        shutil.copytree(merges(adapter, dtype), merged, dirs_exist_ok=True)
        spoil(merged / "model.safetensors", change)
        base = read_checkpoint(base_folder)
        expected = against or AdapterWeights.read(adapters / adapter)
        return compare(read_config(str(merged)), base, read_checkpoint(merged), expected)

    return comparison


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter", [*LORA, "everything"])
def test_parity_of_right_merge(compared, adapter, dtype):
    """An honest merge differs by rounding alone."""
    comparison = compared(adapter=adapter, dtype=dtype)
    assert comparison.tensors == 177
    assert comparison.largest_tensor_difference <= 1
    assert comparison.largest_block_difference < {"fp32": 2e-6, "bf16": 3e-2, "fp16": 4e-3}[dtype]
    expected = BLOCKS if adapter != "everything" else BLOCKS[:11]  # whose vision tower was trained in full
    assert list(comparison.block_differences) == expected
    if dtype != "fp32":
        assert comparison.largest_tensor_difference > 0.5
        assert comparison.largest_block_difference > 1e-5


@pytest.mark.parametrize("name", [UP, NORM, GATE, ROWS, UNTOUCHED])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_one_changed_value(compared, name, place, dtype):
    """One changed value is found whatever the tensor."""

    def change(tensors):
        values = tensors[name].view(-1)
        kind = torch.finfo(values.dtype)
        values[place] += 64 * kind.eps * max(abs(values[place]), 0.1) if dtype == "fp32" else 3 * kind.eps

    comparison = compared(change, dtype=dtype)
    assert comparison.largest_tensor_difference > 1
    assert comparison.worst_tensor == name


def rows_found(base_folder, adapter, merged, name, tmp_path):
    """Rows of a merged tensor in which one changed value is found."""
    tensor, base = load_file(merged / "model.safetensors")[name], read_checkpoint(base_folder)
    for row in range(len(tensor)):
        changed = tensor.clone()
        changed.view(len(tensor), -1)[row, -1] += 0.01
        save_file({name: changed}, tmp_path / "one.safetensors")
        if compare_tensor(name, {}, base, read_header(tmp_path / "one.safetensors"), adapter).relative > 1:
            yield row


def test_parity_sampled_rows(base_folder, adapters, merges, monkeypatch, tmp_path):
    """Of a large tensor four rows are looked at and of a replaced one all."""
    monkeypatch.setattr(merge_parity, "SMALL", 0)
    adapter, merged = AdapterWeights.read(adapters / "everything"), merges("everything")
    found = {
        name: list(rows_found(base_folder, adapter, merged, name, tmp_path))
        for name in (UP, UP.replace("layers.3", "layers.4"), REPLACED)
    }
    one, other, replaced = found.values()
    assert len(one) == len(other) == 4
    assert one != other
    assert replaced == list(range(384))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parity_not_a_number(compared, value):
    """What is not a number is found."""

    def change(tensors):
        tensors[NORM][5] = value

    comparison = compared(change)
    assert not comparison.tensor_differences[NORM] <= 1
    assert not comparison.block_differences["model.layers.3"] < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_parity_scaled_adapter(compared, adapters, dtype, factor):
    """An adapter scaled by a hundredth is found."""
    other = AdapterWeights.read(adapters / "lora")
    other.lora[UP][factor] = other.lora[UP][factor] * 1.01
    comparison = compared(dtype=dtype, against=other)
    assert comparison.tensor_differences.pop(UP) > 1
    assert max(comparison.tensor_differences.values()) <= 1


@pytest.mark.parametrize("adapter", ["rslora", "dora"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_other_lora(compared, adapters, adapter, dtype):
    """Another kind of LoRA is found."""
    plain = compared(adapter=adapter, dtype=dtype, against=AdapterWeights.read(adapters / "lora"))
    assert plain.largest_tensor_difference > 10
    assert plain.largest_block_difference > 1e-2


def test_parity_base_itself(compared, base_folder):
    """The base itself is found."""
    base = load_file(base_folder / "model.safetensors")

    def change(tensors):
        tensors[UP] = base[UP]

    comparison = compared(change)
    assert comparison.worst_tensor == UP
    assert comparison.worst_block == "model.layers.3"
    assert comparison.largest_block_difference > 1e-2


@pytest.mark.parametrize(
    ("one", "other", "block"),
    [
        ("model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.k_proj.weight", "model.layers.2"),
        ("model.layers.2.mlp.gate_proj.weight", "model.layers.5.mlp.gate_proj.weight", "model.layers.2"),
        (
            "model.gated_cross_attn_layers.0.mlp.gate_proj.weight",
            "model.gated_cross_attn_layers.0.mlp.up_proj.weight",
            "model.gated_cross_attn_layers.0",
        ),
        (
            "model.perceiver_resampler.blocks.0.0.k_proj.weight",
            "model.perceiver_resampler.blocks.0.0.v_proj.weight",
            "model.perceiver_resampler",
        ),
        (
            "model.vision_model.encoder.layers.1.self_attn.q_proj.weight",
            "model.vision_model.encoder.layers.1.self_attn.v_proj.weight",
            "model.vision_model.encoder.layers.1",
        ),
    ],
)
def test_parity_exchanged_tensors(compared, one, other, block):
    """Exchanged tensors are found in their block."""

    def change(tensors):
        tensors[one], tensors[other] = tensors[other], tensors[one]

    comparison = compared(change)
    assert comparison.tensor_differences[one] > 1
    assert comparison.block_differences[block] > 1e-2
    blocks = {name for name, difference in comparison.block_differences.items() if difference > 1e-4}
    assert blocks == {name for name in BLOCKS if f"{name}." in f"{one} {other}"}


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 7),
    st.booleans(),
)
def test_parity_nearest_value(tmp_path_factory, values, dtype, index, up):
    """Whatever the size: powers of two, where steps change, and numbers below the normal ones."""
    folder = tmp_path_factory.getbasetemp()
    exact = torch.tensor(values)
    nearest = exact.to(dtype)
    wrong, index = nearest.clone(), index % len(values)
    kind = torch.tensor(math.inf if up else -math.inf, dtype=dtype)
    for _ in range(2):  # one step may be as near as the nearest
        wrong[index] = neighbour(wrong[index], kind)
    assume(wrong[index].isfinite())
    for name, tensor in (("exact", exact), ("nearest", nearest), ("wrong", wrong)):
        save_file({"x": tensor}, folder / f"{name}.safetensors")
    read = {name: read_header(folder / f"{name}.safetensors") for name in ("exact", "nearest", "wrong")}
    nothing = AdapterWeights({}, {}, None)
    assert compare_tensor("x", {}, read["exact"], read["nearest"], nothing).relative <= 1
    assert compare_tensor("x", {}, read["exact"], read["wrong"], nothing).relative > 1


def neighbour(value, towards):
    """The next number of a 16-bit type: its bits, counted on."""
    bits = value.view(torch.int16).item()
    if value == 0:
        bits = 1 if towards > 0 else -32768 + 1
    else:
        bits += 1 if (value < towards) == (value > 0) else -1
    return torch.tensor(bits, dtype=torch.int16).view(value.dtype)


def real_model(base_folder, adapter):
    """The base in plain transformers under PEFT, with what the adapter replaces in place."""
    model = IdeficsForVisionText2Text.from_pretrained(base_folder, attn_implementation="sdpa")
    model.load_state_dict(load_file(adapter / "trained.safetensors"), strict=False)
    return PeftModel.from_pretrained(model, adapter).eval().base_model.model


@pytest.mark.parametrize("kind", LORA)
def test_block_equals_model_under_peft(base_folder, adapters, kind):
    """Base and adapter give what the real model's block gives under PEFT."""
    real, base = real_model(base_folder, adapters / kind), read_checkpoint(base_folder)
    config = IdeficsConfig.from_pretrained(base_folder, attn_implementation="sdpa")
    config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    adapter = AdapterWeights.read(adapters / kind)
    assert changed_blocks(adapter) == BLOCKS
    for block in BLOCKS:
        expected = feed(block, real.get_submodule(block), config)
        got = feed(block, build_block(block, config, base, adapter), config)
        assert (got - expected).abs().max() < 2e-6 * expected.abs().max(), block
        without = feed(block, build_block(block, config, base), config)
        assert (without - expected).abs().max() > 1e-3 * expected.abs().max(), block


def test_block_equals_plain_transformers(base_folder, merges):
    """A merged block gives what plain transformers gives."""
    folder = merges("lora")
    real = IdeficsForVisionText2Text.from_pretrained(folder, attn_implementation="sdpa").eval()
    merged = read_checkpoint(folder)
    real.config._attn_implementation = real.config.vision_config._attn_implementation = "sdpa"
    for block in BLOCKS:
        got = feed(block, build_block(block, real.config, merged), real.config)
        torch.testing.assert_close(got, feed(block, real.get_submodule(block), real.config), rtol=1e-5, atol=1e-5)


def test_block_of_row_blocks(base_folder, adapters, merges, monkeypatch):
    """Blocks of rows change no block's output."""
    base, merged = read_checkpoint(base_folder), read_checkpoint(merges("lora"))
    config, adapter = read_config(str(merges("lora"))), AdapterWeights.read(adapters / "dora")
    whole = [compare_block(block, config, base, merged, adapter).largest for block in BLOCKS]
    monkeypatch.setattr(safetensors_io, "BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(safetensors_io, "ROW_GROUP", 1)
    assert [compare_block(block, config, base, merged, adapter).largest for block in BLOCKS] == pytest.approx(
        whole, rel=1e-4
    )


def test_changed_blocks_order():
    """The order of blocks is that of numbers."""
    names = ["model.layers.10.mlp.up_proj", "model.layers.9.mlp.up_proj", "model.layers.9.mlp.down_proj"]
    adapter = AdapterWeights({f"{name}.weight": {} for name in names}, {"lm_head.weight": torch.zeros(1)}, None)
    assert changed_blocks(adapter) == ["model.layers.9", "model.layers.10"]


def test_parity_of_base_precisions(base_folder, adapters, merges):
    """The released weights and those in 4 bits are told apart."""
    config, merged = read_config(str(merges("lora"))), read_checkpoint(merges("lora"))
    stored, adapter = read_checkpoint(base_folder), AdapterWeights.read(adapters / "lora")
    quantized = compare(config, weights_of(stored, read_config(str(base_folder)), "nf4"), merged, adapter)
    assert quantized.largest_tensor_difference > 100
    wrong = {name for name, difference in quantized.tensor_differences.items() if difference > 1}
    linear = {name for name in stored if "_proj" in name and ("gated_cross" in name or "model.layers" in name)}
    assert wrong == {name for name in linear if stored[name].shape[1] % 64 == 0}  # others are in no whole groups
    assert 0 < len(wrong) < len(linear)
