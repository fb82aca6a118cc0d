"""Norms, rotations and gated products of IDEFICS, their backward written out: fewer passes over memory, less kept.

    norm       x / rms(x) * w          keeps x and a root for each vector; autograd keeps x in fp32 besides
    rotation   q cos + (-q2, q1) sin   three passes each way; autograd's make five tensors, and nine going back
    product    silu(gate) * up         keeps gate and up; autograd keeps silu(gate) besides
    embedding  two tables, one of them for the added tokens; transformers' asks the device where those are

Each is transformers' module with another forward, and no memory of its own: names and weights stay what they are.
"""

from collections.abc import Callable
from typing import Any

import torch
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
    """Give decoder and cross-attention the forwards of this page. Modules and weights stay the same objects."""
    for module in model.modules():
        if isinstance(module, IdeficsRMSNorm):
            module.__class__ = RMSNorm
        elif isinstance(module, IdeficsAttention) and not module.is_cross_attention:
            module.__class__ = SelfAttention
        elif isinstance(module, IdeficsMLP) and model.config.hidden_act == "silu":
            module.__class__ = GatedMLP
        elif isinstance(module, IdeficsDecoupledEmbedding) and module.num_additional_embeddings:
            module.__class__ = DecoupledEmbedding


class RMSNorm(IdeficsRMSNorm):
    """[..., D] -> [..., D] in the dtype of the weight; computed in fp32.

    Without gradients torch's own: for one token of a generation an autograd function costs more than the norm.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and hidden_states.dtype == self.weight.dtype == torch.float32:
            return rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class DecoupledEmbedding(IdeficsDecoupledEmbedding):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] -> [B, T, D]. Every token is looked up in both tables, so that no index is read from a GPU."""
        is_added = input_ids >= self.num_embeddings
        rows = embedding(input_ids.masked_fill(is_added, 0), self.weight)
        added = self.additional_embedding((input_ids - self.num_embeddings).clamp(min=0))
        return torch.where(is_added[..., None], added, rows)


class GatedMLP(IdeficsMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_GatedProduct.apply(gate, up) if torch.is_grad_enabled() else silu(gate).mul_(up))


class SelfAttention(IdeficsAttention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B, T, H * D], position_ids int64 [B, T] -> ([B, T, H * D], the scores, if any)."""
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


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        root = norm.square_().div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, root)
        scaled = hidden * root  # root's dtype, fp32, or hidden's
        return (scaled if weight.dtype == torch.float32 else scaled.to(weight.dtype)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With u = g w: root u - x root^3 mean(u x), and for the weight the sum over vectors of g x root."""
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
    """`rotate`, and back by the same angles the other way."""

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
    """(cosine, sine) [B, T, 1, D] of positions, in the dtype of `like`; the sine's first half is negative."""
    cosine, sine = (turn[:, :, None] for turn in attention.rotary_emb(like, position_ids))
    first, second = sine.chunk(2, dim=-1)
    return cosine, torch.cat([-first, second], dim=-1)


def rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, way: int = 1) -> torch.Tensor:
    """States [B, T, H, D] turned by `angles`; way -1: back."""
    return torch.addcmul(states * cosine, states.roll(states.shape[-1] // 2, dims=-1), sine, value=way)
