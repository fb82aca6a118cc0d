"""The run folder: stages done once, interruptions gone on from, every mistake told without a traceback."""

import json

import PIL.Image
import pytest
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data import prepare_shards, rows, shards
from finetune.pipeline import open_run, run
from finetune.recipe.load import load_recipe
from finetune.training.trainer import IdeficsTrainer
from modeling.errors import UserError


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_leaves_everything_its_docstring_names_and_is_done_once(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    result = run(recipe)
    folder = tmp_path / "run"
    for name in (
        *(
            "recipe.yaml",
            "environment.json",
            "data.json",
            "metrics.jsonl",
            "checkpoint-4",
            "adapter/trained.safetensors",
        ),
        *("adapter/adapter_model.safetensors", "training.json", "evaluation.json", "predictions.jsonl"),
        *("merged/model.safetensors", "merged/provenance.json", "merge.json", "result.json"),
    ):
        assert (folder / name).exists(), name
    assert result == json.loads((folder / "result.json").read_text())
    assert result["train"]["steps"] == 4
    assert result["train"]["parameters_trained"]["full"] == {"added_tokens": 384, "gates": 4}
    assert result["evaluate"]["base"]["loss"] > result["evaluate"]["tuned"]["loss"]
    assert result["merge"]["largest_difference"] < 1e-4 < result["merge"]["largest_difference_to_base"]
    assert result["merge"]["answers"] == result["merge"]["same_answers"] > 0
    (source,) = result["data"]["sources"]
    assert (source["read"], source["kept"], source["rejected"]) == (12, 12, {})
    assert result["data"]["training_examples"] + result["data"]["held_out_examples"] == 12
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert run(recipe) == result
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_interrupted_between_checkpoints_the_same_command_ends_as_if_nothing_had_happened(
    recipe_file, tmp_path, monkeypatch
):
    run(load_recipe(recipe_file, [f"output={tmp_path / 'whole'}"]), ("train",))
    interrupt(monkeypatch)
    outcome = invoke("train", recipe_file)
    assert outcome.exit_code == 130
    assert "the same command goes on" in outcome.output
    assert not (tmp_path / "run" / "training.json").exists()
    assert invoke("train", recipe_file).exit_code == 0
    assert_same_training(tmp_path / "run", tmp_path / "whole")


def interrupt(monkeypatch):
    """Ctrl-C in the middle of step 3; two rows a step."""
    original, calls = IdeficsTrainer.compute_loss, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(IdeficsTrainer, "compute_loss", interrupted)


def assert_same_training(one, other):
    for name in ("adapter_model.safetensors", "trained.safetensors"):
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    ours, theirs = (metrics(folder) for folder in (one, other))
    assert [(line["step"], line["loss"], line["tokens"], line["epoch"]) for line in ours] == [
        (line["step"], line["loss"], line["tokens"], line["epoch"]) for line in theirs
    ]


def test_cached_features_give_what_live_images_give_and_the_towers_are_asked_once(recipe_file, tmp_path, monkeypatch):
    changes = {"live": "data.cache_features=false", "cached": "data.cache_features=true"}
    results = {}
    for name, change in changes.items():
        recipe = load_recipe(recipe_file, [f"output={tmp_path / name}", change, "adapter.dropout=0"])
        results[name] = run(recipe, ("train", "evaluate"))
        assert (tmp_path / "features").exists() == (name == "cached")
    # Adam's first steps are signs of gradients, and rounding decides the sign of a gradient near zero.
    for live, cached in zip(metrics(tmp_path / "live"), metrics(tmp_path / "cached"), strict=True):
        assert cached["loss"] == pytest.approx(live["loss"], rel=1e-3), live["step"]
    for name in ("base", "tuned"):
        live, cached = (results[which]["evaluate"][name] for which in changes)
        assert cached["loss"] == pytest.approx(live["loss"], rel=1e-3)
        assert cached["questions"] == live["questions"]
    assert results["live"]["evaluate"]["base"]["exact"] == results["cached"]["evaluate"]["base"]["exact"]
    monkeypatch.setattr("finetune.training.training_stage.load_image_towers", None)  # a call would fail
    again = load_recipe(recipe_file, [f"output={tmp_path / 'again'}", "adapter.dropout=0"])
    run(again, ("train", "evaluate"))
    assert metrics(tmp_path / "again") == metrics(tmp_path / "cached")


@pytest.mark.parametrize("change", ["data.augment.flip=true", "model.resampler=lora"])
def test_images_that_change_or_towers_that_learn_run_live(recipe_file, tmp_path, change):
    recipe = load_recipe(recipe_file, [change, "training.steps=1"])
    assert not recipe.caches_features
    run(recipe, ("train",))
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(("free", "asked"), [(10**12, True), (10, False)])
def test_a_merged_model_too_large_for_this_machine_is_proved_by_blocks_alone(recipe_file, monkeypatch, free, asked):
    monkeypatch.setattr("finetune.export.merge_stage.free_memory", lambda: free)
    recipe = load_recipe(recipe_file, ["training.steps=1"])
    proof = run(recipe, ("train", "merge"))["merge"]
    assert ("answers" in proof) == asked
    assert proof["weights"]["blocks"] > 0
    shown = invoke("run", recipe_file, "training.steps=1").output
    assert ("answers equal to those of base + adapter" in shown) == asked
    assert "the merged model:" in shown


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def streaming_recipe(write_recipe, tmp_path, monkeypatch):
    """Dialogues that are streamed, one of them with a broken image, two rejected; and prepared ones, by tokens."""
    sources = [{"path": "streamed.jsonl", "stream": True, "weight": 1}, {"path": "prepared.jsonl", "weight": 3}]
    data = {"sources": sources, "eval_split": 0, "weigh": "tokens", "shuffle_buffer": 3}
    monkeypatch.setattr(rows, "LANES", 2)
    path = write_recipe(tmp_path, data=data, training={"steps": 12}, evaluation=None)
    folder = path.parent
    lines = (folder / "dialogues.jsonl").read_text().splitlines()
    shown = {"role": "user", "content": [{"type": "image", "image": "broken.png"}, {"type": "text", "text": "what?"}]}
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:40])
    broken = {"messages": [shown, {"role": "assistant", "content": "red"}]}
    (folder / "streamed.jsonl").write_text("\n".join([*lines[:6], "{broken", json.dumps(broken), "[]"]))
    (folder / "prepared.jsonl").write_text("\n".join(lines[6:]))
    return path


