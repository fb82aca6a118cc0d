"""The merged model is base + adapter: in plain transformers, against PEFT's own merge, and never the base again."""

import errno
import json
import os
import shutil

import peft
import PIL.Image
import pytest
import torch
from merging import CHANGES, EVERYTHING, FOUR_TOWERS, UP, adapter_for, copy_base, disturb, files_of, spoil
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, IdeficsForVisionText2Text

from finetune.data.images import Preprocessing
from finetune.evaluation.generate import Assistant
from finetune.export import merge as merging_module
from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.merge import merge
from finetune.export.verify import compare_answers, verify
from modeling import loading, safetensors_io
from modeling.adapter_weights import AdapterWeights
from modeling.adapters import open_adapter
from modeling.config import read_config
from modeling.errors import UserError
from modeling.packed_forward import forward_arguments
from modeling.quantize import dequantized, quantized_names
from modeling.safetensors_io import fingerprint, read_checkpoint

VARIANTS = {
    "lora on the text towers": ({"cross_attention": "lora", "decoder": "lora"}, {}),
    "everything at once": (EVERYTHING, {}),
    "all in full, no lora": (dict.fromkeys(EVERYTHING, "full"), {}),
    "rank and alpha patterns": (
        {"decoder": "lora", "gates": "full"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 32}},
    ),
    "rslora": ({"decoder": "lora"}, {"use_rslora": True}),
    "dora": ({"decoder": "lora", "cross_attention": "lora", "added_tokens": "full"}, {"use_dora": True}),
    "four towers": (FOUR_TOWERS, {}),
}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def adapter(base_folder, tmp_path):
    """A small adapter folder: LoRA and gates."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora", "gates": "full"})
    return tmp_path / "adapter"


def weights(folder):
    return {name: one.rows() for name, one in read_checkpoint(folder).items()}


def different(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def logits(model, rows):
    batch = rows.batch(rows.rows[0])
    with torch.no_grad():
        return model(**forward_arguments(batch, model.config)).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_equals_base_plus_adapter(base_folder, make_rows, tmp_path, variant):
    """Merged is base plus adapter to 1e 5 and not the base."""
    modes, lora = VARIANTS[variant]
    tuned = adapter_for(base_folder, tmp_path / "adapter", modes, lora)
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    merged = loading.load(str(tmp_path / "merged"), instruct=False).model
    rows = make_rows()
    expected = logits(tuned, rows)
    scale = expected.abs().max()
    assert (logits(merged, rows) - expected).abs().max() < 1e-5 * scale  # fp32 rounding of W + BA against Wx + BAx
    assert (expected - logits(loading.load(str(base_folder)).model, rows)).abs().max() > 1e-2 * scale


UNIT = 2.0**-24
"""Half a unit in the last place of an fp32 number, relative to it: the largest error of one rounding."""

IN_BLOCKS = {"groups of 64 rows": 64, "any number of rows": 1}
"""ROW_GROUP, with blocks of 500 elements."""


def in_blocks_of(monkeypatch, group):
    monkeypatch.setattr(safetensors_io, "BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(safetensors_io, "ROW_GROUP", group)


def unlike_rounding(ours, theirs, base, adapter):
    """Names of tensors that differ by more than the order explains in which the terms of a sum are added.

    A row of W + s (b_1 a_1 + ... + b_r a_r) rounds r products, r - 1 sums, the scale and the last sum, on both sides.
    DoRA's row is that times m / norm: n squares and n - 1 sums, halved by the root, which itself, the quotient and the
    product round once each.
    """
    assert ours.keys() == theirs.keys()
    changes, wrong = AdapterWeights.read(adapter), []
    for name in different(ours, theirs):
        factors = {key: factor.double() for key, factor in changes.lora[name].items()}
        scale, rank = abs(changes.scaling(name)), len(factors["lora_A"])
        product = scale * (factors["lora_B"].abs() @ factors["lora_A"].abs())
        bound = UNIT * (2 * rank * product + base[name].double().abs() + product)
        if "lora_magnitude_vector" in factors:
            row = base[name].double() + scale * (factors["lora_B"] @ factors["lora_A"])
            factor = (factors["lora_magnitude_vector"] / torch.linalg.norm(row, dim=1))[:, None]
            bound = factor * bound + UNIT * (row.shape[1] + 3) * theirs[name].double().abs()
        if ((ours[name].double() - theirs[name].double()).abs() > 2 * bound).any():
            wrong.append(name)
    return wrong


PEFT_VARIANTS = ["lora on the text towers", "rank and alpha patterns", "rslora", "dora", "four towers"]


@pytest.fixture(scope="module")
def merged_by_peft(base_folder, tmp_path_factory):
    """Adapter folders of each variant, and what PEFT's own merge makes of them."""
    made = {}
    for variant in PEFT_VARIANTS:
        folder = tmp_path_factory.mktemp("peft")
        tuned = adapter_for(base_folder, folder / "adapter", *VARIANTS[variant])
        made[variant] = folder / "adapter", tuned.merge_and_unload().state_dict()
    return made


