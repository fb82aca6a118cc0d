"""Stage `generation`: tokens a second of the 9B, against transformers' `generate` and the rate of the memory."""

import re
from collections.abc import Callable
from typing import Any

import torch
from gpu import models
from gpu.figures import Figures, now
from transformers import GenerationConfig

from modeling.generation import greedy

PROMPT = 256
"""Tokens of a prompt, which shows one image."""


def generation(figures: Figures, device: torch.device, *, tiny: bool) -> None:
    config, dtype = models.shape_of(tiny=tiny), models.dtype_of(device)
    model = models.build(config, device, dtype)
    stock = models.build(config, device, dtype, packed=False)
    stock.load_state_dict(model.state_dict(), assign=True)  # one set of weights
    # A token's own row is all that is read of the embeddings, and an image's keys and values were made with the prompt.
    kept = re.compile(r"embed_tokens|cross_attn\.[kv]_proj")
    read = sum(one.nbytes for name, one in model.named_parameters() if not kept.search(name))
    first, last = (4, 12) if tiny else (32, 128)
    for count in (1, 2) if tiny else (1, 8, 32):
        inputs = models.prompts(config, device, dtype, count=count, tokens=32 if tiny else PROMPT)
        seconds = _per_token(lambda settings: greedy(model, inputs, settings), device, first, last)  # noqa: B023
        figures.add(f"{count} conversations", count / seconds, "tokens/s")
        if count == 1 and (rate := figures.earlier("environment", "memory rate")):
            figures.add("1 conversation, share of the memory rate", read / seconds / rate / 1e12, least=0.6)
        slow = _per_token(lambda settings: models.ask_stock(stock, inputs, settings), device, first, last)  # noqa: B023
        figures.add(f"{count} conversations, transformers", count / slow, "tokens/s")
        figures.add(f"{count} conversations, ours / transformers", slow / seconds)


def _per_token(ask: Callable[[GenerationConfig], Any], device: torch.device, first: int, last: int) -> float:
    """Seconds of a token between the `first` and the `last`: what both runs have, the prompt, is taken off."""
    spent = []
    for tokens in (first, last, first, last):
        settings = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=[2], pad_token_id=0, do_sample=False
        )
        started = now(device)
        with torch.no_grad():
            ask(settings)
        spent.append(now(device) - started)
    return max(spent[3] - spent[2], 1e-9) / (last - first)