STREAMED = {
    "read": 9,
    "kept": 6,
    "limited": False,
    "broken": [],
    "rejected": {"not JSON": 1, "not an object": 1, "corrupt image": 1},
    "parts_rejected": {},
    "dialogues": 7,
    "examples": 7,
}


def test_a_streamed_run_interrupted_ends_as_if_nothing_had_happened_and_accounts_for_every_record(
    streaming_recipe, tmp_path, monkeypatch
):
    outcome = invoke("train", streaming_recipe, f"output={tmp_path / 'whole'}")
    assert outcome.exit_code == 0, outcome.output
    interrupt(monkeypatch)
    assert invoke("train", streaming_recipe).exit_code == 130
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert not (tmp_path / "run" / "training.json").exists()
    outcome = invoke("train", streaming_recipe)
    assert "going on from checkpoint-2" in outcome.output
    assert_same_training(tmp_path / "run", tmp_path / "whole")
    training = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert json.loads((tmp_path / "run" / "training.json").read_text())["streamed"] == training["streamed"]
    (account,) = training["streamed"]
    assert account["source"].endswith("streamed.jsonl[train]")
    assert {key: account[key] for key in STREAMED} == STREAMED
    assert account["first_rejected"]["corrupt image"].startswith("streamed.jsonl:8: ")
    assert training["steps"] == 12
    assert training["tokens_trained"] == sum(line["tokens"] for line in metrics(tmp_path / "whole") if "loss" in line)
    (prepared,) = json.loads((tmp_path / "whole" / "data.json").read_text())["sources"]
    assert prepared["source"].endswith("prepared.jsonl[train]")
    assert (prepared["read"], prepared["kept"]) == (6, 6)


