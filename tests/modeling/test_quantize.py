"""NF4: the matrices of two towers in 4 bits, and everything computed with them as with the matrices they stand for."""

import json
import re
import shutil

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from training_settings import training
from trl import SFTTrainer
from typer.testing import CliRunner

from finetune.base_model import open_base
from finetune.cli import app
from finetune.pipeline import resolve_sources
from finetune.pipeline import run as run_stages
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Model
from finetune.reporting.plots import draw
from finetune.serving.chat import load_assistant
from finetune.training.arguments import training_arguments
from finetune.training.callbacks import gate_openings
from finetune.training.checkpoints import last_checkpoint
from finetune.training.prefetch import PrefetchedRows
from finetune.training.trainer import IdeficsTrainer, _row_numbers, train
from modeling import loading, quantize
from modeling.adapters import attach, count_trained, open_adapter, save_adapter, trained_parameters
from modeling.config import read_config
from modeling.device import compute_dtype
from modeling.errors import UserError
from modeling.packed_forward import packed_loss
from modeling.quantize import Nf4, dequantized, quantized_checkpoint, quantized_layers, quantized_names
from modeling.shapes import IDEFICS_9B, IDEFICS_80B, tensor_shapes
from modeling.towers import stock_name

MODES = {"cross_attention": "lora", "decoder": "lora", "resampler": "full", "gates": "full", "added_tokens": "full"}
LORA = {"r": 4, "lora_alpha": 8}

BLOCK = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EXPECTED = {
    *(f"model.layers.{layer}.self_attn.{linear}.weight" for layer in range(8) for linear in BLOCK),
    *(f"model.layers.{layer}.mlp.{linear}.weight" for layer in range(8) for linear in MLP),
    *(f"model.gated_cross_attn_layers.{layer}.cross_attn.{linear}.weight" for layer in (0, 1) for linear in BLOCK),
    *(f"model.gated_cross_attn_layers.{layer}.mlp.{linear}.weight" for layer in (0, 1) for linear in MLP),
}
"""Of a stand-in of the 9B: eight layers, a gated block before every fourth."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture
def load_nf4(bf16_folder, cache):
    """load_nf4(**options) -> the stand-in in NF4, from bf16 files; what is not quantised is fp32."""
    quantized = quantized_checkpoint(bf16_folder, cache, name="base")
    return lambda **options: loading.load(str(bf16_folder), quantized=quantized, **options).model


@pytest.fixture
def load_reference(bf16_folder):
    """The reference: plain linear layers that hold the dequantised matrices, in fp32."""

    def load():
        model = loading.load(str(bf16_folder)).model
        for name, parameter in model.named_parameters():
            if name in EXPECTED:
                parameter.data = dequantized(parameter.data)
        return model

    return load


def attached(model, *, modes=None, scale=0.0, **lora):
    """With LoRA of its own seed; `scale` moves it away from the zeros it starts with."""
    torch.manual_seed(0)
    wrapped = attach(model, modes or MODES, lora={**LORA, **lora}, base="base")
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            parameter.data.add_(torch.randn(parameter.shape), alpha=scale)
    return wrapped


def run(model, folder, rows, base, *, resume_from=None, eval_rows=None, **settings):
    tokenizer = loading.load_processor(str(base)).tokenizer
    options = {"train_rows": rows, "eval_rows": eval_rows, "resume_from": resume_from}
    return train(model, tokenizer, folder, training(**settings), **options)


def trained(folder):
    files = sorted((folder / "adapter").glob("*.safetensors"))
    return {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}


# The format


def test_nf4_row_by_hand():
    """One group: its scale, 2, is the mean of all scales, so double quantisation does not change it."""
    row = torch.tensor([[2.0, -2.0, 0.0, 1.0, -1.0, 0.15] + [0.0] * 58])
    # levels of Dettmers et al. 2023, appendix E, times 2
    expected = [2.0, -2.0, 0.0, 2 * 0.44070982933044434, 2 * -0.5250730514526367, 2 * 0.07958029955625534]
    torch.testing.assert_close(dequantized(row)[0, :6], torch.tensor(expected), rtol=0, atol=0)
    assert not dequantized(row)[0, 6:].any()


@given(
    shape=st.tuples(st.integers(1, 200), st.sampled_from([2, 48, 64, 96, 130, 352])),
    block=st.sampled_from([1, 5000, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10),
)
@settings(deadline=None, max_examples=60)
def test_nf4_blocks_equal_bitsandbytes(shape, block, dtype, seed):
    """Blocks of rows give what bitsandbytes gives at once."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    asked = []

    def rows(start, stop):
        asked.append(weight[start:stop])
        return asked[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "BLOCK_ELEMENTS", block)
        got = Nf4.of(rows, shape)
    packed, state = functional.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4", compress_statistics=True)
    assert all(one.numel() <= max(block, 64 * shape[1]) for one in asked)
    assert torch.equal(got.packed, packed)
    theirs, ours = state.as_dict(packed=True), got.state.as_dict(packed=True)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: weight.numel()].long()
    whole = (state.code[codes] * scales.repeat_interleave(64)[: weight.numel()]).view(shape)
    assert torch.equal(got.rows(), whole)
    first, last = sorted((seed * 7 % shape[0], seed * 31 % shape[0]))
    assert torch.equal(got.rows(first, last + 1), whole[first : last + 1])


