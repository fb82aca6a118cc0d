"""Rendered -> Example: token ids, labels from character offsets within a piece, and the image that each token sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data.chat_template import Rendered, Special, Text
from finetune.data.conversation import RecordError
from modeling.tokens import BOS, END_OF_UTTERANCE, EOS, FAKE, IGNORED, IMAGE

SPECIALS = (BOS, EOS, FAKE, IMAGE, END_OF_UTTERANCE)


@dataclass(frozen=True)
class Example:
    """A tokenised dialogue; all three arrays are int64 [T].

    "<s>User:<fake><image><fake>Who?<eou>\\nAssistant: Me.<eou></s>" gives

    input_ids    <s> User :  <fake> <image> <fake>  Who ? <eou>  \\n Assistant :  Me . <eou>  </s>
    labels        .   .   .    .       .      .      .  .   .    .      .     .  Me . <eou>   .
    image_index  -1  -1  -1   -1       0      0      0  0   0    0      0     0   0 0   0     0
    """

    input_ids: np.ndarray
    labels: np.ndarray
    image_index: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORED).sum())


class Encoder:
    """The fast backend of a transformers tokenizer, which can be sent to worker processes quickly.

    Text is encoded with special-token parsing off, so a literal "<image>" in a dataset stays text.
    """

    def __init__(self, tokenizer: Any):
        self.backend = tokenizer.backend_tokenizer
        ids = tokenizer.convert_tokens_to_ids(list(SPECIALS))
        self.specials = dict(zip(SPECIALS, ids, strict=True))
        self.forbidden = frozenset(ids) - {tokenizer.unk_token_id}
        self._prefixes: dict[str, list[int]] = {"": []}

    @property
    def fingerprint(self) -> str:
        """Return a string of all settings that determine the token ids of a text."""
        self._settle()
        return f"{self.backend.to_str()}{sorted(self.specials.items())}"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text."""
        if not texts:
            return []
        self._settle()
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def prefix(self, text: str) -> list[int]:
        """Return the ids of the text before a supervised text: nearly always "\\nAssistant:"."""
        if text not in self._prefixes:
            (self._prefixes[text],) = self.encode([text])
        return self._prefixes[text]

    def _settle(self) -> None:
        """Reset the backend before each use: the transformers tokenizer shares it, and changes its settings."""
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()


def tokenize(rendered: Rendered, tokenizer: Any) -> Example:
    """Tokenise one dialogue. Raises RecordError: prompt and answer cannot be tokenised separately."""
    (example,) = tokenize_all([rendered], Encoder(tokenizer))
    if isinstance(example, RecordError):
        raise example
    return example


def tokenize_all(rendered: Sequence[Rendered], encoder: Encoder) -> list[Example | RecordError]:
    """Encode piece by piece, with the same ids as encoding each whole string."""
    texts = [piece.text for one in rendered for piece in one.pieces if isinstance(piece, Text)]
    encoded = iter(encoder.encode(texts))
    examples: list[Example | RecordError] = []
    for one in rendered:
        own = [next(encoded) if isinstance(piece, Text) else [] for piece in one.pieces]
        try:
            examples.append(_example(one, own, encoder))
        except RecordError as error:
            examples.append(error)
    return examples


def see_images(input_ids: np.ndarray, image: int) -> np.ndarray:
    """Return the index of the last image before each token, -1 = none: int64 [T]; `image` is the id of "<image>"."""
    return (input_ids == image).cumsum() - 1


def _example(rendered: Rendered, encoded: Sequence[list[int]], encoder: Encoder) -> Example:
    ids: list[int] = []
    supervised: list[slice] = []
    for piece, tokens in zip(rendered.pieces, encoded, strict=True):
        start = len(ids)
        if isinstance(piece, Special):
            ids.append(encoder.specials[piece.name])
            if piece.supervised:
                supervised.append(slice(start, start + 1))
        else:
            if not encoder.forbidden.isdisjoint(tokens):
                raise RecordError("text became a special token", "this tokenizer cannot keep literal specials apart")
            ids += tokens
            if piece.supervised_from is not None:
                supervised.append(slice(start + _require_prefix(tokens, piece, encoder), len(ids)))
    input_ids = np.array(ids, dtype=np.int64)
    labels = np.full(len(ids), IGNORED, dtype=np.int64)
    for part in supervised:
        labels[part] = input_ids[part]
    image_index = see_images(input_ids, encoder.specials[IMAGE])
    assert labels[0] == IGNORED
    assert image_index[-1] + 1 == len(rendered.images)
    return Example(input_ids, labels, image_index)


def _require_prefix(tokens: list[int], piece: Text, encoder: Encoder) -> int:
    """Return the number of tokens before the supervised text; they must equal those of the prompt alone."""
    prompt = piece.text[: piece.supervised_from]
    before = encoder.prefix(prompt)
    if tokens[: len(before)] != before:
        where = f"one token spans the end of {prompt!r} in {piece.text[:80]!r}"
        raise RecordError("answer not apart from its prompt", where)
    return len(before)
