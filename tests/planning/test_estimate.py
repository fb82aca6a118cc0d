"""`plan`: memory of one process of several, disk, notes; compared with torch where that is possible."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planned import GIB, MATRICES_80B, recipe_of

from finetune.planning.estimate import Planner, estimate, plan
from finetune.planning.static_memory import RowSize, Setup
from finetune.recipe.schema import Recipe
from modeling.shapes import IDEFICS_80B

ROOT = Path(__file__).parents[2]


def test_ddp_holds_a_copy_of_the_gradients():
    setup, row = Setup(IDEFICS_80B, MATRICES_80B, item=2, rows_per_step=8), RowSize(128, 64, 1)
    alone, one_of_eight = (estimate(replace(setup, processes=processes), row).parts for processes in (1, 8))
    trained = 245_432_320
    assert one_of_eight == {**alone, "gradients": alone["gradients"] + 4 * trained}
    assert alone["gradients"] == 4 * trained


@pytest.mark.parametrize(
    ("rows", "whole"),
    [(8, 4 * 245_432_320), (1, 2 * 4 * 199_884_800 // 80)],  # all that a step adds up; or those of two layers
)
def test_fsdp2_shards_gradients_after_the_last_row_of_a_step(rows, whole):
    setup = Setup(IDEFICS_80B, MATRICES_80B, item=2, rows_per_step=rows, processes=8, sharded=True, checkpointing=80)
    parts = estimate(setup, RowSize(128, 64, 1)).parts
    brief = parts["gradients"] - 4 * 245_432_320 // 8 - whole
    assert 0 <= brief <= 4 * 16 * (8192 + 22016)  # of the operation whose backward runs


def test_plan_of_several_processes():
    recipe = recipe_of(training={"tokens_per_step": 10 * 2048})
    one, eight = (plan(recipe, gpu="80GiB", processes=processes) for processes in (1, 8))
    assert [(made["processes"], made["rows_per_step"], made["rows_per_process"]) for made in (one, eight)] == [
        (1, 10, 10),
        (8, 10, 2),
    ]
    assert any("10 rows of a step cannot be divided evenly over 8 processes" in note for note in eight["notes"])
    assert any("DDP" in note for note in eight["notes"])
    divided = plan(recipe_of(training={"parallel": "fsdp2"}), gpu="80GiB", processes=4)
    assert any("a share of every tensor" in note for note in divided["notes"])
    assert not any("evenly" in note for note in divided["notes"])  # four rows
    assert divided["memory"]["parts"]["weights"] == (17_859_424_832 - 2 * 756_728_064) // 4  # features are cached


def test_one_process_shards_nothing():
    alone = [plan(recipe_of(training={"parallel": kind}), gpu="80GiB")["memory"] for kind in ("ddp", "fsdp2")]
    assert alone[0] == alone[1]


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


def test_dtype_auto_is_bf16_on_a_gpu_only():
    recipe = recipe_of()
    assert [Planner(recipe, on_gpu=on_gpu).setup(recipe).item for on_gpu in (True, False)] == [2, 4]


def test_documents_alone_add_no_end_of_utterance():
    documents = recipe_of(data={"sources": [{"format": "pairs", "path": "nowhere.jsonl"}]})
    assert plan(documents, gpu="80GiB")["totals"]["total"] == 8_929_679_632
    assert plan(recipe_of(), gpu="80GiB")["totals"]["total"] == 8_929_687_824


def test_constants_equal_those_of_training():
    from finetune.planning import idefics_graph
    from modeling import packed_forward

    assert idefics_graph.ROWS == packed_forward.ROWS


def test_notes_name_what_is_not_counted():
    notes = plan(recipe_of(adapter={"use_dora": True}), gpu="80GiB")["notes"]
    assert "adapter.use_dora is not counted" in notes


def test_plan_imports_no_torch(tmp_path):
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
def test_estimate_equals_what_the_allocator_counts():
    script = [sys.executable, "scripts/benchmarks/check_plan.py", "lora, checkpointing", "lora, 8 cached images"]
    checked = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert "2 recipes, 0 bounds missed" in checked.stdout, checked.stdout + checked.stderr
    assert checked.returncode == 0


def test_evaluation_needs_the_whole_model_on_each_gpu():
    """The 80B in bf16 is 149 GiB: eight GPUs train it, and none can be asked it."""
    changes = {"parallel": "fsdp2", "checkpointing": True}
    model = {"base": "HuggingFaceM4/idefics-80b", "dtype": "bf16"}
    recipe = recipe_of(model=model, data={"eval_split": 0.1}, training=changes)
    evaluated = Recipe.model_validate({**recipe.model_dump(), "evaluation": {}})
    assert Planner(recipe, on_gpu=True, processes=8).fits(recipe, 74 * GIB)
    made = plan(evaluated, gpu="80GB", processes=8)["gpu"]
    assert round(made["evaluation"] / GIB) == 149
    assert (made["fits"], made["change"]) == (False, None)
