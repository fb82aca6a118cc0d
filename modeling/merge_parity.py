"""Check the parity of a merged checkpoint with base + adapter, a few rows at a time, without the code that merged it.

Tensors: sampled rows of each are compared with the formula in fp64. Blocks with LoRA: the same input goes through base
+ adapter, with factors not merged, and through the merged weights.
"""

import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.functional import linear
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsDecoderLayer, IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.vision import IdeficsVisionEncoderLayer

from modeling.adapter_weights import AdapterWeights
from modeling.image_towers import make_resampler
from modeling.safetensors_io import Rows, Stored, in_threads, row_blocks
from modeling.shapes import Config
from modeling.towers import BLOCKS

SAMPLED_ROWS = 4
"""Number of rows compared in a large tensor, unless it was replaced."""

SMALL = 2**16
"""Largest number of elements of a tensor whose rows are all compared."""

POSITIONS = 16
"""Length of a block's random input: tokens, or patches of an image."""


@dataclass(frozen=True)
class Difference:
    """The difference between actual and expected values."""

    largest: float
    """The largest absolute difference."""
    relative: float
    """For a tensor: relative to the possible rounding error; above 1, the merge is wrong.

    For a block: relative to its largest output.
    """


def compare_tensor(
    name: str, config: Config, base: Mapping[str, Rows], merged: Mapping[str, Stored], adapter: AdapterWeights
) -> Difference:
    """Compare sampled rows of a merged tensor with the formula, or all rows if it is small or was replaced.

    The possible rounding error is known for every element: half a step of the merged dtype, and the sums in fp32.
    """
    stored, found = merged[name], []
    chosen: Iterable[tuple[int, int]]
    if name in adapter.replaced or math.prod(stored.shape) <= SMALL:
        chosen = row_blocks(stored.shape)
    else:
        rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        sampled = torch.randperm(stored.shape[0], generator=rng)[:SAMPLED_ROWS].tolist()
        chosen = [(row, row + 1) for row in sampled]
    for start, stop in chosen:
        exact, slack = _expected(name, start, stop, config, base, adapter)
        differing = (stored.rows(start, stop).double() - exact).abs()
        explained = _step(exact, stored.dtype) / 2 + slack
        found.append(torch.stack([differing.max(), (differing / explained).max()]))
    return Difference(*torch.stack(found).amax(0).tolist())  # amax, unlike max, keeps NaN


def _expected(
    name: str, start: int, stop: int, config: Config, base: Mapping[str, Rows], adapter: AdapterWeights
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return the expected fp64 rows of a merged tensor, and the possible error of sums in fp32."""
    if name in adapter.replaced:
        return adapter.replaced[name][start:stop].double(), 0.0
    rows = base[name].rows(start, stop).double()
    if len(rows) < stop - start:  # the row of `<end_of_utterance>` is initialised from `</s>`
        owner, end = base[name.removesuffix(".weight").rpartition(".")[0] + ".weight"], config["eos_token_id"]
        rows = torch.cat([rows, owner.rows(end, end + 1).double()])
    return _formula(rows, adapter, name, start) if name in adapter.lora else (rows, 0.0)


def _formula(weight: torch.Tensor, adapter: AdapterWeights, name: str, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of W + s B A (LoRA, Hu et al. 2021), or of DoRA's m (W + s B A) / |W + s B A| (Liu et al. 2024).

    Also return the error of a sum of r + 1 products in fp32: at most r + 2 roundings of the largest partial sum.
    """
    factors = {key: tensor.double() for key, tensor in adapter.lora[name].items()}
    rows, scaling = slice(start, start + len(weight)), adapter.scaling(name)
    lora_A, lora_B = factors["lora_A"], factors["lora_B"][rows]
    step = torch.finfo(torch.float32).eps
    merged = weight + scaling * torch.einsum("mr,rn->mn", lora_B, lora_A)
    summed = weight.abs() + abs(scaling) * torch.einsum("mr,rn->mn", lora_B.abs(), lora_A.abs())
    slack = (len(lora_A) + 2) * step * summed
    if "lora_magnitude_vector" in factors:
        scale = (factors["lora_magnitude_vector"][rows] / merged.square().sum(1).sqrt()).view(-1, 1)
        merged = merged * scale
        slack = slack * scale.abs() + math.sqrt(merged.shape[1]) * step * merged.abs()
    return merged, slack


def _step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between neighbouring numbers of a dtype at these values."""
    kind = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=kind.tiny))
    return torch.ldexp(torch.full_like(values, kind.eps), exponent - 1)


def compare_block(
    block: str, config: Config, base: Mapping[str, Rows], merged: Mapping[str, Stored], adapter: AdapterWeights
) -> Difference:
    """Compare the outputs of a block (`model.layers.7`) for one random input, in fp32, with few rows in memory."""
    shape = IdeficsConfig(**config, attn_implementation="sdpa")
    got, expected = (
        feed(block, build_block(block, shape, tensors, added), shape)
        for tensors, added in ((merged, None), (base, adapter))
    )
    largest, scale = float((got - expected).abs().max()), float(expected.abs().max())
    return Difference(largest, largest / scale if scale else largest)


def changed_blocks(adapter: AdapterWeights) -> list[str]:
    """Return the module paths of the blocks that hold LoRA, in the model's order."""
    found = {match[0] for name in adapter.lora if (match := re.match("|".join(BLOCKS.values()), name))}
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in path.split(".")])


