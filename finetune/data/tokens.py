"""Rendered -> Example: ids, labels by character offsets within a piece, and the image each token sees."""

from dataclasses import dataclass
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


def tokenize(rendered: Rendered, tokenizer: Any) -> Example:
    """Encode with `tokenizer` (a fast transformers tokenizer).

    Text is encoded with special-token parsing off, piece by piece: the same ids as the whole string would give, and a
    literal "<image>" in a dataset stays text. Raises RecordError where the text cannot be kept apart.
    """
    specials = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(list(SPECIALS)), strict=True))
    texts = [piece.text for piece in rendered.pieces if isinstance(piece, Text)]
    encoded = iter(_encode(texts, tokenizer, forbidden=set(specials.values()) - {tokenizer.unk_token_id}))
    ids: list[int] = []
    labels: list[int] = []
    for piece in rendered.pieces:
        if isinstance(piece, Special):
            ids.append(specials[piece.name])
            labels.append(specials[piece.name] if piece.supervised else IGNORED)
        else:
            tokens, offsets = next(encoded)
            ids += tokens
            labels += _labels(tokens, offsets, piece)
    input_ids = np.array(ids, dtype=np.int64)
    image_index = (input_ids == specials[IMAGE]).cumsum() - 1
    example = Example(input_ids, np.array(labels, dtype=np.int64), image_index)
    assert len(labels) == len(ids)
    assert labels[0] == IGNORED
    assert image_index[-1] + 1 == len(rendered.images)
    return example


def _encode(texts: list[str], tokenizer: Any, *, forbidden: set[int]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    if not texts:
        return []
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    if any(not forbidden.isdisjoint(ids) for ids in encoding["input_ids"]):
        raise RecordError("text became a special token", "this tokenizer cannot keep literal special tokens apart")
    return list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))


def _labels(tokens: list[int], offsets: list[tuple[int, int]], piece: Text) -> list[int]:
    labels = [IGNORED] * len(tokens)
    for start, stop in piece.supervised:
        for index, (first, last) in enumerate(offsets):
            if start <= first and last <= stop:
                labels[index] = tokens[index]
            elif first < start < last:
                # The prompt's ids would then not be a prefix of the dialogue's.
                raise RecordError("answer not apart from its prompt", f"one token spans {piece.text[first:last]!r}")
    return labels