def test_nf4_bf16_equals_fp32_copy():
    """A bf16 matrix and its fp32 copy are the same in 4 bits."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(dequantized(weight), dequantized(weight.float()))
    assert 0 < (dequantized(weight) - weight.float()).abs().max() < 0.5


def test_bitsandbytes_wrong_scales_for_uneven_rows():
    """modeling/quantize.py `quantized_names` leaves them out; when bitsandbytes mends it on the CPU, it need not."""
    weight = torch.randn(128, 96, generator=torch.Generator().manual_seed(0)) * torch.arange(128)[:, None]
    theirs = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    assert (dequantized(weight) - weight).norm() < 0.1 * weight.norm()
    assert (theirs - weight).norm() > 0.3 * weight.norm()


# What is quantised


def test_uneven_rows_not_quantised(base_folder, tmp_path):
    """The other stand-in: MLPs of 96, and images' features of 96."""
    expected = {name for name in EXPECTED if not re.search(r"down_proj|cross_attn\.[kv]_proj", name)}
    assert len(expected) == 8 * 6 + 2 * 4
    made = quantized_checkpoint(base_folder, tmp_path, name="base")
    model = loading.load(str(base_folder), quantized=made).model
    assert {f"{name}.weight" for name in quantized_layers(model)} == expected
    assert quantized_names(read_config(str(base_folder))) == expected


