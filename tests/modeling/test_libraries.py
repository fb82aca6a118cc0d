"""What is broken for IDEFICS in the libraries of today. When one of these fails, a file of ours may become smaller."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import stand_in
from transformers import AutoTokenizer, IdeficsForVisionText2Text

from modeling import loading, tiny
from modeling.shapes import IDEFICS_9B

ROW = {
    "input_ids": torch.tensor([[1, 17, 300, 301, 300, 18, 19, 2]]),
    "image_attention_mask": torch.tensor([[[0], [0], [0], [1], [1], [1], [1], [1]]]),
    "pixel_values": torch.randn(1, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture
def stock(base_folder):
    return IdeficsForVisionText2Text.from_pretrained(base_folder, attn_implementation="sdpa").eval()


def test_stock_loss_crashes(stock):
    """modeling/packed_forward.py has a loss of its own because this one cannot count its logits."""
    assert stock(**ROW).logits.shape == (1, 8, 302)
    with pytest.raises((ValueError, RuntimeError), match=r"[Ee]xpected input batch_size|invalid for input of size"):
        stock(**ROW, labels=ROW["input_ids"])


def test_stock_loss_leaves_out_added_rows(stock):
    """modeling/packed_forward.py: `vocab_size` is 300 where the logits are 302 wide."""
    asked = []
    stock.loss_function = lambda logits, labels, vocab_size, **kwargs: asked.append((logits.shape[-1], vocab_size))
    stock(**ROW, labels=ROW["input_ids"])
    assert asked == [(302, 300)]


def test_processor_first_argument_is_images(base_folder):
    """finetune/data/chat_template.py and collate.py write batches themselves; the card's call is one reason."""
    processor = loading.load_processor(str(base_folder))
    assert processor(text=[["User: Hello"]], return_tensors="pt")["input_ids"].shape[0] == 1
    with pytest.raises(UnboundLocalError):
        processor([["User: Hello"]], return_tensors="pt")


def test_llama_tokenizer_forgets_legacy(llama_tokenizer, tmp_path):
    """modeling/loading.py `save_processor` writes the flag because plain saving changes the ids."""
    text = "<image>What is it?<image>A dog."
    tokenizer = copy.deepcopy(llama_tokenizer)
    tokenizer.init_kwargs.pop("legacy", None)  # where our own saving of the shared fixture has left it
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.legacy, again.legacy) == (True, False)
    assert tokenizer.tokenize(text) == ["<image>", "▁What", "▁is", "▁it", "?", "<image>", "▁A", "▁dog", "."]
    assert again.tokenize(text) == ["<image>", "What", "▁is", "▁it", "?", "<image>", "A", "▁dog", "."]


def test_peft_suffix_targets_hit_all_towers(stock):
    """modeling/towers.py spells every target in full because "q_proj" is not a tower."""
    wrapped = get_peft_model(stock, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted = {name.split(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A" in name}
    prefixes = ("vision_model", "perceiver_resampler", "gated_cross_attn_layers", "layers")
    hit = {tower: sum(name.startswith(f"base_model.model.model.{tower}.") for name in adapted) for tower in prefixes}
    assert hit == {"vision_model": 2, "perceiver_resampler": 2, "gated_cross_attn_layers": 2, "layers": 8}


def test_peft_does_not_train_gates(stock):
    """modeling/fp32.py and adapters.py keep and save gates because PEFT silently leaves them alone."""
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["alpha_cross_attn", "alpha_dense"])
    wrapped = get_peft_model(stock, config)
    assert not any("alpha" in name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)


def test_zero_gates_give_no_gradient():
    """modeling/shapes.py starts fresh shapes with gates of one (`alpha_initializer`) because of this."""
    config = {**stand_in(IDEFICS_9B), "alpha_initializer": "zeros"}
    model = tiny.build_model(config, seed=0).requires_grad_(True)
    model(**ROW).logits.logsumexp(-1).sum().backward()
    behind = ("cross_attn.", "perceiver_resampler", "vision_model", "gated_cross_attn_layers.0.mlp")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    closed = {name: g for name, g in gradients.items() if any(part in name for part in behind)}
    assert len(closed) > 60
    assert not any(gradient.any() for gradient in closed.values())
    assert gradients["model.gated_cross_attn_layers.0.alpha_cross_attn"].any()


def packed_and_alone(model, **kwargs):
    """Logits of the second of two sequences of 4 tokens: in one row, and alone."""
    ids = torch.tensor([[1, 17, 18, 2, 1, 60, 61, 62]])
    positions = torch.arange(4).repeat(2)[None]
    blind = {"perceiver_embeddings": torch.zeros(1, 0, 8, 96), "use_cache": False}
    no_images = torch.zeros(1, 8, 1, dtype=torch.long)
    with torch.no_grad():
        row = model(ids, position_ids=positions, image_attention_mask=no_images[:, :, :0], **blind, **kwargs).logits
        alone = model(ids[:, 4:], image_attention_mask=no_images[:, 4:, :0], **blind).logits
    return row[0, 4:], alone[0]


def test_restarting_positions_do_not_part_sequences(stock, idefics):
    """modeling/attention.py runs every sequence alone because the stock model looks across: it fills in a mask."""
    row, alone = packed_and_alone(stock)
    assert (row - alone).abs().max() > 1e-2
    row, alone = packed_and_alone(idefics.model, sequence_starts=[0, 4, 8])
    # Ours, on the same two sequences: rounding of products of another size.
    torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)
