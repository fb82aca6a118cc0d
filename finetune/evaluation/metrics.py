"""Answers and their references -> scores: exact match, VQA accuracy, CIDEr-D, ROUGE-L. Strings in, numbers out."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, compress

import numpy as np


def score(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Return, for each answer, the scores that apply to it, by name.

    Always `exact`; `rouge_l` and `cider` where the references are sentences; else `vqa` where there are several. The
    n-gram weights of CIDEr-D come from all the sentences together.
    """
    described = []  # by sentences: four words or more on average, most of them worded differently
    for given in references:
        words = sum(len(reference.split()) for reference in given)
        described.append(words >= 4 * len(given) and 2 * len(set(given)) > len(given))
    ciders = iter(cider_d(list(compress(answers, described)), list(compress(references, described))))
    scores: list[dict[str, float]] = []
    for answer, given, sentences in zip(answers, references, described, strict=True):
        own: dict[str, float] = {"exact": exact_match(answer, given)}
        if sentences:
            own |= {"rouge_l": rouge_l(answer, given), "cider": next(ciders)}
        elif len(given) > 1:
            own["vqa"] = vqa_accuracy(answer, given)
        scores.append(own)
    return scores


def exact_match(answer: str, references: Sequence[str]) -> bool:
    """Return whether the answer is equal to one of the references."""
    return answer in references


def most_common(references: Sequence[str]) -> str:
    """Return the most common reference; on a tie, the first."""
    return Counter(references).most_common(1)[0][0]


def is_yes_no(references: Sequence[str]) -> bool:
    """Return whether the most common reference is yes or no, in any case."""
    return most_common(references).lower() in ("yes", "no")


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the official VQA accuracy (Antol et al. 2015): min(1, matches / 3), leaving out each human answer in turn.

    With ten human answers, an answer that 1, 2, 3, 4 of them gave scores 0.3, 0.6, 0.9, 1. Both sides are normalised,
    except if all humans agree: then, as in the official code, the answer must be equal without normalisation. With
    fewer than ten, the same mean is taken: an answer that all of three gave scores 2/3, and with one always 0.
    """
    answer, given = _one_line(answer), [_one_line(reference) for reference in references]
    if len(set(given)) > 1:
        answer, given = normalise_vqa(answer), [normalise_vqa(reference) for reference in given]
    matches = given.count(answer)
    others = len(given) - matches
    return (matches * min(1, (matches - 1) / 3) + others * min(1, matches / 3)) / len(given)


def normalise_vqa(text: str) -> str:
    """Apply the official VQA normalisation: "The two  dogs." -> "2 dogs".

    It handles punctuation, number words up to ten, articles and missing apostrophes, in this order; the result is in
    lower case with single spaces.
    """
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(_one_line(text)).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Remove punctuation: a mark that is beside a space anywhere is deleted, any other becomes a space.

    If a comma is between two digits anywhere, all marks are deleted.

    Then full stops are deleted, except before a digit: only the first 32, because the official code passes re.UNICODE
    as the count.
    """
    parts_digits = re.search(r"\d,\d", text)
    cleaned = text
    for sign in ';/[]"{}()=+\\_-><@`,?!':
        drop = parts_digits or f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if drop else " ")
    return re.sub(r"\.(?!\d)", "", cleaned, count=32)


_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}

_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""