def test_quantized_names(bf16_folder):
    """Names of the stand in and of the released shapes."""
    assert quantized_names(read_config(str(bf16_folder))) == EXPECTED
    assert len(EXPECTED) == 8 * 7 + 2 * 7
    for config, layers, blocks in ((IDEFICS_9B, 32, 8), (IDEFICS_80B, 80, 20)):
        names = quantized_names(config)
        assert len(names) == 7 * (layers + blocks)
        assert all(len(shape) == 2 for name, shape in tensor_shapes(config).items() if name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_layers_exactly(bf16_folder, load_nf4, dtype):
    """Exactly these layers are in 4 bits and all else is as it was."""
    model, plain = load_nf4(dtype=dtype), loading.load(str(bf16_folder), dtype=dtype).model
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert {f"{name}.weight" for name in layers} == EXPECTED
    expected = dict(plain.named_parameters())
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if name in EXPECTED:
            assert parameter.dtype == torch.uint8
            assert parameter.quant_state.nested
            got = functional.dequantize_4bit(parameter.data, parameter.quant_state)
            assert torch.equal(got, dequantized(expected[name].data))
        else:
            assert parameter.dtype == dtype, name
            assert torch.equal(parameter, expected[name]), name
    assert model.dtype == dtype
    assert {layer.compute_dtype for layer in layers.values()} == {compute_dtype()}


def test_compute_dtype_in_both_passes(load_nf4, monkeypatch):
    """Both passes multiply in the compute type."""
    monkeypatch.setattr(quantize, "compute_dtype", lambda: torch.bfloat16)
    for layer in quantized_layers(load_nf4()).values():
        assert (layer.compute_dtype, layer.weight.quant_state.dtype) == (torch.bfloat16, torch.bfloat16)


def test_compute_dtype_by_hardware(monkeypatch):
    """The compute type follows the hardware."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compute_dtype() == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert compute_dtype() == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert compute_dtype() == torch.float16


def test_quantized_base_becomes_instruct(bf16_folder, load_nf4):
    """A base becomes instruct in 4 bits as in full."""
    model, plain = load_nf4(), loading.load(str(bf16_folder)).model
    base = load_nf4(instruct=False)
    assert (base.config.additional_vocab_size, model.config.additional_vocab_size) == (2, 3)
    for owner in ("lm_head.additional_fc", "model.embed_tokens.additional_embedding"):
        rows = model.get_submodule(owner).weight
        assert torch.equal(rows, plain.get_submodule(owner).weight)
        assert torch.equal(rows[:2], base.get_submodule(owner).weight)
    assert torch.equal(model.lm_head.additional_fc.weight[2], model.lm_head.weight[2])
    ids = {"input_ids": torch.tensor([[1, 17, 302]]), "perceiver_embeddings": torch.zeros(1, 0, 8, 128)}
    assert model(**ids, image_attention_mask=torch.zeros(1, 3, 0)).logits.shape == (1, 3, 303)


# On disk


def test_quantized_checkpoint_resumes(bf16_folder, tmp_path, monkeypatch):
    """It is made once and goes on where it was interrupted."""
    monkeypatch.setattr(quantize, "SHARD_BYTES", 400_000)
    made = quantized_checkpoint(bf16_folder, tmp_path, name="base")
    files = sorted(made.glob("model-*.safetensors"))
    assert len(files) > 3
    assert made.name.startswith("base-")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    assert quantized_checkpoint(bf16_folder, tmp_path, name="base") == made
    assert all(file.stat().st_mtime_ns == then for file, (_, then) in before.items())
    (made / "config.json").unlink()
    files[1].unlink()
    (made / f"{files[1].name}.partial").write_bytes(b"half")
    assert quantized_checkpoint(bf16_folder, tmp_path, name="base") == made
    assert all(file.read_bytes() == content for file, (content, _) in before.items())
    assert [file for file, (_, then) in before.items() if file.stat().st_mtime_ns != then] == [files[1]]
    assert not list(made.glob("*.partial"))
    files[2].write_bytes(before[files[2]][0][:-9])
    assert quantized_checkpoint(bf16_folder, tmp_path, name="base") == made
    assert all(file.read_bytes() == content for file, (content, _) in before.items())


def test_quantized_checkpoint_of_changed_base(bf16_folder, tmp_path):
    """A base that changed is another base."""
    folder = tmp_path / "base"
    shutil.copytree(bf16_folder, folder)
    first = quantized_checkpoint(folder, tmp_path / "cache", name="base")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    second = quantized_checkpoint(folder, tmp_path / "cache", name="base")
    assert first != second
    changed = loading.load(str(folder), quantized=second).model.model.norm.weight
    assert torch.equal(changed, tensors["model.norm.weight"].float())


def test_quantized_checkpoint_of_other_bitsandbytes(bf16_folder, tmp_path, monkeypatch):
    """Versions have quantised differently: what one made is not what the next would train on."""
    monkeypatch.setattr(quantize, "_write", lambda made, *_: (made / "config.json").write_text("{}"))
    folders = []
    for number in ("0.50.2", "0.51.0", "0.50.2"):
        monkeypatch.setattr(quantize, "version", {"bitsandbytes": number}.__getitem__)
        folders.append(quantized_checkpoint(bf16_folder, tmp_path, name="base"))
    assert folders[0] == folders[2] != folders[1]


@pytest.mark.parametrize("missing", [True, False])
def test_quantized_files_do_not_fit_config(bf16_folder, tmp_path, missing):
    """Files that are not their config's are told."""
    folder = tmp_path / "base"
    shutil.copytree(bf16_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    weight = tensors.pop(name)
    if not missing:
        tensors[name] = weight[:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = (
        rf"lacks 1 tensors of its own config: \['{name}'\]" if missing else rf"{name} is \(127, 64\).*says \(128, 64\)"
    )
    with pytest.raises(UserError, match=said):
        quantized_checkpoint(folder, tmp_path / "cache", name="base")
    assert not (tmp_path / "cache").exists()


# The arithmetic


@pytest.fixture
def layers_of_peft(monkeypatch):
    """The reference adds LoRA in the order in which PEFT's 4-bit layers do, not in place (modeling/fused.py)."""
    monkeypatch.setattr("modeling.adapters.fuse_linears", lambda config: None)


@pytest.mark.usefixtures("layers_of_peft")
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}])
def test_nf4_gradients_equal_dequantised(load_nf4, load_reference, make_rows, lora):
    """Forward and every gradient equal the dequantised reference."""
    modes = {**MODES, "vision": "lora"}
    models = [attached(load(), modes=modes, scale=0.05, **lora) for load in (load_nf4, load_reference)]
    rows = make_rows(row_tokens=512)
    batch = rows.batch(rows.rows[0])
    assert len(batch["pixel_values"]) > 1
    assert len(batch["layout"].sequence_starts) > 3
    got, expected = (packed_loss(model.train(), batch, config=model.config) for model in models)
    got.backward()
    expected.backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    gradients = {name: p.grad for name, p in models[1].named_parameters() if p.requires_grad}
    assert len(gradients) > 150
    for name, parameter in models[0].named_parameters():
        assert parameter.requires_grad == (name in gradients), name
        if name in gradients:
            reference = gradients[name]
            assert reference.any() or ".post_layernorm." in name, name
            assert (parameter.grad - reference).norm() <= 1e-5 * reference.norm(), name


