"""Keep parameters that are trained in full in fp32 on a bf16 base, with results in bf16.

A gate is one scalar of about 0.1 to 0.5: in bf16 an update below 1e-3 rounds away. Its parameter is kept in fp32, and
the block's Tanh is replaced by one that returns the model's dtype, because a fp32 tensor of shape (1,) would promote
every hidden state after it. The rows of the added tokens are treated in the same way; their stock embedding fails if
two dtypes meet.
"""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.functional import linear

from modeling.towers import GATES, tower_of


def keep_in_fp32(model: nn.Module, full: Collection[str]) -> None:
    """Convert the parameters of the towers in `full` to fp32, and replace the modules that need equal dtypes.

    `model` is the plain IDEFICS, before PEFT wraps it.
    """
    whole = set(full) - {"gates", "added_tokens"}
    if "vision" in full:
        whole.add("resampler")  # its layer norms in bf16 would not accept fp32 features
    for name, parameter in model.named_parameters():
        if tower_of(name) in whole:
            parameter.data = parameter.data.float()
    if "gates" in full:
        keep_gates_in_fp32(model)
    if "added_tokens" in full or "embeddings_and_head" in full:  # one embedding joins the rows of both
        keep_added_rows_in_fp32(model)


def keep_gates_in_fp32(model: nn.Module) -> None:
    """Make every gate a fp32 parameter, applied by a `Gate`."""
    for block in model.model.gated_cross_attn_layers:
        for name in GATES:
            alpha = getattr(block, name)
            dtype = alpha.dtype
            alpha.data = alpha.data.float()
            setattr(block, name.replace("alpha", "act"), Gate(dtype))


def keep_added_rows_in_fp32(model: nn.Module) -> None:
    """Convert the rows of the added tokens to fp32, in the embedding and in the head."""
    embedding, head = model.model.embed_tokens.additional_embedding, model.lm_head.additional_fc
    if embedding.weight.dtype == torch.float32:
        return
    rows = AddedEmbedding(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight.data.float())
    rows.output_dtype = model.model.embed_tokens.weight.dtype
    model.model.embed_tokens.additional_embedding = rows
    added = AddedHead(head.in_features, head.out_features, bias=False, device="meta")
    added.weight = nn.Parameter(head.weight.data.float())
    model.lm_head.additional_fc = added


class Gate(nn.Module):
    """tanh of a fp32 gate [1] (or [1, 1, D]), in the dtype of the hidden states that it scales."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, alpha: torch.Tensor) -> torch.Tensor:
        return torch.tanh(alpha).to(self.dtype)


class AddedEmbedding(nn.Embedding):
    """Input rows of the added tokens in fp32: int64 [...] -> [..., D] in the dtype of LLaMA's embedding."""

    output_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(self.output_dtype)


class AddedHead(nn.Linear):
    """Output rows of the added tokens, stored and multiplied in fp32: [..., D] -> [..., added] in the input's dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input.float(), self.weight.float()).to(input.dtype)
