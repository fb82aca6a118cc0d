"""Adapters to merge, and merged folders to spoil, for the tests of merging and of parity."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling import loading
from modeling.adapters import attach, save_adapter

EVERYTHING = {
    "vision": "full",
    "resampler": "lora",
    "cross_attention": "lora",
    "decoder": "lora",
    "gates": "full",
    "added_tokens": "full",
    "embeddings_and_head": "frozen",
}
FOUR_TOWERS = {**dict.fromkeys(("vision", "resampler", "cross_attention", "decoder"), "lora"), "gates": "full"}


def disturb(model):
    """Every trained tensor moved at random, as training would."""
    rng = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)


def adapter_for(base, folder, modes, lora=None):
    """An adapter folder as training would leave it; the tuned model."""
    model = loading.load(str(base)).model
    wrapped = attach(model, modes, lora={"r": 4, "lora_alpha": 8, **(lora or {})}, base=str(base))
    disturb(wrapped)
    save_adapter(wrapped, folder)
    return wrapped.eval()


def copy_base(base, folder, dtype):
    """The base in another dtype, with its processor."""
    loading.load(str(base), dtype=dtype, instruct=False).model.save_pretrained(folder)
    loading.save_processor(loading.load_processor(str(base), instruct=False), folder)
    return folder


def spoil(file, change):
    """Write a weight file again, its tensors changed in place."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


UP = "base_model.model.model.layers.1.mlp.up_proj"
CHANGES = {
    "weights": lambda adapter: spoil(
        adapter / "adapter_model.safetensors", lambda tensors: tensors[f"{UP}.lora_A.weight"].mul_(2)
    ),
    "alpha": lambda adapter: (adapter / "adapter_config.json").write_text(
        (adapter / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": 9')
    ),
    "gates": lambda adapter: spoil(
        adapter / "trained.safetensors",
        lambda tensors: tensors["model.gated_cross_attn_layers.0.alpha_dense"].add_(1),
    ),
}
"""Of an adapter folder, each in a file of its own."""
