"""What is trained is what was chosen, in fp32; what is saved comes back bit for bit, or not at all."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import one_row
from torch import nn
from transformers import IdeficsConfig, IdeficsForVisionText2Text

from modeling import loading
from modeling.adapters import (
    Counts,
    attach,
    count_trained,
    expected_counts,
    load_adapter_weights,
    open_adapter,
    save_adapter,
    trained_parameters,
)
from modeling.errors import UserError
from modeling.packed_forward import packed_loss
from modeling.shapes import IDEFICS_9B
from modeling.towers import stock_name

LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
"""Factors that are both random: with PEFT's zeros, an adapter that is not there would look like one that is."""

# Linear layers of the stand-in, and parameters of rank 4 in them, worked out by hand: 4 x (rows + columns) each.
LAYERS = {"vision": 12, "resampler": 12, "cross_attention": 14, "decoder": 56}
FACTORS = {
    "vision": 2 * (4 * 768 + 2 * 1920),
    "resampler": 2 * (4 * 768 + 2 * 1920),
    "cross_attention": 2 * (2 * 512 + 2 * 640 + 3 * 640),
    "decoder": 8 * (4 * 512 + 3 * 640),
}
PREFIXES = {
    "vision": "model.vision_model.",
    "resampler": "model.perceiver_resampler.",
    "cross_attention": "model.gated_cross_attn_layers.",
    "decoder": "model.layers.",
}
USUAL = {"decoder": "lora", "cross_attention": "lora", "gates": "full", "added_tokens": "full"}
MODES = {
    "decoder": {"decoder": "lora"},
    "image side": {"vision": "lora", "resampler": "lora"},
    "usual": USUAL,
    "every tower": dict.fromkeys(LAYERS, "lora") | {"gates": "full", "added_tokens": "full"},
    "mixed": {"decoder": "lora", "cross_attention": "full", "resampler": "full", "gates": "full", "vision": "frozen"},
    "gates alone": {"gates": "full"},
    "added tokens alone": {"added_tokens": "full"},
    "no lora": {"resampler": "full", "embeddings_and_head": "full", "added_tokens": "full", "gates": "full"},
    "everything": dict.fromkeys(("gates", "added_tokens", "embeddings_and_head", *LAYERS), "full"),
}


@torch.no_grad()
def logits(model):
    row = one_row()
    mask = (row["image_index"] >= 0).long()[..., None]
    return model(input_ids=row["input_ids"], pixel_values=row["pixel_values"][None], image_attention_mask=mask).logits


def fresh(base_folder, dtype=torch.float32):
    return loading.load(str(base_folder), dtype=dtype).model


def attached(base_folder, modes, *, seed=0, disturb=True, **lora):
    """An attached model, every trained tensor of which differs from its base."""
    torch.manual_seed(seed)
    model = attach(fresh(base_folder), modes, lora={**LORA, **lora}, base=str(base_folder))
    if disturb:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", MODES)
def test_attach_lora_on_linear_layers_of_towers(base_folder, name):
    """LoRA is on exactly the linear layers of the chosen towers."""
    modes = MODES[name]
    towers = [tower for tower, mode in modes.items() if mode == "lora"]
    expected = {
        module_name
        for module_name, module in fresh(base_folder).named_modules()
        if isinstance(module, nn.Linear) and module_name.startswith(tuple(PREFIXES[tower] for tower in towers))
    }
    model = attached(base_folder, modes, disturb=False)
    for factor in ("lora_A", "lora_B"):
        adapted = {stock_name(n).removesuffix(".weight") for n, _ in model.named_parameters() if f".{factor}." in n}
        assert adapted == expected
    assert len(expected) == sum(LAYERS[tower] for tower in towers)
    assert isinstance(model, PeftModel) == bool(towers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODES)
def test_count_trained_as_expected(base_folder, name, dtype):
    """What is trained is counted as expected and is in fp32."""
    modes = MODES[name]
    model = attach(fresh(base_folder, dtype), modes, lora=LORA, base="base")
    counts = count_trained(model)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert counts == expected_counts(model.config.to_dict(), modes, rank=4)
    assert counts.lora == {tower: FACTORS[tower] for tower, mode in modes.items() if mode == "lora"}
    by_hand = {"gates": 4, "added_tokens": 6 * 64, "embeddings_and_head": 600 * 64}
    assert {tower: counts.full[tower] for tower in by_hand if tower in counts.full} == {
        tower: count for tower, count in by_hand.items() if modes.get(tower) == "full"
    }
    assert counts.total == sum(parameter.numel() for parameter in trained(model).values())


