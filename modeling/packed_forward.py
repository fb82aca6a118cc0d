"""Run a packed row through the stock forward, and sum its token losses; logits are computed only where supervised.

The loss is ours because transformers 5.23 reshapes to `vocab_size` logits where IDEFICS has
`vocab_size + additional_vocab_size`, and because TRL's fused head leaves the added rows out of the normaliser.
The loss is part of the model's forward, so that PEFT, DDP and FSDP see a single call.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import IdeficsCausalLMOutputWithPast

from modeling.device import choices
from modeling.fused import use_fused_modules

ROWS = 16
"""Number of rows of logits whose losses are computed at once: with 32,000 words they fit a processor's cache."""

FP16_SCALE = 2.0**12
"""Scale of the gradients inside a head in fp16, where probabilities below 6e-8 would underflow."""


class PackedIdefics(IdeficsForVisionText2Text):
    """The stock model with fused modules; called with `targets`, it returns their loss alone."""

    def __init__(self, config: IdeficsConfig, vision_model: nn.Module | None = None):
        super().__init__(config, vision_model)
        use_fused_modules(self.model)

    def forward(self, *args: Any, targets: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """Return the loss if `targets` are given: int64 [K], the next tokens of the K positions in `logits_to_keep`."""
        if targets is None:
            return super().forward(*args, **kwargs)
        positions = kwargs.pop("logits_to_keep")
        hidden = self.model(*args, **kwargs).last_hidden_state[0].index_select(0, positions)
        return IdeficsCausalLMOutputWithPast(loss=head_loss(self.lm_head, hidden, targets))


def packed_loss(model: nn.Module, batch: Mapping[str, Any], *, config: IdeficsConfig) -> torch.Tensor:
    """Return the sum of the token losses of one packed row: fp32 scalar; 0, with gradients, if nothing is supervised.

    `model` is a `PackedIdefics`, possibly wrapped by PEFT, DDP or FSDP; `config` is the plain model's. `batch` holds
    input_ids, position_ids and image_index int64 [1, T], what `lay_out` makes, and pixel_values [N, 3, H, W] or
    image_features [N, latents, D] in the model's dtype.
    """
    supervised = {"logits_to_keep": batch["supervised_positions"], "targets": batch["targets"]}
    return model(**forward_arguments(batch, config), **supervised).loss


def head_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the token losses of `head(hidden)`: [K, D], [K] -> fp32 scalar.

    Only a few rows of logits are in memory at once. The loss is a sum, so the gradients of `hidden` and of the trained
    parameters of the head are computed in the forward, and the backward only scales them. A head that FSDP shards is
    whole only inside its own forward and backward, and so runs once.
    """
    if any(isinstance(parameter, DTensor) for parameter in head.parameters()):
        return token_losses(head(hidden), targets).sum()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    learning = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    return _HeadLoss.apply(head, targets, learning, hidden, *trained)


class _HeadLoss(torch.autograd.Function):
    """Sum of token losses, with two buffers: logits, and fp32 log-probabilities, later the logits' gradient.

    The product with the vocabulary has a manual backward; the few added rows, which may be wrapped and have another
    dtype, use autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, head: nn.Module, targets: torch.Tensor, learning: bool, hidden: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.scale = FP16_SCALE if dtype == torch.float16 else 1.0
        weight, added = head.weight.to(dtype), getattr(head, "additional_fc", None)
        words, width = len(weight), len(weight) + getattr(head, "out_additional_features", 0)
        at_once = choices(device).head_rows
        logits = hidden.new_empty(min(len(hidden), at_once), width, dtype=dtype)
        logs = torch.empty_like(logits, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = [torch.zeros_like(one) for one in (hidden, *trained)] if learning else []
        by_parameter = dict(zip(trained, gradients[1:], strict=False))
        beside = [parameter for parameter in trained if parameter is not head.weight]
        for start in range(0, len(hidden), at_once):
            rows, target = hidden[start : start + at_once], targets[start : start + at_once, None]
            some, log = logits[: len(rows)], logs[: len(rows)]
            torch.mm(rows.to(dtype), weight.T, out=some[:, :words])
            if added is not None:
                with torch.set_grad_enabled(learning):
                    reached = rows.detach().requires_grad_(learning)
                    more = added(reached)
                some[:, words:] = more.detach()
            torch.log_softmax(some, 1, dtype=torch.float32, out=log)
            total -= log.gather(1, target).sum()
            if not learning:
                continue
            shares = log.exp_().scatter_add_(1, target, log.new_full((1, 1), -1.0).expand(len(rows), 1))
            made = (shares.mul_(ctx.scale) if ctx.scale != 1 else shares).to(dtype)  # softmax - one-hot
            place = gradients[0][start : start + at_once]
            place += made[:, :words] @ weight
            if head.weight in by_parameter:
                by_parameter[head.weight] += made[:, :words].T @ rows.to(dtype)
            if added is not None:
                behind = torch.autograd.grad(more, (reached, *beside), made[:, words:].to(more.dtype))
                for sum_, gradient in zip((place, *(by_parameter[one] for one in beside)), behind, strict=True):
                    sum_ += gradient
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, weight: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *(gradient * (weight / ctx.scale) for gradient in ctx.saved_tensors)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return negative log-likelihoods in fp32 over the whole decoupled vocabulary: [K, V + added], [K] -> [K]."""
    return _TokenLosses.apply(logits, targets)


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy, a few rows at a time: besides the logits and their gradient, no tensor is as large."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        sums = torch.cat([rows.float().logsumexp(dim=1) for rows in logits.split(ROWS)])
        ctx.save_for_backward(logits, targets, sums)
        return sums - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return softmax - one-hot, weighted."""
        logits, targets, sums = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        parts = (tensor.split(ROWS) for tensor in (gradient, logits, targets, sums, weights))
        for made, row, target, total, weight in zip(*parts, strict=True):
            shares = (row.float() - total[:, None]).exp_()
            shares.scatter_add_(1, target[:, None], shares.new_full((len(target), 1), -1.0))
            torch.mul(shares, weight[:, None], out=made)
        return gradient, None


def forward_arguments(batch: Mapping[str, Any], config: IdeficsConfig) -> dict[str, Any]:
    """Return the arguments of `IdeficsForVisionText2Text.forward` for a packed row, except `logits_to_keep`."""
    image_index, layout = batch["image_index"], batch["layout"]
    arguments: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        # Packed attention reads no mask. transformers leaves a mask with four axes as it is; for none, or one with two
        # axes, it checks whether anything is masked, which would wait for the GPU.
        "attention_mask": image_index.new_ones((1, 1, 1, 1), dtype=torch.bool),
        "position_ids": batch["position_ids"],
        # The stock forward uses this mask only for its "sees an image" gate; our attention selects the image.
        "image_attention_mask": (image_index >= 0).long()[..., None],
        "use_cache": False,
        "sequence_starts": layout.sequence_starts,
        "image_runs": layout.image_runs,
        "image_latents": config.perceiver_config.resampler_n_latents,
    }
    if "image_features" in batch:
        arguments["perceiver_embeddings"] = batch["image_features"][None]
    elif len(batch["pixel_values"]):
        arguments["pixel_values"] = batch["pixel_values"][None]
    else:
        # The stock reshape crashes on empty pixels, but not on empty features.
        shape = (1, 0, config.perceiver_config.resampler_n_latents, config.vision_config.embed_dim)
        arguments["perceiver_embeddings"] = batch["pixel_values"].new_zeros(shape, dtype=config.dtype)
    return arguments


def image_features(model: IdeficsForVisionText2Text, pixel_values: torch.Tensor) -> torch.Tensor:
    """Run vision tower and resampler, once per image: [N, 3, H, W] -> [N, latents, D], in the model's dtype."""
    hidden = model.model.vision_model(pixel_values=pixel_values.to(model.dtype)).last_hidden_state
    return model.model.perceiver_resampler(hidden)
