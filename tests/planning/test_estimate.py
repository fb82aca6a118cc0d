"""`plan`: sizes alone tell what a recipe holds; figures worked out by hand, what more costs, and what helps."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import stand_in
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.dataset import prepare_sources
from finetune.data.source import Source
from finetune.planning.estimate import Planner, plan
from finetune.planning.graph import Tape, peak
from finetune.planning.memory import count, estimate, fixed_parts
from finetune.planning.setup import RowSize, Setup
from finetune.planning.suggest import Change, apply_change, cheapest_changes
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.training.trainer import checkpoint_layers
from modeling.adapters import attach, expected_counts
from modeling.forward import packed_loss
from modeling.loading import load_processor
from modeling.shapes import IDEFICS_9B, IDEFICS_80B, TINY
from modeling.towers import TOWERS

ROOT = Path(__file__).parents[2]
LORA = {"cross_attention": "lora", "decoder": "lora", "gates": "full", "added_tokens": "full"}
FULL = dict.fromkeys(TOWERS, "full")
INSTRUCT_9B = {**IDEFICS_9B, "additional_vocab_size": 3}
GIB = 2**30


def recipe_of(**sections):
    document = {
        "model": {"base": "HuggingFaceM4/idefics-9b", **LORA},
        "data": {"sources": [{"format": "messages", "path": "nowhere.jsonl"}], "max_length": 512},
        "training": {"steps": 10, "row_tokens": 2048, "row_images": 8, "tokens_per_step": 8192},
        "output": "run",
    }
    for name, section in sections.items():
        document[name] = {**document.get(name, {}), **section}
    return Recipe.model_validate(document)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("config", "total"), [(IDEFICS_9B, 8_929_679_632), (IDEFICS_80B, 79_967_843_624)])
def test_totals_are_those_published(config, total):
    assert sum(one.total for one in count(Setup(config, LORA)).values()) == total


@pytest.mark.parametrize("modes", [LORA, FULL, {"vision": "lora", "resampler": "lora", "decoder": "full"}])
def test_what_is_trained_is_what_a_run_counts(modes):
    counts = expected_counts(TINY, modes, rank=4)
    trained = {tower: counts.lora.get(tower, 0) + counts.full.get(tower, 0) for tower in TOWERS}
    assert {tower: one.trained for tower, one in count(Setup(TINY, modes, rank=4)).items()} == trained


def test_parts_of_the_9b_in_bf16_with_lora():
    assert fixed_parts(Setup(INSTRUCT_9B, LORA, item=2)) == {
        "weights": 17_859_424_832,
        "adapters": 197_099_520,
        "optimizer": 394_199_168,
    }


def test_parts_of_the_9b_in_nf4_with_an_8_bit_optimizer():
    setup = Setup(INSTRUCT_9B, LORA, item=2, quantize=True, optimizer="adamw_8bit")
    assert sum(one.quantized for one in count(setup).values()) == 7_910_457_344
    assert fixed_parts(setup) == {"weights": 6_119_270_976, "adapters": 197_099_520, "optimizer": 100_089_632}


def test_parts_of_the_9b_trained_in_full_on_bf16_are_fp32():
    assert fixed_parts(Setup(IDEFICS_9B, FULL, item=2)) == {
        "weights": 35_718_718_528,
        "adapters": 0,
        "optimizer": 71_437_437_056,
    }


def test_parts_of_the_80b_with_lora_on_its_decoder_and_cross_attention():
    modes = {"cross_attention": "lora", "decoder": "lora"}
    assert fixed_parts(Setup(IDEFICS_80B, modes, item=2)) == {
        "weights": 159_935_687_248,
        "adapters": 981_729_280,
        "optimizer": 1_963_458_560,
    }


MATRICES_80B = {"cross_attention": "lora", "decoder": "lora"}


def test_parts_of_the_80b_divided_over_eight():
    setup = Setup(IDEFICS_80B, MATRICES_80B, item=2, processes=8, divided=True, cached=True)
    shares = {"weights": (159_935_687_248 - 2 * 756_728_064) // 8, "adapters": 122_716_160, "optimizer": 245_432_320}
    layer = 2 * (4 * 8192**2 + 3 * 8192 * 22016 + 2 * 8192) + 4 * 16 * (4 * 2 * 8192 + 3 * (8192 + 22016))
    layer += -(-2 * 8192 // 80)  # and its part of the last norm
    head = 2 * 32000 * 8192
    assert fixed_parts(setup) == {**shares, "gathered": 2 * layer + head}
    live = fixed_parts(replace(setup, cached=False))
    image_towers = 2 * 756_728_064
    assert live["weights"] == 159_935_687_248 // 8
    assert live["gathered"] == 2 * layer + head + image_towers


def test_with_ddp_every_process_holds_all_and_a_copy_of_the_gradients():
    setup, row = Setup(IDEFICS_80B, MATRICES_80B, item=2, rows_per_step=8), RowSize(128, 64, 1)
    alone, one_of_eight = (estimate(replace(setup, processes=processes), row).parts for processes in (1, 8))
    trained = 245_432_320
    assert one_of_eight == {**alone, "gradients": alone["gradients"] + 4 * trained}
    assert alone["gradients"] == 4 * trained


@pytest.mark.parametrize(
    ("rows", "whole"),
    [(8, 4 * 245_432_320), (1, 2 * 4 * 199_884_800 // 80)],  # all that a step adds up; or those of two layers
)
def test_gradients_are_divided_after_the_last_row_of_a_step(rows, whole):
    setup = Setup(IDEFICS_80B, MATRICES_80B, item=2, rows_per_step=rows, processes=8, divided=True, checkpointing=80)
    parts = estimate(setup, RowSize(128, 64, 1)).parts
    brief = parts["gradients"] - 4 * 245_432_320 // 8 - whole
    assert 0 <= brief <= 4 * 16 * (8192 + 22016)  # of the operation whose backward runs


def test_what_a_plan_says_of_several_processes():
    recipe = recipe_of(training={"tokens_per_step": 10 * 2048})
    one, eight = (plan(recipe, gpu="80GiB", processes=processes) for processes in (1, 8))
    assert [(made["processes"], made["rows_per_step"], made["rows_per_process"]) for made in (one, eight)] == [
        (1, 10, 10),
        (8, 10, 2),
    ]
    assert any("10 rows a step cannot be shared out evenly over 8 processes" in note for note in eight["notes"])
    assert any("DDP" in note for note in eight["notes"])
    divided = plan(recipe_of(training={"parallel": "fsdp2"}), gpu="80GiB", processes=4)
    assert any("its share of every tensor" in note for note in divided["notes"])
    assert not any("evenly" in note for note in divided["notes"])  # four rows
    assert divided["memory"]["parts"]["weights"] == (17_859_424_832 - 2 * 756_728_064) // 4  # features are cached


def test_alone_nothing_is_divided():
    alone = [plan(recipe_of(training={"parallel": kind}), gpu="80GiB")["memory"] for kind in ("ddp", "fsdp2")]
    assert alone[0] == alone[1]


def test_a_plan_for_several_gpus_proposes_to_divide_the_model():
    recipe = recipe_of(model={"base": "HuggingFaceM4/idefics-80b"}, training={"tokens_per_step": 16 * 2048})
    assert "training.parallel=fsdp2" in plan(recipe, gpu="80GB", processes=8)["gpu"]["change"]
    alone = plan(recipe, gpu="80GB")["gpu"]["change"]
    assert [change.split("=")[0] for change in alone] == ["training.checkpointing", "model.quantize"]


@pytest.mark.slow
def test_shares_are_those_of_a_model_that_two_processes_divide(tmp_path):
    script = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2", "tests/shares.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([*script, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    both = json.loads((tmp_path / "out").read_text())
    config = {**stand_in(IDEFICS_9B), "additional_vocab_size": 3}
    setup = Setup(config, LORA, rank=8, item=2, processes=2, divided=True)
    predicted, whole = fixed_parts(setup), fixed_parts(replace(setup, divided=False))
    for part in ("weights", "adapters"):
        shares = [one["divided"][part] for one in both]
        assert sum(shares) == whole[part]
        assert shares == pytest.approx([predicted[part]] * 2, rel=0.002)  # a tensor of three rows is divided 2 to 1
    assert both[0]["divided"]["units"] == {
        "PeftModel": 1,
        "IdeficsDecoupledEmbedding": 1,
        "IdeficsDecoupledLinear": 1,
        "IdeficsDecoderLayer": config["num_hidden_layers"],
        "IdeficsGatedCrossAttentionLayer": config["num_hidden_layers"] // config["cross_layer_interval"],
    }
    copies = 4 * sum(one.trained for one in count(setup).values())
    assert [one["buckets"] for one in both] == [copies] * 2


def test_matrices_whose_rows_are_no_whole_groups_stay_as_they_are():
    odd = {**INSTRUCT_9B, "intermediate_size": 11_000}
    assert count(Setup(odd, LORA, quantize=True))["decoder"].quantized == 32 * (4 * 4096**2 + 2 * 4096 * 11_000)


def test_a_product_keeps_its_input_until_its_backward():
    tape = Tape("layer")
    pixels = tape.run((), tape.new(10, 4, 4))
    hidden = tape.run((pixels,), tape.new(10, 2, 4), saves=(pixels,), gradients=32)
    tape.run((hidden,), tape.new(1, 1, 4))
    assert peak(tape.operations, accumulated=False) == {"layer": 160 + 4 + 80, "gradients": 32}
    assert peak(tape.operations, accumulated=True) == {"layer": 160 + 4 + 80, "gradients": 32}


def test_what_needs_no_gradient_is_kept_by_nobody():
    tape = Tape("tower")
    hidden = tape.run((), tape.new(10, 4, 4))
    for _ in range(5):
        hidden = tape.like(hidden, saves=(hidden,))
    assert peak(tape.operations, accumulated=False) == {"tower": 2 * 160}


def test_a_tensor_kept_twice_lies_there_once():
    tape = Tape("layer")
    hidden = tape.run((), tape.new(10, 4, 4), gradients=8)
    left, right = tape.like(hidden, saves=(hidden,)), tape.like(hidden, saves=(hidden,))
    tape.run((left, right), tape.new(1, 1, 4))
    assert peak(tape.operations, accumulated=False)["layer"] == 160 + 4 + 3 * 160


def test_a_checkpoint_keeps_a_layer_s_input_alone():
    def layer(hidden):
        for _ in range(4):
            hidden = tape.like(hidden, saves=(hidden,))
        return hidden

    def held(run):
        hidden = tape.run((), tape.new(10, 4, 4), gradients=8)
        for _ in range(6):
            hidden = run(hidden)
        tape.run((hidden,), tape.new(1, 1, 4))
        return peak(tape.operations, accumulated=True)["layer"]

    tape = Tape("layer")
    plain = held(layer)
    tape = Tape("layer")
    checkpointed = held(lambda hidden: tape.checkpoint(layer, hidden))
    assert plain == (24 + 2) * 160 + 4
    assert checkpointed == (6 + 3 + 2) * 160 + 4


SETUPS = st.builds(
    Setup,
    config=st.just(TINY),
    modes=st.fixed_dictionaries(
        {
            **{tower: st.sampled_from(["frozen", "lora", "full"]) for tower in ("vision", "resampler")},
            **{tower: st.sampled_from(["frozen", "lora"]) for tower in ("cross_attention", "decoder")},
            **{tower: st.sampled_from(["frozen", "full"]) for tower in TOWERS[4:]},
        }
    ),
    rank=st.integers(1, 64),
    dropout=st.sampled_from([0.0, 0.1]),
    item=st.sampled_from([2, 4]),
    quantize=st.booleans(),
    checkpointing=st.integers(0, 3),
    rows_per_step=st.integers(1, 3),
    gpu=st.booleans(),
)
ROWS = st.builds(RowSize, st.integers(1, 2000), st.integers(0, 1), st.integers(0, 8)).flatmap(
    lambda row: st.integers(0, row.tokens - 1).map(lambda supervised: replace(row, supervised=supervised))
)


@settings(max_examples=150, deadline=None)
@given(SETUPS, ROWS, st.sampled_from(["tokens", "supervised", "images"]), st.integers(1, 500))
def test_a_larger_row_never_costs_less(setup, row, field, more):
    larger = replace(row, **{field: getattr(row, field) + more})
    assert estimate(setup, larger).total >= estimate(setup, row).total


@settings(max_examples=100, deadline=None)
@given(SETUPS, ROWS, st.integers(1, 64))
def test_a_higher_rank_never_costs_less(setup, row, more):
    assert estimate(replace(setup, rank=setup.rank + more), row).total >= estimate(setup, row).total


@settings(max_examples=100, deadline=None)
@given(SETUPS, ROWS)
def test_quantising_and_freezing_never_cost_more(setup, row):
    lighter = replace(setup, modes=dict.fromkeys(TOWERS, "frozen"))
    assert estimate(lighter, row).total <= estimate(setup, row).total
    fixed = [sum(fixed_parts(replace(setup, quantize=quantize)).values()) for quantize in (False, True)]
    assert fixed[1] < fixed[0]


def test_checkpointing_leaves_a_layer_s_input_of_its_activations():
    setup, row = Setup(INSTRUCT_9B, LORA, item=2), RowSize(2048, 500, 4)
    layers = setup.config["num_hidden_layers"]
    off, on = (estimate(replace(setup, checkpointing=checkpointing), row).parts for checkpointing in (0, layers))
    assert on["decoder"] + on["cross_attention"] < (off["decoder"] + off["cross_attention"]) / 10
    assert [on[part] for part in ("weights", "adapters", "optimizer")] == [
        off[part] for part in ("weights", "adapters", "optimizer")
    ]


@pytest.mark.parametrize(("layers", "kept"), [(True, (0, 0)), (1, (7, 1)), (4, (4, 1)), (5, (3, 0)), (9, (0, 0))])
def test_checkpointing_changes_no_gradient(idefics, make_rows, layers, kept):
    """kept: layers of the decoder and blocks of cross-attention that keep all; of the stand-in's eight and two."""
    batch = make_rows().at(0)
    model = attach(idefics.model, {**LORA, "vision": "lora"}, lora={"r": 4, "lora_alpha": 8}, base="x").train()

    def gradients():
        model.zero_grad()
        loss = packed_loss(model, batch, config=model.config)
        loss.backward()
        return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.requires_grad}

    plain_loss, plain = gradients()
    checkpoint_layers(model, layers)
    inner = idefics.model.model
    parts = inner.layers, inner.gated_cross_attn_layers, inner.vision_model.encoder.layers
    keeping = [[not layer.gradient_checkpointing for layer in part] for part in parts]
    assert tuple(map(sum, keeping)) == (*kept, 0)
    assert all(part == sorted(part) for part in keeping)
    loss, checkpointed = gradients()
    assert loss == plain_loss
    assert plain.keys() == checkpointed.keys()
    assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in plain.values()) > 50
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name
    checkpoint_layers(model, False)
    assert not any(layer.gradient_checkpointing for part in parts for layer in part)