@pytest.mark.slow
def test_a_streamed_run_is_the_same_with_any_number_of_worker_processes(streaming_recipe, tmp_path, monkeypatch):
    """Stopped with two and gone on with one, and without one."""
    assert invoke("train", streaming_recipe, f"output={tmp_path / 'whole'}").exit_code == 0
    interrupt(monkeypatch)
    assert invoke("train", streaming_recipe, "data.workers=2").exit_code == 130
    outcome = invoke("train", streaming_recipe, "data.workers=1")
    assert "going on from checkpoint-2" in outcome.output
    assert_same_training(tmp_path / "run", tmp_path / "whole")
    streamed = [json.loads((tmp_path / name / "training.json").read_text())["streamed"] for name in ("run", "whole")]
    assert streamed[0] == streamed[1]


@pytest.mark.parametrize("sources", [None, "[{path: dialogues.jsonl, stream: true}]", "[{path: dialogues.jsonl}]"])
def test_without_held_out_data_the_merge_is_proven_on_training_data(streaming_recipe, sources, monkeypatch):
    monkeypatch.chdir(streaming_recipe.parent)  # paths on the command line are relative to where it is given
    overrides = [f"data.sources={sources}"] if sources else []
    outcome = invoke("run", streaming_recipe, *overrides, "--json")
    assert outcome.exit_code == 0, outcome.output
    proof = json.loads(outcome.stdout)["merge"]
    assert proof["largest_difference"] < 1e-4 < proof["largest_difference_to_base"]
    streamed_alone = sources is not None and "stream" in sources
    assert (proof["answers"] == 0) == streamed_alone
    assert proof["answers"] == proof["same_answers"]


def test_a_streamed_source_with_nothing_usable_ends_the_run_with_the_reasons(streaming_recipe):
    (streaming_recipe.parent / "streamed.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    outcome = invoke("train", streaming_recipe)
    assert outcome.exit_code == 1
    said = " ".join(outcome.output.split())
    assert "1 x no answer to the last question (first:" in said
    assert "Traceback" not in said


def test_where_and_how_fast_data_is_prepared_is_no_part_of_a_run(recipe_file, tmp_path):
    for overrides in ([], ["data.workers=2", f"data.prepared={tmp_path / 'elsewhere'}"]):
        with open_run(load_recipe(recipe_file, overrides)):
            pass


def test_shares_of_an_array_of_jobs_are_joined_by_prepare(recipe_file, monkeypatch):
    monkeypatch.setattr(shards, "LEAST_BYTES", 100)  # so that the small file has several shards
    done = [
        json.loads(invoke("prepare", recipe_file, "--shard", share, "--json").stdout)["sources"][0]
        for share in ("2/2", "1/2")
    ]
    count = done[0]["shards"]
    assert count > 2
    assert [one["done"] for one in done] == [count // 2, count]
    monkeypatch.setattr(prepare_shards, "open_and_count", None)  # nothing is prepared again
    joined = invoke("prepare", recipe_file, "--json")
    assert joined.exit_code == 0, joined.output
    assert json.loads(joined.stdout)["sources"][0]["kept"] > 0


@pytest.mark.parametrize("share", ["3", "0/2", "3/2", "1/x", "-1/2"])
def test_a_share_that_is_none_is_refused(share, recipe_file):
    outcome = invoke("prepare", recipe_file, "--shard", share)
    assert outcome.exit_code == 1
    assert f"--shard: expected I/N with I from 1 to N, such as 3/16, got '{share}'" in outcome.output


def test_the_end_of_a_run_is_tables_answers_and_the_next_line(recipe_file, tmp_path):
    outcome = invoke("run", recipe_file)
    assert outcome.exit_code == 0, outcome.output
    for shown in (
        "eval questions",
        "the merged model",
        "answers equal to those of base + adapter",
        "reference: ",
        "answer: ",
    ):
        assert shown in outcome.output
    assert f"next: finetune chat {tmp_path / 'run' / 'merged'}" in "".join(outcome.output.splitlines())
    with PIL.Image.open(tmp_path / "run" / "curves.png") as curves:
        assert curves.format == "PNG"
        assert len(curves.convert("RGB").getcolors(1_000_000)) > 20


def test_continue_from_starts_where_the_other_adapter_stands(recipe_file, tmp_path):
    first = run(load_recipe(recipe_file), ("train", "evaluate"))
    overrides = [f"model.continue_from={tmp_path / 'run' / 'adapter'}", f"output={tmp_path / 'second'}"]
    run(load_recipe(recipe_file, overrides), ("train",))
    first_losses, second_losses = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "second")
    )
    assert second_losses[0] < first_losses[0]
    wrong = [
        f"model.continue_from={tmp_path / 'run' / 'adapter'}",
        "model.gates=frozen",
        f"output={tmp_path / 'third'}",
    ]
    with pytest.raises(UserError, match="the adapter does not fit the model"):
        run(load_recipe(recipe_file, wrong), ("train",))
    assert first["evaluate"]["tuned"]["questions"] > 0


