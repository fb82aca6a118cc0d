"""How fast dialogues become tokens, labels and image index: transformers' IdeficsProcessor and ours, side by side.

    python scripts/benchmarks/tokenizing.py

Both read the same dialogues of one or two images and several turns, in one process with one thread. The processor is
spared its image work: images are given as ready tensors. It makes no labels; ours does. The ids are compared.
"""

import argparse
import os
import statistics
import time
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import PIL.Image
import torch

from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image, assistant, user
from finetune.data.tokenize import Encoder, tokenize_all
from modeling import tiny
from modeling.shapes import IDEFICS_9B

TEXT = """the a image shows two dogs on red grass near an old house with green windows and what color is it how many
people are there describe this picture in detail there is nobody except for one small cat under the wooden table"""


def make_dialogues(count: int, *, seed: int) -> list[Dialogue]:
    """LLaVA-like: one or two images, one to five turns, short questions, answers of up to sixty words."""
    rng = np.random.default_rng(seed)
    picture = PIL.Image.new("RGB", (8, 8))

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(TEXT.split(), size=rng.integers(low, high))).capitalize()

    dialogues = []
    for _ in range(count):
        images = [Image(picture) for _ in range(rng.integers(1, 3))]
        turns = [user(*images, f"{words(4, 12)}?"), assistant(f"{words(2, 60)}.")]
        for _ in range(rng.integers(0, 5)):
            turns += [user(f"{words(4, 12)}?"), assistant(f"{words(2, 60)}.")]
        dialogues.append(Dialogue(tuple(turns)))
    return dialogues


def stock_prompt(dialogue: Dialogue) -> list[object]:
    """The same text as `render` writes, as the processor wants it."""
    prompt: list[object] = []
    for index, turn in enumerate(dialogue.turns):
        name = turn.role.capitalize()
        lead = f"{name}:" if index == 0 else f"\n{name}:"
        if turn.images:
            prompt += [lead, *(image.source for image in turn.images), f"{turn.text}<end_of_utterance>"]
        else:
            prompt.append(f"{lead} {turn.text}<end_of_utterance>")
    return prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dialogues = make_dialogues(arguments.dialogues, seed=0)
    texts = [turn.text for dialogue in dialogues for turn in dialogue.turns]
    tokenizer = tiny.train_tokenizer(texts, vocab_size=IDEFICS_9B["vocab_size"], added=3)
    processor = tiny.build_processor(tokenizer, image_size=224)
    ready = torch.zeros(3, 1, 1)
    prompts = [stock_prompt(dialogue) for dialogue in dialogues]

    def stock(batch: int) -> list[Any]:
        return [
            processor(
                text=prompts[start : start + batch],
                images_kwargs={"transform": lambda image: ready},
                text_kwargs={"add_eos_token": True, "add_end_of_utterance_token": False, "padding": "longest"},
                return_tensors="pt",
            )
            for start in range(0, len(prompts), batch)
        ]

    def stock_ids(batch: int) -> list[list[int]]:
        return [
            row[mask.bool()].tolist()
            for made in stock(batch)
            for row, mask in zip(made.input_ids, made.attention_mask, strict=True)
        ]

    encoder = Encoder(tokenizer)

    def ours() -> list[Any]:
        examples: list[Any] = []
        for start in range(0, len(dialogues), 512):
            examples += tokenize_all([render(dialogue) for dialogue in dialogues[start : start + 512]], encoder)
        return examples

    expected = [example.input_ids.tolist() for example in ours()]
    assert stock_ids(1) == stock_ids(32) == expected, "the two do not make the same tokens"
    tokens = sum(map(len, expected))
    sides = {"processor, one by one": lambda: stock(1), "processor, batches of 32": lambda: stock(32), "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):  # in turn, so that both see the same minutes of the machine
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(median for name, median in medians.items() if name != "ours")
    print(f"{len(dialogues):,} dialogues, {tokens:,} tokens, median of {arguments.repeats}")
    for name, median in medians.items():
        print(f"{name:26} {len(dialogues) / median:10,.0f} dialogues/s  {tokens / median:12,.0f} tokens/s")
    print(f"ours is {best / medians['ours']:.1f} times as fast as the faster of the processor's")


if __name__ == "__main__":
    main()