def test_a_9b_in_24_gib_needs_checkpointing_and_nothing_else():
    gpu = plan(recipe_of(), gpu="24GiB")["gpu"]
    assert (gpu["bytes"], gpu["fits"]) == (24 * GIB, False)
    ((key, layers),) = (change.split("=") for change in gpu["change"])
    assert key == "training.checkpointing"
    assert gpu["changed"]["gpu"] <= 24 * GIB < gpu["needed"]
    fewer = recipe_of(training={"checkpointing": int(layers) - 1})
    assert not plan(fewer, gpu="24GiB")["gpu"]["fits"]


def test_what_fits_is_left_alone():
    gpu = plan(recipe_of(), gpu="80GiB")["gpu"]
    assert (gpu["fits"], gpu["change"], gpu["changed"]) == (True, None, None)


@pytest.mark.parametrize("gib", [12, 16, 20, 24, 28, 32])
def test_the_change_makes_it_fit_when_pasted_behind_the_recipe(gib, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of().to_yaml())
    change = plan(load_recipe(path), gpu=f"{gib}GiB")["gpu"]["change"]
    assert change
    assert plan(load_recipe(path, change), gpu=f"{gib}GiB")["gpu"]["fits"]


def test_no_change_is_offered_where_none_helps():
    gpu = plan(recipe_of(model={"base": "HuggingFaceM4/idefics-80b"}), gpu="16GiB")["gpu"]
    assert (gpu["fits"], gpu["change"]) == (False, None)