def test_trained_bf16_refused(base_folder):
    """A trained parameter in bf16 is refused."""
    model = fresh(base_folder, torch.bfloat16).requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match=r"model\.norm\.weight is trained in torch\.bfloat16, expected fp32"):
        count_trained(model)


def test_usual_adapter_of_9b_count():
    """The usual adapter of the 9B has the published count."""
    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig(**{**IDEFICS_9B, "additional_vocab_size": 3}))
    counts = count_trained(attach(model, USUAL, lora={"r": 16}, base="HuggingFaceM4/idefics-9b"))
    assert counts == Counts(
        lora={"decoder": 39_976_960, "cross_attention": 9_273_344}, full={"gates": 16, "added_tokens": 24_576}
    )
    assert sum(counts.lora.values()) == 49_250_304


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("decoder", ["adapter_config.json", "adapter_model.safetensors"]),
        ("usual", ["adapter_config.json", "adapter_model.safetensors", "trained.safetensors"]),
        ("mixed", ["adapter_config.json", "adapter_model.safetensors", "trained.safetensors"]),
        ("gates alone", ["trained.safetensors"]),
        ("everything", ["trained.safetensors"]),
    ],
)
def test_adapter_round_trip(base_folder, tmp_path, name, layout):
    """An adapter folder comes back bit for bit."""
    model = attached(base_folder, MODES[name], seed=0)
    save_adapter(model, tmp_path / "adapter")
    assert files(tmp_path / "adapter") == layout
    again = attached(base_folder, MODES[name], seed=1)
    before, after = trained(model), trained(again)
    assert not any(torch.equal(before[key], after[key]) for key in before)
    load_adapter_weights(again, tmp_path / "adapter")
    for key in before:
        assert torch.equal(before[key], after[key]), key
    assert torch.equal(logits(model), logits(again))


def test_trained_file_fp32_stock_names(base_folder, tmp_path):
    """The own file holds fp32 under stock names."""
    save_adapter(attached(base_folder, USUAL), tmp_path)
    tensors = load_file(tmp_path / "trained.safetensors")
    gates = ("alpha_cross_attn", "alpha_dense")
    assert set(tensors) == {f"model.gated_cross_attn_layers.{block}.{gate}" for block in (0, 1) for gate in gates}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    stock = {name for name, _ in fresh(base_folder).named_parameters()}
    save_adapter(attached(base_folder, MODES["everything"]), tmp_path / "all")
    assert set(load_file(tmp_path / "all" / "trained.safetensors")) == stock


def test_adapter_names_its_base(base_folder, tmp_path):
    """The folder names the base it was given."""
    save_adapter(attach(fresh(base_folder), USUAL, lora=LORA, base="somebody/extended"), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("somebody/extended", 4, 8)


@pytest.mark.parametrize("tower", ["decoder", "cross_attention", "resampler", "embeddings_and_head"])
def test_full_tower_on_bf16_base_autocast(base_folder, tower):
    """A tower trained in full on a bf16 base runs under autocast."""
    model = attach(fresh(base_folder, torch.bfloat16), {tower: "full"}, lora=LORA, base="base")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = packed_loss(model, one_row(), config=model.config)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())


def test_plain_peft_loads_adapter(base_folder, tmp_path):
    """Plain PEFT loads its part of the folder."""
    model = attached(base_folder, {**USUAL, "gates": "frozen"})
    save_adapter(model, tmp_path / "adapter")
    fresh(base_folder).save_pretrained(tmp_path / "extended")
    base = IdeficsForVisionText2Text.from_pretrained(tmp_path / "extended").eval()
    before = logits(base)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    # Sums in another order: transformers' blocks, and ours.
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(plain) - before).abs().max() > 0.1


@pytest.mark.parametrize("name", ["usual", "mixed", "no lora", "added tokens alone"])
def test_open_adapter_answers_alike(base_folder, tmp_path, name):
    """An opened adapter answers like the model it was saved from."""
    model = attached(base_folder, MODES[name])
    save_adapter(model, tmp_path)
    opened = open_adapter(fresh(base_folder), tmp_path)
    assert torch.equal(logits(opened), logits(model.eval()))
    assert (logits(opened) - logits(fresh(base_folder))).abs().max() > 1e-3
    assert not trained(opened)
    assert not opened.training


def test_folder_without_adapter(base_folder, tmp_path):
    """A folder without an adapter is refused."""
    with pytest.raises(UserError, match="expected an adapter folder"):
        open_adapter(fresh(base_folder), tmp_path)


