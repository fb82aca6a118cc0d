"""Stage `works`: `finetune run`, shortened, from data to merged model: in LoRA and in QLoRA."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from gpu.figures import Figures

ROOT = Path(__file__).parents[2]

RECIPE = """
model:
  {{base: {root}/recipes/tiny_base, {quantize}cross_attention: lora, decoder: lora, gates: full, added_tokens: full}}
adapter: {{rank: 8, alpha: 16}}
data:
  sources: [{{format: easy_vqa, split: train, turns: 10, limit: {limit}}}]
  eval_sources: [{{format: easy_vqa, split: test, limit: 40}}]
  max_length: 512
  prepared: {folder}/prepared
training:
  {{steps: {steps}, row_tokens: 1024, row_images: 32, tokens_per_step: 2048, learning_rate: 3e-3, warmup_steps: 2}}
evaluation: {{max_new_tokens: 8, batch_size: 32, limit: 32}}
output: {folder}/run
"""
"""The quickstart, shortened."""


def works(figures: Figures, device: torch.device, *, tiny: bool) -> None:
    steps, limit = (3, 60) if tiny else (60, 2000)
    for name, quantize in (("LoRA", ""), ("QLoRA", "quantize: nf4, ")):
        folder = figures.folder / f"works-{name.lower()}"
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(root=ROOT, folder=folder.resolve(), quantize=quantize, steps=steps, limit=limit),
            encoding="utf-8",
        )
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "finetune", "run", str(recipe)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # noqa: S603 - this toolkit
        (folder / "output.txt").write_text(done.stdout, encoding="utf-8")
        figures.check(f"{name}: exit status of finetune run", float(done.returncode), most=0)
        if done.returncode:
            print(done.stdout[-2000:], flush=True)
            continue
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        figures.add(f"{name}: loss of the first step", losses[0])
        figures.add(f"{name}: loss of the last steps", sum(losses[-3:]) / 3)
        figures.check(f"{name}: last / first", sum(losses[-3:]) / 3 / losses[0], most=1.0)
        merged = sorted(path.name for path in (folder / "run" / "merged").glob("*.safetensors"))
        figures.check(f"{name}: merged files that are missing", float(not merged), most=0)