def cheapest_change(recipe, fits):
    return next(iter(cheapest_changes(recipe, fits, layers=32)), None)


def test_the_cheapest_is_tried_first_and_pairs_when_no_single_one_helps():
    recipe = recipe_of()
    cheapest = partial(cheapest_change, recipe)
    assert cheapest(lambda changed: True).overrides == ["training.row_tokens=1024"]
    pair = cheapest(lambda changed: changed.training.checkpointing is True and changed.model.quantize == "nf4")
    assert pair.overrides == ["training.checkpointing=true", "model.quantize=nf4"]
    assert cheapest(lambda changed: False) is None


@pytest.mark.parametrize("needed", [1, 7, 31, 32])
def test_no_more_layers_are_checkpointed_than_must_be(needed):
    def fits(changed):
        kept = changed.training.checkpointing
        return kept is True or kept >= needed

    change = cheapest_change(recipe_of(training={"row_tokens": 128}, data={"max_length": 128}), fits)
    assert change.overrides == [f"training.checkpointing={'true' if needed == 32 else needed}"]


def test_a_second_change_does_without_one_that_the_first_makes():
    recipe = recipe_of(training={"row_tokens": 1024, "checkpointing": 4})

    def fits(changed):
        return changed.training.row_tokens < 1024 or changed.model.quantize == "nf4"

    changes = cheapest_changes(recipe, fits, layers=32, number=3)
    assert [change.overrides for change in changes] == [["training.row_tokens=512"], ["model.quantize=nf4"]]
    assert changes[0].price < changes[1].price


