"""Models of true shape with random weights made on the device, and packed rows of made-up dialogues for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from check_plan import MIDDLE
from torch import nn
from training_sides import Data, Settings
from transformers import GenerationConfig, IdeficsConfig, IdeficsForVisionText2Text

from finetune.data.collate import RowCollator
from finetune.data.images import Preprocessing
from finetune.data.sampling import Mix, build_schedule
from modeling.adapters import attach
from modeling.attention import PACKED
from modeling.device import compute_dtype
from modeling.loading import extend_vocabulary
from modeling.packed_forward import PackedIdefics
from modeling.quantize import configure_quantized, quantized_names
from modeling.shapes import IDEFICS_9B, Config

MODES = {"cross_attention": "lora", "decoder": "lora", "gates": "full", "added_tokens": "full"}
RANK = 16
LORA = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0}

TINY: Config = {
    **MIDDLE,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vision_config": {
        **MIDDLE["vision_config"],
        "embed_dim": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
    "perceiver_config": {**MIDDLE["perceiver_config"], "resampler_n_heads": 2, "resampler_n_latents": 16},
}
"""The stand-in for a CPU: two gated blocks, heads of 64 as the kernels want them."""


def shape_of(*, tiny: bool) -> Config:
    return TINY if tiny else IDEFICS_9B


def dtype_of(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; a CPU multiplies that a hundred times slower than fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build(
    config: Config, device: torch.device, dtype: torch.dtype, *, packed: bool = True, image_towers: bool = False
) -> Any:
    """An instruct model whose weights are drawn on the device, its gates half open."""
    architecture = IdeficsConfig(**config)
    if not image_towers:  # features are given
        architecture.vision_config.num_hidden_layers = architecture.perceiver_config.resampler_depth = 0
    kind, attention = (PackedIdefics, PACKED) if packed else (IdeficsForVisionText2Text, "sdpa")
    torch.manual_seed(0)
    with device:
        model = kind._from_config(architecture, dtype=dtype, attn_implementation=attention)
    if not image_towers:
        model.model.vision_model = model.model.perceiver_resampler = None
    for block in model.model.gated_cross_attn_layers:
        block.alpha_cross_attn.data.fill_(0.5)
        block.alpha_dense.data.fill_(0.5)
    extend_vocabulary(model)
    return model.to(device).eval()


def quantize(model: Any, config: Config, dtype: torch.dtype) -> Any:
    """The matrices of both text towers in NF4, one after the other, where they are."""
    for name in sorted(quantized_names(config)):
        path, _, last = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(path)
        linear = getattr(parent, last)
        layer = Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype(), device="meta"
        )
        weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer.weight = weight.to(linear.weight.device)
        layer.weight.module = layer
        layer.quant_state = layer.weight.quant_state
        setattr(parent, last, layer)
    configure_quantized(model, config, dtype=dtype)
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layer
    return model


def with_lora(model: Any) -> nn.Module:
    """LoRA on both text towers, neither factor zero, gates and added tokens in full."""
    torch.manual_seed(0)
    wrapped = attach(model, MODES, lora=LORA, base="random")
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return wrapped.train()


def dialogues(count: int) -> Data:
    """Made-up dialogues about one to three images, with a median of 90 tokens, as both sides want them."""
    return Data.make(Settings("ours", "9b", "llava", count, batch=1, epochs=1, features="cached", checkpointing=False))


def packed_rows(data: Data, config: Config, dtype: torch.dtype, *, row_tokens: int, rows_per_step: int) -> RowCollator:
    """All dialogues in packed rows, with image features as a cache might hold them."""
    place = {image: number for number, image in enumerate(data.images)}
    image_ids = [[place[image] for image in one.images] for one in data.rendered]
    lengths = np.array([len(example) for example in data.examples])
    rows = build_schedule(
        Mix([len(lengths)], [None], lengths),
        np.array([len(set(ids)) for ids in image_ids]),
        row_tokens=row_tokens,
        row_images=row_tokens // 16,
        rows_per_step=rows_per_step,
        seed=0,
        epochs=1,
    )
    preprocessing = Preprocessing.of(data.processor.image_processor)
    features = _RandomFeatures.of(config, dtype)
    return RowCollator(rows, data.examples, image_ids, data.images, preprocessing, filler=1, features=features)


@dataclass(frozen=True)
class _RandomFeatures:
    """The same for every image."""

    one: torch.Tensor

    @classmethod
    def of(cls, config: Config, dtype: torch.dtype) -> "_RandomFeatures":
        shape = config["perceiver_config"]["resampler_n_latents"], config["vision_config"]["embed_dim"]
        return cls(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))

    def __call__(self, images: Sequence[int]) -> torch.Tensor:
        return self.one.expand(len(images), -1, -1).contiguous()

    def exchanged(self, other: Mapping[int, int]) -> "_RandomFeatures":
        return self


def prompts(
    config: Config, device: torch.device, dtype: torch.dtype, *, count: int, tokens: int
) -> dict[str, torch.Tensor]:
    """Random prompts of one image each, as `generate` takes them; every token after the first two sees the image."""
    rng = torch.Generator().manual_seed(0)
    shape = config["perceiver_config"]["resampler_n_latents"], config["vision_config"]["embed_dim"]
    seen = (torch.arange(tokens) >= 2).long()[None, :, None].expand(count, -1, 1)
    made = {
        "input_ids": torch.randint(3, 300, (count, tokens), generator=rng),
        "attention_mask": torch.ones(count, tokens, dtype=torch.long),
        "image_attention_mask": seen,
        "image_hidden_states": torch.randn(count, 1, *shape, generator=rng).to(dtype),
    }
    return {name: one.to(device) for name, one in made.items()}


def ask_stock(model: Any, inputs: Mapping[str, torch.Tensor], settings: GenerationConfig) -> list[list[int]]:
    """What transformers' generate writes after the prompts."""
    output = model.generate(**inputs, generation_config=settings)
    return output[:, inputs["input_ids"].shape[1] :].tolist()