@pytest.mark.parametrize("variant", PEFT_VARIANTS)
def test_merge_whole_equals_peft(base_folder, tmp_path, variant, merged_by_peft):
    """Whole matrices are merged as PEFT does bit for bit."""
    adapter, theirs = merged_by_peft[variant]
    merge(adapter, str(base_folder), tmp_path / "merged")
    assert different(weights(tmp_path / "merged"), theirs) == []


@pytest.mark.parametrize("group", IN_BLOCKS.values(), ids=IN_BLOCKS)
@pytest.mark.parametrize("variant", PEFT_VARIANTS)
def test_merge_blocks_equal_peft(base_folder, tmp_path, variant, merged_by_peft, group, monkeypatch):
    """Blocks of rows are merged as PEFT does up to the order of sums."""
    in_blocks_of(monkeypatch, group)
    adapter, theirs = merged_by_peft[variant]
    merge(adapter, str(base_folder), tmp_path / "merged")
    assert unlike_rounding(weights(tmp_path / "merged"), theirs, weights(base_folder), adapter) == []


def test_merged_in_plain_transformers(base_folder, make_rows, tmp_path):
    """Plain transformers loads it and writes the same tokens."""
    tuned = adapter_for(base_folder, tmp_path / "adapter", EVERYTHING, {})
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged", provenance={"base": "stand-in"})
    model = IdeficsForVisionText2Text.from_pretrained(tmp_path / "merged").eval()
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")) is IdeficsForVisionText2Text
    assert model.config.architectures == ["IdeficsForVisionText2Text"]
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    image = make_rows().images[0].source
    with PIL.Image.open(image) as opened:
        prompt = ["User:", opened.convert("RGB"), "what color is it?<end_of_utterance>", "\nAssistant:"]
        inputs = processor(text=[prompt], add_end_of_utterance_token=False, return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=12)
    config = GenerationConfig.from_pretrained(tmp_path / "merged", max_new_tokens=12)
    assert torch.equal(plain, tuned.get_base_model().generate(**inputs, generation_config=config))
    assert plain.shape[1] > inputs["input_ids"].shape[1]


