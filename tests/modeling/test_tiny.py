"""Tokenizers of an exact size that can say everything, models that can be made again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import stand_in

from modeling import tiny
from modeling.errors import UserError
from modeling.shapes import IDEFICS_9B, tensor_shapes
from modeling.tokens import ADDED

SENTENCES = ["a small dog and a red ball", "the quick brown fox jumps over the lazy dog"] * 4
CONFIG = stand_in(IDEFICS_9B)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer(SENTENCES, vocab_size=320, added=3)


@pytest.mark.parametrize("added", [2, 3])
@pytest.mark.parametrize("size", [260, 261, 300, 400])
def test_vocabulary_size(size, added):
    """A vocabulary has exactly the size asked for."""
    tokenizer = tiny.train_tokenizer(SENTENCES, vocab_size=size, added=added)
    assert len(tokenizer) == size + added
    names = ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>", "<fake_token_around_image>", "<image>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 258, size, size + 1]
    assert sorted(tokenizer.get_vocab().values()) == list(range(size + added))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_vocabulary_larger_than_text():
    """A vocabulary larger than the text is filled up."""
    tokenizer = tiny.train_tokenizer(["ab"], vocab_size=300)
    assert len(tokenizer) == 302
    assert tokenizer.convert_tokens_to_ids("<unused0>") < 300


@pytest.mark.parametrize("size", [0, 259])
def test_vocabulary_too_small(size):
    """A vocabulary too small for the bytes is refused."""
    with pytest.raises(UserError, match=f"expected at least 260 .* got {size}"):
        tiny.train_tokenizer(SENTENCES, vocab_size=size)


def test_frequent_words_become_pieces(tokenizer):
    """Frequent words become pieces."""
    ids = tokenizer("a dog", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁a", "▁dog"]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(ADDED + tiny.CONTROL))
def test_any_text_round_trip(tokenizer, text):
    """The space put before every text is the one that decoding takes away; "▁" is a space to it."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert max(ids, default=0) < 320
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert decoded == text.replace("▁", " ").removeprefix(" ")


def test_same_texts_same_tokenizer():
    """The same texts give the same tokenizer."""
    one, other = (tiny.train_tokenizer(SENTENCES, vocab_size=320) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    assert one("the quick dog")["input_ids"] == other("the quick dog")["input_ids"]


def test_same_seed_same_weights():
    """The same seed gives the same weights and leaves the generator alone."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (tiny.build_model(CONFIG, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert {name: tuple(one[name].shape) for name in tensor_shapes(CONFIG)} == tensor_shapes(CONFIG)


def test_fresh_model_fp32_eval():
    """A fresh model is fp32 and asleep."""
    model = tiny.build_model(CONFIG, seed=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert all(block.alpha_dense.item() == 1 for block in model.model.gated_cross_attn_layers)


def test_processor_image_size(tokenizer):
    """A processor squashes images to its size."""
    assert tiny.build_processor(tokenizer, image_size=56).image_processor.image_size == 56
