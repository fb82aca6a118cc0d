"""Stage `parity`: what the toolkit computes in its own way, against the plain way, on this device.

In fp32 the two differ by the order of sums: bounds of 1e-5 to 1e-4 of the largest value. In bf16, with 8 bits, both are
wrong, by several roundings of 2^-9 each; so ours is held to twice the plain way's own distance from the fp32 result,
or to one rounding (2^-8) where that was lucky. Matrix products in fp32 are full (no TF32).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from gpu import models
from gpu.figures import Figures
from random_rows import make_row
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import GenerationConfig

from finetune.planning.static_memory import RowSize
from modeling import flash
from modeling.attention import packed_attention
from modeling.device import copy_batch
from modeling.generation import greedy
from modeling.layout import lay_out
from modeling.packed_forward import head_loss, packed_loss
from modeling.quantize import dequantized, quantized_names
from modeling.tokens import IGNORED

FP32, ROUNDING = 1e-4, 2.0**-8

ROW = RowSize(192, 100, 4)
SEQUENCE = 48

Tensors = Sequence[torch.Tensor]


def parity(figures: Figures, device: torch.device, *, tiny: bool) -> None:
    """Small models whatever the size asked for: the paths are the same."""
    for check in (_packed, _attention, _layers, _head, _generation, _nf4):
        check(figures, device)


def _packed(figures: Figures, device: torch.device) -> None:
    """A packed row against its sequences one by one through the stock model: loss, and gradients of what is trained."""
    _compare(figures, "packed row, one by one", lambda dtype: _packed_loss(device, dtype), _one_by_one_of(device))


def _packed_loss(device: torch.device, dtype: torch.dtype) -> Tensors:
    model = models.with_lora(models.build(models.TINY, device, dtype))
    batch = _batch(device, dtype)
    return _with_gradients(model, packed_loss(model, batch, config=model.config))


def _one_by_one_of(device: torch.device) -> Callable[[torch.dtype], Tensors]:
    def run(dtype: torch.dtype) -> Tensors:
        ours = models.build(models.TINY, device, dtype)
        model = models.build(models.TINY, device, dtype, packed=False)
        model.load_state_dict(ours.state_dict())
        model, batch, losses = models.with_lora(model), _batch(device, dtype), []
        for start, stop in pairwise(batch["layout"].sequence_starts):
            image = batch["image_index"][:, start:stop]
            count = len(batch["image_features"])
            seen = (image[..., None] == torch.arange(count, device=device)).long()
            logits = model(
                input_ids=batch["input_ids"][:, start:stop],
                attention_mask=torch.ones(1, stop - start, dtype=torch.long, device=device),
                image_attention_mask=seen,
                perceiver_embeddings=batch["image_features"][None],
                use_cache=False,
            ).logits[0]
            labels = batch["labels"][0, start + 1 : stop]
            losses.append(cross_entropy(logits[:-1].float(), labels, reduction="sum"))
        return _with_gradients(model, torch.stack(losses).sum())

    return run


def _with_gradients(model: Any, loss: torch.Tensor) -> Tensors:
    loss.backward()
    named = sorted((name, one.grad) for name, one in model.named_parameters() if one.requires_grad)
    return [loss.detach(), torch.cat([gradient.flatten().float() for _, gradient in named])]


def _batch(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    batch = make_row(models.TINY, ROW, sequence=SEQUENCE)
    starts, labels = batch["layout"].sequence_starts, batch["labels"]
    labels[0, list(starts[:-1])] = IGNORED  # a sequence's first token is never supervised
    batch |= lay_out(starts, batch["image_index"], labels)
    batch["image_features"] = batch["image_features"].to(dtype)
    return copy_batch(batch, device)


def _attention(figures: Figures, device: torch.device) -> None:
    """The kernels that this device has, against plain attention with a mask, forward and backward."""
    starts, runs, latents = (0, 7, 40, 64), ((2, 9, 1), (12, 40, 0), (50, 64, 1)), 16

    def inputs(dtype: torch.dtype, keys: int) -> list[torch.Tensor]:
        rng = torch.Generator().manual_seed(0)
        shapes = [(1, 2, length, 64) for length in (64, keys, keys)]
        return [torch.randn(shape, generator=rng).to(device, dtype).requires_grad_() for shape in shapes]

    for name, is_cross, keys in (("sequences", False, 64), ("images", True, 32)):
        module = type("Module", (), {"is_cross_attention": is_cross, "is_causal": True, "training": False})()
        allowed = torch.zeros(64, keys, dtype=torch.bool, device=device)
        for start, stop, image in runs if is_cross else ():
            allowed[start:stop, image * latents : (image + 1) * latents] = True
        for start, stop in () if is_cross else pairwise(starts):
            allowed[start:stop, start:stop] = True
        allowed = allowed if is_cross else allowed.tril()

        def ours(dtype: torch.dtype, module: Any = module, keys: int = keys) -> Tensors:
            given = inputs(dtype, keys)
            options = {"sequence_starts": starts, "image_runs": runs, "image_latents": latents}
            output, _ = packed_attention(module, *given, None, **options)
            return [output.detach(), *torch.autograd.grad(output.float().square().sum(), given)]

        def plain(dtype: torch.dtype, allowed: torch.Tensor = allowed, keys: int = keys) -> Tensors:
            given = inputs(dtype, keys)
            seeing = allowed.any(dim=1)[None, None, :, None]
            # A token that sees nothing would divide by zero: it sees all, and its result is thrown away.
            output = scaled_dot_product_attention(*given, attn_mask=allowed | ~allowed.any(dim=1, keepdim=True))
            output = torch.where(seeing, output, 0).transpose(1, 2)
            return [output.detach(), *torch.autograd.grad(output.float().square().sum(), given)]

        _compare(figures, f"attention, {name}", ours, plain)
    query = inputs(torch.bfloat16, 64)[0]
    figures.add("variable-length kernels used", flash.serves(query, 0.0))


def _layers(figures: Figures, device: torch.device) -> None:
    """A decoder layer with fused norm, rotation and product, against transformers' own with the same weights."""

    def run(dtype: torch.dtype, *, packed: bool) -> Tensors:
        ours = models.build(models.TINY, device, dtype)
        model = models.build(models.TINY, device, dtype, packed=packed)
        model.load_state_dict(ours.state_dict())
        rng = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 32, models.TINY["hidden_size"], generator=rng).to(device, dtype).requires_grad_()
        positions = torch.arange(32, device=device)[None]
        layer = model.model.layers[0].requires_grad_(True)
        mask = torch.ones(32, 32, dtype=torch.bool, device=device).tril()[None, None]
        output = layer(hidden, attention_mask=mask, position_ids=positions)
        output = output[0] if isinstance(output, tuple) else output
        output.float().square().sum().backward()
        return [output.detach(), hidden.grad, *(one.grad for one in layer.parameters())]

    _compare(figures, "decoder layer", lambda dtype: run(dtype, packed=True), lambda dtype: run(dtype, packed=False))


