"""Fresh IDEFICS models, tokenizers and processors of any size, made offline: for `model.init`, benchmarks, tests."""

import json
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForImageTextToText,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    LlamaTokenizer,
)
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from modeling.attention import PACKED
from modeling.errors import UserError
from modeling.packed_forward import PackedIdefics
from modeling.shapes import Config
from modeling.tokens import ADDED, BOS, EOS

CONTROL = ("<unk>", BOS, EOS)
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SMALLEST_VOCABULARY = len(CONTROL) + len(BYTES) + 1


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, added: int = 2) -> LlamaTokenizer:
    """Train a LLaMA-style tokenizer (BPE, byte fallback, a space before words) of exactly `vocab_size` + `added` ids.

    Pieces never contain an inner space. Ids: unk, bos, eos 0 to 2, bytes from 3, then the learnt pieces.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size: expected at least {SMALLEST_VOCABULARY} (256 bytes and 4 more), got {vocab_size}")
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    pieces = vocab_size - len(CONTROL) - len(BYTES)
    learner.train_from_iterator(texts, BpeTrainer(vocab_size=pieces, show_progress=False, initial_alphabet=["▁"]))
    learnt = [piece for piece, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1])][:pieces]
    fill = [f"<unused{index}>" for index in range(pieces - len(learnt))]
    vocab = {piece: index for index, piece in enumerate((*CONTROL, *BYTES, *learnt, *fill))}
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    return LlamaTokenizer(
        vocab=vocab,
        merges=[(left, right) for left, right in merges if {left, right, left + right} <= vocab.keys()],
        legacy=True,
        pad_token=CONTROL[0],
        extra_special_tokens=list(ADDED[:added]),
        padding_side="left",
    )


def build_processor(tokenizer: LlamaTokenizer, *, image_size: int) -> IdeficsProcessor:
    """Return the stock processor of this tokenizer, with the PIL image processor that IDEFICS was trained with."""
    return IdeficsProcessor(IdeficsImageProcessorPil(image_size=image_size), tokenizer)


def build_model(config: Config, *, seed: int, packed: bool = False) -> IdeficsForVisionText2Text:
    """Return a freshly initialised model in fp32, stock or for packed rows; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if packed:
            return PackedIdefics(IdeficsConfig(**config, attn_implementation=PACKED)).eval()
        stock = AutoModelForImageTextToText.from_config(
            IdeficsConfig(**config), attn_implementation="sdpa", dtype=torch.float32
        )
        return stock.eval()
