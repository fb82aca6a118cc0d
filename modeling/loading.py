"""Load model, tokenizer and processor; extend a base to instruct (2 -> 3 added tokens); save a verified tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    PreTrainedTokenizerBase,
)

from modeling.attention import PACKED
from modeling.config import hub_errors, is_folder, read_config, require_hub_id
from modeling.errors import UserError
from modeling.packed_forward import PackedIdefics
from modeling.quantize import configure_quantized
from modeling.safetensors_io import read_checkpoint, require_shapes
from modeling.shapes import Config, tensor_shapes
from modeling.tokens import ADDED, END_OF_UTTERANCE, FAKE, IMAGE

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Idefics:
    """A model ready for training or generation, and its processor."""

    model: PackedIdefics
    processor: IdeficsProcessor

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.processor.tokenizer


def load(
    base: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    instruct: bool = True,
    quantized: Path | None = None,
    device: torch.device = CPU,
    image_towers: bool = True,
    weights: bool = True,
) -> Idefics:
    """Load an IDEFICS with packed attention; `instruct` adds `<end_of_utterance>` to a base. Raises UserError.

    `quantized` is the folder of the base's quantised checkpoint: weights in NF4 stay in NF4, and `dtype` applies to the
    others. Without `image_towers` (vision tower and resampler), these are not read, and the model accepts only
    `image_features`. Without `weights`, nothing is read, and parameters are uninitialised: for processes that receive
    their shard by FSDP.
    """
    folder, config = open_base(base, revision=revision)
    place = quantized or folder
    architecture = _read_architecture(place, image_towers=image_towers)
    if weights:
        if not quantized:  # transformers would initialise missing tensors at random
            require_shapes(folder, read_checkpoint(folder), tensor_shapes(config))
        model = PackedIdefics.from_pretrained(
            str(place),
            config=architecture,
            dtype=dtype,
            attn_implementation=PACKED,
            use_safetensors=True,
            generation_config=GenerationConfig(),  # set below; the base's file is not read
            device_map={"": device} if quantized else None,
        )
    else:
        architecture.dtype = dtype
        with init_empty_weights(include_buffers=False):
            model = PackedIdefics(architecture)
        _allocate(model, dtype)
    model.name_or_path = base
    if not image_towers:
        _remove_image_towers(model, config)
    if quantized:
        configure_quantized(model, config, dtype=dtype)
    processor = load_processor(base, revision=revision, instruct=instruct)
    if instruct:
        extend_vocabulary(model)
    require_agreement(model.config.to_dict(), processor, where=base)
    model.generation_config = generation_config(processor.tokenizer)
    return Idefics(model.to(device).eval(), processor)


def _allocate(model: nn.Module, dtype: torch.dtype) -> None:
    """Allocate memory for parameters on the meta device; it is not written to, so the system commits none yet.

    accelerate 1.15 identifies parameters by their memory address, which the meta device does not have.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, dtype=dtype, device=CPU)
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


def _read_architecture(folder: Path, *, image_towers: bool) -> IdeficsConfig:
    """Return the folder's configuration as transformers reads it. Raises UserError.

    Without `image_towers`, these have no layers, and transformers skips their weights in the file.
    """
    try:
        config = IdeficsConfig.from_pretrained(str(folder), attn_implementation=PACKED)
    except Exception as error:  # the libraries by which transformers checks fields raise exceptions of their own
        raise UserError(f"{folder / 'config.json'}: transformers refuses it: {_in_one_line(error)}") from error
    if not image_towers:
        config.vision_config.num_hidden_layers = config.perceiver_config.resampler_depth = 0
    return config


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _remove_image_towers(model: IdeficsForVisionText2Text, config: Config) -> None:
    """Remove the rest of the image towers, which would compute wrong features from pixels without an error."""
    model.config.vision_config.num_hidden_layers = config["vision_config"]["num_hidden_layers"]
    model.config.perceiver_config.resampler_depth = config["perceiver_config"]["resampler_depth"]
    model.model.vision_model = model.model.perceiver_resampler = None


def local_folder(base: str, *, revision: str | None = None) -> Path:
    """Return the folder of the base's files; for a hub id, download them first. Raises UserError."""
    if is_folder(base):
        return Path(base)
    require_hub_id(base)
    from huggingface_hub import snapshot_download

    with hub_errors(base):
        wanted = ["*.safetensors", "*.json", "*.model"]
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted))


def open_base(base: str, *, revision: str | None = None) -> tuple[Path, Config]:
    """Return the base's folder on this machine, and its config. Raises UserError: no such folder, no such hub id."""
    read_config(base, revision=revision)  # for a hub id, before its weights are downloaded
    folder = local_folder(base, revision=revision)
    config = read_config(str(folder))
    _read_architecture(folder, image_towers=True)
    return folder, config