@pytest.mark.parametrize(
    ("training", "model", "changed"),
    [
        ({}, {}, ["training.parallel=fsdp2"]),
        ({"optimizer": "adamw_8bit"}, {}, ["training.parallel=fsdp2", "training.optimizer=adamw"]),
        ({}, {"quantize": "nf4"}, None),
    ],
)
def test_the_model_is_divided_where_there_are_processes_and_nothing_is_in_4_bits(training, model, changed):
    recipe = recipe_of(training=training, model=model)

    def divided(changed):
        return changed.training.parallel == "fsdp2"

    found = cheapest_changes(recipe, divided, layers=32, divisible=True)
    assert [change.overrides for change in found] == ([changed] if changed else [])
    assert cheapest_changes(recipe, divided, layers=32) == []


def test_rows_shorter_than_an_example_shorten_the_examples():
    recipe = recipe_of(data={"max_length": 2048})
    change = cheapest_change(recipe, lambda changed: changed.training.row_tokens == 512)
    assert change.overrides == ["training.row_tokens=512", "data.max_length=512"]


def test_a_change_that_contradicts_the_recipe_is_none():
    full = recipe_of(model={"decoder": "full"})
    assert apply_change(full, Change(2, {"model.quantize": "nf4"})) is None
    assert apply_change(recipe_of(), Change(2, {"model.quantize": "nf4"})).model.quantize == "nf4"


