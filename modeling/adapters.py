"""Make parts of a model trainable (LoRA through PEFT, towers in full), count, save and load the trained parameters.

An adapter folder holds PEFT's own files (LoRA, and the added tokens through `modules_to_save`) and
`trained.safetensors` (gates and towers trained in full, in fp32, under stock names). Without LoRA there are no PEFT
files, and everything trained is in `trained.safetensors`.
"""

import math
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import IdeficsForVisionText2Text

from modeling.adapter_files import PEFT_CONFIG, PEFT_WEIGHTS, TRAINED_FILE
from modeling.adapter_weights import AdapterWeights
from modeling.errors import UserError
from modeling.fp32 import keep_in_fp32
from modeling.fused import fuse_linears
from modeling.quantize import quantized_layers
from modeling.shapes import Config, count_lora, count_parameters, tensor_shapes
from modeling.towers import ADDED_ROWS, LORA_TOWERS, TOWERS, is_lora, lora_pattern, stock_name, tower_of

Modes = Mapping[str, str]
"""Tower -> "frozen" | "lora" | "full"; a tower not named is frozen."""


@dataclass(frozen=True)
class Counts:
    """Numbers of trained parameters by tower: in LoRA factors, and trained in full."""

    lora: dict[str, int]
    full: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.lora.values()) + sum(self.full.values())


def attach(model: IdeficsForVisionText2Text, modes: Modes, *, lora: Mapping[str, Any], base: str) -> nn.Module:
    """Freeze all of `model`, make towers trainable by `modes`, and return it, wrapped by PEFT if any tower has LoRA.

    `lora` are `peft.LoraConfig` fields (r, lora_alpha, ...); `base` is the name under which PEFT users load the
    base. Every trained parameter is fp32, whatever the dtype of the base.
    """
    full = {tower for tower in TOWERS if modes.get(tower) == "full"}
    _refuse_quantized(model, full)
    towers = lora_towers(modes)
    if not towers:
        keep_in_fp32(model, full)
        return _attach(model, full, None)
    try:
        config = LoraConfig(
            **lora,
            target_modules=lora_pattern(towers),
            modules_to_save=list(ADDED_ROWS) if "added_tokens" in full else None,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"adapter: PEFT refuses these LoRA fields: {error}") from error
    keep_in_fp32(model, full)
    wrapped = _attach(model, full, config)
    wrapped.peft_config["default"].base_model_name_or_path = base  # PEFT sets the model's own name
    adapted = sum(name.endswith(".lora_A.default.weight") for name, _ in wrapped.named_parameters())
    expected, _ = count_lora(model.config.to_dict(), towers, config.r)
    selected = "exclude_modules" in lora or "layers_to_transform" in lora
    assert selected or adapted == expected, (
        f"LoRA on {adapted} linear layers, expected {expected} in {', '.join(towers)}"
    )
    return wrapped


def _refuse_quantized(model: IdeficsForVisionText2Text, full: Collection[str]) -> None:
    """Raise UserError if a tower to train in full has matrices in 4 bits, which cannot be trained."""
    quantized = {tower_of(f"{name}.weight") for name in quantized_layers(model)} & set(full)
    if quantized:
        towers = " and ".join(sorted(quantized))
        raise UserError(f"{towers}: trained in full, and the model has it in 4 bits; load the model without quantize")


def _attach(model: IdeficsForVisionText2Text, full: Collection[str], lora: LoraConfig | None) -> nn.Module:
    """Freeze all, add LoRA by its config, and let the towers in `full` require gradients."""
    model.requires_grad_(False)
    if lora is not None and not quantized_layers(model):
        fuse_linears(lora)
    wrapped = model if lora is None else get_peft_model(model, lora)  # PEFT freezes all other parameters
    for name, parameter in wrapped.named_parameters():
        if tower_of(stock_name(name)) in full and not is_lora(name) and ".original_module." not in name:
            parameter.requires_grad_(True)
    return wrapped


def lora_towers(modes: Modes) -> tuple[str, ...]:
    return tuple(tower for tower in LORA_TOWERS if modes.get(tower) == "lora")


def count_trained(model: nn.Module) -> Counts:
    """Return the numbers of parameters that require gradients. Raises AssertionError if one is not in fp32."""
    lora: dict[str, int] = {}
    full: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, f"{name} is trained in {parameter.dtype}, expected fp32"
            tower, counts = tower_of(stock_name(name)), lora if is_lora(name) else full
            counts[tower] = counts.get(tower, 0) + parameter.numel()
    return Counts(lora, full)


def expected_counts(config: Config, modes: Modes, *, rank: int) -> Counts:
    """Return the expected counts of `modes` for a model of this config (plain LoRA, one rank everywhere)."""
    sizes = count_parameters(config)
    return Counts(
        lora={tower: count_lora(config, (tower,), rank)[1] for tower in lora_towers(modes)},
        full={tower: sizes[tower] for tower in TOWERS if modes.get(tower) == "full"},
    )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return stock name -> trained parameter that PEFT does not save: gates, and towers trained in full."""
    of_peft = ("lora_", ".modules_to_save.")
    return {
        stock_name(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in of_peft)
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a whole parameter, detached. If it is sharded, all processes must call this, and get a copy."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def gathered_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all trained parameters by name, on the CPU. If they are sharded, all processes must call this."""
    return {name: whole(one).cpu() for name, one in model.named_parameters() if one.requires_grad}


