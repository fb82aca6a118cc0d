"""Quantise the matrices of two towers of a checkpoint to NF4 (4 bits), once, and keep the result on disk.

The format is NF4 with double quantisation (Dettmers et al. 2023, QLoRA): 64 consecutive weights share a scale, and 256
scales share another. `cross_attention` and `decoder`, nine tenths of the parameters, are in NF4; vision tower,
resampler, embeddings, head, added tokens, norms and gates are not quantised. A matrix is quantised in blocks of rows
and always from fp32, so that a bf16 file and its fp32 copy give the same 4 bits, whatever the size of the matrix.

    <cache>/<base>-<fingerprint>/   model-*.safetensors, in the layout of transformers and bitsandbytes
                                 config.json, written last: a folder that has it is whole
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig

from modeling.atomic_files import partial_of, put_in_place, write_json
from modeling.config import read_config
from modeling.device import compute_dtype
from modeling.errors import UserError
from modeling.safetensors_io import Stored, plan_shards, read_checkpoint, read_header, require_shapes, write_index
from modeling.shapes import Config, tensor_shapes
from modeling.towers import NOT_QUANTIZED, QUANTIZED_TOWERS, lora_pattern

GROUP, NESTED_GROUP = 64, 256
"""Number of weights that share a scale, and number of scales that share another."""

BLOCK_ELEMENTS = 2 * 2**20
"""Number of weights quantised at once; memory holds several fp32 copies of them."""

SHARD_BYTES = 256 * 2**20
"""Bytes of the checkpoint (or one tensor) per output file, which are in memory at once, and lost if interrupted."""

Track = Callable[[Iterable[Any], str], Iterable[Any]]
"""(items, description) -> items, with a progress bar."""


def quantized_names(config: Config) -> set[str]:
    """Return the stock names of the weights in NF4: those of the linear layers of `QUANTIZED_TOWERS`.

    In the released models, these are all of them. A matrix whose rows are not a whole number of groups is not
    quantised: on a CPU, bitsandbytes 0.50 would use the scales of other groups.
    """
    return {name for name, (_, columns) in _matrices(config).items() if columns % GROUP == 0}


def _matrices(config: Config) -> dict[str, tuple[int, ...]]:
    """Return stock name -> shape of every weight of a linear layer of `QUANTIZED_TOWERS`."""
    pattern = re.compile(rf"({lora_pattern(QUANTIZED_TOWERS)})\.weight")
    return {name: shape for name, shape in tensor_shapes(config).items() if pattern.fullmatch(name)}


@dataclass(frozen=True)
class Nf4:
    """A matrix in NF4."""

    packed: torch.Tensor
    """Packed weights, two per byte: uint8 [rows * columns / 2, 1]."""
    state: functional.QuantState

    @classmethod
    def of(cls, rows: Callable[[int, int], torch.Tensor], shape: Sequence[int]) -> "Nf4":
        """Quantise a matrix that `rows(start, stop)` reads, a block of rows at a time, with bitsandbytes' result."""
        count = max(GROUP, BLOCK_ELEMENTS // shape[1] // GROUP * GROUP)  # whole groups, whatever the width
        elements = math.prod(shape)
        # Allocate the results first: later allocations between blocks would keep the allocator from freeing memory.
        packed, scales = torch.empty(-(-elements // 2), 1, dtype=torch.uint8), torch.empty(-(-elements // GROUP))
        for start in range(0, shape[0], count):
            block, own = functional.quantize_4bit(rows(start, start + count).float(), blocksize=GROUP, quant_type="nf4")
            byte, group = start * shape[1] // 2, start * shape[1] // GROUP
            packed[byte : byte + len(block)], scales[group : group + len(own.absmax)] = block, own.absmax
        offset = scales.mean()
        small, nested = functional.quantize_blockwise(scales - offset, blocksize=NESTED_GROUP)
        state = functional.QuantState(
            absmax=small,
            shape=torch.Size(shape),
            code=functional.get_4bit_type("nf4", device="cpu"),
            blocksize=GROUP,
            quant_type="nf4",
            dtype=torch.float32,
            offset=offset,
            state2=nested,
        )
        return cls(packed, state)

    def rows(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return dequantised rows, as the model multiplies with them: fp32 [stop - start, columns]."""
        count, width = self.state.shape
        stop = count if stop is None else min(stop, count)
        first, last = start * width // GROUP, -(-stop * width // GROUP)  # groups
        scales = functional.dequantize_blockwise(self.state.absmax, self.state.state2) + self.state.offset
        length = min(last * GROUP, count * width) - first * GROUP
        state = functional.QuantState(
            absmax=scales[first:last],
            shape=torch.Size((1, length)),
            code=self.state.code,
            blocksize=GROUP,
            quant_type="nf4",
            dtype=torch.float32,
        )
        flat = functional.dequantize_4bit(self.packed[first * GROUP // 2 : last * GROUP // 2], state).flatten()
        offset = start * width - first * GROUP
        return flat[offset : offset + (stop - start) * width].view(stop - start, width)

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the checkpoint's tensors for a weight of this name."""
        parts = self.state.as_dict(packed=True)
        return {name: self.packed, **{f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}}


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """Return dequant(NF4(weight)), the matrix that the quantised model computes with: fp32 of the same shape."""
    return Nf4.of(lambda start, stop: weight[start:stop], weight.shape).rows()


def quantized_checkpoint(
    folder: Path,
    cache: Path,
    *,
    name: str,
    track: Track = lambda items, description: items,
) -> Path:
    """Return the folder of a checkpoint in NF4, from `cache` or newly made, named by `name` and a fingerprint.

    After an interruption, it continues with the next file. Memory holds the tensors of one file. Raises UserError.
    """
    stored = read_checkpoint(folder)
    config = read_config(str(folder))
    require_shapes(folder, stored, tensor_shapes(config))
    made = cache / f"{name}-{_fingerprint(folder, stored)}"
    made.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_name(f".{made.name}.lock")):
        for path in made.glob("*.safetensors"):
            try:
                read_header(path)
            except UserError:  # cut short; without config.json the folder is not whole
                (made / "config.json").unlink(missing_ok=True)
                path.unlink()
        if not (made / "config.json").is_file():
            _write(made, stored, config, track)
    return made


def _fingerprint(folder: Path, stored: dict[str, Stored]) -> str:
    """Return a hash of the weight files' names, sizes and dates, the config, and the version of bitsandbytes."""
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in {one.file for one in stored.values()}
    ]
    made_of = [sorted(files), (folder / "config.json").read_text(encoding="utf-8"), version("bitsandbytes")]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _write(made: Path, stored: dict[str, Stored], config: Config, track: Track) -> None:
    names, quantized = tensor_shapes(config), quantized_names(config)
    uneven = _matrices(config).keys() - quantized
    shards = plan_shards({name: one for name, one in stored.items() if name in names}, SHARD_BYTES)
    for file, members in track(list(shards.items()), "quantise"):
        if not (made / file).is_file():
            tensors: dict[str, torch.Tensor] = {}
            for member in members:
                one = stored[member]
                tensors |= Nf4.of(one.rows, one.shape).tensors(member) if member in quantized else {member: one.rows()}
            save_file(tensors, partial_of(made / file), metadata={"format": "pt"})
            put_in_place(partial_of(made / file), made / file)
    written = {file: read_header(made / file) for file in shards}
    contents = {name: one for part in written.values() for name, one in part.items()}
    write_index(made, {file: list(part) for file, part in written.items()}, contents)
    method = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=[*NOT_QUANTIZED, *sorted(name.removesuffix(".weight") for name in uneven)],
    )
    content = {"model_type": "idefics", **config, "quantization_config": method.to_dict()}
    write_json(made / "config.json", content)


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """Return module name -> layer for the layers in NF4."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def configure_quantized(model: nn.Module, config: Config, *, dtype: torch.dtype) -> None:
    """Set what transformers does not: the dtype of weights not quantised, and the compute dtype of NF4 layers."""
    layers, expected = quantized_layers(model), quantized_names(config)
    assert {f"{name}.weight" for name in layers} == expected, f"{len(layers)} layers in NF4, expected {len(expected)}"
    for layer in layers.values():
        # The backward pass dequantises to the dtype of the state, which is fp32 in the file.
        layer.compute_dtype = layer.weight.quant_state.dtype = compute_dtype()
        # On a CPU with AVX512-BF16, inference would repack the weights for a bf16 kernel, and later training would use
        # that kernel, which has no gradient.
        layer.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.is_floating_point():  # transformers keeps the file's dtype for every ".weight" not quantised
            parameter.data = parameter.data.to(dtype)