def test_json_on_stdout_is_the_result_and_nothing_else(recipe_file, tmp_path):
    outcome = invoke("train", recipe_file, "--json")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout) == json.loads((tmp_path / "run" / "result.json").read_text())


def test_stages_out_of_order_say_what_comes_first(recipe_file):
    for verb in ("evaluate", "merge"):
        outcome = invoke(verb, recipe_file)
        assert outcome.exit_code == 1
        assert "nothing is trained here yet" in " ".join(outcome.output.split())


def mistakes(base_folder):
    yield "unknown key", ["training.lerning_rate=1"], "did you mean learning_rate?"
    yield "missing base", ["model.base=/nowhere/at/all"], "neither a folder here nor a hub id"
    yield "missing data", ["data.sources.0.path=gone.jsonl"], "nothing is there"
    yield "unfit lora", ["adapter.rank=0"], "adapter.rank: input should be greater than 0"
    yield "everything rejected", ["data.max_length=8"], "no dialogue is left: "


@pytest.mark.parametrize("case", range(5))
def test_a_user_s_mistake_is_one_message_and_status_1(recipe_file, base_folder, case):
    _, overrides, message = list(mistakes(base_folder))[case]
    outcome = invoke("run", recipe_file, *overrides)
    assert outcome.exit_code == 1
    assert message in " ".join(outcome.output.split())
    assert "Traceback" not in outcome.output


def test_a_base_that_is_not_idefics(recipe_file, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    for verb in ("check", "train"):
        outcome = invoke(verb, recipe_file, f"model.base={tmp_path / 'llama'}")
        assert outcome.exit_code == 1
        assert "expected an IDEFICS model (model_type 'idefics'), got model_type 'llama'" in " ".join(
            outcome.output.split()
        )


def test_a_full_disk_is_told_and_what_was_finished_stays(recipe_file, tmp_path, monkeypatch):
    run(load_recipe(recipe_file), ("train",))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", str(tmp_path / "run" / "merged.partial"))

    monkeypatch.setattr("finetune.export.merge_stage.merge", full)
    outcome = invoke("merge", recipe_file)
    assert outcome.exit_code == 1
    assert "No space left on device; what is complete is kept" in " ".join(outcome.output.split())
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_every_rejected_record_has_its_line_in_data_json(recipe_file, tmp_path):
    bad = [
        "{broken",
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}]}),
        json.dumps({"messages": [{"role": "assistant", "content": "hi"}]}),
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "../secret.png"}]},
                    {"role": "assistant", "content": "x"},
                ]
            }
        ),
        json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x" * 2000}]}),
    ]
    with (recipe_file.parent / "dialogues.jsonl").open("a") as lines:
        lines.write("\n" + "\n".join(bad) + "\n")
    run(load_recipe(recipe_file, ["data.sources.0.limit=16"]), ("train",))
    (source,) = json.loads((tmp_path / "run" / "data.json").read_text())["sources"]
    assert (source["read"], source["kept"], source["limited"]) == (16, 12, True)
    assert source["rejected"] == {
        "not JSON": 1,
        "empty answer": 1,
        "roles do not alternate": 1,
        "image outside the image root": 1,
    }
    assert source["first_rejected"]["empty answer"] == "dialogues.jsonl:14: turn 2"