def test_merged_generation_stops(base_folder, tmp_path):
    """Generation stops at the end of utterance and writes no image token."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora"}, {})
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [302, 2]
    assert config["suppress_tokens"] == [300, 301]


def test_merge_provenance_and_shards(base_folder, make_rows, tmp_path):
    """Provenance and shards."""
    tuned = adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora"}, {})
    provenance = {"base": "stand-in", "revision": None}
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged", provenance=provenance, shard_bytes=400_000)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 5
    assert shards == sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert max((tmp_path / "merged" / shard).stat().st_size for shard in shards) < 450_000
    merged = loading.load(str(tmp_path / "merged"), instruct=False).model
    rows = make_rows()
    torch.testing.assert_close(logits(merged, rows), logits(tuned, rows), rtol=1e-4, atol=1e-4)
    record = json.loads((tmp_path / "merged" / "provenance.json").read_text())
    assert record.keys() == {
        *("base", "revision", "commit", "sources", "made_of", "left_out", "parity", "against", "sha256", "files")
    }
    assert (record["base"], record["revision"]) == ("stand-in", None)
    assert record["sources"]["base"] == str(base_folder)
    assert record["made_of"]["base"] == fingerprint(read_checkpoint(base_folder))
    assert record["made_of"]["adapter"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    others = ("config.json", "generation_config.json", "model.safetensors.index.json", "processor_config.json")
    tokenizer = ("tokenizer.json", "tokenizer_config.json")
    assert sorted(record["sha256"]["merged"]) == sorted([*shards, *others, *tokenizer])
    assert list(record["sha256"]["base"]) == ["model.safetensors"]
    assert all(len(digest) == 64 for digests in record["sha256"].values() for digest in digests.values())
    assert record["parity"]["tensors"] == 177
    assert record["parity"]["blocks"] == 8
    assert record["against"] == {}
    # a sharded base is read by the same code
    again = adapter_for(tmp_path / "merged", tmp_path / "adapter2", {"decoder": "lora"}, {})
    merge(tmp_path / "adapter2", str(tmp_path / "merged"), tmp_path / "merged2")
    second = loading.load(str(tmp_path / "merged2"), instruct=False).model
    torch.testing.assert_close(logits(second, rows), logits(again, rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [None, *DTYPES])
@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_merge_dtype(base_folder, tmp_path, base_dtype, asked):
    """Weights are in the base's dtype or the one asked for."""
    base = copy_base(base_folder, tmp_path / "base", DTYPES[base_dtype])
    adapter_for(base, tmp_path / "adapter", EVERYTHING)
    dtype = DTYPES[asked or base_dtype]
    merge(tmp_path / "adapter", str(base), tmp_path / "merged", dtype=DTYPES[asked] if asked else None)
    got = weights(tmp_path / "merged")
    assert {tensor.dtype for tensor in got.values()} == {dtype}
    merge(tmp_path / "adapter", str(base), tmp_path / "exact", dtype=torch.float32)
    exact = weights(tmp_path / "exact")
    assert different(got, {name: tensor.to(dtype) for name, tensor in exact.items()}) == []
    # transformers loads in the dtype that the config names
    assert IdeficsForVisionText2Text.from_pretrained(tmp_path / "merged").dtype == dtype


def test_merge_fp16_overflow(base_folder, adapter, tmp_path):
    """A value too large for fp16 is told."""
    shutil.copytree(base_folder, tmp_path / "base")
    spoil(tmp_path / "base" / "model.safetensors", lambda tensors: tensors["lm_head.weight"][7, 7].fill_(70_000))
    with pytest.raises(UserError, match=r"lm_head\.weight: holds 70,000, and fp16 ends at 65,504; .*--dtype bf16"):
        merge(adapter, str(tmp_path / "base"), tmp_path / "merged", dtype=torch.float16)
    assert not (tmp_path / "merged").exists()
    merge(adapter, str(tmp_path / "base"), tmp_path / "merged", dtype=torch.bfloat16)


