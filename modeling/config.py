"""Read and check config.json of an IDEFICS: it becomes a complete configuration, or a UserError.

A config from elsewhere determines memory and running time, so every field is bounded before it is used. A missing field
gets transformers' default.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling.atomic_files import read_json
from modeling.errors import UserError
from modeling.shapes import RELEASED, Config


def read_config(base: str, *, revision: str | None = None) -> Config:
    """Return the config.json of a folder or hub id, checked and complete. Raises UserError.

    The configs of the released models are built in, and need no hub.
    """
    if is_folder(base):
        path = Path(base) / "config.json"
        if not path.is_file():
            adapter = any((Path(base) / name).is_file() for name in ("adapter_config.json", "trained.safetensors"))
            hint = "; it is an adapter: name its base here, and the adapter beside it" if adapter else ""
            raise UserError(f"{base}: expected a model folder with a config.json, found none{hint}")
        return require_idefics(_read_json(path), where=str(path))
    if base in RELEASED and revision is None:
        return RELEASED[base]
    require_hub_id(base)
    from huggingface_hub import hf_hub_download

    with hub_errors(base):
        path = Path(hf_hub_download(base, "config.json", revision=revision))
    return require_idefics(_read_json(path), where=f"{base} (hub)")


def is_folder(name: str) -> bool:
    """Return whether a base's name is a folder on this machine."""
    try:
        return name != "" and Path(name).is_dir()
    except OSError:  # the name is too long
        return False


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")


def require_hub_id(base: str) -> None:
    """Raise UserError if a name is not OWNER/NAME, or looks like a folder that does not exist."""
    if not _HUB_ID.fullmatch(base) or is_folder(str(Path(base).parent)):
        raise UserError(f"{base!r} is neither a folder here nor a hub id (OWNER/NAME)")


@contextmanager
def hub_errors(base: str) -> Iterator[None]:
    """Turn any error of the hub, offline or not, into a UserError of one line."""
    try:
        yield
    except Exception as error:  # the hub's client, its transport and the file system have no common type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{base!r} is neither a folder here nor a model the hub gave: {reason}") from error


def _read_json(path: Path) -> Config:
    """Return the object in a file. Raises UserError."""
    config = read_json(path, repair="fetch the file again")
    if config is None:
        raise UserError(f"{path}: is gone; fetch the file again")
    return config


def require_idefics(config: Config, *, where: str) -> Config:
    """Return the completed `config`. Raises UserError: not an IDEFICS, or one that this project cannot train."""
    model_type = config.get("model_type", "idefics")
    if model_type != "idefics":
        other = {"idefics2": ", another architecture", "idefics3": ", another architecture"}
        raise UserError(
            f"{where}: expected an IDEFICS model (model_type 'idefics'), got model_type {str(model_type)[:80]!r}"
            f"{other.get(str(model_type), '')}"
        )
    if config.get("use_resampler") is not True:
        raise UserError(f"{where}: got an IDEFICS without a perceiver resampler; the released models all have one")
    if config.get("tie_word_embeddings"):
        raise UserError(f"{where}: tie_word_embeddings is true: its head has no weights of its own to train or merge")
    added = config.get("additional_vocab_size", 0)
    if type(added) is not int or added not in (2, 3):
        raise UserError(
            f"{where}: expected additional_vocab_size 2 (base: fake token, image) or 3 (instruct: and end of "
            f"utterance), got {str(added)[:80]}"
        )
    return complete(config, where=where)


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
"""Defaults of `transformers.IdeficsConfig` 5.23, for the fields that decide a shape or a token."""

PARTS = ("vision_config", "perceiver_config")

Test = tuple[str, Callable[[Any], bool]]
"""(expected value in words, function that tests a value)"""


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
"""Section of the config ("": the top level) -> field -> test for its value, if the field is present."""


def complete(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return the config with transformers' defaults filled in. Raises UserError: a value that no IDEFICS has."""
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
    """Raise UserError where fields contradict each other."""
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
    """Return a value as text, short enough for a message."""
    text = f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
