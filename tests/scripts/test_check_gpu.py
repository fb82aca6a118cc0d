"""The check of the GPU, run on a CPU: its stages, what it does where one fails, and the page that describes it."""

import ast
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import check_gpu
import pytest
import torch
from check_gpu import STAGES, Stage, main
from gpu import models
from gpu.training import kind_of

from modeling.quantize import quantized_layers, quantized_names

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PAGE = (ROOT / "docs" / "gpu.md").read_text()


def figures_of(folder, stage):
    return {one["name"]: one for one in json.loads((folder / f"{stage}.json").read_text())}


def check(folder, *arguments):
    return main(["--device", "cpu", "--tiny", "--out", str(folder), *arguments])


def test_environment_names_packages_and_rates(tmp_path):
    assert check(tmp_path, "--only", "environment") == 0
    found = figures_of(tmp_path, "environment")
    assert found["torch"]["value"] == torch.__version__
    assert found["pillow"]["value"] not in (None, "missing")
    assert found["matrix rate"]["value"] > 0
    summary = (tmp_path / "summary.md").read_text()
    assert "## environment: done" in summary
    assert "## parity" not in summary


@pytest.mark.slow
def test_all_stages_run_and_hold(tmp_path):
    """The same code as on a GPU. Bounds of time are wide: this machine may do other things."""
    started = time.monotonic()
    assert check(tmp_path, "--minutes", "30", "--patience", "10") == 0
    assert time.monotonic() - started < 1800
    found = {stage.name: figures_of(tmp_path, stage.name) for stage in STAGES}
    assert all(one["holds"] for stage in found.values() for one in stage.values() if one["required"])
    assert found["parity"]["packed row, one by one, fp32"]["value"] < 1e-4
    assert found["works"]["QLoRA: last / first"]["value"] < 1
    assert found["stock"]["this toolkit / stock"]["value"] > 1
    for stage in ("lora", "qlora", "stock"):
        assert found[stage]["of a step: products"]["value"] > 0.05


FOUND = """
import json, pathlib
found = {{"name": "before", "value": 1.5, "unit": "s", "bound": "<= 1", "holds": False, "required": False}}
pathlib.Path({folder!r}, "{name}.json").write_text(json.dumps([found]))
"""

ENDS = {
    "environment": ("raise ValueError('a fault')", "failed with status 1"),
    "parity": ("raise SystemExit(3)", "a difference is too large"),
    "works": ("import time; time.sleep(600)", "ended after its 5 s"),
    "lora": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed with status -11"),
    "stock": ("", "done"),
}


def test_stage_that_fails_loses_nothing(tmp_path, monkeypatch):
    """Whatever ends a stage, what it had found is in the summary, and the next stages run."""
    stages = [Stage(name, "", 5 if name == "works" else 60, f"about {name}") for name in ENDS]
    monkeypatch.setattr(check_gpu, "STAGES", tuple(stages))

    def command(stage, options):
        return [sys.executable, "-c", FOUND.format(folder=str(options.out), name=stage.name) + ENDS[stage.name][0]]

    monkeypatch.setattr(check_gpu, "_command", command)
    assert check(tmp_path) == 1
    summary = (tmp_path / "summary.md").read_text()
    for name, (_, outcome) in ENDS.items():
        assert f"## {name}: {outcome}" in summary
        assert figures_of(tmp_path, name)["before"]["holds"] is False
    assert summary.count("| before | 1.5 | s | <= 1 | missed |") == len(ENDS)


def test_stage_without_time_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "_command", lambda stage, options: ["false"])
    assert check(tmp_path, "--minutes", "0.1") == 1
    assert (tmp_path / "summary.md").read_text().count("not begun: no time was left") == len(STAGES)


@pytest.mark.parametrize(("value", "status"), [(0.5, 0), (2.0, 3), (float("nan"), 3), (None, 1)])
def test_status_of_a_stage(tmp_path, monkeypatch, value, status):
    """0: all holds; 3: a difference is too large, or not a number; 1: an error, which is a figure, too."""

    def stage(figures, device, *, tiny):
        figures.add("target", 1.0, least=2.0)  # missed, and no failure
        if value is None:
            raise ValueError("a fault")
        figures.check("difference", value, most=1.0)

    monkeypatch.setattr(check_gpu, "STAGES", (Stage("environment", "made_up", 60, ""),))
    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(environment=stage))
    assert check(tmp_path, "--stage", "environment") == status
    assert ("error" in figures_of(tmp_path, "environment")) == (value is None)


def test_quantised_shape_computes_in_nf4():
    """The model that stage `qlora` builds on the device holds every matrix of both text towers in 4 bits."""
    model = models.quantize(models.build(models.TINY, CPU, torch.float32), models.TINY, torch.float32)
    assert {f"{name}.weight" for name in quantized_layers(model)} == quantized_names(models.TINY)
    assert {type(one).__name__ for _, one in models.with_lora(model).named_modules()} >= {"Linear4bit"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNN", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "NF4"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "elementwise"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


def test_page_describes_every_stage():
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## How to read it")[0], re.MULTILINE)
    assert listed == [stage.name for stage in STAGES]


def asks_for_the_device(node):
    match node:
        case ast.Attribute(attr="cuda" | "is_cuda"):
            return True
        case ast.Attribute(attr="type"):
            return ast.unparse(node).endswith("device.type")
        case ast.Constant(value="cuda"):
            return True
        case ast.Call(func=ast.Name(id="choices")):
            return True
    return False


def places(path):
    """Functions (or "", the module) of a file in which the kind of device is asked for."""
    found = set()

    def visit(node, scope):
        for child in ast.iter_child_nodes(node):
            if asks_for_the_device(child):
                found.add(".".join(scope))
            is_scope = isinstance(child, ast.FunctionDef | ast.ClassDef)
            visit(child, [*scope, child.name] if is_scope else scope)

    visit(ast.parse(path.read_text(encoding="utf-8")), [])
    return found


def test_page_lists_every_branch_on_the_device():
    """docs/gpu.md, "What depends on the device", against the code."""
    in_code = {
        (str(path.relative_to(ROOT)), place)
        for package in ("finetune", "modeling")
        for path in (ROOT / package).rglob("*.py")
        for place in places(path)
    }
    in_page, names = set(), [stage.name for stage in STAGES]
    table = PAGE.partition("## What depends on the device")[2].partition("##")[0]
    for file, functions, stage in re.findall(r"^\| `([\w/]+\.py)`:?([^|]*)\|[^|]*\| ([^|]+) \|$", table, re.MULTILINE):
        in_page |= {(file, name) for name in re.findall(r"`([\w.]+)`", functions) or [""]}
        assert stage.startswith("none: ") or stage.strip("`") in names, stage
    assert in_page == in_code
