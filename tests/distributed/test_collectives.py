"""Two processes do what one does: the same files, figures and answers, each written by one of them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file

from finetune.data import join_questions, rows, shards
from finetune.distributed import collectives
from finetune.pipeline import run
from finetune.recipe.load import load_recipe
from modeling.device import CHOICES
from modeling.errors import UserError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}

PART_RECORDS = 4
"""Of twelve dialogues: parts for two nodes."""

WATCHED = """
import os, sys
from pathlib import Path
from finetune.cli import app
from finetune.exit_codes import quiet
quiet()
from finetune.evaluation import evaluate, generate
from dataclasses import replace
from modeling.device import CHOICES
from finetune.data import join_questions, shards
shards.LEAST_BYTES, shards.BLOCK = 1, {part_records}
join_questions.PART_DIALOGUES = {part_records}
CHOICES["cpu"] = replace(CHOICES["cpu"], tower_images=1)
place, written = Path({folder!r}), open({folder!r} + "/written." + os.environ["RANK"], "w")
def watch(event, arguments):
    if event == "os.rename":
        name = arguments[1]
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        name = arguments[0]
    else:
        return
    if isinstance(name, str | Path) and Path(name).is_relative_to(place):
        print(Path(name).relative_to(place), file=written, flush=True)
sys.addaudithook(watch)
def told(module, name, word):
    original = getattr(module, name)
    def tell(*arguments, **options):
        print(word, file=written, flush=True)
        return original(*arguments, **options)
    setattr(module, name, tell)
told(generate, "greedy", "asked")
told(evaluate, "packed_loss", "measured")
app()
"""
"""`finetune`, with every file written below a folder, every batch asked and row measured told in written.RANK."""


def in_two(code, *arguments):
    """(exit status, stdout, stderr) of each of two processes that run `code`, as launchers on two nodes start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = ENVIRONMENT | {name: str(place) for name, place in places.items()}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env={**environment, "RANK": rank}, **streams) for rank in ("0", "1")]
    outcomes = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *outcome) for process, outcome in zip(processes, outcomes, strict=True)]


@pytest.fixture(scope="module")
def recipe_of(write_recipe, tmp_path_factory):
    """recipe_of(folder) -> a recipe file and overrides: data is prepared in `folder`, and the run is `folder`/run."""
    changes = {"adapter": {"dropout": 0.0}, "training": {"steps": 2}, "evaluation": {"batch_size": 2}}
    recipe = write_recipe(tmp_path_factory.mktemp("recipe"), data={"eval_split": 0.4}, **changes)
    return lambda folder: [recipe, f"data.prepared={folder / 'prepared'}", f"output={folder / 'run'}"]


@pytest.fixture(scope="module")
def one(recipe_of, tmp_path_factory):
    """What one process makes of the recipe."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "LEAST_BYTES", 1)
        patch.setattr(shards, "BLOCK", PART_RECORDS)
        patch.setattr(join_questions, "PART_DIALOGUES", PART_RECORDS)
        patch.setitem(CHOICES, "cpu", replace(CHOICES["cpu"], tower_images=1))
        recipe, *overrides = recipe_of(folder)
        run(load_recipe(recipe, overrides), ("train", "evaluate", "merge"))
    return folder


@pytest.fixture(scope="module")
def two(one, recipe_of, tmp_path_factory):
    """(folder, outcomes) of two processes, of two nodes, that evaluate and merge the adapter of one."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "run").mkdir()
    shutil.copytree(one / "run" / "adapter", folder / "run" / "adapter")
    for name in ("inputs.json", "training.json", "metrics.jsonl"):
        shutil.copy(one / "run" / name, folder / "run" / name)
    code = WATCHED.format(part_records=PART_RECORDS, folder=str(folder))
    return folder, in_two(code, "run", *recipe_of(folder), "--json")


def result(folder, name):
    return json.loads((folder / "run" / name).read_text())


