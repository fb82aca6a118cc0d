"""A base becomes an instruct model without a resize; what is saved can be loaded, with the same ids."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import IdeficsDecoupledEmbedding, IdeficsDecoupledLinear

from modeling import loading, tiny
from modeling.errors import UserError

# Of logits: transformers' blocks, or a product of one row, and ours add up in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

ROW = {
    "input_ids": torch.tensor([[1, 17, 300, 301, 300, 18, 19, 2]]),
    "image_attention_mask": torch.tensor([[[0], [0], [0], [1], [1], [1], [1], [1]]]),
    "pixel_values": torch.randn(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
}
PROBE = (
    "<s>User:<fake_token_around_image><image><fake_token_around_image>Who? <end_of_utterance>\nAssistant: A fox.</s>"
)


@torch.no_grad()
def logits(model):
    return model(**ROW).logits[0]


@pytest.fixture
def base(base_folder):
    return IdeficsForVisionText2Text.from_pretrained(base_folder, attn_implementation="sdpa").eval()


def encode(tokenizer, text=PROBE):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_extend_vocabulary_copies_end_of_text(idefics, base):
    """The third row is copied from the end of text and the others are kept."""
    for ours, theirs, table in [
        (idefics.model.lm_head.additional_fc, base.lm_head.additional_fc, base.lm_head),
        (
            idefics.model.model.embed_tokens.additional_embedding,
            base.model.embed_tokens.additional_embedding,
            base.model.embed_tokens,
        ),
    ]:
        assert ours.weight.shape == (3, 64)
        assert torch.equal(ours.weight[:2], theirs.weight)
        assert torch.equal(ours.weight[2], table.weight[2])


def test_extend_vocabulary_keeps_first_logits(idefics, base):
    """The first logits stay as they were."""
    ours, before = logits(idefics.model), logits(base)
    assert (ours.shape, before.shape) == ((8, 303), (8, 302))
    torch.testing.assert_close(ours[:, :302], before, **CLOSE)
    torch.testing.assert_close(ours[:, 302], before[:, 2], **CLOSE)


def test_config_modules_tokenizer_agree(idefics):
    """Config modules and tokenizer agree on the three tokens."""
    model = idefics.model
    assert (model.config.vocab_size, model.config.additional_vocab_size) == (300, 3)
    assert type(model.lm_head) is IdeficsDecoupledLinear
    assert isinstance(model.model.embed_tokens, IdeficsDecoupledEmbedding)
    assert model.lm_head.out_additional_features == model.model.embed_tokens.num_additional_embeddings == 3
    names = ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    assert idefics.tokenizer.convert_tokens_to_ids(names) == [300, 301, 302]
    assert len(idefics.tokenizer) == 303
    assert not model.training


def test_extended_model_in_plain_transformers(idefics, tmp_path):
    """An extended model can be saved and loaded by plain transformers."""
    idefics.model.save_pretrained(tmp_path)
    loading.save_processor(idefics.processor, tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.config.additional_vocab_size == 3
    assert type(again) is IdeficsForVisionText2Text
    torch.testing.assert_close(logits(again), logits(idefics.model), **CLOSE)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "packed" not in json.dumps(config)


def test_instruct_base_unchanged(idefics, tmp_path):
    """An instruct base is left as it is."""
    with torch.no_grad():
        idefics.model.lm_head.additional_fc.weight[2] += 1
        idefics.model.model.embed_tokens.additional_embedding.weight[2] -= 1
    idefics.model.save_pretrained(tmp_path)
    loading.save_processor(idefics.processor, tmp_path)
    again = loading.load(str(tmp_path))
    assert len(again.tokenizer) == 303
    for (name, ours), theirs in zip(again.model.named_parameters(), idefics.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_extend_vocabulary_twice(idefics):
    """Extending twice is extending once."""
    before = {name: p.clone() for name, p in idefics.model.named_parameters()}
    loading.extend_vocabulary(idefics.model)
    assert all(torch.equal(before[name], p) for name, p in idefics.model.named_parameters())


def test_base_stays_base(base_folder, base):
    """A base may stay a base."""
    kept = loading.load(str(base_folder), instruct=False)
    assert kept.model.config.additional_vocab_size == 2
    assert len(kept.tokenizer) == 302
    torch.testing.assert_close(logits(kept.model), logits(base), **CLOSE)
    assert kept.model.generation_config.eos_token_id == [2]


def test_extend_vocabulary_bf16(base_folder):
    """An extension in bf16 stays in bf16."""
    model = loading.load(str(base_folder), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.additional_fc.weight[2], model.lm_head.weight[2])


def test_generation_config(idefics):
    """Generation stops at both ends and writes no image."""
    config = idefics.model.generation_config
    assert config.eos_token_id == [302, 2]
    assert config.suppress_tokens == [300, 301]
    assert (config.bos_token_id, config.pad_token_id) == (1, 0)


def test_tokenizer_other_ids_refused(base_folder, tmp_path):
    """A tokenizer with other ids is refused."""
    shutil.copytree(base_folder, tmp_path, dirs_exist_ok=True)
    other = tiny.train_tokenizer(["a dog"], vocab_size=299)
    loading.save_processor(tiny.build_processor(other, image_size=64), tmp_path)
    with pytest.raises(UserError, match=r"tokenizer and model disagree .*\[299, 300, 301\], not \[300, 301, 302\]"):
        loading.load(str(tmp_path))


def test_folder_without_tokenizer(base_folder, tmp_path):
    """A folder without a tokenizer is refused."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base_folder / name, tmp_path)
    with pytest.raises(UserError, match="expected tokenizer and image processor files"):
        loading.load(str(tmp_path))


@pytest.mark.parametrize("fixture", ["tiny_tokenizer", "llama_tokenizer"])
def test_saved_tokenizer_same_ids(request, fixture, tmp_path):
    """A saved tokenizer gives the same ids."""
    tokenizer = request.getfixturevalue(fixture)
    loading.save_processor(tiny.build_processor(tokenizer, image_size=64), tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert encode(again) == encode(tokenizer)
    assert again.padding_side == tokenizer.padding_side
    again_again = tmp_path / "again"
    loading.save_processor(tiny.build_processor(again, image_size=64), again_again)
    assert encode(AutoTokenizer.from_pretrained(again_again)) == encode(tokenizer)


def test_saved_processor_keeps_image_size(idefics, tmp_path):
    """A saved processor loads by itself and keeps the image size."""
    loading.save_processor(idefics.processor, tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again).__name__ == "IdeficsProcessor"
    assert type(again.image_processor).__name__ == "IdeficsImageProcessorPil"
    assert again.image_processor.image_size == 64
    assert again.tokenizer.convert_tokens_to_ids("<end_of_utterance>") == 302
    assert encode(again.tokenizer) == encode(idefics.tokenizer)