def _head(figures: Figures, device: torch.device) -> None:
    """The loss a few rows at a time, against all logits at once."""

    def run(dtype: torch.dtype, *, ours: bool) -> Tensors:
        head = models.build(models.TINY, device, dtype).lm_head.requires_grad_(True)
        rng = torch.Generator().manual_seed(0)
        hidden = torch.randn(1100, models.TINY["hidden_size"], generator=rng).to(device, dtype).requires_grad_()
        targets = torch.randint(32003, (1100,), generator=rng).to(device)
        loss = (
            head_loss(head, hidden, targets) if ours else cross_entropy(head(hidden).float(), targets, reduction="sum")
        )
        loss.backward()
        return [loss.detach(), hidden.grad, *(one.grad for one in head.parameters())]

    _compare(figures, "head", lambda dtype: run(dtype, ours=True), lambda dtype: run(dtype, ours=False))


def _generation(figures: Figures, device: torch.device) -> None:
    """Greedy decoding against transformers' generate, in fp32, where no two tokens are as likely."""
    ours = models.build(models.TINY, device, torch.float32)
    stock = models.build(models.TINY, device, torch.float32, packed=False)
    stock.load_state_dict(ours.state_dict())
    inputs = models.prompts(models.TINY, device, torch.float32, count=3, tokens=40)
    config = GenerationConfig(
        max_new_tokens=24, min_new_tokens=24, eos_token_id=[2], pad_token_id=0, suppress_tokens=[32000], do_sample=False
    )
    with torch.no_grad():
        expected = models.ask_stock(stock, inputs, config)
    written = greedy(ours, inputs, config)
    wrong = int((torch.tensor(written) != torch.tensor(expected)).sum())
    figures.check("greedy, other tokens than generate's", wrong, most=0)


def _nf4(figures: Figures, device: torch.device) -> None:
    """A model in NF4 against the same model with those matrices written out, in the dtype that NF4 is multiplied in."""
    dtype = models.dtype_of(device)
    plain = models.build(models.TINY, device, dtype)
    packed = models.quantize(models.build(models.TINY, device, dtype), models.TINY, dtype)
    for name in quantized_names(models.TINY):
        weight = plain.get_parameter(name)
        weight.data = dequantized(weight.data.cpu()).to(device, dtype)
    got, expected = (
        _with_gradients(model, packed_loss(model, _batch(device, dtype), config=model.config))
        for model in (models.with_lora(packed), models.with_lora(plain))
    )
    # On a GPU the two round differently: NF4's own scales are quantised there by another kernel.
    bound = FP32 if dtype == torch.float32 else 4 * ROUNDING
    for what, one, other in zip(("loss", "gradients"), got, expected, strict=True):
        figures.check(f"NF4, written out: {what}", _distance(one, other), most=bound)


def _compare(
    figures: Figures, name: str, ours: Callable[[torch.dtype], Tensors], plain: Callable[[torch.dtype], Tensors]
) -> None:
    """Both ways in fp32, and in bf16 by their distance from the plain way in fp32: the largest of all results."""
    truth = plain(torch.float32)
    figures.check(f"{name}, fp32", _largest(ours(torch.float32), truth), most=FP32)
    own = _largest(plain(torch.bfloat16), truth)
    figures.check(f"{name}, bf16", _largest(ours(torch.bfloat16), truth), most=max(2 * own, ROUNDING))


def _largest(got: Tensors, expected: Tensors) -> float:
    return max(_distance(one, other) for one, other in zip(got, expected, strict=True))


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative, of all numbers together."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