def save_adapter(model: nn.Module, folder: Path, *, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write all trained parameters to a folder. `state_dict`: the gathered state, if parameters are sharded."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    tensors = {name: parameter.detach().contiguous() for name, parameter in trained_parameters(model).items()}
    if state_dict is not None:
        gathered = {stock_name(name): tensor for name, tensor in state_dict.items()}
        tensors = {name: gathered[name].contiguous() for name in tensors}
    if tensors or not isinstance(model, PeftModel):
        save_file(tensors, folder / TRAINED_FILE, metadata={"format": "pt"})


def copy_adapter(folder: Path, to: Path) -> None:
    """Copy only the files of an adapter out of a folder."""
    to.mkdir(parents=True, exist_ok=True)
    for name in (PEFT_CONFIG, PEFT_WEIGHTS, TRAINED_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, to / name)


def load_adapter_weights(model: nn.Module, folder: Path) -> None:
    """Load an adapter folder into an attached model; tensors and parameters must correspond one to one.

    Raises UserError: the adapter is incomplete, was made for another base, or trains other towers.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    adapter = AdapterWeights.read(folder)
    adapter.require_fit(tensor_shapes(plain.config.to_dict()))
    if bool(adapter.lora) != isinstance(model, PeftModel):
        raise UserError(f"{folder}: the adapter has {'' if adapter.lora else 'no '}LoRA and this recipe says otherwise")
    _fill(model, adapter, {name: one for name, one in model.named_parameters() if one.requires_grad})
    for name, layer in _lora_layers(model):
        if not math.isclose(got := adapter.scaling(name), expected := layer.scaling["default"]):
            raise UserError(
                f"{folder}: {name}: its LoRA was trained at a scale (alpha / rank) of {got:.4g}, and this recipe's is "
                f"{expected:.4g}; name the adapter's own alpha"
            )


def open_adapter(model: IdeficsForVisionText2Text, folder: Path) -> nn.Module:
    """Load an adapter folder onto its (extended) base, frozen, ready for generation.

    What was trained in full is rounded to the base's dtype, as it will be in the merged model. Raises UserError.
    """
    adapter, lora = AdapterWeights.read(folder), None
    adapter.require_fit(tensor_shapes(model.config.to_dict()))
    full = {tower_of(name) for name in adapter.replaced}
    _refuse_quantized(model, full)
    if adapter.config:  # list modules by name, so that PEFT does not match the file's patterns again
        ranks = {name.removesuffix(".weight"): len(one["lora_A"]) for name, one in adapter.lora.items()}
        lora = LoraConfig(
            r=adapter.config.r,
            target_modules=list(ranks),
            rank_pattern={
                f"({'|'.join(re.escape(name) for name in ranks if ranks[name] == rank)})": rank
                for rank in {*ranks.values()} - {adapter.config.r}
            },
            use_dora=bool(adapter.config.use_dora),
        )
    wrapped = _attach(model, full, lora)
    kept = adapter.replaced.keys()
    places = {name: one for name, one in wrapped.named_parameters() if is_lora(name) or stock_name(name) in kept}
    _fill(wrapped, adapter, places)
    for name, layer in _lora_layers(wrapped):
        layer.scaling["default"] = adapter.scaling(name)
    return wrapped.requires_grad_(False).eval()


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield (stock name of the weight, layer) of each layer with LoRA."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield f"{stock_name(name)}.weight", module


def _fill(model: nn.Module, adapter: AdapterWeights, places: Mapping[str, nn.Parameter]) -> None:
    """Copy the adapter's tensors into the model's parameters. Raises UserError: names or shapes do not agree."""
    got = {(name, ""): tensor for name, tensor in adapter.replaced.items()}
    got |= {(name, key): tensor for name, factors in adapter.lora.items() for key, tensor in factors.items()}
    into = {(stock_name(name), _factor(name)): parameter for name, parameter in places.items()}
    missing, surplus = ([" ".join(one) for one in sorted(names)] for names in (into.keys() - got, got.keys() - into))
    if missing or surplus:
        raise UserError(
            f"{adapter.folder}: the adapter does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(surplus)} with no place {surplus[:3]}"
        )
    for key, place in into.items():
        if got[key].shape != place.shape:
            shapes = f"{tuple(got[key].shape)}, expected {tuple(place.shape)}"
            raise UserError(f"{adapter.folder}: the adapter does not fit the model: {' '.join(key)} is {shapes}")
    for key, place in into.items():
        place.data.copy_(got[key])


def _factor(parameter: str) -> str:
    """Return a parameter's kind: lora_A, lora_B or lora_magnitude_vector; "" for the weight itself."""
    found = re.search(r"\.(lora_\w+)\.", parameter)
    return found[1] if found else ""