def build_block(
    block: str, config: IdeficsConfig, tensors: Mapping[str, Rows], adapter: AdapterWeights | None = None
) -> nn.Module:
    """Return a block (`model.layers.7`) in fp32 with LoRA not merged; large weights are read only when used."""
    kind = _kind(block)
    with init_empty_weights(include_buffers=False):
        if kind == "decoder":
            module: nn.Module = IdeficsDecoderLayer(config, 0)
        elif kind == "cross_attention":
            module = IdeficsGatedCrossAttentionLayer(config, 0)
        else:
            module = IdeficsVisionEncoderLayer(config.vision_config) if kind == "vision" else make_resampler(config)
    for path, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            module.set_submodule(path, _Linear(f"{block}.{path}.weight", layer, tensors, adapter))
    weights = {path: _weight(f"{block}.{path}", tensors, adapter) for path in module.state_dict()}
    module.load_state_dict(weights, assign=True)
    return module.eval()


@torch.no_grad()
def feed(block: str, module: nn.Module, config: IdeficsConfig) -> torch.Tensor:
    """Return a block's output for a fixed random input: fp32 [1, N, width].

    N is `POSITIONS`, or for the resampler its number of latents.
    """
    rng = torch.Generator().manual_seed(zlib.crc32(block.encode()))
    kind, image_width = _kind(block), config.vision_config.embed_dim
    if kind == "decoder":
        hidden = torch.randn(1, POSITIONS, config.hidden_size, generator=rng)
        return module(hidden, position_ids=torch.arange(POSITIONS)[None])
    if kind == "cross_attention":
        hidden = torch.randn(1, POSITIONS, config.hidden_size, generator=rng)
        images = torch.randn(1, config.perceiver_config.resampler_n_latents, image_width, generator=rng)
        return module(hidden, image_hidden_states=images, cross_attention_gate=torch.ones(1, POSITIONS))
    hidden = torch.randn(1, POSITIONS, image_width, generator=rng)
    if kind == "resampler":
        return module(hidden)
    out = module(hidden, attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


def _kind(block: str) -> str:
    """Return the tower of a block's module path."""
    return next(kind for kind, pattern in BLOCKS.items() if re.fullmatch(pattern, block))


def _weight(
    name: str, tensors: Mapping[str, Rows], adapter: AdapterWeights | None, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """Return rows in fp32; tensors that the adapter replaces are rounded as in the merged model."""
    if adapter and name in adapter.replaced:
        return adapter.replaced[name][start:stop].to(tensors[name].dtype).float()
    return tensors[name].rows(start, stop).float()


class _Linear(nn.Module):
    """A linear layer with LoRA factors not merged, as in training; its weight is read only when used."""

    def __init__(self, name: str, layer: nn.Linear, tensors: Mapping[str, Rows], adapter: AdapterWeights | None):
        super().__init__()
        self.name, self.tensors, self.adapter, self.bias = name, tensors, adapter, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = row_blocks(self.tensors[self.name].shape)
        out = torch.cat(list(in_threads(lambda start, stop: self._outputs(x, start, stop), blocks)), dim=-1)
        return out if self.bias is None else out + self.bias

    def _outputs(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the outputs of these rows of the weight: [..., stop - start]."""
        weight = _weight(self.name, self.tensors, self.adapter, start, stop)
        if self.adapter is None or self.name not in self.adapter.lora:
            return linear(x, weight)
        factors, scaling = self.adapter.lora[self.name], self.adapter.scaling(self.name)
        lora_A, lora_B = factors["lora_A"].float(), factors["lora_B"][start:stop].float()
        out = linear(x, weight) + linear(linear(x, lora_A), lora_B) * scaling
        if "lora_magnitude_vector" in factors:
            magnitudes = factors["lora_magnitude_vector"][start:stop].float()
            out = out * (magnitudes / torch.linalg.norm(weight + scaling * lora_B @ lora_A, dim=1))
        return out
