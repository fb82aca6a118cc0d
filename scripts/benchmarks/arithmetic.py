"""How many multiplications training cannot do without, from a config and sizes alone."""

from dataclasses import dataclass

from modeling.shapes import Config


@dataclass(frozen=True)
class Sizes:
    """Of a sequence, or of many together."""

    tokens: int
    supervised: int
    images: int
    """Shown to it."""
    seeing: int
    """Tokens that see an image: the latents of one."""


@dataclass(frozen=True)
class Arithmetic:
    """Of LoRA on decoder and cross-attention, everything else frozen, image features given.

    Each token goes once through decoder and cross-attention, forward, and its gradient back through the frozen matrices
    (no gradient of those); so do the factors of LoRA, with both their gradients; causal attention is a triangle; the
    head stands on supervised positions; keys and values are made of every image shown, forward alone.
    """

    config: Config
    rank: int

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def blocks(self) -> int:
        """Of cross-attention."""
        return -(-self.layers // self.config["cross_layer_interval"])

    @property
    def per_token(self) -> int:
        """Products with frozen matrices, forward."""
        hidden = self.config["hidden_size"]
        mlp = 3 * hidden * self.config["intermediate_size"]
        return self.layers * (4 * hidden**2 + mlp) + self.blocks * (2 * hidden**2 + mlp)

    @property
    def lora_per_token(self) -> int:
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        mlp = 3 * self.rank * (hidden + inner)
        return (self.layers * 4 + self.blocks * 2) * 2 * self.rank * hidden + (self.layers + self.blocks) * mlp

    def products(self, sequence: Sizes, *, recomputed: float = 0.0) -> float:
        """Multiply-adds of a sequence, forward and backward; `recomputed`: share of layers that run forward twice."""
        config = self.config
        hidden, width = config["hidden_size"], config["vision_config"]["embed_dim"]
        latents = config["perceiver_config"]["resampler_n_latents"]
        shown = latents * sequence.images
        per_latent, lora_per_latent = 2 * width * hidden, 2 * self.rank * (width + hidden)
        lora_backward = 2 * self.rank * (width + 2 * hidden)  # features need no gradient
        tokens = sequence.tokens * ((2 + recomputed) * self.per_token + (3 + recomputed) * self.lora_per_token)
        images = shown * self.blocks * ((1 + recomputed) * (per_latent + lora_per_latent) + lora_backward)
        attention = self.layers * sequence.tokens**2 + self.blocks * 2 * sequence.seeing * latents
        head = 2 * sequence.supervised * hidden * (config["vocab_size"] + 3)
        return tokens + images + (3 + recomputed) * hidden * attention + head


def products_of_an_image(config: Config) -> int:
    """Multiply-adds of an image on its way through vision tower and resampler, forward."""
    vision, resampler = config["vision_config"], config["perceiver_config"]
    width, patches = vision["embed_dim"], (vision["image_size"] // vision["patch_size"]) ** 2
    tower = patches * width * 3 * vision["patch_size"] ** 2
    layer = 4 * width**2 + 2 * width * vision["intermediate_size"]
    tower += vision["num_hidden_layers"] * (patches + 1) * (layer + 2 * (patches + 1) * width)
    latents, heads = resampler["resampler_n_latents"], resampler["resampler_n_heads"] * resampler["resampler_head_dim"]
    columns = patches + 1 + latents
    block = 2 * (latents + columns) * width * heads + 2 * latents * columns * heads + latents * 8 * width**2
    return tower + resampler["resampler_depth"] * block
