"""Map parameter and module paths of IDEFICS to towers. The only file that spells module paths.

Every parameter of `IdeficsForVisionText2Text` belongs to exactly one tower:

    vision               CLIP ViT                      frozen | lora | full
    resampler            perceiver resampler           frozen | lora | full
    cross_attention      gated blocks, less the gates  frozen | lora | full
    decoder              LLaMA layers and final norm   frozen | lora | full
    gates                alpha_cross_attn, alpha_dense frozen | full
    added_tokens         the 2 or 3 decoupled rows     frozen | full
    embeddings_and_head  the 32,000 rows, both sides   frozen | full
"""

import re
from collections.abc import Iterable, Mapping

LORA_TOWERS = ("vision", "resampler", "cross_attention", "decoder")
TOWERS = (*LORA_TOWERS, "gates", "added_tokens", "embeddings_and_head")

IMAGE_TOWERS = ("vision", "resampler")
"""Towers that compute an image's features; where both are frozen, features can be cached."""

QUANTIZED_TOWERS = ("cross_attention", "decoder")
"""Towers whose linear layers `quantize: nf4` keeps in 4 bits: nine tenths of the parameters."""

NOT_QUANTIZED = ("lm_head", "model.embed_tokens", "model.vision_model", "model.perceiver_resampler")
"""Modules whose linear layers are not quantised, as prefixes of names, the form that transformers expects."""

GATES = ("alpha_cross_attn", "alpha_dense")
"""Names of the gates in a gated cross-attention block."""

ADDED_ROWS = ("additional_embedding", "additional_fc")
"""Names of the modules with the rows of the added tokens: in the embedding, in the head."""

ADDED_WEIGHTS = ("model.embed_tokens.additional_embedding.weight", "lm_head.additional_fc.weight")
"""The tensors of these modules."""

EXACT_LORA: Mapping[str, tuple[object, ...]] = {
    "bias": ("none",),
    # Other values change the base's matrices before training starts.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "layer_replication": (None,),
    "lora_bias": (False,),
    "target_parameters": (None,),
    "trainable_token_indices": (None,),
    "use_bdlora": (None,),
    "use_qalora": (False,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "velora_config": (None,),
}
"""LoraConfig field -> values with which base + adapter is a sum of matrices, so that a merge is exact."""

_PARAMETERS = {
    "gates": r"model\.gated_cross_attn_layers\.\d+\.(alpha_cross_attn|alpha_dense)",
    "added_tokens": r"(model\.embed_tokens\.additional_embedding|lm_head\.additional_fc)\.weight",
    "embeddings_and_head": r"(model\.embed_tokens|lm_head)\.weight",
    "vision": r"model\.vision_model\..+",
    "resampler": r"model\.perceiver_resampler\..+",
    "cross_attention": r"model\.gated_cross_attn_layers\..+",
    "decoder": r"model\.(layers\..+|norm\.weight)",
}

# A suffix such as "q_proj" would match all four towers, so every LoRA target is spelt in full.
_LINEARS = {
    "vision": r"model\.vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
    "resampler": r"model\.perceiver_resampler\.blocks\.\d+\.(0\.(q|k|v|output)_proj|1\.(fc|c_proj))",
    "cross_attention": r"model\.gated_cross_attn_layers\.\d+\.(cross_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
    "decoder": r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
}

BLOCKS = {
    "vision": r"model\.vision_model\.encoder\.layers\.\d+",
    "resampler": r"model\.perceiver_resampler",
    "cross_attention": r"model\.gated_cross_attn_layers\.\d+",
    "decoder": r"model\.layers\.\d+",
}
"""Patterns of the module paths of a tower's blocks."""

# The parts that PEFT adds to a stock name: two outer modules, and the wrappers of LoRA and of modules_to_save.
_PEFT = re.compile(r"^base_model\.model\.|\.(base_layer|original_module|(modules_to_save|lora_\w+)\.[^.]+)(?=\.)")


def stock_name(parameter: str) -> str:
    """Return a parameter's name in the plain model; for a LoRA factor, the name of the weight that it adapts.

    `base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight` -> `model.layers.0.mlp.up_proj.weight`
    """
    return _PEFT.sub("", parameter)


def is_computed(tensor: str) -> bool:
    """Return whether a tensor is computed from the config, like a few buffers that old transformers versions saved."""
    return bool(re.fullmatch(r"model\.(.+\.rotary_emb\.inv_freq|vision_model\.embeddings\.position_ids)", tensor))


def is_lora(parameter: str) -> bool:
    return ".lora_" in parameter


def tower_of(parameter: str) -> str:
    """Return the tower of a stock parameter name. Raises KeyError for a name that IDEFICS does not have."""
    for tower, pattern in _PARAMETERS.items():
        if re.fullmatch(pattern, parameter):
            return tower
    raise KeyError(f"{parameter!r} is not a parameter of IDEFICS")


def lora_pattern(towers: Iterable[str]) -> str:
    """Return a pattern for PEFT's `target_modules` that matches exactly the linear layers of these towers."""
    return "|".join(f"({_LINEARS[tower]})" for tower in towers)


def matrices_trained_in_full(modes: Mapping[str, str]) -> list[str]:
    """Return the towers whose matrices are trained in full, hence in fp32; gates and added tokens have none."""
    return [tower for tower, mode in modes.items() if mode == "full" and tower not in ("gates", "added_tokens")]


def no_decay(parameter: str) -> bool:
    """Return whether a parameter has no weight decay: norms, biases, gates, latents, positions and added rows."""
    return tower_of(parameter) in ("gates", "added_tokens") or bool(
        re.search(r"norm\w*\.weight$|\.ln\.weight$|\.bias$|\.latents$|class_embedding$|position_embedding", parameter)
    )
