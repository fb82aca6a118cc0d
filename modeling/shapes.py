"""Model configurations as literals, and their tensor shapes, without torch, weights, files or the hub.

The published values are those of the released config.json files (HuggingFaceM4/idefics-9b and -80b).
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from modeling.towers import TOWERS, lora_pattern, tower_of

Config = Mapping[str, Any]
"""The content of config.json: the arguments of `transformers.IdeficsConfig`."""

_VISION_H14 = {
    "embed_dim": 1280,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
_RESAMPLER = {
    "use_resampler": True,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "resampler_n_latents": 64,
    "qk_layer_norms_perceiver": True,
}
_COMMON = {
    "additional_vocab_size": 2,
    "qk_layer_norms": True,
    "use_resampler": True,
    "alpha_initializer": "zeros",
    "alpha_type": "float",
    "freeze_text_layers": False,
    "freeze_vision_layers": False,
    "freeze_lm_head": False,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

IDEFICS_9B: Config = {
    **_COMMON,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "cross_layer_interval": 4,
    "max_position_embeddings": 2048,
    "vision_config": _VISION_H14,
    "perceiver_config": _RESAMPLER,
}
IDEFICS_80B: Config = {
    **IDEFICS_9B,
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "rms_norm_eps": 1e-5,
}
TINY: Config = {
    **_COMMON,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-6,
    "cross_layer_interval": 2,
    "max_position_embeddings": 1024,
    # A gate of exactly zero would give the towers behind it zero gradients, so fresh models start with open gates.
    "alpha_initializer": "ones",
    # 1 / sqrt(width): with the usual 0.02, the outputs of such a narrow tower would hardly depend on its inputs.
    "initializer_range": 0.09,
    "vision_config": {
        "embed_dim": 96,
        "image_size": 64,
        "intermediate_size": 384,
        "patch_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    },
    "perceiver_config": {
        **_RESAMPLER,
        "resampler_depth": 1,
        "resampler_n_heads": 4,
        "resampler_head_dim": 24,
        "resampler_n_latents": 8,
    },
}
SHAPES: Mapping[str, Config] = {"tiny": TINY, "idefics-9b": IDEFICS_9B, "idefics-80b": IDEFICS_80B}

RELEASED: Mapping[str, Config] = {
    "HuggingFaceM4/idefics-9b": IDEFICS_9B,
    "HuggingFaceM4/idefics-9b-instruct": {**IDEFICS_9B, "additional_vocab_size": 3},
    "HuggingFaceM4/idefics-80b": IDEFICS_80B,
    "HuggingFaceM4/idefics-80b-instruct": {**IDEFICS_80B, "additional_vocab_size": 3},
}
"""Hub id -> config of the released models, so that their recipes can be checked without the hub."""


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return stock name -> shape of every tensor of the model, in no particular order."""
    return dict(_tensors(config))


def count_parameters(config: Config) -> dict[str, int]:
    """Return tower -> number of parameters."""
    counts = dict.fromkeys(TOWERS, 0)
    for name, shape in _tensors(config):
        counts[tower_of(name)] += prod(shape)
    return counts


def count_lora(config: Config, towers: tuple[str, ...], rank: int) -> tuple[int, int]:
    """Return (number of linear layers, number of LoRA parameters) if all linear layers of `towers` have this rank."""
    pattern = lora_pattern(towers)
    matrices = [
        shape
        for name, shape in _tensors(config)
        if towers and name.endswith(".weight") and re.fullmatch(pattern, name.removesuffix(".weight"))
    ]
    return len(matrices), sum(rank * (rows + columns) for rows, columns in matrices)


