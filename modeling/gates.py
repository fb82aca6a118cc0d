"""Gates and added rows trained in fp32 on a bf16 base.

A gate is one scalar of about 0.1 to 0.5: in bf16 an update below 1e-3 rounds away. Its parameter is kept in fp32, and
the block's Tanh is replaced by one that hands its result back in the model's dtype, because a fp32 tensor of shape
(1,) would promote every hidden state behind it. The same for the rows of the added tokens, whose stock embedding
fails when two dtypes meet.
"""

import torch
from torch import nn
from torch.nn.functional import linear

from modeling.towers import GATES


class Gate(nn.Module):
    """tanh of a fp32 gate, in the dtype of the hidden states it scales."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, alpha: torch.Tensor) -> torch.Tensor:
        return torch.tanh(alpha).to(self.dtype)


class AddedEmbedding(nn.Embedding):
    """Input rows of the added tokens, kept in fp32, looked up in the dtype of the rows they are written among."""

    output_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(self.output_dtype)


class AddedHead(nn.Linear):
    """Output rows of the added tokens, kept and multiplied in fp32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input.float(), self.weight.float()).to(input.dtype)


def hold_gates_in_fp32(model: nn.Module) -> None:
    """Every gate becomes a fp32 parameter behind a `Gate`. `model` is the plain IDEFICS."""
    for block in model.model.gated_cross_attn_layers:
        for name in GATES:
            alpha = getattr(block, name)
            dtype = alpha.dtype
            alpha.data = alpha.data.float()
            setattr(block, name.replace("alpha", "act"), Gate(dtype))


def hold_added_rows_in_fp32(model: nn.Module) -> None:
    """The added tokens' rows become fp32, on both sides. `model` is the plain IDEFICS, before PEFT wraps it."""
    embedding, head = model.model.embed_tokens.additional_embedding, model.lm_head.additional_fc
    if embedding.weight.dtype == torch.float32:
        return
    rows = AddedEmbedding(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight.data.float())
    rows.output_dtype = model.model.embed_tokens.weight.dtype
    model.model.embed_tokens.additional_embedding = rows
    added = AddedHead(head.in_features, head.out_features, bias=False, device="meta")
    added.weight = nn.Parameter(head.weight.data.float())
    model.lm_head.additional_fc = added
