"""How fast an answer about five images is written: transformers' processor and model.generate, and ours, side by side.

    python scripts/benchmarks/generation.py

Both read the same conversation with the same model, a fresh one with the proportions of the 9B: hidden 512, 8 layers,
a gated block every 4, 64 latents an image. Both write exactly the same number of tokens, greedily: the ends are
suppressed. The tokens are compared.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import PIL.Image
import torch

from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image, assistant, user
from finetune.data.images import Preprocessing
from finetune.data.tokenize import tokenize
from finetune.evaluation.generate import Assistant, make_inputs
from modeling import tiny
from modeling.generation import greedy
from modeling.loading import generation_config
from modeling.shapes import IDEFICS_9B

QUESTIONS = ("what is in this image?", "and what is in this one?", "what color is it?", "how many?", "is it the same?")
ANSWER = "it shows two dogs on red grass near an old house with green windows."


def make_model(hidden: int, image_width: int, vocab_size: int, *, packed: bool) -> torch.nn.Module:
    """The 9B, narrower and with fewer layers; the vision tower, which runs once, is kept small."""
    config = {
        **IDEFICS_9B,
        "additional_vocab_size": 3,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": hidden * 43 // 16,
        "num_hidden_layers": 8,
        "num_attention_heads": max(1, hidden // 128),
        "alpha_initializer": "ones",
        "initializer_range": hidden**-0.5,
        "vision_config": {
            **IDEFICS_9B["vision_config"],
            "embed_dim": image_width,
            "image_size": 56,
            "intermediate_size": 4 * image_width,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
        "perceiver_config": {
            **IDEFICS_9B["perceiver_config"],
            "resampler_depth": 1,
            "resampler_n_heads": 4,
            "resampler_head_dim": image_width // 4,
        },
    }
    return tiny.build_model(config, seed=0, packed=packed)


def make_conversation(images: int, *, seed: int) -> Dialogue:
    rng = np.random.default_rng(seed)
    turns = []
    for index in range(images):
        picture = PIL.Image.fromarray(rng.integers(0, 256, size=(56, 56, 3), dtype=np.uint8))
        turns += [user(Image(picture), QUESTIONS[index % len(QUESTIONS)]), assistant(ANSWER)]
    return Dialogue(tuple(turns[:-1]))


def stock_prompt(dialogue: Dialogue) -> list[object]:
    """The same text as `render` writes, as the processor wants it."""
    prompt: list[object] = []
    for index, turn in enumerate(dialogue.turns):
        lead = f"{turn.role.capitalize()}:" if index == 0 else f"\n{turn.role.capitalize()}:"
        if turn.images:
            prompt += [lead, *(image.source for image in turn.images), f"{turn.text}<end_of_utterance>"]
        else:
            prompt.append(f"{lead} {turn.text}<end_of_utterance>")
    return [*prompt, "\nAssistant:"]


def measure(plain: Any, asked: Assistant, dialogues: list[Dialogue], tokens: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both sides, in turn, so that both see the same minutes of the machine. `plain`: theirs."""
    processor = tiny.build_processor(asked.tokenizer, image_size=asked.idefics.config.vision_config.image_size)
    config = generation_config(asked.tokenizer)
    config.max_new_tokens = config.min_new_tokens = tokens

    def stock() -> list[list[int]]:
        prompts = [stock_prompt(dialogue) for dialogue in dialogues]
        inputs = processor(text=prompts, add_end_of_utterance_token=False, padding="longest", return_tensors="pt")
        with torch.no_grad():
            output = plain.generate(**inputs, generation_config=config)
        return output[:, inputs["input_ids"].shape[1] :].tolist()

    def ours() -> list[list[int]]:
        rendered = [render(dialogue) for dialogue in dialogues]
        inputs = make_inputs(asked, [tokenize(text, asked.tokenizer) for text in rendered], rendered)
        return greedy(asked.idefics, inputs, config)

    sides: dict[str, Callable[[], list[list[int]]]] = {"stock": stock, "ours": ours}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        written = {}
        for name, side in sides.items():
            started = time.perf_counter()
            written[name] = side()
            if repeat:  # the first time warms up
                seconds[name].append(time.perf_counter() - started)
        assert written["stock"] == written["ours"], "the two do not write the same tokens"
        assert {len(ids) for ids in written["ours"]} == {tokens}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {**medians, "ratio": medians["stock"] / medians["ours"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1, help="conversations asked together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--image-width", type=int, default=160, help="of a latent; the 9B: 5/16 of hidden")
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    plain, model = (
        make_model(arguments.hidden, arguments.image_width, arguments.vocab, packed=packed) for packed in (False, True)
    )
    model.load_state_dict(plain.state_dict(), assign=True)
    dialogues = [make_conversation(arguments.images, seed=seed) for seed in range(arguments.batch)]
    texts = [turn.text for dialogue in dialogues for turn in dialogue.turns]
    tokenizer = tiny.train_tokenizer(texts, vocab_size=arguments.vocab, added=3)
    processor = tiny.build_processor(tokenizer, image_size=model.config.vision_config.image_size)
    asked = Assistant(model, tokenizer, Preprocessing.of(processor.image_processor))
    figures = measure(plain, asked, dialogues, arguments.tokens, arguments.repeats)
    if arguments.json:
        print(json.dumps({**vars(arguments), **figures}, indent=2))
        return
    print(
        f"{arguments.batch} conversations of {arguments.images} images, {arguments.tokens} tokens each, "
        f"median of {arguments.repeats}, the same tokens"
    )
    for name in ("stock", "ours"):
        speed = arguments.batch * arguments.tokens / figures[name]
        print(f"{name:8} {figures[name]:8.2f} s {speed:10,.1f} tokens/s")
    print(f"ours is {figures['ratio']:.2f} times as fast")


if __name__ == "__main__":
    main()