def _tensors(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocab, added = config["hidden_size"], config["vocab_size"], config["additional_vocab_size"]
    image = config["vision_config"]["embed_dim"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.embed_tokens.additional_embedding.weight", (added, hidden)
    yield "lm_head.weight", (vocab, hidden)
    yield "lm_head.additional_fc.weight", (added, hidden)
    yield "model.norm.weight", (hidden,)
    yield from _vision(config["vision_config"])
    yield from _resampler(config["perceiver_config"], image)
    for layer in range(config["num_hidden_layers"]):
        yield from _block(f"model.layers.{layer}", "self_attn", hidden, hidden, config["intermediate_size"])
    for layer in range(config["num_hidden_layers"] // config["cross_layer_interval"]):
        path = f"model.gated_cross_attn_layers.{layer}"
        yield from _block(path, "cross_attn", hidden, image, config["intermediate_size"])
        if config["qk_layer_norms"]:
            for norm in ("q_layer_norm", "k_layer_norm"):
                yield f"{path}.cross_attn.{norm}.weight", (hidden // config["num_attention_heads"],)
        gate = (1,) if config["alpha_type"] == "float" else (1, 1, hidden)
        yield f"{path}.alpha_cross_attn", gate
        yield f"{path}.alpha_dense", gate


def _block(path: str, attention: str, hidden: int, source: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, shape) of a LLaMA-style block whose keys and values read `source` features."""
    yield f"{path}.{attention}.q_proj.weight", (hidden, hidden)
    yield f"{path}.{attention}.k_proj.weight", (hidden, source)
    yield f"{path}.{attention}.v_proj.weight", (hidden, source)
    yield f"{path}.{attention}.o_proj.weight", (hidden, hidden)
    yield f"{path}.mlp.gate_proj.weight", (inner, hidden)
    yield f"{path}.mlp.up_proj.weight", (inner, hidden)
    yield f"{path}.mlp.down_proj.weight", (hidden, inner)
    yield f"{path}.input_layernorm.weight", (hidden,)
    yield f"{path}.post_attention_layernorm.weight", (hidden,)


def _vision(vision: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, patch = vision["embed_dim"], vision["intermediate_size"], vision["patch_size"]
    root = "model.vision_model"
    yield f"{root}.embeddings.class_embedding", (width,)
    yield f"{root}.embeddings.patch_embedding.weight", (width, vision.get("num_channels", 3), patch, patch)
    yield f"{root}.embeddings.position_embedding.weight", ((vision["image_size"] // patch) ** 2 + 1, width)
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield from _affine(f"{root}.{norm}", (width,), width)
    for layer in range(vision["num_hidden_layers"]):
        path = f"{root}.encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{path}.self_attn.{projection}", (width, width), width)
        yield from _affine(f"{path}.mlp.fc1", (inner, width), inner)
        yield from _affine(f"{path}.mlp.fc2", (width, inner), width)
        yield from _affine(f"{path}.layer_norm1", (width,), width)
        yield from _affine(f"{path}.layer_norm2", (width,), width)


def _resampler(resampler: Config, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    root, head = "model.perceiver_resampler", resampler["resampler_head_dim"]
    heads = resampler["resampler_n_heads"] * head
    yield f"{root}.latents", (resampler["resampler_n_latents"], width)
    yield from _affine(f"{root}.layer_norm", (width,), width)
    for block in range(resampler["resampler_depth"]):
        attention, mlp = f"{root}.blocks.{block}.0", f"{root}.blocks.{block}.1"
        for norm in ("context_layer_norm", "latents_layer_norm"):
            yield from _affine(f"{attention}.{norm}", (width,), width)
        if resampler["qk_layer_norms_perceiver"]:
            for norm in ("q_layer_norm", "k_layer_norm"):
                yield from _affine(f"{attention}.{norm}", (head,), head)
        for projection in ("q_proj", "k_proj", "v_proj"):
            yield f"{attention}.{projection}.weight", (heads, width)
        yield f"{attention}.output_proj.weight", (width, heads)
        yield from _affine(f"{mlp}.ln", (width,), width)
        yield f"{mlp}.fc.weight", (4 * width, width)
        yield f"{mlp}.c_proj.weight", (width, 4 * width)


def _affine(path: str, weight: tuple[int, ...], bias: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{path}.weight", weight
    yield f"{path}.bias", (bias,)
