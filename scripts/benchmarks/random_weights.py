"""Checkpoints and adapters of true names and shapes with random weights, written a few rows at a time."""

import json
import math
import re
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from modeling import loading, tiny
from modeling.safetensors_io import Planned, plan_shards, write_index, write_shard
from modeling.shapes import Config, tensor_shapes
from modeling.towers import lora_pattern

SHARD_BYTES = 5 * 10**9
CHUNK = 2**22
"""Random values made once and repeated, from another place for each tensor."""


def write_base(config: Config, folder: Path, words: list[str]) -> None:
    """A bf16 checkpoint with a tokenizer of these words: norms are one, gates half open. Interrupted, it goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = (0.02 * torch.randn(CHUNK, generator=torch.Generator().manual_seed(0))).bfloat16().repeat(2)

    def rows(name: str, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
        width = math.prod(shape[1:])
        count = (stop - start) * width
        if "alpha_" in name or ("norm" in name and name.endswith(".weight")):
            return torch.full((count,), 0.5 if "alpha_" in name else 1.0, dtype=torch.bfloat16)
        first = (int.from_bytes(name.encode()[-8:], "little") + start * width) % CHUNK
        return noise[first : first + count]

    planned = {
        name: Planned(torch.bfloat16, shape, partial(rows, name, shape))
        for name, shape in tensor_shapes(config).items()
    }
    shards = plan_shards(planned, SHARD_BYTES)
    for file, names in shards.items():
        if not (folder / file).is_file():
            write_shard(folder / file, {name: planned[name] for name in names})
    write_index(folder, shards, planned)
    tokenizer = tiny.train_tokenizer([" ".join(words)] * 8, vocab_size=config["vocab_size"])
    loading.save_processor(tiny.build_processor(tokenizer, image_size=config["vision_config"]["image_size"]), folder)
    content = {**config, "model_type": "idefics", "architectures": ["IdeficsForVisionText2Text"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_adapter(config: Config, folder: Path, *, rank: int) -> None:
    """LoRA on the decoder and the cross-attention, in PEFT's own files."""
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora_pattern(("cross_attention", "decoder")))
    lora.save_pretrained(str(folder))
    adapted = re.compile(rf"({lora.target_modules})\.weight")
    rng, factors = torch.Generator().manual_seed(1), {}
    for name, shape in tensor_shapes(config).items():
        if adapted.fullmatch(name):
            path = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{path}.lora_A.weight"] = 0.02 * torch.randn(rank, shape[1], generator=rng)
            factors[f"{path}.lora_B.weight"] = 0.02 * torch.randn(shape[0], rank, generator=rng)
    save_file(factors, folder / "adapter_model.safetensors")
