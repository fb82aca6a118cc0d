"""Rendered -> Example: ids, labels by character offsets within a piece, and the image each token sees."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np

from finetune.data.dialogue import RecordError
from finetune.data.template import BOS, END_OF_UTTERANCE, EOS, FAKE, IMAGE, Rendered, Special, Text

SPECIALS = (BOS, EOS, FAKE, IMAGE, END_OF_UTTERANCE)

IGNORED = -100
"""The label of a token that is not supervised."""


@dataclass(frozen=True)
class Example:
    """A dialogue as the model trains on it; all three int64 [T].

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
    """The fast tokenizer inside a transformers one, without the rest: worker processes can have it in a moment.

    Text is encoded with special-token parsing off, so a literal "<image>" in a dataset stays text.
    """

    def __init__(self, tokenizer: Any):
        self.backend = tokenizer.backend_tokenizer
        ids = tokenizer.convert_tokens_to_ids(list(SPECIALS))
        self.specials = dict(zip(SPECIALS, ids, strict=True))
        self.forbidden = frozenset(ids) - {tokenizer.unk_token_id}

    @property
    def identity(self) -> str:
        """Everything that decides what a text becomes."""
        self._settle()
        return f"{self.backend.to_str()}{sorted(self.specials.items())}"

    def encode(self, texts: list[str]) -> list[Any]:
        """Encodings, with `ids` and character `offsets`."""
        if not texts:
            return []
        self._settle()
        return self.backend.encode_batch(texts, add_special_tokens=False)

    def _settle(self) -> None:
        """Before each use: the transformers tokenizer, which shares the backend, leaves its last call's settings."""
        self.backend.encode_special_tokens = True
        self.backend.no_padding()
        self.backend.no_truncation()


def tokenize(rendered: Rendered, tokenizer: Any) -> Example:
    """One dialogue with a fast transformers tokenizer. Raises RecordError where the text cannot be kept apart."""
    (example,) = tokenize_all([rendered], Encoder(tokenizer))
    if isinstance(example, RecordError):
        raise example
    return example


def tokenize_all(rendered: Sequence[Rendered], encoder: Encoder) -> list[Example | RecordError]:
    """Encode piece by piece: the same ids as each whole string would give."""
    texts = [piece.text for one in rendered for piece in one.pieces if isinstance(piece, Text)]
    encodings = iter(encoder.encode(texts))
    examples: list[Example | RecordError] = []
    for one in rendered:
        own = [next(encodings) if isinstance(piece, Text) else None for piece in one.pieces]
        try:
            examples.append(_example(one, own, encoder))
        except RecordError as error:
            examples.append(error)
    return examples


def see_images(input_ids: np.ndarray, image: int) -> np.ndarray:
    """int64 [T]: the number of the last image before each token, -1 = none; `image` is the id of "<image>"."""
    return (input_ids == image).cumsum() - 1


def _example(rendered: Rendered, encodings: Sequence[Any], encoder: Encoder) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    for piece, encoding in zip(rendered.pieces, encodings, strict=True):
        if isinstance(piece, Special):
            token = encoder.specials[piece.name]
            ids.append(token)
            labels.append(token if piece.supervised else IGNORED)
        else:
            tokens = encoding.ids
            if not encoder.forbidden.isdisjoint(tokens):
                raise RecordError("text became a special token", "this tokenizer cannot keep literal specials apart")
            ids += tokens
            labels += _labels(tokens, encoding, piece) if piece.supervised else [IGNORED] * len(tokens)
    input_ids = np.array(ids, dtype=np.int64)
    image_index = see_images(input_ids, encoder.specials[IMAGE])
    assert len(labels) == len(ids)
    assert labels[0] == IGNORED
    assert image_index[-1] + 1 == len(rendered.images)
    return Example(input_ids, np.array(labels, dtype=np.int64), image_index)


def _labels(tokens: list[int], encoding: Any, piece: Text) -> list[int]:
    labels = [IGNORED] * len(tokens)
    offsets = encoding.offsets
    for start, stop in piece.supervised:
        first = bisect_left(offsets, start, key=itemgetter(0))
        if first and offsets[first - 1][1] > start:
            # The prompt's ids would then not be a prefix of the dialogue's.
            spanned = slice(*offsets[first - 1])
            raise RecordError("answer not apart from its prompt", f"one token spans {piece.text[spanned]!r}")
        last = bisect_right(offsets, stop, key=itemgetter(1))
        labels[first:last] = tokens[first:last]
    return labels