def load_processor(base: str, *, revision: str | None = None, instruct: bool = True) -> IdeficsProcessor:
    """Load the stock processor, always with the PIL image processor that IDEFICS was trained with.

    Raises UserError: files that are missing, damaged, or require remote code.
    """
    if not is_folder(base):
        require_hub_id(base)
    elif pipes := [path for path in Path(base).iterdir() if path.exists() and not (path.is_file() or path.is_dir())]:
        raise UserError(f"{pipes[0]}: expected a file, found a pipe, a socket or a device; fetch the folder again")
    options = {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        images = AutoImageProcessor.from_pretrained(base, backend="pil", **options)
    except Exception as error:  # tokenizers, written in Rust, raises bare Exceptions
        raise UserError(
            f"{base}: expected tokenizer and image processor files beside the weights: {_in_one_line(error)}"
        ) from error
    if instruct and tokenizer.convert_tokens_to_ids(END_OF_UTTERANCE) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"extra_special_tokens": list(ADDED)})
    return IdeficsProcessor(images, tokenizer)


def extend_vocabulary(model: IdeficsForVisionText2Text) -> None:
    """Add `<end_of_utterance>` to a base as its third added token, with rows copied from `</s>`.

    An instruct model is not changed. Rows 0 and 1 are kept bit for bit. `resize_token_embeddings` must not be used: it
    turns the decoupled head into a plain Linear and orphans the added rows.
    """
    if model.config.additional_vocab_size != 2:
        return
    embeddings, head, end = model.model.embed_tokens, model.lm_head, model.config.eos_token_id
    rows_in = torch.cat([embeddings.additional_embedding.weight, embeddings.weight[end : end + 1]]).detach()
    rows_out = torch.cat([head.additional_fc.weight, head.weight[end : end + 1]]).detach()
    embeddings.additional_embedding = nn.Embedding(*rows_in.shape, _weight=rows_in.clone())
    head.additional_fc = nn.Linear(rows_out.shape[1], rows_out.shape[0], bias=False, device="meta")
    head.additional_fc.weight = nn.Parameter(rows_out.clone())
    embeddings.num_additional_embeddings = head.out_additional_features = len(rows_in)
    model.config.additional_vocab_size = len(rows_in)


def require_agreement(config: Config, processor: IdeficsProcessor, *, where: str) -> None:
    """Raise UserError, beginning with `where`, unless tokenizer and image processor fit a model of this config."""
    tokenizer, vocabulary = processor.tokenizer, config["vocab_size"]
    tokens = list(ADDED[: config["additional_vocab_size"]])
    expected = [vocabulary + index for index in range(len(tokens))]
    actual = tokenizer.convert_tokens_to_ids(tokens)
    if actual != expected:
        raise UserError(
            f"{where}: tokenizer and model disagree on the ids of {', '.join(tokens)}: {actual}, not {expected}"
        )
    for name in ("bos_token_id", "eos_token_id"):
        if (got := getattr(tokenizer, name)) != config[name]:
            raise UserError(f"{where}: tokenizer and model disagree on {name}: {got}, not {config[name]}")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{where}: its tokenizer has no pad_token; in the released models it is <unk>")
    if (largest := max(tokenizer.get_vocab().values())) >= vocabulary + len(tokens):
        raise UserError(f"{where}: its tokenizer has ids up to {largest}, its model {vocabulary + len(tokens)} tokens")
    size, seen = processor.image_processor.image_size, config["vision_config"]["image_size"]
    if size != seen:
        raise UserError(
            f"{where}: its image processor makes images of {size} pixels, and its vision tower takes {seen}"
        )


def generation_config(tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return settings that stop at `<end_of_utterance>`, if there is one, and at `</s>`, and write no image token."""
    fake, image, end = tokenizer.convert_tokens_to_ids(list(ADDED))
    ends = [tokenizer.eos_token_id] if end in (None, tokenizer.unk_token_id) else [end, tokenizer.eos_token_id]
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends,
        suppress_tokens=[fake, image],
    )


def save_processor(processor: IdeficsProcessor, folder: Path) -> None:
    """Write tokenizer and processor files that give the same ids when loaded again.

    transformers 5.23 does not save LlamaTokenizer's `legacy` flag: a reloaded tokenizer would drop the space before
    text that follows a special token. This function writes the flag, and checks the result.
    """
    tokenizer = processor.tokenizer
    if hasattr(tokenizer, "legacy"):
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    processor.save_pretrained(folder)
    probe = f"{tokenizer.bos_token}User:{FAKE}{IMAGE}{FAKE}What is it?{END_OF_UTTERANCE}\nAssistant: A dog."
    ours, theirs = (_encode(tokenizer, probe), _encode(AutoTokenizer.from_pretrained(folder), probe))
    assert ours == theirs, f"the tokenizer changed when it was saved: {ours} became {theirs}"


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
