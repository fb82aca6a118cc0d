"""The merged model is base + adapter: in plain transformers, against PEFT's own merge, and never the base again."""

import json

import peft
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, IdeficsForVisionText2Text

from finetune.data.images import Preprocessing
from finetune.generate import Assistant
from finetune.merge import merge
from finetune.proof import prove
from modeling import deltas, loading
from modeling.adapters import attach, open_adapter, save_adapter
from modeling.errors import UserError
from modeling.forward import forward_arguments

EVERYTHING = {
    "vision": "full",
    "resampler": "lora",
    "cross_attention": "lora",
    "decoder": "lora",
    "gates": "full",
    "added_tokens": "full",
    "embeddings_and_head": "frozen",
}
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
}


def adapter_for(base, folder, modes, lora):
    """An adapter as training would leave it: every trained tensor moved at random."""
    model = loading.load(str(base)).model
    wrapped = attach(model, modes, lora={"r": 4, "lora_alpha": 8, **lora}, base=str(base))
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    save_adapter(wrapped, folder)
    return wrapped.eval()


def logits(model, rows):
    batch = rows.batch(rows.rows[0])
    with torch.no_grad():
        return model(**forward_arguments(batch, model.config)).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_is_base_plus_adapter_to_1e_5_and_not_the_base(base_folder, make_rows, tmp_path, variant):
    modes, lora = VARIANTS[variant]
    tuned = adapter_for(base_folder, tmp_path / "adapter", modes, lora)
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    merged = loading.load(str(tmp_path / "merged"), instruct=False).model
    rows = make_rows()
    expected = logits(tuned, rows)
    scale = expected.abs().max()
    assert (logits(merged, rows) - expected).abs().max() < 1e-5 * scale  # fp32 rounding of W + BA against Wx + BAx
    assert (expected - logits(loading.load(str(base_folder)).model, rows)).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("block", [deltas.BLOCK_ELEMENTS, 500])
@pytest.mark.parametrize("variant", ["lora on the text towers", "rank and alpha patterns", "rslora", "dora"])
def test_it_is_peft_s_merge_bit_for_bit_in_whole_matrices_and_in_blocks(
    base_folder, tmp_path, variant, block, monkeypatch
):
    monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", block)
    tuned = adapter_for(base_folder, tmp_path / "adapter", *VARIANTS[variant])
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    theirs = tuned.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_plain_transformers_loads_it_and_writes_the_same_tokens(base_folder, make_rows, tmp_path):
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


def test_generation_stops_at_the_end_of_utterance_and_writes_no_image_token(base_folder, tmp_path):
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora"}, {})
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [302, 2]
    assert config["suppress_tokens"] == [300, 301]


def test_provenance_and_shards(base_folder, make_rows, tmp_path):
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
    assert record.keys() == {"base", "revision", "adapter_sha256"}
    # a sharded base is read by the same code
    again = adapter_for(tmp_path / "merged", tmp_path / "adapter2", {"decoder": "lora"}, {})
    merge(tmp_path / "adapter2", str(tmp_path / "merged"), tmp_path / "merged2")
    second = loading.load(str(tmp_path / "merged2"), instruct=False).model
    torch.testing.assert_close(logits(second, rows), logits(again, rows), rtol=1e-4, atol=1e-4)


def test_the_base_s_dtype_is_kept(base_folder, tmp_path):
    loading.load(str(base_folder), dtype=torch.bfloat16, instruct=False).model.save_pretrained(tmp_path / "bf16")
    loading.save_processor(loading.load_processor(str(base_folder), instruct=False), tmp_path / "bf16")
    adapter_for(tmp_path / "bf16", tmp_path / "adapter", EVERYTHING, {})
    merge(tmp_path / "adapter", str(tmp_path / "bf16"), tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_base_without_training_of_added_tokens_gains_the_row_of_the_end(base_folder, tmp_path):
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora"}, {})
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    tensors, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", base_folder))
    for owner, rows in (("model.embed_tokens", "additional_embedding"), ("lm_head", "additional_fc")):
        grown = tensors[f"{owner}.{rows}.weight"]
        assert torch.equal(grown[:2], base[f"{owner}.{rows}.weight"])
        assert torch.equal(grown[2], base[f"{owner}.weight"][2])


def test_a_tensor_that_finds_no_home_is_an_error(base_folder, tmp_path):
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora", "gates": "full"}, {})
    trained = load_file(tmp_path / "adapter" / "trained.safetensors")
    trained["model.gated_cross_attn_layers.7.alpha_dense"] = torch.zeros(1)
    save_file(trained, tmp_path / "adapter" / "trained.safetensors")
    with pytest.raises(UserError, match=r"1 tensors of the adapter have no place .*layers\.7\.alpha_dense"):
        merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_this_merge_does_not_understand_is_refused(base_folder, tmp_path):
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora"}, {"bias": "lora_only"})
    with pytest.raises(UserError, match="cannot be merged exactly: bias is 'lora_only'"):
        merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")


def test_what_is_no_adapter_or_no_base(base_folder, tmp_path):
    with pytest.raises(UserError, match="expected an adapter folder"):
        merge(tmp_path, str(base_folder), tmp_path / "merged")
    with pytest.raises(UserError, match="found none"):
        merge(tmp_path, str(tmp_path), tmp_path / "merged")


def test_the_proof_tells_a_right_merge_from_a_wrong_one(base_folder, make_rows, tmp_path):
    adapter_for(base_folder, tmp_path / "adapter", EVERYTHING, {})
    merge(tmp_path / "adapter", str(base_folder), tmp_path / "merged")
    processor, rows = loading.load_processor(str(base_folder)), make_rows()

    def assistant(model):
        return Assistant(model, processor.tokenizer, Preprocessing.of(processor.image_processor))

    def proof(merged):
        return prove(
            base=lambda: assistant(loading.load(str(base_folder)).model),
            tuned=lambda: assistant(open_adapter(loading.load(str(base_folder)).model, tmp_path / "adapter")),
            merged=lambda: assistant(loading.load(merged).model),
            batches=[rows.batch(row) for row in rows.rows],
            prompts=[],
        )

    right, wrong = proof(str(tmp_path / "merged")), proof(str(base_folder))
    assert right.largest_difference < 1e-4  # fp32 rounding of logits of about 10
    assert wrong.largest_difference > 1e-2
    assert wrong.largest_difference == pytest.approx(right.largest_difference_to_base, abs=1e-4)
    assert wrong.largest_difference_to_base == 0


def test_peft_has_no_lora_field_the_merge_was_not_told_of():
    """The merge refuses what it does not understand; a new LoraConfig field of PEFT must be looked at first."""
    assert peft.__version__ == "0.21.2"
