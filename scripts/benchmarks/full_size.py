"""Models of full size through the ordinary verbs, on a machine without a GPU.

    python scripts/benchmarks/full_size.py --shape 9b --out runs/full_size

`3b` and `9b` (the true names and shapes of idefics-9b; the 3B has its towers): write a checkpoint of random weights,
prepare, plan, train in NF4 for two optimiser steps on packed dialogues of 512 tokens, merge, verify. The 9B takes
18 GB of disk, as much again for the merged model, and 7 GB for the weights in 4 bits, which are kept.

`80b`, as far as it goes without its weights: the plan of its recipe, every name and shape against transformers' own
model, and a merge of 4 of its 80 layers in true shape, 11 GB of disk and as much again.

Each stage is a process of its own. Its time is printed, and the peak of its memory: anonymous (RssAnon), and in all
(VmRSS), weights that are mapped from their files included; the plan counts those, too. A stage that is done is not done
again, so an interrupted run goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import PIL.Image
import yaml
from process_memory import memory

from modeling.shapes import IDEFICS_9B, IDEFICS_80B, Config, count_parameters, tensor_shapes

SHAPES: dict[str, Config] = {
    "3b": {**IDEFICS_9B, "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26},
    "9b": IDEFICS_9B,
    "80b": IDEFICS_80B,
}
SAMPLED_LAYERS = 4
"""Of the 80B, with the cross-attention before them."""

TEXT = "the image shows a small dog on green grass near an old house with two windows and a wooden table"
WORDS = TEXT.split()
DIALOGUES, ROW_TOKENS = 24, 512
RECIPE_80B = Path("recipes/idefics-80b_qlora_8x80gb.yaml")
FINETUNE = [sys.executable, "-m", "finetune"]


def write(config: Config, base: Path) -> None:
    """A checkpoint of random weights, its tokenizer one of `WORDS`."""
    from random_weights import write_base

    write_base(config, base, [*WORDS, "User:", "Assistant:"])


def write_sample(config: Config, out: Path) -> None:
    """base/ and adapter/ with `SAMPLED_LAYERS` of the layers."""
    from random_weights import write_adapter

    sampled = {**config, "num_hidden_layers": SAMPLED_LAYERS}
    write(sampled, out / "base")
    write_adapter(sampled, out / "adapter", rank=16)


def check_names(config: Config) -> None:
    """Every name and shape is that of transformers' model, made without memory."""
    import torch
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    with torch.device("meta"):
        model = IdeficsForVisionText2Text(IdeficsConfig(**config))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = tensor_shapes(config)
    if ours != theirs:
        sys.exit(f"names or shapes differ: {sorted(ours.items() ^ theirs.items())[:5]}")
    print(json.dumps({"tensors": len(theirs), "parameters": sum(one.numel() for one in model.parameters())}))


def write_recipe(out: Path) -> str:
    """QLoRA over dialogues about four plain images, two rows full."""
    for number in range(4):
        PIL.Image.new("RGB", (224, 224), (60 * number, 90, 200 - 40 * number)).save(out / f"{number}.png")
    lines = []
    for number in range(DIALOGUES):
        content = [{"type": "image", "image": f"{number % 4}.png"}, {"type": "text", "text": " ".join(WORDS[:8])}]
        answer = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(20 + number % 8))
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    (out / "dialogues.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "model": {"base": str(out / "base"), "quantize": "nf4"},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {
            "sources": [{"path": "dialogues.jsonl", "format": "messages"}],
            "max_length": ROW_TOKENS,
            "cache_features": False,  # all of the model is there
            "prepared": str(out / "prepared"),
        },
        "training": {
            "steps": 2,
            "row_tokens": ROW_TOKENS,
            "row_images": 16,
            "tokens_per_step": ROW_TOKENS,
            "learning_rate": 2.0e-4,
            "checkpointing": True,
        },
        "merge": False,
        "output": str(out / "run"),
    }
    path = out / "full_size.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return str(path)


