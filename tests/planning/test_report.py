"""`finetune plan`: tables, JSON, a picture, exit codes."""

import json

import pytest
from typer.testing import CliRunner

from finetune.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("gpu", "status"), [("1GiB", 3), ("8GiB", 0)])
def test_plan_exit_code_says_whether_it_fits(recipe_file, gpu, status):
    outcome = invoke("plan", recipe_file, "--gpu", gpu, "--json")
    assert (outcome.exit_code, json.loads(outcome.stdout)["gpu"]["fits"]) == (status, status == 0)


def test_plan_prints_tables_json_and_a_picture(recipe_file, tmp_path):
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


def test_plan_refuses_a_wrong_option(recipe_file, tmp_path):
    size = invoke("plan", recipe_file, "--gpu", "lots")
    assert (size.exit_code, "--gpu: expected a size with its unit" in " ".join(size.output.split())) == (1, True)
    picture = invoke("plan", recipe_file, "--gpu", "1GiB", "--picture", tmp_path / "plan.wrong")
    assert (picture.exit_code, "--picture" in picture.output) == (1, True)
    assert invoke("plan", recipe_file, "--processes", "0").exit_code == 2


def test_plan_help_has_an_example():
    shown = invoke("plan", "--help")
    assert shown.exit_code == 0
    assert "Example: finetune plan idefics-9b_lora_1x80gb" in " ".join(shown.output.split())
