"""Made-up data for scripts/benchmarks/training.py: seeded dialogues with photograph-like images, in four mixes.

    short   several short questions about each image, each its own dialogue
    llava   dialogues of one to three turns about one to three images, lengths log-normal with a median of 90 tokens
    pages   documents of some hundred words among three to six images
    text    the dialogues of llava, without images

No image of llava and pages comes twice.
"""

from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np
import PIL.Image

from finetune.data.conversation import Dialogue, Image, Turn, assistant, user

WORDS = 3000
QUESTIONS_AN_IMAGE = 6


def make_mix(name: str, count: int, *, seed: int) -> list[Dialogue]:
    """`count` dialogues of a mix."""
    rng = np.random.default_rng([seed, *name.encode()])
    return list(MIXES[name](_Words(rng), rng, count))


class _Words:
    """Random text of made-up words, the same words whatever the seed: a tokenizer learns them all."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.words = rng, vocabulary()

    def __call__(self, count: int) -> str:
        return " ".join(self.words[index] for index in self.rng.integers(len(self.words), size=max(int(count), 1)))


def vocabulary() -> list[str]:
    rng = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    words = {"".join(rng.choice(syllables, size=rng.integers(1, 4))) for _ in range(WORDS)}
    return sorted(words)


def _short(words: _Words, rng: np.random.Generator, count: int) -> Iterator[Dialogue]:
    for number in range(count):
        if number % QUESTIONS_AN_IMAGE == 0:
            image = photograph(rng)
        yield Dialogue((user(image, f"{words(rng.integers(4, 10))}?"), assistant(words(rng.integers(1, 4)))))


def _llava(words: _Words, rng: np.random.Generator, count: int) -> Iterator[Dialogue]:
    for _ in range(count):
        yield _conversation(words, rng, [photograph(rng) for _ in range(rng.integers(1, 4))])


def _text(words: _Words, rng: np.random.Generator, count: int) -> Iterator[Dialogue]:
    for _ in range(count):
        yield _conversation(words, rng, [])


def _conversation(words: _Words, rng: np.random.Generator, images: list[Image]) -> Dialogue:
    """Questions of five to fifteen words; answers share what is left of a log-normal length."""
    template, question = 6, rng.integers(5, 16)  # tokens that each question and answer is wrapped in; words
    length = float(np.clip(rng.lognormal(np.log(90), 0.6), 30, 700))
    turns = min(int(rng.integers(1, 4)), 1 + int(length // 60))
    left = length - 2 - 2 * len(images) - turns * (template + question)
    spoken: list[Turn] = []
    for number in range(turns):
        shown = images if number == 0 else []
        spoken += [user(*shown, f"{words(question)}?"), assistant(f"{words(max(left / turns, 2))}.")]
    return Dialogue(tuple(spoken))


def _pages(words: _Words, rng: np.random.Generator, count: int) -> Iterator[Dialogue]:
    for _ in range(count):
        parts: list[str | Image] = [f"{words(rng.integers(10, 60))}."]
        for _ in range(rng.integers(3, 7)):
            parts += [photograph(rng), f"{words(rng.integers(30, 150))}."]
        yield Dialogue((Turn("document", tuple(parts)),))


def photograph(rng: np.random.Generator) -> Image:
    """A JPEG of 640 x 480: coarse blots of colour with fine grain, about as large as a photograph's."""
    coarse = PIL.Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480))
    grain = rng.integers(-12, 13, (480, 640, 1))
    content = BytesIO()
    levels = np.clip(np.asarray(coarse).astype(np.int16) + grain, 0, 255).astype(np.uint8)
    PIL.Image.fromarray(levels).save(content, "JPEG", quality=85)
    return Image(content.getvalue())


MIXES: dict[str, Callable[[_Words, np.random.Generator, int], Iterator[Dialogue]]] = {
    "short": _short,
    "llava": _llava,
    "pages": _pages,
    "text": _text,
}
