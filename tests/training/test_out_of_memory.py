"""Out of memory: told once, with the plan's figures beside the actual ones, and changes that really need less."""

import json
import re
import resource
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from finetune import base_model as base
from finetune.cli import app
from finetune.console import show_size
from finetune.distributed import collectives
from finetune.pipeline import resolve_sources
from finetune.planning.estimate import Planner
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.training import fit_memory as training_memory
from finetune.training.fit_memory import LESS, Usage, explain_out_of_memory, explanation, measure_usage
from finetune.training.trainer import IdeficsTrainer
from finetune.training.training_stage import attach_adapter
from modeling.errors import UserError

GIB = 2**30


def recipe_of(*, base="HuggingFaceM4/idefics-9b", **training):
    return Recipe.model_validate(
        {
            "model": {"base": base},
            "data": {"sources": [{"format": "messages", "path": "nowhere.jsonl"}], "max_length": 512},
            "training": {"steps": 10, "row_tokens": 2048, "row_images": 8, "tokens_per_step": 16 * 2048, **training},
            "output": "runs/mine",
        }
    )


def proposed(message):
    """The overrides of each proposal."""
    _, _, lines = message.partition("behind the same command:\n")
    return [line.split() for line in lines.splitlines()]


def changed(recipe, overrides, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return load_recipe(path, overrides)


FULL = Usage(True, 21 * GIB, 22 * GIB, GIB // 2, 24 * GIB, 23 * GIB)


def test_out_of_memory_message():
    """What was planned stands beside what there was."""
    lines = explanation(recipe_of(), "CUDA out of memory", FULL).splitlines()
    memory = Planner(recipe_of(), on_gpu=True).estimate(recipe_of())
    activations = sum(memory.parts[part] for part in ("vision", "resampler", "cross_attention", "decoder", "head"))
    planned = {**{part: memory.parts[part] for part in ("weights", "adapters", "optimizer", "gradients")}}
    planned["activations"] = activations + memory.parts["batch"]
    assert sum(planned.values()) + GIB == memory.on_gpu > 23 * GIB
    figures = ", ".join(f"{part} {show_size(size)}" for part, size in planned.items())
    assert lines[:5] == [
        "out of memory while training: CUDA out of memory",
        f"  planned: {figures}; {show_size(memory.on_gpu)} needed",
        "  used at most: 21.00 GiB in tensors, 22.00 GiB by the allocator",
        "  of the GPU: 24.00 GiB in all, 512.0 MiB free",
        "by the plan it does not fit into the 23.00 GiB that this process could have",
    ]


@pytest.mark.parametrize("trained", [False, True])
def test_out_of_memory_proposals_fit(tmp_path, monkeypatch, trained):
    """They fit when pasted, and the second one is another way."""
    monkeypatch.setattr(training_memory, "is_trained", lambda folder: trained)
    recipe = recipe_of()
    first, second = proposed(explanation(recipe, "x", FULL))
    planner = Planner(recipe, on_gpu=True)
    for overrides in (first, second):
        assert planner.needed(changed(recipe, overrides, tmp_path)) <= 23 * GIB
    keys = [{override.split("=")[0] for override in overrides} for overrides in (first, second)]
    assert keys[0] == {"training.checkpointing"}  # which changes no result: the folder's run goes on
    assert "training.checkpointing" not in keys[1]
    assert ("output=runs/mine-2" in second) == trained  # as long as nothing is trained, the folder is any recipe's


def test_out_of_memory_although_it_was_planned_to_fit(tmp_path):
    """The message says so, and proposes what needs less by the plan's own figures."""
    recipe = recipe_of()
    planner = Planner(recipe, on_gpu=True)
    needed = planner.needed(recipe)
    roomy = Usage(True, 70 * GIB, 78 * GIB, GIB, 80 * GIB, 79 * GIB)
    assert needed < roomy.room
    message = explanation(recipe, "x", roomy)
    assert "by the plan it should have fitted into the 79.00 GiB" in message
    assert "the plan is wrong here, and what follows needs at most 90% of what it says of this recipe" in message
    options = proposed(message)
    assert len(options) == 2
    for overrides in options:
        assert planner.needed(changed(recipe, overrides, tmp_path)) <= LESS * needed


def test_out_of_memory_of_several_gpus(monkeypatch):
    """They may shard the model, and the message says which process it is."""
    monkeypatch.setattr(training_memory.collectives, "world_size", lambda: 8)
    monkeypatch.setattr(training_memory.collectives, "rank", lambda: 2)
    recipe = recipe_of(base="HuggingFaceM4/idefics-80b", checkpointing=True)
    message = explanation(recipe, "x", Usage(True, 78 * GIB, 78 * GIB, GIB, 80 * GIB, 79 * GIB))
    assert message.startswith("process 3 of 8: out of memory while training: x\n")
    assert proposed(message)[0] == ["training.parallel=fsdp2"]
    divided = explanation(recipe_of(parallel="fsdp2"), "x", FULL)
    assert ", gathered " in divided.splitlines()[1]


def test_out_of_memory_nothing_helps():
    tiny = Usage(True, GIB, GIB, 0, GIB, GIB)
    assert explanation(recipe_of(), "x", tiny).endswith("makes it fit; a larger GPU does")


def test_usage_of_this_process_s_gpu(monkeypatch):
    """Figures of a GPU are those of this process."""
    figures = {"max_memory_allocated": 5, "max_memory_reserved": 7, "memory_reserved": 6}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda gpu, value=value: value if gpu.index == 3 else 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (2, 20) if gpu.index == 3 else (0, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert measure_usage() == Usage(True, highest=5, allocated=7, free=2, total=20, room=8)


def test_usage_without_gpu_is_resident_memory(monkeypatch):
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    monkeypatch.setattr(training_memory.sys, "platform", "linux")
    found = measure_usage()
    assert (found.on_gpu, found.highest) == (False, 3 * GIB)
    assert 0 < found.free < found.room < found.total


def test_out_of_memory_explains_allocators_alone(monkeypatch):
    monkeypatch.setattr(training_memory, "explanation", lambda recipe, reason, usage: f"explained: {reason}")
    cases = {
        torch.OutOfMemoryError: ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total\nSee", "GiB"),
        MemoryError: ("", "MemoryError"),
    }
    for kind, (said, end) in cases.items():
        with pytest.raises(UserError, match=f"explained: .*{end}$"), explain_out_of_memory(recipe_of()):
            raise kind(said)
    with pytest.raises(UserError, match=r"explained: .*can't allocate memory"), explain_out_of_memory(recipe_of()):
        torch.empty(2**58, dtype=torch.uint8)  # the allocator's own words
    with pytest.raises(RuntimeError, match=r"^shapes differ$") as raised, explain_out_of_memory(recipe_of()):
        raise RuntimeError("shapes differ")
    assert not isinstance(raised.value, UserError)


def test_sharded_model_is_loaded_onto_no_gpu(recipe_file, tmp_path, monkeypatch):
    """FSDP moves its shards to the GPU."""
    monkeypatch.setattr(base, "device", lambda: torch.device("meta"))  # as a GPU that is not here
    recipe = load_recipe(recipe_file)
    opened = base.open_base(recipe, resolve_sources(recipe), tmp_path)
    for divided, expected in ((False, "meta"), (True, "cpu")):
        assert {one.device.type for one in opened.load(divided=divided).parameters()} == {expected}


@pytest.mark.parametrize(
    ("processes", "parallel", "divided"), [(2, "fsdp2", True), (2, "ddp", False), (1, "fsdp2", False)]
)
def test_training_loads_a_sharded_model_onto_no_gpu(recipe_file, tmp_path, monkeypatch, processes, parallel, divided):
    def load(self, *, image_towers, divided):
        raise InterruptedError(divided)

    monkeypatch.setattr(base.Base, "load", load)
    recipe = load_recipe(recipe_file, [f"training.parallel={parallel}"])
    opened = base.open_base(recipe, resolve_sources(recipe), tmp_path)
    monkeypatch.setattr(collectives, "world_size", lambda: processes)
    with pytest.raises(InterruptedError) as loaded:
        attach_adapter(recipe, opened)
    assert loaded.value.args == (divided,)


def test_out_of_memory_run_goes_on_with_the_proposal(recipe_file, tmp_path, monkeypatch):
    """A run that ran out of memory goes on with the overrides of the message."""
    runner, original, calls = CliRunner(), IdeficsTrainer.compute_loss, []

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # in step 3, of two rows
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(IdeficsTrainer, "compute_loss", full)

    def too_little():
        recipe = load_recipe(recipe_file)
        room = Planner(recipe, on_gpu=False).needed(recipe) - 1
        return Usage(False, room, room, 0, room, room)

    monkeypatch.setattr(training_memory, "measure_usage", too_little)
    failed = runner.invoke(app, ["train", str(recipe_file)])
    assert failed.exit_code == 1
    said = " ".join(failed.output.split())
    assert "out of memory while training: CUDA out of memory. Tried to allocate 2.00 GiB" in said
    assert "of resident memory" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "training.json").exists()
    (change,) = re.findall(r"training\.checkpointing=\w+", said)
    again = runner.invoke(app, ["train", str(recipe_file), change])
    assert again.exit_code == 0, again.output
    assert "going on from checkpoint-2" in again.output
    whole = runner.invoke(app, ["train", str(recipe_file), f"output={tmp_path / 'whole'}", "--json"])
    assert json.loads(whole.stdout)["train"]["steps"] == 4
    for name in ("adapter_model.safetensors", "trained.safetensors"):
        ours, theirs = (tmp_path / run / "adapter" / name for run in ("run", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