def test_merge_adds_end_of_utterance(base_folder, tmp_path):
    """A base without training of added tokens gains the row of the end."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora"}, {})
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    tensors, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base_folder))
    for owner, rows in (("model.embed_tokens", "additional_embedding"), ("lm_head", "additional_fc")):
        grown = tensors[f"{owner}.{rows}.weight"]
        assert torch.equal(grown[:2], base[f"{owner}.{rows}.weight"])
        assert torch.equal(grown[2], base[f"{owner}.weight"][2])


def test_merge_tensor_without_place(base_folder, tmp_path):
    """A tensor that finds no home is an error."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora", "gates": "full"}, {})
    trained = load_file(tmp_path / "adapter" / "trained.safetensors")
    trained["model.gated_cross_attn_layers.7.alpha_dense"] = torch.zeros(1)
    save_file(trained, tmp_path / "adapter" / "trained.safetensors")
    with pytest.raises(UserError, match=r"1 tensors of the adapter have no place .*layers\.7\.alpha_dense"):
        merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merge_unknown_lora_refused(base_folder, tmp_path):
    """An adapter this merge does not understand is refused."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora"}, {"bias": "lora_only"})
    with pytest.raises(UserError, match="cannot be merged exactly: bias is 'lora_only'"):
        merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")


def test_merge_not_an_adapter(base_folder, tmp_path):
    """What is no adapter or no base."""
    with pytest.raises(UserError, match="expected an adapter folder"):
        merge(tmp_path, str(base_folder), tmp_path / "merged")
    with pytest.raises(UserError, match="found none"):
        merge(tmp_path, str(tmp_path), tmp_path / "merged")


def elsewhere(base, folder, **config):
    """An adapter as plain PEFT leaves it: no note of ours, a base of the hub; the tuned model."""
    model = IdeficsForVisionText2Text.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    disturb(wrapped)
    wrapped.peft_config["default"].base_model_name_or_path = "HuggingFaceM4/idefics-9b"
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def test_merge_widely_copied_adapter(base_folder, tmp_path):
    """q, k, v of all four towers at rank 16, from the published notebook."""
    settings = {"target_modules": ["q_proj", "k_proj", "v_proj"], "r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    tuned = elsewhere(base_folder, tmp_path / "adapter", bias="none", **settings)
    metadata = AdapterMetadata.read(tmp_path / "adapter")
    assert metadata == AdapterMetadata("HuggingFaceM4/idefics-9b", None, False, None, None)
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged", instruct=metadata.instruct)
    got = weights(tmp_path / "merged")
    assert different(got, tuned.merge_and_unload().state_dict()) == []
    changed = different(got, weights(base_folder))
    towers = ("vision_model", "perceiver_resampler", "gated_cross_attn_layers", "model.layers")
    assert [sum(tower in name for name in changed) for tower in towers] == [6, 6, 6, 24]
    assert IdeficsForVisionText2Text.from_pretrained(tmp_path / "merged").config.additional_vocab_size == 2


def test_merge_embeddings_saved_by_peft(base_folder, tmp_path):
    """Embeddings that PEFT saved whole replace the base s."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    tuned = elsewhere(base_folder, tmp_path / "adapter", **settings)
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged", instruct=False)
    got = weights(tmp_path / "merged")
    assert different(got, tuned.merge_and_unload().state_dict()) == []
    owners = ("model.embed_tokens.", "lm_head.")
    assert len([name for name in different(got, weights(base_folder)) if name.startswith(owners)]) == 4