def written(folder, number):
    return (folder / f"written.{number}").read_text().splitlines()


def test_two_processes_evaluate_as_one(one, two):
    """Figures and answers are the same."""
    folder, outcomes = two
    assert [status for status, *_ in outcomes] == [0, 0], outcomes
    assert result(one, "evaluation.json") == result(folder, "evaluation.json")
    assert result(one, "evaluation.json")["tuned"]["questions"] > 4  # more batches than processes
    predictions = [place / "run" / "predictions.jsonl" for place in (one, folder)]
    assert predictions[0].read_bytes() == predictions[1].read_bytes()
    assert result(one, "data.json") == result(folder, "data.json")


def test_two_processes_merge_as_one(one, two):
    """The model that one of two processes merges is that of one."""
    folder, _ = two
    weights = [place / "run" / "merged" / "model.safetensors" for place in (one, folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    proof = result(folder, "merge.json")
    assert proof["answers"] == proof["same_answers"] > 0


def test_two_nodes_prepare_as_one(one, two):
    """Byte for byte."""
    folder, _ = two
    (mine,), (theirs,) = (sorted((place / "prepared").glob("dialogues*/")) for place in (one, folder))
    assert mine.name == theirs.name
    names = sorted(path.name for path in mine.iterdir())
    assert names == sorted(path.name for path in theirs.iterdir())
    assert {"examples.arrow", "images.arrow", "files.arrow", "stats.json"} <= set(names)
    for name in names:
        assert (mine / name).read_bytes() == (theirs / name).read_bytes(), name


def test_two_processes_compute_features_as_one(one, two):
    """Each computes some of them."""

    def held(place):
        files = [load_file(path) for path in (place / "features").rglob("*.safetensors")]
        rows = [row for file in files for row in zip(file["images"].numpy(), file["features"], strict=True)]
        return {bytes(digest): features for digest, features in rows}

    folder, _ = two
    mine, theirs = held(one), held(folder)
    assert mine.keys() >= theirs.keys()
    assert len(theirs) > 1
    assert all(torch.equal(mine[digest], theirs[digest]) for digest in theirs)
    by_each = [[name for name in written(folder, rank) if name.endswith(".safetensors")] for rank in (0, 1)]
    by_each = [sum(name.startswith("features/") for name in names) for names in by_each]
    assert min(by_each) > 0
    assert sum(by_each) == len(list((folder / "features").rglob("*.safetensors")))


def test_two_processes_write(two):
    """One writes the run folder, and each its parts of what is prepared."""
    folder, _ = two
    main, other = (written(folder, number) for number in (0, 1))
    of_the_run = [name for name in main if name.startswith("run/")]
    for name in ("recipe.yaml", "environment.json", "data.json", "evaluation.json", "predictions.jsonl", "merge.json"):
        assert of_the_run.count(f"run/{name}") == 1, name
    for name in ("predictions.html", "result.json", "curves.png", "merged"):
        assert of_the_run.count(f"run/{name}") == 1, name
    assert [name for name in other if name.startswith("run/")] == []
    parts = [
        sorted(Path(name).name for name in names if re.fullmatch(r"prepared/[^/]+/parts/\d+", name))
        for names in (main, other)
    ]
    assert parts == [[f"{number:06}" for number in range(first, 16, 2)] for first in (0, 1)]


def test_two_processes_share_out_the_evaluation(one, two):
    """Two processes share out questions and held out rows."""
    folder, _ = two
    questions = result(one, "evaluation.json")["tuned"]["questions"]
    batches = -(-questions // 2)
    main, other = (Counter(written(folder, number)) for number in (0, 1))
    merging = 2 * -(-min(questions, 8) // 32)  # base + adapter and merged are asked after the base, by the main one
    assert main["asked"] - merging - 1 == 3 * -(-batches // 2)
    assert other["asked"] == 3 * (batches // 2)
    assert main["measured"] - other["measured"] in (0, 3)
    assert other["measured"] > 0


def test_two_processes_print_once(two):
    folder, ((_, stdout, stderr), (_, other_stdout, other_stderr)) = two
    assert json.loads(stdout) == result(folder, "result.json")
    assert "train: done before" in stderr
    assert (other_stdout, other_stderr) == ("", "")


# The steps that processes take together


def steps(folder, local_rank):
    if local_rank is not None:
        os.environ["LOCAL_RANK"] = local_rank
    me = collectives.rank()
    assert collectives.world_size() == 2

    # one for all: its value, and the mistakes it meets
    assert collectives.on_main("a", lambda: (me, collectives.rank(), collectives.world_size())) == (0, 0, 1)

    def full():
        raise OSError(28, "No space left on device", "merged")

    def wrong():
        raise UserError(f"wrong in {me}")

    mistakes = [
        ("b", full, OSError, "[Errno 28] No space left on device: 'merged'"),
        ("c", wrong, UserError, "wrong in 0"),
    ]
    for step, work, kind, message in mistakes:
        with pytest.raises(kind) as raised:
            collectives.on_main(step, work)
        assert (str(raised.value), type(raised.value)) == (message, kind)

    # the others find what the main one made
    def make():
        found = (folder / "made").exists()
        if not found:
            time.sleep(0.3)
            (folder / "made").write_text("")
        return found

    assert collectives.main_first("d", make) == (me == 1)

    # each its own; a mistake of one is raised on both
    assert collectives.each("e", lambda: me) == [0, 1]
    with pytest.raises(UserError, match=r"^wrong in 1$"):
        collectives.each("f", lambda: wrong() if me == 1 else None)

    # shares, in the order of the items, whatever their number; inside, nobody waits for another
    seen = []
    for items in (range(5), range(4), range(1), range(0)):
        seen.clear()
        assert collectives.share_out("g", items, lambda item: seen.append(item) or 10 * item) == [
            10 * item for item in items
        ]
        assert seen == list(items[me::2])
    assert collectives.on_main("h", lambda: collectives.share_out("i", range(3), lambda item: item)) == [0, 1, 2]
    assert collectives.each("j", lambda: collectives.each("k", lambda: me)) == [[0], [1]]

    # a folder that one does not see
    (folder / "seen").mkdir(exist_ok=True)
    collectives.require_shared("output", folder / "seen")
    with pytest.raises(UserError, match="output: /nowhere is there for the main process, and not for process 1 on"):
        collectives.require_shared("output", folder / "seen" if me == 0 else Path("/nowhere"))

    # one machine: its second process prepares nothing; two machines: both do
    nodes = collectives.nodes()
    assert nodes.each("l", lambda: me) == list(range(nodes.of))
    assert nodes.on_main("m", lambda: me) == 0

    # who comes to another step than the others is told
    with pytest.raises(AssertionError, match=r"^processes came to different steps: step 0, step 1$"):
        collectives.each(f"step {me}", lambda: None)
    return nodes.which, nodes.of


@pytest.mark.parametrize(("local_rank", "nodes"), [(None, [(0, 1), (None, 1)]), ("0", [(0, 2), (1, 2)])])
def test_steps_of_two_processes(tmp_path, local_rank, nodes):
    """On one machine; on two, where each is its machine's first."""
    assert run_processes(2, steps, tmp_path, local_rank) == nodes


def test_steps_of_one_process():
    """It waits for nobody, and its mistakes are its own."""
    assert collectives.on_main("a", lambda: collectives.world_size()) == 1
    assert collectives.share_out("b", range(3), lambda item: item + 1) == [1, 2, 3]
    team = collectives.nodes()
    assert (team.which, team.of, team.each("c", lambda: 5)) == (0, 1, [5])

    class OwnError(UserError):
        pass

    def wrong():
        raise OwnError("as it was")

    for step in (collectives.on_main, collectives.main_first, collectives.each):
        with pytest.raises(OwnError, match="as it was"):
            step("d", wrong)


@pytest.mark.parametrize(("rank", "said"), [("0", ["hello"]), ("1", [])])
def test_main_process_prints(rank, said):
    script = "from finetune import console; console.log('hello'); list(console.track([1], 'bar'))"
    command, environment = [sys.executable, "-c", script], {**ENVIRONMENT, "RANK": rank}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert [line for line in outcome.stderr.splitlines() if line and not line.startswith("bar ")] == said
    assert ("bar " in outcome.stderr) == (rank == "0")


# One machine, as torchrun starts it


def torchrun(file, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", file, *arguments]
    return subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.fixture
def watched(tmp_path):
    path = tmp_path / "watched.py"
    path.write_text(WATCHED.format(part_records=PART_RECORDS, folder=str(tmp_path)))
    return path


@pytest.mark.slow
def test_torchrun_does_everything(watched, recipe_of, tmp_path):
    """A fresh base is made, quantised, trained, evaluated and merged."""
    changes = ["model.base=null", "model.init=tiny", "model.quantize=nf4", "data.eval_split=0.2"]
    outcome = torchrun(watched, "run", *recipe_of(tmp_path), *changes, "--json")
    assert outcome.returncode == 0, outcome.stderr
    figures = json.loads(outcome.stdout)
    assert figures == result(tmp_path, "result.json")
    assert figures["train"]["steps"] == 2
    assert figures["merge"]["answers"] > 0
    main, other = (written(tmp_path, number) for number in (0, 1))
    assert [name for name in other if name.startswith(("run/", "prepared/", "quantized/"))] == []
    for name in ("base", "training.json", "evaluation.json", "merge.json"):
        assert main.count(f"run/{name}") == 1, name
    assert sum(name.startswith("quantized/") and name.endswith("/config.json") for name in main) == 1
    assert outcome.stderr.count("train: waited for data") == 1


@pytest.mark.slow
def test_torchrun_mistake_of_all(watched, recipe_of, tmp_path):
    """It is reported once, and ends all."""
    outcome = torchrun(watched, "run", *recipe_of(tmp_path), "data.max_length=8", "--json")
    assert outcome.returncode == 1
    assert outcome.stderr.count("no dialogue is left:") == 1
    assert outcome.stdout == ""


def test_streamed_records_are_counted_over_processes(write_recipe, tmp_path, monkeypatch):
    """Twelve dialogues, three of them with an image that is broken, and an account that is one process's."""
    monkeypatch.setattr(rows, "LANES", 4)
    data = {"sources": [{"path": "dialogues.jsonl", "stream": True}], "eval_split": 0, "shuffle_buffer": 3}
    recipe = write_recipe(tmp_path, adapter={"dropout": 0.0}, data=data, training={"steps": 24}, evaluation=None)
    dialogues = recipe.with_name("dialogues.jsonl")
    lines = dialogues.read_text().splitlines()
    recipe.with_name("broken.png").write_bytes(b"no image")
    broken = [lines[number].replace(name, "broken.png") for number, name in ((0, "red.png"), (5, "green.png"))]
    assert all("broken" in line for line in broken)
    dialogues.write_text("\n".join([*lines, *broken, "no JSON", broken[0]]))

    def train(name):
        return run(load_recipe(recipe, [f"output={tmp_path / name}"]), ("train",))["train"]

    (alone,) = run_processes(1, train, "alone")
    together, same = run_processes(2, train, "together")
    assert together["streamed"] == same["streamed"] == alone["streamed"]
    (account,) = alone["streamed"]
    assert account["rejected"] == {"not JSON": 1, "corrupt image": 3}
    assert (account["read"], account["kept"]) == (16, 12)
    assert together["tokens_trained"] == alone["tokens_trained"]