def run_stage(name: str, command: list[str], out: Path, *, planned: int | None = None) -> str:
    """Print seconds and peak memory of a command, beside what was `planned`; return what it printed. It runs once."""
    done, log = out / f"{name}.json", out / f"{name}.log"
    if not done.is_file():
        started, anonymous, everything = time.perf_counter(), 0, 0
        with log.open("wb") as file, (out / f"{name}.errors").open("wb") as errors:
            process = subprocess.Popen(command, stdout=file, stderr=errors)  # noqa: S603
            while process.poll() is None:
                seen = memory(process.pid)
                anonymous, everything = max(anonymous, seen["RssAnon"]), max(everything, seen["VmRSS"])
                time.sleep(0.05)
        if process.returncode:
            sys.exit(f"{name} failed:\n{(out / f'{name}.errors').read_text(errors='replace')[-3000:]}")
        seconds = time.perf_counter() - started
        done.write_text(json.dumps({"seconds": seconds, "anonymous": anonymous, "all": everything}) + "\n")
    figures = json.loads(done.read_text())
    against = f"{planned / 1e9:12.2f} GB" if planned else ""
    sizes = "".join(f"{figures[kind] / 1e9:12.2f} GB" for kind in ("anonymous", "all"))
    print(f"{name:12}{figures['seconds']:10.1f} s{sizes}{against}", flush=True)
    return log.read_text(encoding="utf-8")


def tell_plan(plan: dict[str, Any]) -> None:
    row, size = plan["row"], plan["memory"].get("gpu") or plan["memory"]["resident"]
    print(f"{'':12}{row['tokens']} tokens, {row['supervised']} of them supervised, {row['images']} images a row")
    print(f"{'':12}{size / 1e9:.2f} GB of memory, {plan['disk']['total'] / 1e9:.1f} GB of disk, predicted")


def print_parity(parity: dict[str, Any]) -> None:
    print(
        f"{'':12}{parity['tensors']} tensors, largest difference {parity['largest_tensor_difference']:.3f} of rounding"
    )
    print(
        f"{'':12}{parity['blocks']} blocks, largest difference {parity['largest_block_difference']:.1e} of the output"
    )


def whole(out: Path, again: list[str]) -> None:
    """Write, prepare, plan, train, merge, verify; `again` is the command of this script."""
    run_stage("write", [*again, "--stage", "write"], out)
    recipe = write_recipe(out)
    run_stage("prepare", [*FINETUNE, "prepare", recipe], out)
    plan = json.loads(run_stage("plan", [*FINETUNE, "plan", recipe, "--json"], out))
    tell_plan(plan)
    # Memory that importing takes comes on top of what is planned.
    run_stage("imports", [sys.executable, "-c", "import finetune.pipeline, finetune.training.trainer"], out)
    imports = json.loads((out / "imports.json").read_text())["all"]
    run_stage("train", [*FINETUNE, "train", recipe], out, planned=plan["memory"]["resident"] + imports)
    merge_and_verify(out, [str(out / "run"), "--base-precision", "full"], out / "run/merged")


def sampled(out: Path, again: list[str]) -> None:
    """Plan, names, and a merge of some layers; `again` is the command of this script."""
    tell_plan(json.loads(run_stage("plan", [*FINETUNE, "plan", str(RECIPE_80B), "--gpu", "80GB", "--json"], out)))
    print(f"{'':12}{run_stage('names', [*again, '--stage', 'names'], out).strip()}")
    run_stage("write", [*again, "--stage", "sample"], out)
    merged = out / "merged"
    merge_and_verify(out, [str(out / "adapter"), "--base", str(out / "base"), "--out", str(merged)], merged)


def merge_and_verify(out: Path, arguments: list[str], merged: Path) -> None:
    print_parity(json.loads(run_stage("merge", [*FINETUNE, "merge", *arguments, "--json"], out))["parity"])
    print_parity(json.loads(run_stage("verify", [*FINETUNE, "merge", str(merged), "--verify", "--json"], out)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="9b")
    parser.add_argument("--out", type=Path, default=Path("runs/full_size"))
    parser.add_argument("--stage", choices=("write", "sample", "names"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape, out, config = arguments.shape, (arguments.out / arguments.shape).resolve(), SHAPES[arguments.shape]
    out.mkdir(parents=True, exist_ok=True)
    match arguments.stage:
        case "write":
            write(config, out / "base")
        case "sample":
            write_sample(config, out)
        case "names":
            check_names(config)
        case None:
            # glibc otherwise keeps what was freed, up to twice what is in use
            os.environ |= {"HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
            print(f"{sum(count_parameters(config).values()):,} parameters")
            print(f"{'stage':12}{'time':>12}{'anonymous':>15}{'in all':>15}{'planned':>15}")
            again = [sys.executable, __file__, "--shape", shape, "--out", str(arguments.out)]
            (sampled if shape == "80b" else whole)(out, again)


if __name__ == "__main__":
    main()