def test_merge_pickled_adapter(base_folder, tmp_path):
    """A pickled adapter of old is read without running it and told apart."""
    tuned = elsewhere(base_folder, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    record = merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged", instruct=False)
    assert different(weights(tmp_path / "merged"), tuned.merge_and_unload().state_dict()) == []
    assert record["made_of"]["adapter"].keys() == {"adapter_config.json", "adapter_model.bin"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.lora_B.weight"), r"layers\.1\.mlp\.up_proj\.weight: expected LoRA of a linear layer"),
        (lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(4, 64, 1, 1)}), "expected LoRA of a linear layer"),
        (lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(3, 64)}), r"got .*'lora_A': \(3, 64\)"),
        (lambda t: t.update({f"{UP}.lora_embedding_A": torch.zeros(4, 64)}), "lora_embedding_A"),
        (
            lambda t: t.update({f"{UP}.lora_A.weight": torch.zeros(4, 65)}),
            r"another base: model\.layers\.1\.mlp\.up_proj\.weight is \(96, 65\) there and \(96, 64\) here",
        ),
        (
            lambda t: t.update({f"{UP}.lora_B.weight": torch.zeros(97, 4)}),
            r"another base: model\.layers\.1\.mlp\.up_proj\.weight is \(97, 64\) there and \(96, 64\) here",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(301, 64)}),
            r"another base: lm_head\.weight is \(301, 64\) there and \(300, 64\) here",
        ),
        (
            lambda t: t.update({f"{UP.replace('1', '8')}.lora_A.weight": torch.zeros(4, 64)}),
            r"model\.layers\.8\.mlp\.up_proj\.weight: expected LoRA",
        ),
    ],
)
def test_merge_adapter_that_does_not_fit(base_folder, adapter, tmp_path, change, message):
    """An adapter that does not fit is told and nothing is written."""
    spoil(adapter / "adapter_model.safetensors", change)
    with pytest.raises(UserError, match=message):
        merge(adapter, str(base_folder), tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merge_other_kind_of_adapter(base_folder, adapter, tmp_path):
    """Another kind of adapter and a merged model are none."""
    model = IdeficsForVisionText2Text.from_pretrained(base_folder)
    other = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(model, other).save_pretrained(tmp_path / "ia3")
    with pytest.raises(UserError, match="expected LoRA, got an adapter of PEFT's type IA3"):
        merge(tmp_path / "ia3", str(base_folder), tmp_path / "merged")
    merge(adapter, str(base_folder), tmp_path / "merged")
    with pytest.raises(UserError, match=r"expected an adapter folder .*, found a model"):
        merge(tmp_path / "merged", str(base_folder), tmp_path / "twice")
    with pytest.raises(UserError, match=r"expected an adapter folder .*, found a model"):
        AdapterMetadata.read(tmp_path / "merged")
    with pytest.raises(UserError, match=r"expected an adapter folder .*, found neither"):
        AdapterMetadata.read(tmp_path)


def test_merge_other_base_equal_shapes(base_folder, adapter, tmp_path):
    """Another base of equal shapes is refused."""
    shutil.copytree(base_folder, tmp_path / "other")
    spoil(tmp_path / "other" / "model.safetensors", lambda tensors: tensors["lm_head.weight"][0, 0].add_(1))
    mine = fingerprint(read_checkpoint(base_folder))
    with pytest.raises(
        UserError, match=r"was trained on other weights than those of .*other: same shapes, other content"
    ):
        merge(adapter, str(tmp_path / "other"), tmp_path / "merged", base_fingerprint=mine)
    merge(adapter, str(base_folder), tmp_path / "merged", base_fingerprint=mine)


def test_merge_other_base_other_shapes(base_folder, tmp_path):
    """Another base of other shapes is told by its shapes."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora", "embeddings_and_head": "full"})
    shutil.copytree(base_folder, tmp_path / "other")

    def shorten(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:299].clone()

    spoil(tmp_path / "other" / "model.safetensors", shorten)
    with pytest.raises(UserError, match=r"is \(299, 64\), its config says \(300, 64\)"):
        merge(tmp_path / "adapter", str(tmp_path / "other"), tmp_path / "merged", base_fingerprint="0")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 299}))
    with pytest.raises(UserError, match=r"made for another base: .* is \(300, 64\) there and \(299, 64\) here"):
        merge(tmp_path / "adapter", str(tmp_path / "other"), tmp_path / "merged", base_fingerprint="0")


def test_merge_base_tensors_missing_or_surplus(base_folder, adapter, tmp_path):
    """A base with a tensor too few or too many."""
    shutil.copytree(base_folder, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    spoil(file, lambda tensors: tensors.update({"model.layers.0.more": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"model\.layers\.0\.more is no tensor of IDEFICS"):
        merge(adapter, str(tmp_path / "base"), tmp_path / "merged")
    spoil(file, lambda tensors: [tensors.pop(name) for name in ("model.layers.0.more", "model.norm.weight")])
    with pytest.raises(UserError, match=r"lacks 1 tensors of its own config: \['model\.norm\.weight'\]"):
        merge(adapter, str(tmp_path / "base"), tmp_path / "merged")


def test_merge_leaves_out_old_buffers(base_folder, adapter, tmp_path):
    """Buffers that old checkpoints hold are left out and named."""
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.vision_model.embeddings.position_ids": torch.arange(65)[None],
    }
    shutil.copytree(base_folder, tmp_path / "base")
    spoil(tmp_path / "base" / "model.safetensors", lambda tensors: tensors.update(buffers))
    record = merge(adapter, str(tmp_path / "base"), tmp_path / "merged")
    assert record["left_out"] == list(buffers)
    merge(adapter, str(base_folder), tmp_path / "plain")
    assert different(weights(tmp_path / "merged"), weights(tmp_path / "plain")) == []
    assert verify(tmp_path / "merged") == record["parity"]


def test_merge_base_missing(adapter, tmp_path):
    """A base that is nowhere is told."""
    for base in ("nobody/nothing-at-all", str(tmp_path / "gone"), "a b"):
        with pytest.raises(UserError, match="is neither a folder here nor a"):
            merge(adapter, base, tmp_path / "merged")


def test_merge_base_without_tokenizer(base_folder, adapter, tmp_path):
    """A base without tokenizer is told before anything is written."""
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base_folder / name, tmp_path / "base")
    with pytest.raises(UserError, match="expected tokenizer and image processor files"):
        merge(adapter, str(tmp_path / "base"), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_merge_folder_name_not_utf_8(base_folder, adapter, tmp_path):
    """A folder whose name is not UTF-8 is refused."""
    with pytest.raises(UserError, match="the name is not UTF-8, and a model cannot be written there"):
        merge(adapter, str(base_folder), tmp_path / os.fsdecode(b"m\xff") / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_merge_folder_in_use(base_folder, adapter, tmp_path):
    """A folder in use is left alone."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    shutil.copytree(base_folder, tmp_path / "model")
    before = files_of(tmp_path)
    for name in ("file", "full", "model"):
        with pytest.raises(UserError, match=f"{name}: is not empty, and not the result of this merge"):
            merge(adapter, str(base_folder), tmp_path / name)
    assert files_of(tmp_path) == before
    (tmp_path / "empty").mkdir()
    merge(adapter, str(base_folder), tmp_path / "empty")
    assert (tmp_path / "empty" / "provenance.json").is_file()


def test_merge_folder_not_writable(base_folder, adapter, tmp_path, monkeypatch):
    """A folder that cannot be written is told."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file/merged: cannot be written: File exists \(.*/file\)"):
        merge(adapter, str(base_folder), tmp_path / "file" / "merged")

    def read_only(path, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(merging_module.Path, "mkdir", read_only)
    with pytest.raises(UserError, match=r"merged: cannot be written: Read-only file system \("):
        merge(adapter, str(base_folder), tmp_path / "merged")


def test_merge_mount_point(base_folder, adapter, tmp_path, monkeypatch):
    """A mount point cannot appear as a whole."""
    monkeypatch.setattr(merging_module.Path, "is_mount", lambda path: path.name == "merged")
    with pytest.raises(UserError, match=r"is a mount point, .*; name a folder inside it"):
        merge(adapter, str(base_folder), tmp_path / "merged")


def test_merge_too_little_disk(base_folder, adapter, tmp_path, monkeypatch):
    """Too little disk is told before anything is written."""
    asked = []

    def usage(free):
        def disk_usage(path):
            asked.append(path)
            return shutil._ntuple_diskusage(10**12, 10**12 - free, free)

        return disk_usage

    size = (base_folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", usage(200_000_000 + size - 50_000))
    with pytest.raises(UserError, match=r"0\.2 GB are free, and the merged model needs 0\.0 GB more"):
        merge(adapter, str(base_folder), tmp_path / "new" / "merged")
    assert asked == [tmp_path / "new"]
    assert files_of(tmp_path / "new") == {}
    monkeypatch.setattr(shutil, "disk_usage", usage(200_000_000 + size + 50_000))
    merge(adapter, str(base_folder), tmp_path / "new" / "merged")


SHARDS = 600_000


@pytest.fixture
def uninterrupted(base_folder, adapter, tmp_path):
    merge(adapter, str(base_folder), tmp_path / "whole", shard_bytes=SHARDS, card="# card\n")
    return files_of(tmp_path / "whole")


def interrupt(monkeypatch, *, at, before=True):
    """The merge fails at the shard number `at`, or in the middle of it; names of those that were begun."""
    begun, write = [], merging_module.write_shard

    def write_shard(path, tensors):
        begun.append(path.name)
        if len(begun) == at:
            if not before:
                path.with_name(f"{path.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, tensors)

    monkeypatch.setattr(merging_module, "write_shard", write_shard)
    return begun


@pytest.mark.parametrize("before", [True, False])
def test_merge_resumes_at_shard(base_folder, adapter, tmp_path, monkeypatch, uninterrupted, before):
    """Interrupted at any shard it goes on with it."""
    count = sum(name.endswith(".safetensors") for name in uninterrupted)
    assert count >= 5
    for at in range(1, count + 1):
        out = tmp_path / f"out{at}"
        with monkeypatch.context() as patch:
            begun = interrupt(patch, at=at, before=before)
            with pytest.raises(KeyboardInterrupt):
                merge(adapter, str(base_folder), out, shard_bytes=SHARDS, card="# card\n")
        assert not out.exists()
        with monkeypatch.context() as patch:
            rest = interrupt(patch, at=None)
            merge(adapter, str(base_folder), out, shard_bytes=SHARDS, card="# card\n")
        assert len(begun) == at
        assert rest[0] == begun[-1]
        assert len(begun) + len(rest) == count + 1
        assert files_of(out) == uninterrupted
        assert not out.with_name(f".{out.name}.partial").exists()


@pytest.mark.parametrize("stage", ["save_processor", "compare", "weight_digests"])
def test_merge_resumes_after_weights(base_folder, adapter, tmp_path, monkeypatch, uninterrupted, stage):
    """Interrupted after the weights it writes none again."""

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(merging_module, stage, stop)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, str(base_folder), tmp_path / "out", shard_bytes=SHARDS, card="# card\n")
    assert not (tmp_path / "out").exists()
    begun = interrupt(monkeypatch, at=None)
    merge(adapter, str(base_folder), tmp_path / "out", shard_bytes=SHARDS, card="# card\n")
    assert begun == []
    assert files_of(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize("change", CHANGES)
def test_merge_adapter_changed_meanwhile(base_folder, adapter, tmp_path, monkeypatch, change):
    """Of an adapter that changed meanwhile nothing old is used."""
    with monkeypatch.context() as patch:
        interrupt(patch, at=4)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, str(base_folder), tmp_path / "out", shard_bytes=SHARDS)
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    CHANGES[change](adapter)
    assert before != {path.name: path.read_bytes() for path in adapter.iterdir()}
    begun = interrupt(monkeypatch, at=None)
    merge(adapter, str(base_folder), tmp_path / "out", shard_bytes=SHARDS)
    merge(adapter, str(base_folder), tmp_path / "fresh", shard_bytes=SHARDS)
    assert len(begun) == 2 * len(list((tmp_path / "fresh").glob("*.safetensors")))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_merge_done_before(base_folder, adapter, tmp_path, monkeypatch):
    """Done before it returns at once and another merge is refused."""
    first = merge(adapter, str(base_folder), tmp_path / "out")
    before = files_of(tmp_path / "out")
    begun = interrupt(monkeypatch, at=None)
    monkeypatch.setattr(merging_module, "compare", None)
    assert merge(adapter, str(base_folder), tmp_path / "out") == first
    others = [{"dtype": torch.bfloat16}, {"shard_bytes": SHARDS}, {"base_precision": "nf4"}]
    for other in others:
        with pytest.raises(UserError, match="is not empty, and not the result of this merge"):
            merge(adapter, str(base_folder), tmp_path / "out", **other)
    CHANGES["alpha"](adapter)
    with pytest.raises(UserError, match="is not empty, and not the result of this merge"):
        merge(adapter, str(base_folder), tmp_path / "out")
    assert begun == []
    assert files_of(tmp_path / "out") == before


def test_merge_spoilt_shard(base_folder, adapter, tmp_path, monkeypatch):
    """By whatever wrote to it between an interruption and the end."""
    with monkeypatch.context() as patch:
        interrupt(patch, at=3)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, str(base_folder), tmp_path / "out", shard_bytes=SHARDS)
    first = next((tmp_path / ".out.partial").glob("model-00001*"))
    spoil(first, lambda tensors: next(iter(tensors.values())).add_(1))
    with pytest.raises(
        UserError, match=rf"{first.name}: .* as far from base \+ adapter .*; delete the file, and merge"
    ):
        merge(adapter, str(base_folder), tmp_path / "out", shard_bytes=SHARDS)
    assert not (tmp_path / "out").exists()
    first.unlink()
    merge(adapter, str(base_folder), tmp_path / "out", shard_bytes=SHARDS)


def test_merge_infinite_outputs(base_folder, adapter, tmp_path):
    """Infinite outputs are refused."""
    shutil.copytree(base_folder, tmp_path / "base")
    name = "model.layers.0.input_layernorm.weight"
    spoil(tmp_path / "base" / "model.safetensors", lambda tensors: tensors[name].fill_(1e38))
    with pytest.raises(UserError, match=r"model\.layers\.0: its outputs are not numbers"):
        merge(adapter, str(tmp_path / "base"), tmp_path / "merged")


def nf4_of(base):
    """The base with the matrices that 4-bit training quantises dequantised, in plain transformers."""
    model = loading.load(str(base)).model
    for name in quantized_names(read_config(str(base))):
        weight = model.get_parameter(name)
        weight.data = dequantized(weight.data)
    return model


@pytest.mark.parametrize("group", [None, 1], ids=["whole", "any number of rows"])
def test_merge_base_precision_nf4(base_folder, tmp_path, monkeypatch, group):
    """Onto nf4 it is PEFT's merge onto the dequantised model."""
    if group:
        in_blocks_of(monkeypatch, group)
    modes = {"decoder": "lora", "resampler": "lora", "gates": "full", "added_tokens": "full"}
    adapter_for(base_folder, tmp_path / "adapter", modes)
    record = merge(tmp_path / "adapter", str(base_folder), tmp_path / "nf4", base_precision="nf4", trained_on="nf4")
    theirs = open_adapter(nf4_of(base_folder), tmp_path / "adapter").merge_and_unload().state_dict()
    ours = weights(tmp_path / "nf4")
    base = nf4_of(base_folder).state_dict()
    assert unlike_rounding(ours, theirs, base, tmp_path / "adapter") == []
    assert group or different(ours, theirs) == []
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "full")
    quantized = quantized_names(read_config(str(base_folder)))
    assert set(different(ours, weights(tmp_path / "full"))) == quantized  # also those without LoRA
    assert any("cross_attn" in name for name in quantized)
    assert record["parity"]["largest_tensor_difference"] <= 1
    assert record["parity"]["largest_block_difference"] < 1e-5
    assert record["against"].keys() == {"full"}
    assert record["against"]["full"]["largest_tensor_difference"] > 100
    assert record["against"]["full"]["largest_block_difference"] > 1e-3
    assert verify(tmp_path / "nf4") == record["parity"]


