"""Greedy generation with KV caches for text and images; it gives the same tokens as transformers' `generate`.

For each token, transformers 5.23 again multiplies the latents of all images by k_proj and v_proj of every gated block
(in the 9B, five images are 320 rows, while a token is one row for every other matrix), attends to all images although
it sees one, makes new masks, and copies the keys and values of all earlier tokens. Here the prompt goes through the
stock forward; then each token costs only its own products, and attention to the earlier text and to its one image.

Axes: B prompts, T tokens so far, H heads, D head size, N images, L latents of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, IdeficsForVisionText2Text
from transformers.cache_utils import DynamicCache

from modeling.device import choices, copy_numbers
from modeling.fused import angles, rotate

ROOM = 64
"""Number of tokens by which the memory for keys and values grows."""


@torch.no_grad()
def greedy(
    model: IdeficsForVisionText2Text, inputs: Mapping[str, torch.Tensor], config: GenerationConfig
) -> list[list[int]]:
    """Return the tokens that follow B left-padded prompts, each with its end, padded to the longest.

    `inputs` are those of the stock `generate`: input_ids and attention_mask int64 [B, T], image_attention_mask int64
    [B, T, N], where the last token of each prompt sees at most one image, image_hidden_states [B, N, L, width]. It uses
    max_new_tokens, min_new_tokens, eos_token_id, pad_token_id and suppress_tokens of `config`. The model may have LoRA
    or 4-bit layers. Memory: keys and values of the text and, in each gated block, of one image per prompt.
    """
    device, shortest = model.device, config.min_new_tokens or 0
    ends, never = (
        copy_numbers(ids or [], torch.int64, device) for ids in (config.eos_token_id, config.suppress_tokens)
    )
    decoder, logits = _Decoder.read(model, inputs)
    written: list[torch.Tensor] = []
    going = torch.ones(len(logits), dtype=torch.bool, device=device)
    lengths = torch.zeros(len(logits), dtype=torch.int64, device=device)
    look_every = choices(device.type).tokens_between_stops
    while True:
        logits.index_fill_(1, never, -torch.inf)
        if len(written) < shortest:
            logits.index_fill_(1, ends, -torch.inf)
        written.append(torch.where(going, logits.argmax(dim=1), config.pad_token_id))
        lengths += going
        going &= ~torch.isin(written[-1], ends)
        if len(written) == config.max_new_tokens or (len(written) % look_every == 0 and not going.any()):
            return torch.stack(written, dim=1)[:, : int(lengths.max())].tolist()
        logits = decoder.step(written[-1])


class _TextCache:
    """KV cache of the text in one layer: keys and values [B, H, T, D], in memory with room for more tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.length = keys.shape[2]
        self.states = [self._with_room(one) for one in (keys, values)]

    def _with_room(self, known: torch.Tensor) -> torch.Tensor:
        roomy = known.new_empty(*known.shape[:2], self.length + ROOM, known.shape[3])
        roomy[:, :, : self.length] = known
        return roomy

    def append(self, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        """Append a key and a value, [B, 1, H, D] each, and return all keys and values so far."""
        if self.length == self.states[0].shape[2]:
            self.states = [self._with_room(one) for one in self.states]
        for known, new in zip(self.states, (key, value), strict=True):
            known[:, :, self.length] = new[:, 0]
        self.length += 1
        return [one[:, :, : self.length] for one in self.states]


@dataclass(frozen=True)
class _ImageCache:
    """KV cache of the one image that the new tokens see, in one gated block, and the block's gates."""

    key: torch.Tensor
    """Keys of the image: [B, H, L, D]; `value` has the same shape."""
    value: torch.Tensor
    attention_gate: torch.Tensor
    """tanh of the attention gate: [B, 1, 1 or H * D], zero where a prompt sees no image."""
    dense_gate: torch.Tensor
    """tanh of the MLP's gate: [1], or [1, 1, H * D]."""

    @classmethod
    def of(cls, block: Any, image: torch.Tensor, sees: torch.Tensor) -> "_ImageCache":
        """Project image features [B, L, width] once; sees int64 [B]: 1 where a prompt sees its image, else 0."""
        attention = block.cross_attn
        key, value = (
            project(image).unflatten(-1, (attention.num_heads, attention.head_dim)).transpose(1, 2)
            for project in (attention.k_proj, attention.v_proj)
        )
        if attention.qk_layer_norms:
            key = attention.k_layer_norm(key)
        gate, dense = block.act_cross_attn(block.alpha_cross_attn), block.act_dense(block.alpha_dense)
        return cls(key.contiguous(), value.contiguous(), gate * sees[:, None, None].to(gate.dtype), dense)

    def run_block(self, block: Any, hidden: torch.Tensor) -> torch.Tensor:
        """Run the gated block for one token of each prompt: [B, 1, H * D] -> [B, 1, H * D]."""
        attention, normed = block.cross_attn, block.input_layernorm(hidden)
        query = attention.q_proj(normed).view(len(hidden), 1, attention.num_heads, attention.head_dim).transpose(1, 2)
        if attention.qk_layer_norms:
            query = attention.q_layer_norm(query)
        found = scaled_dot_product_attention(query, self.key, self.value, scale=attention.scaling)
        hidden = hidden + self.attention_gate * attention.o_proj(found.transpose(1, 2).flatten(2))
        return hidden + self.dense_gate * block.mlp(block.post_attention_layernorm(hidden))


class _Decoder:
    """The model with its KV caches, run token by token."""

    def __init__(
        self,
        model: IdeficsForVisionText2Text,
        texts: list[_TextCache],
        images: list[_ImageCache],
        attended: torch.Tensor,
    ):
        self.model, self.texts, self.images = model, texts, images
        self.positions = attended.sum(dim=1, keepdim=True)
        padding = attended.shape[1] - self.positions
        self.padding = padding if padding.any() else None

    @classmethod
    def read(
        cls, model: IdeficsForVisionText2Text, inputs: Mapping[str, torch.Tensor]
    ) -> tuple["_Decoder", torch.Tensor]:
        """Run the prompts through the stock forward, and return (decoder, logits fp32 [B, V] of the next tokens)."""
        cache, seen = DynamicCache(config=model.config), inputs["image_attention_mask"]
        images, attended = inputs["image_hidden_states"], inputs["attention_mask"]
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=attended,
            image_attention_mask=seen,
            perceiver_embeddings=images,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        sees, image = seen[:, -1].max(dim=1)
        last = images[torch.arange(len(images), device=images.device), image]
        image_caches = [_ImageCache.of(block, last, sees) for block in model.model.gated_cross_attn_layers]
        texts = []
        for layer in cache.layers:
            texts.append(_TextCache(layer.keys, layer.values))
            layer.keys = layer.values = None
        return cls(model, texts, image_caches, attended), output.logits[:, -1].float()

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take one token of each prompt, int64 [B], and return the logits fp32 [B, V] of the next ones."""
        inner = self.model.model
        hidden, rotation, mask = inner.embed_tokens(tokens[:, None]), None, None
        if self.padding is not None:  # bool [B, 1, 1, T + 1]: false at the prompts' padding
            places = torch.arange(self.texts[0].length + 1, device=self.padding.device)
            mask = (places >= self.padding)[:, None, None]
        for number, (layer, text) in enumerate(zip(inner.layers, self.texts, strict=True)):
            if number % inner.cross_layer_interval == 0:
                block = number // inner.cross_layer_interval
                hidden = self.images[block].run_block(inner.gated_cross_attn_layers[block], hidden)
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            shape = (len(tokens), 1, attention.num_heads, attention.head_dim)
            query, key, value = (
                project(normed).view(shape) for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if rotation is None:  # shared by all layers
                rotation = angles(attention, value, self.positions)
            keys, values = text.append(rotate(key, *rotation), value)
            query = rotate(query, *rotation).transpose(1, 2)
            found = scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attention.scaling)
            hidden = hidden + attention.o_proj(found.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.positions = self.positions + 1
        return self.model.lm_head(inner.norm(hidden))[:, 0].float()
