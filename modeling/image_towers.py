"""The image towers without the rest (vision tower and resampler): pixels -> features that a run can cache."""

import hashlib
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics.vision import IdeficsVisionTransformer

from modeling.attention import PACKED
from modeling.config import read_config
from modeling.safetensors_io import Stored, fingerprint, read_checkpoint, require_shapes
from modeling.shapes import Config, tensor_shapes
from modeling.towers import IMAGE_TOWERS, is_computed, tower_of


class ImageTowers(nn.Module):
    """pixel_values float [N, 3, H, W] -> features [N, latents, D] in the dtype of the weights."""

    def __init__(self, config: IdeficsConfig):
        super().__init__()
        self.vision_model = IdeficsVisionTransformer(config.vision_config)
        self.perceiver_resampler = make_resampler(config)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        like = next(self.parameters())
        hidden = self.vision_model(pixel_values=pixel_values.to(like.device, like.dtype)).last_hidden_state
        return self.perceiver_resampler(hidden)


def load_image_towers(folder: Path, *, dtype: torch.dtype, device: torch.device) -> ImageTowers:
    """Load only the two image towers of a checkpoint. Raises UserError."""
    config = IdeficsConfig(**read_config(str(folder)), attn_implementation=PACKED)
    with init_empty_weights(include_buffers=False):
        towers = ImageTowers(config)
    weights = {
        name.removeprefix("model."): stored.rows().to(device, dtype) for name, stored in _tower_tensors(folder).items()
    }
    towers.load_state_dict(weights, assign=True)
    return towers.to(device).eval()


def image_towers_fingerprint(folder: Path) -> str:
    """Return a hash of the weights and the configuration of the two image towers. Raises UserError."""
    config = read_config(str(folder))
    settings = [sorted(config[part].items()) for part in ("vision_config", "perceiver_config")]
    return hashlib.sha256(f"{fingerprint(_tower_tensors(folder))} {settings}".encode()).hexdigest()


def feature_shape(config: Config) -> tuple[int, int]:
    """Return (latents, D), the shape of one image's features."""
    return config["perceiver_config"]["resampler_n_latents"], config["vision_config"]["embed_dim"]


def make_resampler(config: IdeficsConfig) -> IdeficsPerceiverResampler:
    """Return a perceiver resampler (Alayrac et al. 2022): [N, patches, D] -> [N, latents, D]."""
    perceiver = config.perceiver_config
    return IdeficsPerceiverResampler(
        config,
        config.vision_config.embed_dim,
        perceiver.resampler_depth,
        perceiver.resampler_n_heads,
        perceiver.resampler_head_dim,
        perceiver.resampler_n_latents,
    )


def _tower_tensors(folder: Path) -> dict[str, Stored]:
    stored = read_checkpoint(folder)
    require_shapes(folder, stored, tensor_shapes(read_config(str(folder))))
    return {name: one for name, one in stored.items() if not is_computed(name) and tower_of(name) in IMAGE_TOWERS}