def test_merge_reports_both_precisions(base_folder, adapter, tmp_path):
    """Trained in nf4 and merged onto the released weights both differences are told."""
    record = merge(adapter, str(base_folder), tmp_path / "merged", trained_on="nf4")
    assert record["parity"]["largest_block_difference"] < 1e-5
    assert record["against"].keys() == {"nf4"}
    assert record["against"]["nf4"]["largest_block_difference"] > 1e-3


def test_merge_nf4_full_tower_refused(base_folder, tmp_path):
    """A tower trained in full was never in 4 bits."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "full"})
    with pytest.raises(UserError, match=r"--base-precision nf4: model\.layers\..* was trained in full"):
        merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged", base_precision="nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_compare_answers(base_folder, make_rows, tmp_path):
    """Answers tell a right merge from a wrong one."""
    adapter_for(base_folder, tmp_path / "adapter", EVERYTHING, {})
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    processor, rows = loading.load_processor(str(base_folder)), make_rows()

    def assistant(model):
        return Assistant(model, processor.tokenizer, Preprocessing.of(processor.image_processor))

    def compared(merged):
        return compare_answers(
            base=lambda: assistant(loading.load(str(base_folder)).model),
            tuned=lambda: assistant(open_adapter(loading.load(str(base_folder)).model, tmp_path / "adapter")),
            merged=lambda: assistant(loading.load(merged).model),
            batches=[rows.batch(row) for row in rows.rows],
            prompts=[],
        )

    right, wrong = compared(str(tmp_path / "merged")), compared(str(base_folder))
    assert right.largest_difference < 1e-4  # fp32 rounding of logits of about 10
    assert wrong.largest_difference > 1e-2
    assert wrong.largest_difference == pytest.approx(right.largest_difference_to_base, abs=1e-4)
    assert wrong.largest_difference_to_base == 0


def test_peft_lora_fields_known():
    """The merge refuses what it does not understand; a new LoraConfig field of PEFT must be looked at first."""
    assert peft.__version__ == "0.21.2"


@pytest.mark.parametrize(
    ("owner", "name", "file"),
    [
        (merging_module, "write_json", ".merged.partial/provenance.json"),
        (merging_module.Path, "unlink", ".merged.partial/made_of.json"),
        (merging_module, "flush", ".merged.partial"),
        (merging_module.Path, "rename", ".merged.partial"),
    ],
)
def test_merge_resumes_when_little_is_missing(base_folder, tmp_path, monkeypatch, owner, name, file):
    """Killed just before `name` is done to `file`; no weights are written again."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora"})
    original = getattr(owner, name)

    def killed(path, *arguments, **options):
        if path == tmp_path / file:
            raise KeyboardInterrupt
        return original(path, *arguments, **options)

    monkeypatch.setattr(owner, name, killed)
    with pytest.raises(KeyboardInterrupt):
        merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    monkeypatch.undo()
    monkeypatch.setattr(merging_module, "write_shard", None)
    record = merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    assert record == json.loads((tmp_path / "merged" / "provenance.json").read_text())
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "provenance.json"} <= names
    assert "made_of.json" not in names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