def test_nf4_differs_from_full_precision(load_nf4, bf16_folder, make_rows):
    """It differs from the full precision model by what 4 bits leave out."""
    batch = make_rows().batch(make_rows().rows[0])
    models = load_nf4(), loading.load(str(bf16_folder)).model
    with torch.no_grad():
        quantized, full = (float(packed_loss(model, batch, config=model.config)) for model in models)
    assert 1e-3 < abs(quantized - full) / full < 0.3


def test_evaluation_changes_no_gradient(load_nf4, make_rows):
    """bitsandbytes repacks weights at the first inference on some CPUs, and its kernel for them has no gradient."""
    model, batch = attached(load_nf4(), scale=0.05), make_rows().batch(make_rows().rows[0])

    def gradients():
        model.zero_grad()
        loss = packed_loss(model.train(), batch, config=model.config)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return float(loss.detach()), found

    loss, before = gradients()
    with torch.no_grad():
        asked = float(packed_loss(model.eval(), batch, config=model.config))
    assert asked == pytest.approx(loss, rel=1e-6)
    again, after = gradients()
    assert again == loss
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 alone")
def test_bitsandbytes_loses_gradients_after_inference():
    """`configure_quantized` switches the repacking off; when bitsandbytes mends it, that line can go."""
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    with torch.no_grad():
        layer(torch.ones(1, 64))
    x = torch.ones(1, 64, requires_grad=True)
    with pytest.warns(UserWarning, match="autograd"):
        layer.train()(x).sum().backward()
    assert x.grad is None


# Training


@pytest.mark.usefixtures("layers_of_peft")
def test_nf4_training_equals_dequantised(bf16_folder, load_nf4, load_reference, make_rows, tmp_path):
    """The same products of the same matrices: TRL's cast to bf16 would already differ in the first digits."""
    rows = make_rows(row_tokens=192)
    run(attached(load_reference()), tmp_path / "reference", rows, bf16_folder)
    expected = trained(tmp_path / "reference")
    for name, checkpointing in (("nf4", False), ("checkpointed", True)):
        run(attached(load_nf4()), tmp_path / name, rows, bf16_folder, checkpointing=checkpointing)
        got = trained(tmp_path / name)
        assert got.keys() == expected.keys()
        assert all(tensor.dtype == torch.float32 for tensor in got.values())
        assert all(torch.equal(got[key], expected[key]) for key in got)