@pytest.mark.parametrize("file", ["trained.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_load_adapter_that_does_not_fit(base_folder, tmp_path, file, change):
    """An adapter that does not fit is refused."""
    model = attached(base_folder, USUAL)
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / file)
    first = min(name for name in tensors if "layers.0" in name)
    if change == "missing":
        del tensors[first]
        message = "1 tensors missing .*, 0 with no place|expected LoRA of a linear layer"
    else:
        tensors[first.replace("layers.0", "layers.9")] = tensors[first].clone()
        message = "1 tensors of the adapter have no place in the base: .*9|expected LoRA of a linear layer"
    save_file(tensors, tmp_path / file)
    with pytest.raises(UserError, match=message):
        load_adapter_weights(model, tmp_path)


@pytest.mark.parametrize("shape", [(1, 64), (3, 32)], ids=["one that would broadcast", "another width"])
def test_load_adapter_other_shape(base_folder, tmp_path, shape):
    """A tensor of another shape is refused."""
    model = attached(base_folder, MODES["added tokens alone"])
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "trained.safetensors")
    save_file({**tensors, "lm_head.additional_fc.weight": torch.zeros(shape)}, tmp_path / "trained.safetensors")
    with pytest.raises(
        UserError, match=r"another base: lm_head\.additional_fc\.weight is \(.*\) there and \(3, 64\) here"
    ):
        load_adapter_weights(model, tmp_path)


@pytest.mark.parametrize(("saved", "asked"), [("usual", "gates alone"), ("gates alone", "usual")])
def test_load_adapter_lora_missing(base_folder, tmp_path, saved, asked):
    """An adapter with LoRA does not fit a model without."""
    save_adapter(attached(base_folder, MODES[saved]), tmp_path)
    with pytest.raises(UserError, match=r"the adapter has (no )?LoRA and this recipe says otherwise"):
        load_adapter_weights(attached(base_folder, MODES[asked]), tmp_path)


def test_gathered_state_is_saved(base_folder, tmp_path):
    """A gathered state is what is saved."""
    model = attached(base_folder, USUAL)
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_adapter(model, tmp_path, state_dict=gathered)
    again = attached(base_folder, USUAL, seed=1)
    load_adapter_weights(again, tmp_path)
    before, after = trained(model), trained(again)
    assert all(torch.equal(after[name], before[name] + 1) for name in before)


@pytest.mark.parametrize("name", ["usual", "every tower", "mixed"])
def test_step_changes_trained_only(base_folder, name):
    """A step of training changes the trained parameters and no other."""
    model = attached(base_folder, MODES[name])
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    packed_loss(model, one_row(), config=model.config).backward()
    torch.optim.SGD(trained(model).values(), lr=0.1).step()
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    # The bias of a key moves all scores alike, so its gradient is rounding or zero.
    assert {key for key in changed ^ set(trained(model)) if "k_layer_norm.bias" not in key} == set()
    assert set(trained_parameters(model)) <= {stock_name(key) for key in trained(model)}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 4**0.5)])
def test_rank_and_alpha_patterns(base_folder, rslora, scale):
    """Ranks and alphas of single layers reach PEFT."""
    layer = "model.layers.0.self_attn.q_proj"
    model = attached(
        base_folder, MODES["decoder"], rank_pattern={layer: 2}, alpha_pattern={layer: 6}, use_rslora=rslora
    )
    layers = model.get_base_model().model.layers
    one, other = layers[0].self_attn.q_proj, layers[1].self_attn.q_proj
    assert one.lora_A["default"].weight.shape == (2, 64)
    assert other.lora_A["default"].weight.shape == (4, 64)
    assert one.scaling["default"] == pytest.approx(6 / (2**0.5 if rslora else 2))
    assert other.scaling["default"] == pytest.approx(scale)


def test_dora_round_trip(base_folder, tmp_path):
    """DoRA reaches PEFT and comes back."""
    model = attached(base_folder, MODES["decoder"], use_dora=True)
    magnitudes = [name for name in trained(model) if "lora_magnitude_vector" in name]
    assert len(magnitudes) == 56
    # One magnitude per output: 4 x 64 in attention, 2 x 96 + 64 in the MLP, of 8 layers.
    assert count_trained(model) == Counts(lora={"decoder": FACTORS["decoder"] + 8 * (4 * 64 + 2 * 96 + 64)}, full={})
    save_adapter(model, tmp_path)
    assert torch.equal(logits(open_adapter(fresh(base_folder), tmp_path)), logits(model))
