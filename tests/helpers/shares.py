"""One of two processes: what it holds of a small model that accelerate divides (fsdp2), and what DDP takes besides.

    torchrun --nproc_per_node 2 tests/helpers/shares.py OUT

Rank 0 writes OUT: figures of both, by rank.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from small_models import stand_in
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from finetune.training.arguments import sharding
from modeling import tiny
from modeling.adapters import attach
from modeling.loading import extend_vocabulary
from modeling.shapes import IDEFICS_9B
from modeling.towers import is_lora

MODES = {"cross_attention": "lora", "decoder": "lora", "gates": "full", "added_tokens": "full"}
RANK = 8


def adapted() -> nn.Module:
    """The 9B's stand-in in bf16, ready to be trained by LoRA."""
    model = tiny.build_model(stand_in(IDEFICS_9B), seed=0).to(torch.bfloat16)
    extend_vocabulary(model)
    return attach(model, MODES, lora={"r": RANK, "lora_alpha": 8}, base="random")


def divided() -> dict[str, object]:
    """Bytes of this process's shares of weights and of adapters, and how many modules of a kind are gathered alone."""
    config = sharding("fsdp2")["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=config["fsdp_auto_wrap_policy"],
        transformer_cls_names_to_wrap=config["fsdp_transformer_layer_cls_to_wrap"].split(","),
        reshard_after_forward=config["fsdp_reshard_after_forward"],
    )
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True)
    model = fsdp2_prepare_model(accelerator, adapted())
    held = {"weights": 0, "adapters": 0}
    for name, parameter in model.named_parameters():
        part = "adapters" if is_lora(name) or ".modules_to_save." in name else "weights"
        held[part] += parameter.to_local().nbytes
    units: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            kind = type(module).__name__.removeprefix("FSDP")
            units[kind] = units.get(kind, 0) + 1
    return {**held, "units": units}


def buckets() -> int:
    """Bytes that DDP keeps for itself, for as long as the model is trained."""
    model = adapted()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        wrapped = DistributedDataParallel(model, init_sync=False)
    changes = [one.nbytes() for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    assert wrapped is not None
    return sum(changes)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    mine = {"divided": divided(), "buckets": buckets()}
    both: list[object] = [None, None]
    distributed.all_gather_object(both, mine)
    if distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(both))
    distributed.destroy_process_group()
    os._exit(0)  # see finetune.distributed.launcher.end_process
