"""Modules of IDEFICS with a faster forward: norms, rotary embedding, gated products, LoRA and the embedding.

    norm       x / rms(x) * w          saves x and 1 / rms per vector; autograd also saves x in fp32
    rotation   q cos + (-q2, q1) sin   three passes each way; autograd makes five tensors, and nine in the backward
    product    silu(gate) * up         saves gate and up; autograd also saves silu(gate)
    LoRA       W x + s B A x           added in place; PEFT makes three results as large as W x, and two in the backward
    embedding  two tables, one for the added tokens; transformers waits for the device to find these tokens

Each is a subclass of the module of transformers or PEFT, with the same names and weights and another `forward`.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn
from torch.nn.functional import embedding, rms_norm, silu
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.idefics.modeling_idefics import (
    IdeficsAttention,
    IdeficsDecoupledEmbedding,
    IdeficsMLP,
    IdeficsModel,
    IdeficsRMSNorm,
    eager_attention_forward,
)


def use_fused_modules(model: IdeficsModel) -> None:
    """Replace the embedding, and the norms, MLPs and self-attention of decoder and gated blocks, by those of this file.

    The model must be newly constructed. A replacement is made without memory (on the meta device), and takes over the
    stock module's parameters and children, so that nothing is initialised twice.
    """
    for path, stock in list(model.named_modules()):
        with torch.device("meta"):
            fused = _make_fused(stock, model.config.hidden_act)
        if fused is not None:
            for name, part in (*stock.named_children(), *stock.named_parameters(recurse=False)):
                setattr(fused, name, part)
            model.set_submodule(path, fused)


def _make_fused(stock: nn.Module, activation: str) -> nn.Module | None:
    """Return the replacement for a stock module, or None if there is none."""
    if isinstance(stock, IdeficsRMSNorm):
        return RMSNorm(len(stock.weight), eps=stock.variance_epsilon)
    if isinstance(stock, IdeficsMLP) and activation == "silu":
        return GatedMLP(stock.gate_proj.in_features, stock.gate_proj.out_features, activation)
    if isinstance(stock, IdeficsAttention) and not stock.is_cross_attention:
        width, heads = stock.hidden_size, stock.num_heads
        return SelfAttention(width, heads, stock.dropout, config=stock.config, layer_idx=stock.layer_idx)
    if isinstance(stock, IdeficsDecoupledEmbedding) and stock.num_additional_embeddings:
        sizes = stock.num_embeddings, stock.num_additional_embeddings, stock.embedding_dim
        return DecoupledEmbedding(*sizes, padding_idx=stock.padding_idx)
    return None


class RMSNorm(IdeficsRMSNorm):
    """RMS norm: [..., D] -> [..., D] in the dtype of the weight; computed in fp32.

    Without gradients, it is torch's own: for a single token, an autograd function costs more than the norm.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and hidden_states.dtype == self.weight.dtype == torch.float32:
            return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class DecoupledEmbedding(IdeficsDecoupledEmbedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up int64 [B, T] -> [B, T, D]. Every token uses both tables, so that no index is read back from a GPU."""
        is_added = input_ids >= self.num_embeddings
        rows = embedding(input_ids.masked_fill(is_added, 0), self.weight)
        added = self.additional_embedding((input_ids - self.num_embeddings).clamp(min=0))
        return torch.where(is_added[..., None], added, rows)


class GatedMLP(IdeficsMLP):
    """SwiGLU (Shazeer 2020), down(silu(gate) * up): [..., D] -> [..., D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_GatedProduct.apply(gate, up) if torch.is_grad_enabled() else silu(gate).mul_(up))


class SelfAttention(IdeficsAttention):
    """Self-attention of a decoder layer, with rotation in the memory order of the projections' results."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend: hidden_states [B, T, H * D], position_ids int64 [B, T] -> ([B, T, H * D], scores or None)."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        cosine, sine = angles(self, value, position_ids)
        query, key = (_Rotation.apply(states, cosine, sine) for states in (query, key))
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.dropout if self.training else 0.0
        output, scores = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2)), scores


class FusedLoraLinear(Linear):
    """PEFT's LoRA layer with result.addmm_(low, B) instead of result + (low @ B) * scaling: [..., n] -> [..., m].

    PEFT handles anything but one plain adapter in the layer's own dtype. On a CPU, this saves 5 to 10 % of a step.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if len(adapters) != 1 or adapters[0] in self.lora_variant or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        (adapter,) = adapters
        first, second = self.lora_A[adapter], self.lora_B[adapter]
        if args or kwargs or second.bias is not None or first.weight.dtype != x.dtype:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        rows = x.flatten(0, -2)
        result = self.base_layer(rows)
        if result.dtype != x.dtype:
            return super().forward(x)
        low = first(self.lora_dropout[adapter](rows))
        # In place is safe: no backward reads the result of a linear layer.
        result.addmm_(low, second.weight.T, alpha=self.scaling[adapter])
        return result.unflatten(0, x.shape[:-1])


def fuse_linears(config: LoraConfig) -> None:
    """Make PEFT use `FusedLoraLinear` for plain linear layers; 4-bit layers, which are also linear, keep PEFT's own.

    https://huggingface.co/docs/peft/developer_guides/custom_models: dynamic dispatch of custom modules.
    """
    config._register_custom_module({nn.Linear: FusedLoraLinear})


class _RMSNorm(torch.autograd.Function):
    """Root mean square norm (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        root = norm.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, root)
        scaled = hidden * root  # root's dtype, fp32, or hidden's
        return (scaled if weight.dtype == torch.float32 else scaled.to(weight.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return root u - x root^3 mean(u x) with u = g w, and for the weight the sum over vectors of g x root."""
        hidden, weight, root = ctx.saved_tensors
        wide, gradient = hidden.float(), gradient.float()
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * wide).mul_(root).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, weight_gradient, None
        made = gradient * weight
        along = torch.linalg.vecdot(made, wide)[..., None].mul_(root**3).div_(-hidden.shape[-1])
        return made.mul_(root).addcmul_(wide, along).to(hidden.dtype), weight_gradient, None


class _GatedProduct(torch.autograd.Function):
    """silu(gate) * up, [..., I] each."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_active = gradient * up
        of_gate = torch.ops.aten.silu_backward.grad_input(of_active, gate, grad_input=of_active)
        return of_gate, silu(gate).mul_(gradient)


class _Rotation(torch.autograd.Function):
    """`rotate` (RoPE, Su et al. 2021); the backward rotates by the negative angles."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return rotate(states, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return rotate(gradient, cosine, sine, way=-1), None, None


def angles(
    attention: IdeficsAttention, like: torch.Tensor, position_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cosine, sine) [B, T, 1, D] of positions, in the dtype of `like`; the sine's first half is negative."""
    cosine, sine = (turn[:, :, None] for turn in attention.rotary_emb(like, position_ids))
    first, second = sine.chunk(2, dim=-1)
    return cosine, torch.cat([-first, second], dim=-1)


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, way: int = 1) -> torch.Tensor:
    """Rotate states [B, T, H, D] by `angles`; way -1 rotates back."""
    return torch.addcmul(states * cosine, states.roll(states.shape[-1] // 2, dims=-1), sine, value=way)