_CONTRACTIONS = {
    word[: place.start()] + word[place.end() :]: word
    for word in _APOSTROPHES.split()
    for place in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
"""The official table: words with one apostrophe left out, including one entry that is reversed there."""


def tokenise_caption(text: str) -> list[str]:
    """Split into lower-case words: "A dog's ball isn't off-white!" -> a, dog, 's, ball, is, n't, off-white.

    An approximation, for English, of the PTB tokenizer (a Java program) of COCO's evaluation: it also splits
    contractions and keeps numbers and hyphenated words whole; unlike it, it drops symbols and splits "u.s.".
    """
    return _TOKEN.findall(text.lower().replace("’", "'"))


_TOKEN = re.compile(r"\w+?(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:]\d+)+|\w+(?:-\w+)*")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Return ROUGE-L (Lin 2004) as in COCO: F, with beta 1.2, of the best precision and recall over references."""
    words, given = tokenise_caption(answer), [tokenise_caption(reference) for reference in references]
    common = [_longest_common_subsequence(words, reference) for reference in given]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(length / max(len(reference), 1) for length, reference in zip(common, given, strict=True))
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def _longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length, by rows of the usual table as bits: a bit is 0 where the row increases (Hyyrö 2004)."""
    places: dict[str, int] = defaultdict(int)
    for index, word in enumerate(first):
        places[word] |= 1 << index
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(first) - row.bit_count()


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return CIDEr-D of each answer (Vedantam et al. 2015): n-grams up to 4, sigma 6, times 10, as in COCO's code.

    The weight of an n-gram decreases with the number of items that have it in their references; a set of one item
    scores 0. Papers print the mean times 100.
    """
    assert len(answers) == len(references)
    assert all(references)
    items = len(answers)
    captions = [tokenise_caption(text) for text in (*answers, *chain.from_iterable(references))]
    counts = np.array([len(given) for given in references], dtype=np.int64)
    item = np.concatenate([np.arange(items), np.repeat(np.arange(items), counts)])
    cosine = np.mean([_cosine(caption, gram, item=item, items=items) for caption, gram in _ngrams(captions)], axis=0)
    length = np.array([len(caption) for caption in captions], dtype=np.int64)
    similarity = cosine * np.exp(-((length - length[item]) ** 2) / (2 * 6.0**2))
    total = np.bincount(item[items:], similarity[items:], minlength=items)
    return (10 * total / counts).tolist()


def _ngrams(captions: Sequence[Sequence[str]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for n = 1, 2, 3, 4, (caption, n-gram id) of all n-grams in all captions: int64 [n-grams]."""
    numbers: dict[str, int] = {}
    word = np.array([numbers.setdefault(w, len(numbers)) for caption in captions for w in caption], dtype=np.int64)
    lengths = np.array([len(caption) for caption in captions], dtype=np.int64)
    caption, end = np.repeat(np.arange(len(captions)), lengths), np.repeat(np.cumsum(lengths), lengths)
    start, gram = np.arange(len(word)), word
    for n in (1, 2, 3, 4):
        yield caption[start], gram
        longer = start + n < end[start]
        start, gram = start[longer], gram[longer]
        gram = np.unique(gram * len(numbers) + word[start + n], return_inverse=True)[1]


def _cosine(caption: np.ndarray, gram: np.ndarray, *, item: np.ndarray, items: int) -> np.ndarray:
    """Return each caption's clipped cosine with the answer of its item, for n-grams of one length: float64 [captions].

    Caption i < items is the answer of item i; the others are references, of `item`.
    """
    width = gram.max(initial=0) + 1
    pairs, counts = np.unique(caption * width + gram, return_counts=True)
    caption, gram = np.divmod(pairs, width)
    referred = caption >= items
    documents = np.unique(item[caption[referred]] * width + gram[referred]) % width
    frequency = np.maximum(np.bincount(documents, minlength=width), 1)
    weight = counts * (np.log(max(items, 1)) - np.log(frequency))[gram]
    norm = np.sqrt(np.bincount(caption, weight**2, minlength=len(item)))
    answers = item[caption] * width + gram
    place = np.searchsorted(pairs, answers)  # always inside: an answer's pairs come before those of its references
    clipped = np.minimum(weight, np.where(pairs[place] == answers, weight[place], 0))
    product = np.bincount(caption, clipped * weight, minlength=len(item))
    norms = norm * norm[item]
    return np.divide(product, norms, out=np.zeros(len(item)), where=norms > 0)
