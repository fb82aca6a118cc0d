"""What benchmark and predictions count is what torch multiplies; the script of how things grow runs."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.planning.static_memory import RowSize
from modeling import tiny
from modeling.adapters import attach
from modeling.packed_forward import packed_loss
from modeling.shapes import TINY

ROOT = Path(__file__).parents[2]
RANK, SEQUENCE, SEQUENCES, SUPERVISED, IMAGES = 4, 32, 4, 52, 4


@pytest.fixture(scope="module")
def scripts():
    """arithmetic.py, scale.py and random_rows.py of scripts/benchmarks/, imported by path."""
    sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))
    try:
        yield tuple(importlib.import_module(name) for name in ("arithmetic", "scale", "random_rows"))
    finally:
        sys.path.remove(str(ROOT / "scripts" / "benchmarks"))


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return operation(*args, **(kwargs or {}))


def test_products_are_those_that_torch_counts(scripts):
    """In matrix products; attention is left out on both sides."""
    arithmetic, _, rows = scripts
    config = {**TINY, "additional_vocab_size": 3}
    model = tiny.build_model(config, seed=0, packed=True)
    modes = {"cross_attention": "lora", "decoder": "lora"}
    tuned = attach(model, modes, lora={"r": RANK, "lora_alpha": 8}, base="x").train()
    size = RowSize(SEQUENCE * SEQUENCES, SUPERVISED, IMAGES)
    row = rows.make_row(TINY, size, sequence=SEQUENCE)
    with Products() as counter:
        packed_loss(tuned, row, config=model.config).backward()
    whole = arithmetic.Sizes(size.tokens, size.supervised, size.images, 0)
    expected = arithmetic.Arithmetic(TINY, RANK).products(whole)
    hidden, layers = TINY["hidden_size"], TINY["num_hidden_layers"]
    expected -= 3 * hidden * layers * whole.tokens**2  # attention
    # The first block's query reads embeddings, and keys and values read features: none of them needs a gradient.
    expected -= whole.tokens * (hidden**2 + RANK * hidden)
    assert counter.count == expected


def test_a_layer_that_is_recomputed_costs_its_forward_again(scripts):
    arithmetic, _, _ = scripts
    one = arithmetic.Arithmetic(TINY, RANK)
    sizes = arithmetic.Sizes(100, 40, 3, 70)
    plain, half, whole = (one.products(sizes, recomputed=share) for share in (0, 0.5, 1))
    head = 2 * 40 * TINY["hidden_size"] * (TINY["vocab_size"] + 3)
    assert half - plain == pytest.approx((whole - plain) / 2)
    # forward and backward through frozen matrices are two passes, and the forward again is a third
    assert (plain - head) / 3 < whole - plain < (plain - head) / 2


def test_predictions_are_of_the_recipes_plans(tmp_path):
    script = [sys.executable, "scripts/benchmarks/scale.py"]
    command = [*script, "--only", "prediction", "--share", "0.2", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "predicted" in done.stdout
    lines = json.loads((tmp_path / "scale.json").read_text())["prediction"]
    assert {line["recipe"] for line in lines} == {
        "idefics-9b_qlora_1x24gb",
        "idefics-9b_lora_1x80gb",
        "idefics-80b_qlora_8x80gb",
    }
    for line in lines:
        assert line["memory_gib"] < line["of_gib"]
        row_tokens = 2048
        teraflops = {"L4": 121, "RTX 4090": 165, "A100 80 GB": 312, "H100 SXM": 989}[line["gpu"]]
        assert line["tokens_per_second"] == pytest.approx(0.2 * teraflops / line["teraflops_a_row"] * row_tokens)


@pytest.mark.slow
def test_rows_are_measured_and_drawn(tmp_path, scripts, monkeypatch):
    _, scale, _ = scripts
    monkeypatch.setattr(scale, "ROW_TOKENS", (256, 512))
    monkeypatch.setattr(scale, "STEPS", 1)
    monkeypatch.chdir(ROOT)
    lines = scale.measure_rows(None)
    assert [line["row_tokens"] for line in lines] == [256, 512]
    for line in lines:
        assert line["per_token"] == line["seconds"] / line["row_tokens"]
        assert line["memory"] > 0
        assert 0 < line["of_multiplying_rate"] < 1.5
    scale.draw({"row": lines}, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


def test_a_million_lengths_fill_their_rows(scripts):
    """Both budgets are there to be filled; the one that is reached first is."""
    _, scale, _ = scripts
    laid = scale.lay_out("20000")
    assert max(laid["tokens_filled"], laid["images_filled"]) > 0.97
    assert torch.tensor([laid["tokens_filled"], laid["images_filled"]]).le(1).all()
