"""Read the files of an adapter folder, without the hub; an error names the file and the repair.

adapter_config.json          PEFT's LoraConfig
adapter_model.safetensors    PEFT's tensors (in old versions adapter_model.bin, a pickle: no code in it is run)
trained.safetensors          ours: gates and towers trained in full, under stock names
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from modeling.atomic_files import is_text, json_digest, read_json
from modeling.errors import UserError
from modeling.safetensors_io import MAX_NAME, fingerprint, read_header
from modeling.towers import EXACT_LORA

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TRAINED_FILE = "trained.safetensors"
ADAPTER_FILES = (PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PICKLE, TRAINED_FILE)

_FETCH = "fetch or save the adapter again"

MOST_NAMES = 10_000
"""Largest number of names in one field of a config. For comparison: the 80B has 1,600 modules."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder looks like an adapter, complete or not."""
    return any((folder / name).is_file() for name in ADAPTER_FILES)


def has_peft_tensors(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (PEFT_WEIGHTS, PEFT_PICKLE))


def require_adapter(folder: Path) -> None:
    """Raise UserError if a folder does not exist, or holds no adapter."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder; one of the hub is downloaded first: hf download OWNER/NAME")
    if not is_adapter(folder):
        found = "a model" if (folder / "config.json").is_file() else "neither"
        inner = sorted(path.parent.name for path in folder.glob(f"*/{PEFT_CONFIG}"))
        hint = f"; is {folder / inner[0]} meant?" if inner else ""
        raise UserError(f"{folder}: expected an adapter folder ({PEFT_CONFIG} or {TRAINED_FILE}), found {found}{hint}")


def read_lora_config(folder: Path) -> LoraConfig | None:
    """Return PEFT's config, which must be LoRA whose merge is a sum of matrices, or None if there is no config.

    Raises UserError: fields of other types, fields that this PEFT does not know, another kind of adapter.
    """
    path = folder / PEFT_CONFIG
    content = read_json(path, repair=_FETCH)
    if content is None:
        return None
    if (kind := content.get("peft_type")) != "LORA":
        raise UserError(f"{path}: expected LoRA, got an adapter of PEFT's type {str(kind)[:80]}")
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(key for key, value in content.items() if key not in known and value):
        raise UserError(
            f"{path}: {unknown[0][:80]}: this version of PEFT has no such field, and it may change the result"
        )
    for key, (expected, is_right) in _EXPECTED.items():
        if (key in content or key in _REQUIRED) and not is_right(value := content.get(key)):
            got = repr(value) if key in content else "nothing"
            raise UserError(f"{path}: {key}: expected {expected}, got {got[:80]}; {_FETCH}")
    for key, values in EXACT_LORA.items():
        if key in content and content[key] not in (*values, [], {}):
            raise UserError(f"{path}: cannot be merged exactly: {key} is {str(content[key])[:80]!r}")
    try:
        config = LoraConfig(**{key: content[key] for key in _EXPECTED if key in content})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: PEFT refuses these fields: {error}") from error
    config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    return config


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**20


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and value != 0 and math.isfinite(value)


def _is_bool(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_list(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= MOST_NAMES and all(map(of, value))


def _is_mapping(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    keys, values = _is_list(is_text), _is_list(of)
    return lambda value: (
        value is None or (isinstance(value, dict) and keys(list(value)) and values(list(value.values())))
    )


_are_texts = _is_list(is_text)
_are_layers = _is_list(lambda value: type(value) is int)

_EXPECTED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a rank, a whole number from 1", _is_rank),
    "lora_alpha": ("a finite number other than 0", _is_alpha),
    "target_modules": (
        "names of modules, or a pattern",
        lambda value: is_text(value) or (_are_texts(value) and value != []),
    ),
    "exclude_modules": (
        "names of modules, or a pattern",
        lambda value: value is None or value == "" or is_text(value) or _are_texts(value),
    ),
    "modules_to_save": ("names of modules", lambda value: value is None or _are_texts(value)),
    "layers_to_transform": (
        "numbers of layers",
        lambda value: value is None or type(value) is int or _are_layers(value),
    ),
    "layers_pattern": (
        "a name of modules, or several",
        lambda value: value is None or value == "" or is_text(value) or _are_texts(value),
    ),
    "rank_pattern": ("a mapping of patterns to ranks", _is_mapping(_is_rank)),
    "alpha_pattern": ("a mapping of patterns to finite numbers other than 0", _is_mapping(_is_alpha)),
    "use_rslora": ("true or false", _is_bool),
    "use_dora": ("true or false", _is_bool),
}
"""Field -> (expected value in words, test). Only these fields are passed to PEFT: the others matter only when training
starts, or must have one value."""

_REQUIRED = ("r", "lora_alpha", "target_modules")


def read_peft_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return PEFT's tensors by PEFT's names. Raises UserError: no tensors, or invalid ones."""
    for name, read in ((PEFT_WEIGHTS, read_tensors), (PEFT_PICKLE, _read_pickle)):
        if (folder / name).is_file():
            return _checked(folder / name, read(folder / name))
    raise UserError(f"{folder}: no {PEFT_WEIGHTS} in it, which belongs to its {PEFT_CONFIG}; {_FETCH}")


def read_trained(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of trained.safetensors by stock name; {} if there is no such file. Raises UserError."""
    path = folder / TRAINED_FILE
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a file of tensors, found something else; {_FETCH}")
    return _checked(path, read_tensors(path)) if path.is_file() else {}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of one safetensors file, in memory. Raises UserError."""
    return {name: stored.rows() for name, stored in read_header(path).items()}


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return a pickled state dict; torch unpickles only tensors, and runs no code in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many types of errors for a damaged file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read as a pickle of tensors alone: {reason}; {_FETCH}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise UserError(f"{path}: expected a mapping of names to tensors, got {type(content).__name__}; {_FETCH}")
    size = path.stat().st_size
    for name, tensor in content.items():
        if (
            type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
            or tensor.device.type != "cpu"
        ):
            raise UserError(f"{path}: {name}: expected a plain tensor, got {type(tensor).__name__}; {_FETCH}")
        if tensor.numel() * tensor.element_size() > size:
            raise UserError(f"{path}: {name}: {tuple(tensor.shape)} is more than the file holds; {_FETCH}")
    return {name: tensor.detach() for name, tensor in content.items()}


def _checked(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors after checking their dtypes and values. Raises UserError."""
    if not tensors:
        raise UserError(f"{path}: holds no tensor (saved under ZeRO-3 or FSDP, without gathering?); save it gathered")
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME:
            raise UserError(f"{path}: a tensor's name of {len(name):,} characters: {name[:80]!r}...; {_FETCH}")
        if not tensor.numel():
            shape = tuple(tensor.shape)
            raise UserError(
                f"{path}: {name} is empty, {shape} (saved under ZeRO-3, without gathering?); save it gathered"
            )
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{path}: {name}: expected floating-point numbers, got {tensor.dtype}; {_FETCH}")
        if not tensor.float().isfinite().all():
            raise UserError(
                f"{path}: {name} holds values that are not finite (NaN or infinite); take a checkpoint before"
            )
    return tensors


def adapter_fingerprint(adapter: Path) -> str:
    """Return a hash of an adapter's headers, sampled weights and settings, without reading all of it."""
    weights = {path.name: fingerprint(read_header(path)) for path in sorted(adapter.glob("*.safetensors"))}
    settings = {path.name: path.read_bytes().hex() for path in sorted(adapter.glob("adapter_config.json"))}
    return json_digest([weights, settings])