@pytest.fixture
def recipe_file(dialogue_folder, base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(
        model={"base": str(base_folder)},
        data={"sources": [{"format": "messages", "path": str(dialogue_folder / "dialogues.jsonl")}], "max_length": 512},
        training={"steps": None, "epochs": 3, "row_tokens": 512, "row_images": 4, "tokens_per_step": 1024},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    return path


def test_without_prepared_data_rows_are_full_and_nothing_is_written(recipe_file, tmp_path):
    made = plan(load_recipe(recipe_file), gpu="1GiB")
    assert made["row"] == {"tokens": 512, "supervised": 511, "images": 4, "from": "full rows"}
    assert (made["steps"], made["rows_per_step"], made["tokens_per_step"]) == (None, 2, 1024)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_prepared_lengths_are_used_and_a_changed_recipe_finds_none(recipe_file, base_folder, make_rows):
    recipe = load_recipe(recipe_file)
    source = Source("messages", paths=tuple(map(Path, recipe.data.sources[0].path)))
    prepared, _ = prepare_sources(recipe, [source], load_processor(str(base_folder)).tokenizer)
    made = plan(recipe, gpu="1GiB")
    rows = make_rows(rows_per_step=2)
    real = [rows.at(number) for number in range(len(rows))]
    assert made["row"] == {
        "tokens": max(batch["input_ids"].shape[1] for batch in real),
        "supervised": max(int((batch["labels"] >= 0).sum()) for batch in real),
        "images": max(sum(prepared.image_counts[list(row.examples)]) for row in rows.rows),
        "from": "prepared data",
    }
    assert made["steps"] == 3 * len(rows) // 2
    sets = sorted(Path(recipe.data.prepared).iterdir())
    changed = plan(load_recipe(recipe_file, ["data.max_length=256"]), gpu="1GiB")
    assert (changed["row"]["from"], changed["steps"]) == ("full rows", None)
    assert sorted(Path(recipe.data.prepared).iterdir()) == sets


def test_disk_of_the_9b(tmp_path):
    disk = plan(recipe_of(model={"quantize": "nf4"}), gpu="24GiB")["disk"]
    assert disk == {
        "base": 0,
        "quantized": 4_080_760_832 + 2 * 1_019_230_480,
        "features": 0,
        "checkpoints": 2 * 12 * 49_274_896,
        "adapter": 4 * 49_274_896,
        "merged": 2 * 8_929_687_824,
        "total": 4_080_760_832 + 2 * 1_019_230_480 + 28 * 49_274_896 + 2 * 8_929_687_824,
    }


def test_dtype_auto_is_bf16_on_a_gpu_and_fp32_without():
    recipe = recipe_of()
    assert [Planner(recipe, on_gpu=on_gpu).setup(recipe).item for on_gpu in (True, False)] == [2, 4]


def test_documents_alone_leave_the_base_two_added_tokens():
    documents = recipe_of(data={"sources": [{"format": "pairs", "path": "nowhere.jsonl"}]})
    assert plan(documents, gpu="80GiB")["totals"]["total"] == 8_929_679_632
    assert plan(recipe_of(), gpu="80GiB")["totals"]["total"] == 8_929_687_824


def test_rows_are_planned_as_they_are_computed_and_made_ahead():
    from finetune.data import prefetch as ahead
    from finetune.planning import memory
    from finetune.planning import operations as footprint
    from modeling import forward

    assert (footprint.HEAD_ROWS, footprint.ROWS) == (forward.HEAD_ROWS, forward.ROWS)
    assert memory.PREFETCHED == ahead.PREFETCHED


def test_what_is_not_counted_is_said():
    notes = plan(recipe_of(adapter={"use_dora": True}), gpu="80GiB")["notes"]
    assert "adapter.use_dora is not counted" in notes


@pytest.mark.parametrize(("gpu", "status"), [("1GiB", 3), ("8GiB", 0)])
def test_the_verb_s_status_says_whether_the_recipe_fits(recipe_file, gpu, status):
    outcome = invoke("plan", recipe_file, "--gpu", gpu, "--json")
    assert (outcome.exit_code, json.loads(outcome.stdout)["gpu"]["fits"]) == (status, status == 0)


def test_the_verb_prints_tables_json_and_a_picture(recipe_file, tmp_path):
    shown = invoke("plan", recipe_file, "--gpu", "8GiB", "--picture", tmp_path / "plan.png")
    assert shown.exit_code == 0, shown.output
    assert "memory at its peak" in shown.output
    assert "predicted" in shown.output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "gathered" not in shown.output
    divided = invoke("plan", recipe_file, "training.parallel=fsdp2", "--gpu", "1GiB", "--processes", "2")
    assert "gathered" in divided.output
    assert "in 2 rows, 1 of them on each of 2 GPUs" in " ".join(divided.output.split())
    printed = invoke("plan", recipe_file, "training.row_tokens=1024", "--gpu", "1GiB", "--json")
    assert json.loads(printed.stdout)["row"]["tokens"] == 1024
    parts = json.loads(printed.stdout)["memory"]
    assert sum(parts["parts"].values()) == parts["tensors"]


def test_a_wrong_option_is_told(recipe_file, tmp_path):
    size = invoke("plan", recipe_file, "--gpu", "lots")
    assert (size.exit_code, "--gpu: expected a size with its unit" in " ".join(size.output.split())) == (1, True)
    picture = invoke("plan", recipe_file, "--gpu", "1GiB", "--picture", tmp_path / "plan.wrong")
    assert (picture.exit_code, "--picture" in picture.output) == (1, True)
    assert invoke("plan", recipe_file, "--processes", "0").exit_code == 2


def test_help_has_an_example():
    shown = invoke("plan", "--help")
    assert shown.exit_code == 0
    assert "Example: finetune plan recipes/" in " ".join(shown.output.split())


def test_a_plan_from_the_config_alone_needs_no_torch(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of(data={"prepared": str(tmp_path / "prepared")}).to_yaml())
    script = (
        "import sys\nfrom pathlib import Path\nfrom finetune.planning.estimate import plan\n"
        f"from finetune.recipe.load import load_recipe\nplan(load_recipe(Path({str(path)!r})), gpu='24GiB')\n"
        "print(*[name for name in 'torch transformers peft trl'.split() if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []


@pytest.mark.slow
def test_what_is_predicted_is_what_the_allocator_counts():
    script = [sys.executable, "scripts/benchmarks/check_plan.py", "lora, checkpointing", "lora, 8 cached images"]
    checked = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert "2 recipes, 0 bounds missed" in checked.stdout, checked.stdout + checked.stderr
    assert checked.returncode == 0


def test_evaluation_of_a_divided_model_needs_it_whole_on_each_gpu():
    """The 80B in bf16 is 149 GiB: eight GPUs train it, and none can be asked it."""
    changes = {"parallel": "fsdp2", "checkpointing": True}
    model = {"base": "HuggingFaceM4/idefics-80b", "dtype": "bf16"}
    recipe = recipe_of(model=model, data={"eval_split": 0.1}, training=changes)
    evaluated = Recipe.model_validate({**recipe.model_dump(), "evaluation": {}})
    assert Planner(recipe, on_gpu=True, processes=8).fits(recipe, 74 * GIB)
    made = plan(evaluated, gpu="80GB", processes=8)["gpu"]
    assert round(made["evaluation"] / GIB) == 149
    assert (made["fits"], made["change"]) == (False, None)
