"""Fixed parts of memory: figures worked out by hand, and counts that a run agrees with."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from planned import FULL, INSTRUCT_9B, LORA, MATRICES_80B
from small_models import stand_in

from finetune.planning.static_memory import Setup, count_by_tower, fixed_parts
from modeling.adapters import expected_counts
from modeling.shapes import IDEFICS_9B, IDEFICS_80B, TINY
from modeling.towers import TOWERS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("config", "total"), [(IDEFICS_9B, 8_929_679_632), (IDEFICS_80B, 79_967_843_624)])
def test_count_of_published_models(config, total):
    assert sum(one.total for one in count_by_tower(Setup(config, LORA)).values()) == total


@pytest.mark.parametrize("modes", [LORA, FULL, {"vision": "lora", "resampler": "lora", "decoder": "full"}])
def test_count_equals_what_a_run_trains(modes):
    counts = expected_counts(TINY, modes, rank=4)
    trained = {tower: counts.lora.get(tower, 0) + counts.full.get(tower, 0) for tower in TOWERS}
    assert {tower: one.trained for tower, one in count_by_tower(Setup(TINY, modes, rank=4)).items()} == trained


def test_fixed_parts_9b_lora_bf16():
    assert fixed_parts(Setup(INSTRUCT_9B, LORA, item=2)) == {
        "weights": 17_859_424_832,
        "adapters": 197_099_520,
        "optimizer": 394_199_168,
    }


def test_fixed_parts_9b_nf4_8_bit_optimizer():
    setup = Setup(INSTRUCT_9B, LORA, item=2, quantize=True, optimizer="adamw_8bit")
    assert sum(one.quantized for one in count_by_tower(setup).values()) == 7_910_457_344
    assert fixed_parts(setup) == {"weights": 6_119_270_976, "adapters": 197_099_520, "optimizer": 100_089_632}


def test_fixed_parts_9b_full_are_fp32():
    assert fixed_parts(Setup(IDEFICS_9B, FULL, item=2)) == {
        "weights": 35_718_718_528,
        "adapters": 0,
        "optimizer": 71_437_437_056,
    }


def test_fixed_parts_80b_lora():
    modes = {"cross_attention": "lora", "decoder": "lora"}
    assert fixed_parts(Setup(IDEFICS_80B, modes, item=2)) == {
        "weights": 159_935_687_248,
        "adapters": 981_729_280,
        "optimizer": 1_963_458_560,
    }


def test_fixed_parts_80b_sharded_over_eight():
    setup = Setup(IDEFICS_80B, MATRICES_80B, item=2, processes=8, sharded=True, cached=True)
    shares = {"weights": (159_935_687_248 - 2 * 756_728_064) // 8, "adapters": 122_716_160, "optimizer": 245_432_320}
    layer = 2 * (4 * 8192**2 + 3 * 8192 * 22016 + 2 * 8192) + 4 * 16 * (4 * 2 * 8192 + 3 * (8192 + 22016))
    layer += -(-2 * 8192 // 80)  # and its part of the last norm
    head = 2 * 32000 * 8192
    assert fixed_parts(setup) == {**shares, "gathered": 2 * layer + head}
    live = fixed_parts(replace(setup, cached=False))
    image_towers = 2 * 756_728_064
    assert live["weights"] == 159_935_687_248 // 8
    assert live["gathered"] == 2 * layer + head + image_towers


@pytest.mark.slow
def test_shares_of_a_model_sharded_over_two_processes(tmp_path):
    torchrun = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*torchrun, "tests/helpers/shares.py", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    both = json.loads((tmp_path / "out").read_text())
    config = {**stand_in(IDEFICS_9B), "additional_vocab_size": 3}
    setup = Setup(config, LORA, rank=8, item=2, processes=2, sharded=True)
    predicted, whole = fixed_parts(setup), fixed_parts(replace(setup, sharded=False))
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
    copies = 4 * sum(one.trained for one in count_by_tower(setup).values())
    assert [one["buckets"] for one in both] == [copies] * 2


def test_quantized_matrices_have_rows_of_whole_groups():
    odd = {**INSTRUCT_9B, "intermediate_size": 11_000}
    assert count_by_tower(Setup(odd, LORA, quantize=True))["decoder"].quantized == 32 * (
        4 * 4096**2 + 2 * 4096 * 11_000
    )
