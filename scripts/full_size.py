"""A model of full size through the ordinary verbs, on a machine without a GPU: write, plan, train, merge, verify.

    python scripts/full_size.py --shape 9b --out runs/full_size

The checkpoint has the true names and shapes of idefics-9b (or of a 3B with the same towers) and random weights: about
18 GB of disk, and as much again for the merged model. Training is QLoRA: NF4, two optimiser steps on packed dialogues
of 512 tokens. Each stage is a process of its own, whose time and peak anonymous memory (RssAnon) are printed; one that
is done is not done again, so an interrupted run goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import yaml

from modeling import loading, tiny
from modeling.checkpoint import Planned, plan_shards, write_index, write_shard
from modeling.shapes import IDEFICS_9B, Config, count_parameters, tensor_shapes

IDEFICS_3B: Config = {
    **IDEFICS_9B,
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
}
SHAPES = {"3b": IDEFICS_3B, "9b": IDEFICS_9B}
TEXT = "the image shows a small dog on green grass near an old house with two windows and a wooden table"
WORDS = TEXT.split()


def write_base(config: Config, folder: Path) -> None:
    """Random weights, written a few rows at a time; norms are one, gates half open."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = (0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)

    def blocks(name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        count = 1
        for size in shape:
            count *= size
        if "alpha_" in name or ("norm" in name and name.endswith(".weight")):
            yield torch.full((count,), 0.5 if "alpha_" in name else 1.0, dtype=torch.bfloat16)
            return
        shift = hash_of(name) % len(noise)
        rolled = torch.roll(noise, shift)
        for start in range(0, count, len(noise)):
            yield rolled[: min(len(noise), count - start)]

    planned = {
        name: Planned(torch.bfloat16, shape, lambda name=name, shape=shape: blocks(name, shape))
        for name, shape in tensor_shapes(config).items()
    }
    shards = plan_shards(planned, 5 * 10**9)
    for file, names in shards.items():
        if not (folder / file).is_file():
            write_shard(folder / file, {name: planned[name] for name in names})
    write_index(folder, shards, planned)
    texts = [f"User: Assistant: {' '.join(WORDS)}"] * 8
    tokenizer = tiny.train_tokenizer(texts, vocab_size=config["vocab_size"])
    loading.save_processor(tiny.build_processor(tokenizer, image_size=config["vision_config"]["image_size"]), folder)
    content = {**config, "model_type": "idefics", "architectures": ["IdeficsForVisionText2Text"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def hash_of(name: str) -> int:
    """The same in every process, unlike hash()."""
    return int.from_bytes(name.encode()[-8:], "little")


def write_recipe(out: Path, base: Path) -> Path:
    """A QLoRA recipe over sixteen dialogues about four plain images."""
    for number in range(4):
        PIL.Image.new("RGB", (224, 224), (60 * number, 90, 200 - 40 * number)).save(out / f"{number}.png")
    lines = []
    for number in range(16):
        content = [{"type": "image", "image": f"{number % 4}.png"}, {"type": "text", "text": " ".join(WORDS[:8])}]
        answer = " ".join(WORDS[(number + place) % len(WORDS)] for place in range(20 + number))
        lines.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    (out / "dialogues.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "model": {"base": str(base.resolve()), "quantize": "nf4"},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"sources": [{"path": "dialogues.jsonl"}], "max_length": 512, "prepared": str(out / "prepared")},
        "training": {"steps": 2, "row_tokens": 512, "row_images": 4, "tokens_per_step": 512, "learning_rate": 2.0e-4},
        "merge": False,
        "output": str(out / "run"),
    }
    path = out / "full_size.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def run_stage(name: str, command: list[str], out: Path, *, shown: bool = True) -> dict[str, Any]:
    """Seconds and peak RssAnon of a command; remembered, so that it runs once."""
    done = out / f"{name}.json"
    if not done.is_file():
        log = out / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)  # noqa: S603
            started, peak = time.perf_counter(), 0
            while process.poll() is None:
                peak = max(peak, anonymous(process.pid))
                time.sleep(0.2)
        if process.returncode:
            sys.exit(f"{name} failed: {log}\n{log.read_text(errors='replace')[-3000:]}")
        figures = {"seconds": round(time.perf_counter() - started, 1), "peak_gb": round(peak / 1e9, 2)}
        done.write_text(json.dumps(figures) + "\n")
    figures = json.loads(done.read_text())
    if shown:
        print(f"{name:24}{figures['seconds']:10.1f} s{figures['peak_gb']:10.2f} GB", flush=True)
    return figures


def anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="9b")
    parser.add_argument("--out", type=Path, default=Path("runs/full_size"))
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out, config = (arguments.out / arguments.shape).resolve(), SHAPES[arguments.shape]
    base = out / "base"
    out.mkdir(parents=True, exist_ok=True)
    if arguments.write:
        write_base(config, base)
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    finetune = [sys.executable, "-m", "finetune"]
    print(f"{sum(count_parameters(config).values()):,} parameters\n{'stage':24}{'time':>12}{'peak RssAnon':>13}")
    again = [sys.executable, __file__, "--shape", arguments.shape, "--out", str(arguments.out), "--write"]
    run_stage("write", again, out)
    recipe = str(write_recipe(out, base))
    run_stage("plan", [*finetune, "plan", recipe, "--json"], out)
    run_stage("train", [*finetune, "train", recipe], out)
    run_stage("merge", [*finetune, "merge", str(out / "run"), "--onto", "full", "--json"], out)
    run_stage("verify", [*finetune, "merge", str(out / "run" / "merged"), "--verify", "--json"], out)


if __name__ == "__main__":
    main()