def test_trl_casts_trained_parameters(load_nf4, make_rows, bf16_folder, tmp_path):
    """training.trainer `IdeficsTrainer.__init__` takes it back; when TRL leaves it alone, those lines can go."""
    model = attached(load_nf4())
    options = {
        "model": model,
        "args": training_arguments(tmp_path, training(), steps=1),
        "processing_class": loading.load_processor(str(bf16_folder)).tokenizer,
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    IdeficsTrainer(**options, settings=training(), train_rows=PrefetchedRows(make_rows()))
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert count_trained(model).total == sum(tensor.numel() for tensor in before.values())
    SFTTrainer(**options, data_collator=make_rows(), train_dataset=_row_numbers(1))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_nf4_resumed_equals_whole(bf16_folder, load_nf4, make_rows, tmp_path, optimizer, capsys):
    """Resumed equals whole with evaluations in between."""
    rows, held = make_rows(row_tokens=192, epochs=2), make_rows(row_tokens=512)
    middle = len(rows.rows) // 2 + 1
    options = {"optimizer": optimizer, "checkpoint_every": middle, "evaluate_every": middle, "eval_rows": held}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    made = run(attached(load_nf4(), lora_dropout=0.1), whole, rows, bf16_folder, **options)
    shutil.copytree(whole / f"checkpoint-{middle}", resumed / f"checkpoint-{middle}")
    shutil.copy(whole / "metrics.jsonl", resumed)
    model = attached(load_nf4(), lora_dropout=0.1)
    again = run(model, resumed, rows, bf16_folder, resume_from=last_checkpoint(resumed), **options)
    assert made.state.global_step == len(rows.rows) > middle
    expected, got = (
        {name: p for name, p in trainer.model.named_parameters() if p.requires_grad} for trainer in (made, again)
    )
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert ("pages nothing without a GPU" in capsys.readouterr().err) == (optimizer == "paged_adamw_8bit")
    states = {name: made.optimizer.state[p] for name, p in made.model.named_parameters() if p.requires_grad}
    matrix = next(name for name in states if name.endswith("perceiver_resampler.blocks.0.1.fc.weight"))
    moment = "exp_avg" if optimizer == "adamw" else "state1"
    assert states[matrix][moment].dtype == (torch.float32 if optimizer == "adamw" else torch.uint8)
    rows_in = next(name for name in states if "additional_embedding" in name)
    assert states[rows_in][moment].dtype == torch.float32


def test_gates_in_metrics_and_picture(bf16_folder, load_nf4, make_rows, tmp_path):
    """The gates are in the metrics and in the picture."""
    rows = make_rows(row_tokens=192, epochs=2)
    steps = len(rows.rows)
    model = attached(load_nf4())
    started = gate_openings(model)
    assert started == {
        "alpha_cross_attn": [pytest.approx(0.7615942)] * 2,
        "alpha_dense": [pytest.approx(0.7615942)] * 2,
    }
    run(model, tmp_path, rows, bf16_folder, checkpoint_every=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "gates" in line] == sorted({*range(2, steps + 1, 2), steps})
    adapter = load_file(tmp_path / "adapter" / "trained.safetensors")
    for gate, values in lines[steps - 1]["gates"].items():
        expected = [float(adapter[f"model.gated_cross_attn_layers.{layer}.{gate}"].tanh()) for layer in (0, 1)]
        assert values == pytest.approx(expected, rel=1e-6)
        assert values != started[gate]
    draw(tmp_path / "metrics.jsonl", None, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_frozen_gates_not_logged(load_nf4):
    """Gates that are frozen are not logged."""
    assert gate_openings(attached(load_nf4(), modes={"decoder": "lora"})) == {}


# A user's mistakes


@pytest.mark.parametrize(
    ("modes", "said"),
    [
        ({"decoder": "full"}, "matrices of decoder in 4 bits.*set decoder: lora, or leave quantize out"),
        (
            {"decoder": "full", "cross_attention": "full"},
            "cross_attention and decoder in 4 bits.*set cross_attention: lora, decoder: lora",
        ),
        ({"decoder": "frozen", "cross_attention": "frozen"}, "expected at least one tower to be lora"),
    ],
)
def test_nf4_recipe_mistakes(modes, said):
    """What cannot be trained in 4 bits is a mistake of the recipe."""
    with pytest.raises(ValueError, match=said):
        Model(base="somewhere", quantize="nf4", **modes)
    assert Model(base="somewhere", **modes).quantize is None


@pytest.mark.parametrize("value", ["fp4", "int8", True])
def test_other_quantize_refused(value):
    """Other ways to quantise are refused."""
    with pytest.raises(ValueError, match="nf4"):
        Model(base="somewhere", quantize=value)


def test_full_tower_in_nf4_refused(load_nf4, bf16_folder, tmp_path):
    """A tower in 4 bits is not trained in full."""
    with pytest.raises(UserError, match=r"decoder: trained in full.*has it in 4 bits"):
        attached(load_nf4(), modes={"decoder": "full"})
    full = attach(loading.load(str(bf16_folder)).model, {"cross_attention": "full"}, lora={}, base="")
    save_adapter(full, tmp_path)
    with pytest.raises(UserError, match=r"cross_attention: trained in full.*load the model without quantize"):
        open_adapter(load_nf4(), tmp_path)


# The verbs

IN_4_BITS = ["model.quantize=nf4", "training.optimizer=adamw_8bit"]


def test_run_in_nf4(recipe_file, bf16_folder, tmp_path):
    """A run trains and evaluates in 4 bits."""
    recipe = load_recipe(recipe_file, [*IN_4_BITS, f"model.base={bf16_folder}"])
    base = open_base(recipe, resolve_sources(recipe), tmp_path / "run")
    assert {f"{name}.weight" for name in quantized_layers(base.load())} == EXPECTED
    result = run_stages(recipe, ("train", "evaluate"))
    assert result["evaluate"]["tuned"]["loss"] < result["evaluate"]["base"]["loss"]
    assert result["evaluate"]["tuned"]["questions"] > 0
    (kept,) = (tmp_path / "quantized").glob("*/config.json")
    assert json.loads(kept.read_text())["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert (tmp_path / "run" / "curves.png").is_file()


def test_fresh_base_in_nf4(recipe_file):
    """A fresh base is trained in 4 bits."""
    result = run_stages(load_recipe(recipe_file, [*IN_4_BITS, "model.base=null", "model.init=tiny"]), ("train",))
    assert result["train"]["steps"] == 4
    assert result["train"]["parameters_trained"]["lora"]["decoder"] > 0


def test_chat_in_nf4(bf16_folder, load_nf4, dialogue_folder, tmp_path, monkeypatch):
    """A model and an adapter answer in 4 bits."""
    monkeypatch.chdir(tmp_path)
    model = attached(load_nf4(), scale=0.3)
    for parameter in trained_parameters(model).values():
        parameter.data += 0.01
    save_adapter(model, tmp_path / "adapter")
    shutil.copy(dialogue_folder / "red.png", tmp_path)
    prompts = tmp_path / "in.jsonl"
    question = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "what is it?"}]
    prompts.write_text(json.dumps({"messages": [{"role": "user", "content": question}]}))
    options = ["--quantize", "nf4", "--adapter", tmp_path / "adapter", "--max-new-tokens", "4"]
    command = ["generate", bf16_folder, prompts, tmp_path / "out.jsonl", *options]
    outcome = CliRunner().invoke(app, [str(argument) for argument in command])
    assert outcome.exit_code == 0, outcome.output
    answer = json.loads((tmp_path / "out.jsonl").read_text())["answer"]
    command = ["chat", bf16_folder, "what is it?", "--image", "red.png", *options]
    outcome = CliRunner().invoke(app, [str(argument) for argument in command])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout.strip() == answer.strip()
    assert len(list((tmp_path / "runs" / "quantized").glob("*/config.json"))) == 1
    assistant = load_assistant(str(bf16_folder), adapter=tmp_path / "adapter", quantize="nf4")
    assert {stock_name(f"{name}.weight") for name in quantized_layers(assistant.idefics)} == EXPECTED
