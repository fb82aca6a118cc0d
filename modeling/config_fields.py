"""Fields of an IDEFICS config.json: what transformers assumes where one is missing, and what each may be.

A config of someone else decides what is allocated and for how long a loop runs: every field is bounded
before it is used.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from modeling.errors import UserError

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "use_resampler": False,
    "alpha_type": "float",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
    "vision_config": {
        "embed_dim": 768,
        "image_size": 224,
        "intermediate_size": 5120,
        "patch_size": 14,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_channels": 3,
    },
    "perceiver_config": {
        "resampler_n_latents": 64,
        "resampler_depth": 6,
        "resampler_n_heads": 16,
        "resampler_head_dim": 96,
        "qk_layer_norms_perceiver": False,
    },
}
"""Of `transformers.IdeficsConfig`, in version 5.23: the fields that decide a shape or a token."""

PARTS = ("vision_config", "perceiver_config")

Test = tuple[str, Callable[[Any], bool]]
"""What is expected, in words and as a function."""


def _size(most: int) -> Test:
    return f"a whole number from 1 to {most:,}", lambda value: type(value) is int and 1 <= value <= most


def _between(low: float, high: float) -> Test:
    return (
        f"a number of at least {low:g} and below {high:g}",
        lambda value: type(value) in (int, float) and low <= value < high,
    )


def _one_of(*values: str) -> Test:
    return f"one of {', '.join(values)}", lambda value: value in values


_BOOL: Test = "true or false", lambda value: isinstance(value, bool)
_ACTIVATION = _one_of("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")
_TOKEN: Test = "a token's number", lambda value: type(value) is int and 0 <= value < 2**24

_ROTATION: Test = (
    "the rotation that IDEFICS was trained with (rope_type default)",
    lambda value: (
        value is None or (isinstance(value, dict) and value.get("rope_type", value.get("type", "default")) == "default")
    ),
)

FIELDS: Mapping[str, Mapping[str, Test]] = {
    "": {
        "vocab_size": _size(2**24),
        "hidden_size": _size(2**17),
        "intermediate_size": _size(2**20),
        "num_hidden_layers": _size(2**12),
        "num_attention_heads": _size(2**12),
        "max_position_embeddings": _size(2**24),
        "cross_layer_interval": _size(2**12),
        "rms_norm_eps": _between(0, 1),
        "dropout": _between(0, 1),
        "qk_layer_norms": _BOOL,
        "hidden_act": _ACTIVATION,
        "alpha_type": _one_of("float", "vector"),
        "alpha_initializer": _one_of("zeros", "ones", "normal", "gaussian", "random"),
        "rope_parameters": _ROTATION,
        "rope_scaling": _ROTATION,
        "bos_token_id": _TOKEN,
        "eos_token_id": _TOKEN,
        "pad_token_id": _TOKEN,
    },
    "vision_config": {
        "embed_dim": _size(2**17),
        "image_size": _size(2**14),
        "intermediate_size": _size(2**20),
        "patch_size": _size(2**14),
        "num_hidden_layers": _size(2**12),
        "num_attention_heads": _size(2**12),
        "num_channels": _size(2**8),
        "layer_norm_eps": _between(0, 1),
        "attention_dropout": _between(0, 1),
        "hidden_act": _ACTIVATION,
    },
    "perceiver_config": {
        "resampler_n_latents": _size(2**16),
        "resampler_depth": _size(2**10),
        "resampler_n_heads": _size(2**12),
        "resampler_head_dim": _size(2**14),
        "qk_layer_norms_perceiver": _BOOL,
    },
}
"""Part of the config -> field -> what it must be, where it is there."""


def complete(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The config with what transformers would assume. Raises UserError: a field that no IDEFICS has so."""
    whole = {**DEFAULTS, **config}
    for part in PARTS:
        given = config.get(part)
        if not isinstance(given, dict | None):
            raise UserError(f"{where}: {part}: expected an object, got {_shown(given)}")
        whole[part] = {**DEFAULTS[part], **(given or {})}
    for part, tests in FIELDS.items():
        fields = whole[part] if part else whole
        for name, (expected, is_right) in tests.items():
            if name in fields and not is_right(fields[name]):
                raise UserError(
                    f"{where}: {f'{part}.' if part else ''}{name}: expected {expected}, got {_shown(fields[name])}"
                )
    _require_agreement(whole, where)
    return whole


def _require_agreement(config: Mapping[str, Any], where: str) -> None:
    """Fields that only make sense together. Raises UserError."""
    vision, hidden, heads = config["vision_config"], config["hidden_size"], config["num_attention_heads"]
    if hidden % heads or (hidden // heads) % 2:
        raise UserError(f"{where}: hidden_size {hidden} does not divide into {heads} heads of an even size")
    if vision["embed_dim"] % vision["num_attention_heads"]:
        width, parts = vision["embed_dim"], vision["num_attention_heads"]
        raise UserError(f"{where}: vision_config: embed_dim {width} does not divide into {parts} heads")
    if vision["patch_size"] > vision["image_size"]:
        raise UserError(f"{where}: vision_config: patch_size {vision['patch_size']} is larger than the image")
    last = config["vocab_size"] + config["additional_vocab_size"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config[name] >= last:
            raise UserError(f"{where}: {name} {config[name]} is no token of a vocabulary of {last}")
    if config.get("quantization_config"):
        raise UserError(f"{where}: is quantised (quantization_config); name the released model, and quantize: nf4")


def _shown(value: Any) -> str:
    """A value of a file, short enough for a message."""
    text = f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
