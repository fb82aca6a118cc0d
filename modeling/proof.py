"""Is a merged checkpoint base + adapter? Asked without the code that merged it, and a block at a time.

Each tensor: sampled rows against the formula in fp64. Each block of the model that LoRA changes: the same input through
base + adapter, whose factors stay apart, and through the merged weights.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.functional import linear
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsDecoderLayer, IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics.vision import IdeficsVisionEncoderLayer

from modeling.checkpoint import Stored
from modeling.deltas import Adapter
from modeling.towers import BLOCKS

SAMPLED_ROWS = 4
POSITIONS = 16


@dataclass(frozen=True)
class Difference:
    """Between what was got and what was expected."""

    largest: float
    """Absolute."""
    relative: float
    """To the largest absolute value expected."""


def compare_tensor(
    name: str, base: Mapping[str, Stored], merged: Mapping[str, Stored], adapter: Adapter, *, seed: int = 0
) -> Difference:
    """Sampled rows of a merged tensor (all rows of one that was replaced) against what they should be."""
    stored = merged[name]
    if name in adapter.replaced:
        return _difference(stored.rows(), adapter.replaced[name].to(stored.dtype))
    rows = min(stored.shape[0], base[name].shape[0])  # a row more is `<end_of_utterance>`, which starts as `</s>`
    chosen = torch.randint(rows, (min(SAMPLED_ROWS, rows),), generator=torch.Generator().manual_seed(seed)).tolist()
    got = torch.cat([stored.rows(row, row + 1) for row in chosen])
    expected = torch.cat([base[name].rows(row, row + 1).double() for row in chosen])
    if name in adapter.lora:
        expected = torch.stack([_formula(one, adapter, name, row) for one, row in zip(expected, chosen, strict=True)])
    return _difference(got, expected.to(stored.dtype))


def _formula(weight: torch.Tensor, adapter: Adapter, name: str, row: int) -> torch.Tensor:
    """A row of W + s B A (LoRA, Hu et al. 2021), or of DoRA's m (W + s B A) / |W + s B A| (Liu et al. 2024): fp64."""
    factors = {key: tensor.double() for key, tensor in adapter.lora[name].items()}
    merged = weight + adapter.scaling(name) * torch.einsum("r,rc->c", factors["lora_B"][row], factors["lora_A"])
    if "lora_magnitude_vector" in factors:
        merged = merged * factors["lora_magnitude_vector"][row] / merged.square().sum().sqrt()
    return merged


def compare_block(
    block: str,
    config: Mapping[str, Any],
    base: Mapping[str, Stored],
    merged: Mapping[str, Stored],
    adapter: Adapter,
    *,
    seed: int = 0,
) -> Difference:
    """Outputs of a block of the model for the same random input; its weights are in memory in fp32, one side a time."""
    shape = IdeficsConfig(**config)
    shape._attn_implementation = shape.vision_config._attn_implementation = "sdpa"
    return _difference(_run(block, shape, merged, None, seed), _run(block, shape, base, adapter, seed))


def changed_blocks(adapter: Adapter) -> list[str]:
    """Module paths of the blocks that hold LoRA, in their order."""
    found = {match[0] for name in adapter.lora if (match := re.match("|".join(BLOCKS.values()), name))}
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in path.split(".")])


@torch.no_grad()
def _run(
    block: str, config: IdeficsConfig, tensors: Mapping[str, Stored], adapter: Adapter | None, seed: int
) -> torch.Tensor:
    kind = next(kind for kind, pattern in BLOCKS.items() if re.fullmatch(pattern, block))
    with init_empty_weights(include_buffers=False):
        module = _MAKERS[kind](config)
    prefix = f"{block}."
    weights = {
        name.removeprefix(prefix): _weight(name, stored, adapter)
        for name, stored in tensors.items()
        if name.startswith(prefix)
    }
    module.load_state_dict(weights, assign=True)
    if adapter:
        _adapt(module, prefix, adapter)
    return _CALLS[kind](module.eval(), config, torch.Generator().manual_seed(seed))


def _weight(name: str, stored: Stored, adapter: Adapter | None) -> torch.Tensor:
    """In fp32; what the adapter replaces, in the precision that the merged model has it in."""
    if adapter and name in adapter.replaced:
        return adapter.replaced[name].to(stored.dtype).float()
    return stored.rows().float()


def _adapt(module: nn.Module, prefix: str, adapter: Adapter) -> None:
    for name in adapter.lora:
        if name.startswith(prefix):
            path = name.removeprefix(prefix).removesuffix(".weight")
            module.set_submodule(path, _Adapted(module.get_submodule(path), adapter, name))


class _Adapted(nn.Module):
    """A linear layer with its LoRA factors apart: what is computed while training."""

    def __init__(self, layer: nn.Module, adapter: Adapter, name: str):
        super().__init__()
        self.layer, self.scaling = layer, adapter.scaling(name)
        self.factors = {key: tensor.float() for key, tensor in adapter.lora[name].items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, lora_A, lora_B = self.layer.weight, self.factors["lora_A"], self.factors["lora_B"]
        out = linear(x, weight) + linear(linear(x, lora_A), lora_B) * self.scaling
        if "lora_magnitude_vector" in self.factors:
            norms = torch.linalg.norm(weight + self.scaling * lora_B @ lora_A, dim=1)
            out = out * (self.factors["lora_magnitude_vector"] / norms)
        return out if self.layer.bias is None else out + self.layer.bias


def _decoder(module: nn.Module, config: IdeficsConfig, rng: torch.Generator) -> torch.Tensor:
    hidden = torch.randn(1, POSITIONS, config.hidden_size, generator=rng)
    return module(hidden, position_ids=torch.arange(POSITIONS)[None])


def _cross_attention(module: nn.Module, config: IdeficsConfig, rng: torch.Generator) -> torch.Tensor:
    hidden = torch.randn(1, POSITIONS, config.hidden_size, generator=rng)
    latents = config.perceiver_config.resampler_n_latents
    images = torch.randn(1, latents, config.vision_config.embed_dim, generator=rng)
    return module(hidden, image_hidden_states=images, cross_attention_gate=torch.ones(1, POSITIONS))


def _vision(module: nn.Module, config: IdeficsConfig, rng: torch.Generator) -> torch.Tensor:
    hidden = torch.randn(1, POSITIONS, config.vision_config.embed_dim, generator=rng)
    out = module(hidden, attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


def _resampler(module: nn.Module, config: IdeficsConfig, rng: torch.Generator) -> torch.Tensor:
    return module(torch.randn(1, POSITIONS, config.vision_config.embed_dim, generator=rng))


def _make_resampler(config: IdeficsConfig) -> nn.Module:
    perceiver = config.perceiver_config
    return IdeficsPerceiverResampler(
        config,
        config.vision_config.embed_dim,
        perceiver.resampler_depth,
        perceiver.resampler_n_heads,
        perceiver.resampler_head_dim,
        perceiver.resampler_n_latents,
    )


_MAKERS = {
    "decoder": lambda config: IdeficsDecoderLayer(config, 0),
    "cross_attention": lambda config: IdeficsGatedCrossAttentionLayer(config, 0),
    "vision": lambda config: IdeficsVisionEncoderLayer(config.vision_config),
    "resampler": _make_resampler,
}
_CALLS = {"decoder": _decoder, "cross_attention": _cross_attention, "vision": _vision, "resampler": _resampler}


def _difference(got: torch.Tensor, expected: torch.Tensor) -> Difference:
    largest = float((got.double() - expected.double()).abs().max())
    return Difference(largest, largest / max(float(expected.double().abs().max()), torch.finfo(torch.float64).tiny))