def test_a_run_that_rejects_records_says_so(recipe_file):
    with (recipe_file.parent / "dialogues.jsonl").open("a") as lines:
        lines.write("\n{broken\n{again")
    outcome = invoke("train", recipe_file)
    assert "2 of 14 records rejected: not JSON 2" in " ".join(outcome.output.split())


def data_of(folder):
    return json.loads((folder / "data.json").read_text())


def overlapping(recipe_file, rule, output):
    """Trained on twelve dialogues, the last of them held out; what it shares is reported or dropped."""
    last = (recipe_file.parent / "dialogues.jsonl").read_text().splitlines()[-1]
    (recipe_file.parent / "held.jsonl").write_text(last)
    return [
        "data.eval_split=0",
        "data.eval_sources=[{path: held.jsonl}]",
        f"data.overlap={rule}",
        f"output={output}",
    ]


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("report", 12),
        ("drop_questions", 10),  # without the held-out dialogue itself, and the one it goes on from
        ("drop_images", 7),  # without those that show the red image
    ],
)
def test_what_training_and_held_out_data_share_is_counted_and_dropped_if_asked(
    recipe_file, tmp_path, rule, left, monkeypatch
):
    monkeypatch.chdir(recipe_file.parent)
    outcome = invoke("train", recipe_file, *overlapping(recipe_file, rule, tmp_path / rule))
    assert outcome.exit_code == 0, outcome.output
    data = data_of(tmp_path / rule)
    assert data["overlap"] == {
        "images": 1,
        "questions": 2,
        "training_examples_with_images": 5,
        "training_examples_with_questions": 2,
        "dropped": rule != "report",
    }
    assert (data["training_examples"], data["held_out_examples"]) == (left, 1)
    (source,) = data["sources"]
    assert (source["examples"], source["draws_per_epoch"], source["repeats_per_epoch"]) == (12, left, 1.0)
    said = " ".join(outcome.output.split())
    shared = "share 1 images (in 5 training examples) and 2 questions about equal images (in 2)"
    assert f"training and held-out data {shared}: {'kept' if rule == 'report' else 'dropped'}" in said


def test_dropping_every_training_example_is_a_mistake(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(recipe_file.parent)
    overrides = overlapping(recipe_file, "drop_images", tmp_path / "out")
    outcome = invoke("train", recipe_file, *overrides, "data.eval_sources=[{path: dialogues.jsonl}]")
    assert outcome.exit_code == 1
    assert "data.overlap: every training example would be dropped" in " ".join(outcome.output.split())


def test_draws_and_repeats_per_epoch_are_told(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(recipe_file.parent)
    sources = "[{path: dialogues.jsonl, weight: 4, limit: 3}, {path: dialogues.jsonl, weight: 1}]"
    overrides = [f"data.sources={sources}", "data.eval_split=0", "evaluation=null"]
    first, second = {}, {}
    for weigh in ("examples", "tokens"):
        outcome = invoke("train", recipe_file, *overrides, f"data.weigh={weigh}", f"output={tmp_path / weigh}")
        assert outcome.exit_code == 0, outcome.output
        first[weigh], second[weigh] = data_of(tmp_path / weigh)["sources"]
    assert [(one["examples"], one["draws_per_epoch"]) for one in (first["examples"], second["examples"])] == [
        (3, 12),
        (12, 3),
    ]
    assert (first["examples"]["repeats_per_epoch"], second["examples"]["repeats_per_epoch"]) == (4, 0.25)
    tokens = [one["tokens"] for one in (first["tokens"], second["tokens"])]
    repeats = [one["repeats_per_epoch"] for one in (first["tokens"], second["tokens"])]
    shares = [repeat * amount / sum(tokens) for repeat, amount in zip(repeats, tokens, strict=True)]
    assert shares == pytest.approx([0.8, 0.2], abs=1 / sum(tokens))
    assert first["tokens"]["draws_per_epoch"] == round(3 * repeats[0]) > 12  # a short dialogue is drawn more often
