"""What a run folder holds decides what is done in it: changed data, changed keys, files that are gone, cut or odd."""

import io
import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import PIL.Image
import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from finetune import pipeline as run_module
from finetune.base_model import open_base
from finetune.cli import app
from finetune.pipeline import open_run, resolve_sources, stages_of
from finetune.pipeline import run as run_stages
from finetune.recipe.load import load_recipe
from finetune.training.callbacks import ProgressBar
from modeling.errors import UserError

STAGES = ("train", "evaluate", "merge")


@pytest.fixture(scope="module")
def finished(write_recipe, tmp_path_factory):
    """(recipe, folder of its finished run), with held-out data of its own; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("finished")
    data = {"eval_split": 0, "eval_sources": [{"format": "messages", "path": "held.jsonl"}]}
    path = write_recipe(folder, data=data, training={"steps": 2, "checkpoint_every": 1})
    lines = (path.parent / "dialogues.jsonl").read_text().splitlines()
    (path.parent / "held.jsonl").write_text("\n".join(lines[:2]))
    recipe = load_recipe(path)
    run_stages(recipe)
    return path, folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    """(recipe, folder, overrides that name it): a copy of the finished run over the same data."""
    path, folder = finished
    shutil.copytree(folder, tmp_path / "copy")
    return path, tmp_path / "copy", [f"output={tmp_path / 'copy'}"]


def interrupt(folder):
    """As if the run had been killed after its first checkpoint."""
    for name in ("adapter", "merged", "checkpoint-2"):
        shutil.rmtree(folder / name)
    for name in ("training.json", "evaluation.json", "merge.json", "predictions.jsonl", "predictions.html"):
        (folder / name).unlink()


def run(path, *overrides, verb="run"):
    return CliRunner().invoke(app, [verb, str(path), *overrides])


def refused(outcome):
    assert outcome.exit_code == 1, outcome.output
    assert "Traceback" not in outcome.output
    return " ".join(outcome.stderr.split())


@pytest.fixture
def changed(finished):
    """changed(name, content) writes over a file of the data until the test has ended."""
    folder, before = finished[0].parent, {}

    def change(name, content):
        before.setdefault(name, (folder / name).read_bytes())
        (folder / name).write_bytes(content)

    yield change
    for name, content in before.items():
        (folder / name).write_bytes(content)


def other_words(finished):
    """As many dialogues, tokens and images, and other words."""
    content = (finished[0].parent / "dialogues.jsonl").read_bytes()
    assert content.count(b"is it a dog?") == 4
    return content.replace(b"is it a dog?", b"is it a god?")


def repainted():
    file = io.BytesIO()
    PIL.Image.new("RGB", (20, 30), (1, 2, 3)).save(file, "PNG")
    return file.getvalue()


CHANGES = {
    "other words": ("dialogues.jsonl", other_words, "dialogues.jsonl[train] holds something else"),
    "a line more": ("dialogues.jsonl", lambda finished: other_words(finished) + b"\n", "holds something else"),
    "another image": ("red.png", lambda finished: repainted(), "red.png: ha"),
}


@pytest.mark.parametrize(
    ("change", "verb"), [("other words", "train"), ("a line more", "run"), ("another image", "merge")]
)
def test_data_changed_after_done_is_refused_and_the_choices_named(finished, copy, changed, change, verb):
    path, folder, overrides = copy
    name, content, said = CHANGES[change]
    changed(name, content(finished))
    told = refused(run(path, *overrides, verb=verb))
    assert f"{folder}: the data has changed since this run began: " in told
    assert said in told
    for choice in ("output=runs/NAME", "delete this one to train anew", "data.changed=keep"):
        assert choice in told


def test_data_changed_after_done_is_kept_when_asked(finished, copy, changed):
    path, folder, overrides = copy
    changed("dialogues.jsonl", other_words(finished))
    before = json.loads((folder / "result.json").read_text())
    outcome = run(path, *overrides, "data.changed=keep")
    assert outcome.exit_code == 0, outcome.output
    assert "holds something else; what was trained is kept as it is" in " ".join(outcome.stderr.split())
    assert json.loads((folder / "result.json").read_text()) == before
    shutil.rmtree(folder / "merged")  # it can be merged, and is not asked about data that it was not trained on
    assert run(path, *overrides, "data.changed=keep").exit_code == 0
    merge = json.loads((folder / "result.json").read_text())["merge"]
    assert merge["weights"] == before["merge"]["weights"]
    assert "answers" not in merge
    (folder / "evaluation.json").unlink()
    assert "what is held out now may be what was trained on" in refused(run(path, *overrides, "data.changed=keep"))


@pytest.mark.parametrize("change", CHANGES)
def test_data_changed_in_the_middle_of_a_run_is_refused_also_when_the_end_may_be_kept(finished, copy, changed, change):
    path, folder, overrides = copy
    interrupt(folder)
    name, content, said = CHANGES[change]
    changed(name, content(finished))
    told = refused(run(path, *overrides, "data.changed=keep"))
    assert said in told
    assert "put the data back, and go on" in told
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1"]


def test_data_that_is_gone_is_refused_and_goes_on_when_it_is_back(copy, finished, changed):
    path, _, overrides = copy
    content = (path.parent / "dialogues.jsonl").read_bytes()
    changed("dialogues.jsonl", b"")
    (path.parent / "dialogues.jsonl").unlink()
    assert "dialogues.jsonl[train] cannot be read any more" in refused(run(path, *overrides))
    (path.parent / "dialogues.jsonl").write_bytes(content)
    assert run(path, *overrides).exit_code == 0


def test_held_out_data_that_changed_is_evaluated_anew_and_nothing_is_trained(copy, changed):
    path, folder, overrides = copy
    lines = (path.parent / "dialogues.jsonl").read_bytes().splitlines()
    changed("held.jsonl", b"\n".join(lines[2:5]))
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    outcome = run(path, *overrides, verb="evaluate")
    assert outcome.exit_code == 0, outcome.output
    assert "evaluate: its settings, its data or the adapter have changed since; done again" in outcome.stderr
    assert json.loads((folder / "data.json").read_text())["held_out_examples"] == 3
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


def test_held_out_data_that_chose_the_checkpoint_is_data_of_the_training(copy, changed):
    path, folder, overrides = copy
    overrides = [*overrides, "training.evaluate_every=1", "evaluation=null", "merge=false"]
    shutil.rmtree(folder)
    assert run(path, *overrides).exit_code == 0
    changed("held.jsonl", (path.parent / "dialogues.jsonl").read_bytes())
    assert "held.jsonl[train] holds something else" in refused(run(path, *overrides))


@pytest.mark.parametrize("stage", ["finished", "interrupted"])
def test_base_that_changed_is_refused(finished, copy, shallow_folder, tmp_path, stage):
    path, folder, overrides = copy
    base = shutil.copytree(shallow_folder, tmp_path / "base")
    shutil.rmtree(folder)
    overrides = [*overrides, f"model.base={base}", "evaluation=null", "merge=false"]
    assert run(path, *overrides).exit_code == 0
    if stage == "interrupted":
        shutil.rmtree(folder / "adapter")
        (folder / "training.json").unlink()
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    told = refused(run(path, *overrides))
    assert "has changed since this run began: same name, other content" in told


def adapter(folder):
    return {path.name: path.read_bytes() for path in (folder / "adapter").glob("*.safetensors")}


GONE = {
    "adapter": "train",
    "adapter/trained.safetensors": "train",
    "adapter/finetune.json": "train",
    "training.json": "train",
    "predictions.jsonl": "evaluate",
    "evaluation.json": "evaluate",
    "merged": "merge",
    "merged/model.safetensors": "merge",
    "merged/config.json": "merge",
    "merged/tokenizer.json": "merge",
    "merge.json": "merge",
    "predictions.html": None,
    "curves.png": None,
    "result.json": None,
    "data.json": None,
    "environment.json": None,
    "recipe.yaml": None,
}


@pytest.mark.parametrize("name", GONE)
def test_files_that_are_gone_come_back_and_no_more_is_done(finished, copy, name):
    path, folder, overrides = copy
    place = folder / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    outcome = run(path, *overrides)
    assert outcome.exit_code == 0, outcome.output
    done = {stage for stage in STAGES if f"{stage}: done before" not in outcome.stderr}
    assert done == ({GONE[name]} - {None})
    if name != "data.json" or done:
        assert place.exists()
    assert adapter(folder) == adapter(finished[1])
    results = [json.loads((one / "result.json").read_text()) for one in (folder, finished[1])]
    for result in results:
        for key in ("seconds", "waiting_for_data"):
            result["train"].pop(key)
        result["merge"].pop("merged")
        result.pop("data", None)
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["merged/model.safetensors", "adapter/adapter_model.safetensors", "predictions.jsonl"])
def test_files_cut_to_half_are_made_anew(finished, copy, name):
    path, folder, overrides = copy
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    outcome = run(path, *overrides)
    assert outcome.exit_code == 0, outcome.output
    assert (folder / name).read_bytes() == content


def test_files_that_a_user_put_into_merged_stay(copy):
    path, folder, overrides = copy
    (folder / "merged" / "notes.txt").write_text("mine")
    (folder / "merged" / "model.safetensors").unlink()
    assert run(path, *overrides).exit_code == 0
    assert (folder / "merged" / "notes.txt").read_text() == "mine"
    assert (folder / "merged" / "model.safetensors").is_file()


def test_merging_looks_at_the_images_of_the_rows_it_asks_about_and_caches_none(copy, finished):
    path, folder, overrides = copy
    shutil.rmtree(folder / "merged")
    features = path.parent.parent / "features"
    features.rename(features.with_name("away"))
    try:
        assert run(path, *overrides, verb="merge").exit_code == 0
        assert not features.exists()
    finally:
        features.with_name("away").rename(features)
    merge = json.loads((folder / "merge.json").read_text())
    assert merge["answers"] == merge["same_answers"] > 0


def test_stages_after_one_that_was_done_again_are_done_again(copy):
    """Another adapter, as of a training with another seed."""
    path, folder, overrides = copy
    for place in [*folder.glob("checkpoint-*"), folder / "adapter"]:
        shutil.rmtree(place)
    first = json.loads((folder / "merged" / "provenance.json").read_text())["made_of"]
    outcome = run(path, *overrides, "training.seed=5")
    assert outcome.exit_code == 0, outcome.output
    assert "done before" not in outcome.stderr
    second = json.loads((folder / "merged" / "provenance.json").read_text())["made_of"]
    assert first["adapter"] != second["adapter"]
    assert first["base"] == second["base"]


def test_an_adapter_without_its_training_json_and_checkpoints_is_not_trained_over(copy):
    path, folder, overrides = copy
    for place in folder.glob("checkpoint-*"):
        shutil.rmtree(place)
    (folder / "training.json").write_text("{")
    before = adapter(folder)
    assert "no checkpoint to go on from" in refused(run(path, *overrides))
    assert adapter(folder) == before


LATER = {
    "evaluation.max_new_tokens=2": {"evaluate"},
    "evaluation.limit=1": {"evaluate"},
    "evaluation.batch_size=1": set(),
    "merge=false": set(),
    "training.trackers=[tensorboard]": set(),
    "training.checkpoint_every=2": set(),
    "training.instability.rollbacks=9": set(),
    "training.checkpointing=true": set(),
    "data.sources.0.license=cc-by-4.0": set(),
    "data.eval_sources=[]": set(),
    "data.workers=2": set(),
}


@pytest.mark.parametrize("override", LATER)
def test_keys_of_later_stages_may_change_on_a_finished_run(copy, override):
    path, folder, overrides = copy
    overrides = [*overrides, override, *(["evaluation=null"] if override == "data.eval_sources=[]" else [])]
    outcome = run(path, *overrides)
    assert outcome.exit_code == 0, outcome.output
    asked = stages_of(load_recipe(path, overrides))
    done = {stage for stage in asked if f"{stage}: done before" not in outcome.stderr}
    assert done == LATER[override]
    assert (folder / "recipe.yaml").read_text() == load_recipe(path, overrides).to_yaml()


def test_keys_of_later_stages_may_change_in_the_middle_of_a_run(copy, finished):
    path, folder, overrides = copy
    interrupt(folder)
    changes = ["evaluation.max_new_tokens=2", "training.checkpoint_every=2", "training.instability.action=stop"]
    outcome = run(path, *overrides, *changes)
    assert outcome.exit_code == 0, outcome.output
    assert "going on from checkpoint-1" in outcome.stderr
    assert adapter(folder) == adapter(finished[1])


@pytest.mark.parametrize("stage", ["finished", "interrupted"])
def test_keys_that_decide_the_training_are_refused_with_their_values_and_with_those_that_may_change(copy, stage):
    path, folder, overrides = copy
    if stage == "interrupted":
        interrupt(folder)
    outcome = run(path, *overrides, "training.learning_rate=1", "adapter.rank=2", "data.sources.0.limit=3")
    told = refused(outcome)
    first = "they differ in adapter.rank (was 4, is 2), data.sources.0.limit (was null, is 3), "
    assert f"holds the run of another recipe; {first}training.learning_rate (was 0.01, is 1.0)" in told
    assert "what may change in it: evaluation, merge, " in told
    assert "training.steps (was 2, is 4)" in refused(run(path, *overrides, "training.steps=4"))


def test_keys_may_all_change_where_nothing_is_trained(copy, finished):
    path, folder, overrides = copy
    interrupt(folder)
    shutil.rmtree(folder / "checkpoint-1")
    overrides = [*overrides, "model.base=null", "model.init=tiny"]
    outcome = run(path, *overrides, "training.learning_rate=1e-3", "adapter.rank=2")
    assert outcome.exit_code == 0, outcome.output
    assert (folder / "base" / "config.json").is_file()
    first = (folder / "base" / "tokenizer.json").read_bytes()
    for place in [*folder.glob("checkpoint-*"), folder / "adapter", folder / "merged"]:
        shutil.rmtree(place)
    outcome = run(path, *overrides, "data.sources.0.limit=3", verb="train")
    assert outcome.exit_code == 0, outcome.output
    assert (folder / "base" / "tokenizer.json").read_bytes() != first  # its vocabulary is that of the data


def test_a_folder_that_was_moved_is_still_the_run_s(copy, tmp_path):
    path, folder, _ = copy
    folder.rename(tmp_path / "elsewhere")
    outcome = run(path, f"output={tmp_path / 'elsewhere'}")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stderr.count("done before") == 3


OWN = (
    *("recipe.yaml", "inputs.json", "environment.json", "data.json", "training.json", "evaluation.json", "merge.json"),
    *("result.json", "metrics.jsonl", "unstable.jsonl", "merged/provenance.json", "adapter/finetune.json"),
    *("adapter/adapter_config.json", "checkpoint-2/trainer_state.json", "checkpoint-2/rows.json"),
    *("checkpoint-2/complete.json",),
)
ODD = [b"", b"{", b"[]", b"null", b"{}", b'{"step": "x", "base": 3, "made_of": {"files": {"/": 1}}}', b"\xff\xfe\x00"]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("contents", [ODD[:1], pytest.param(ODD[1:], marks=pytest.mark.slow)], ids=["empty", "odd"])
def test_own_files_cut_or_odd_are_named_or_made_anew(copy, name, contents):
    path, folder, overrides = copy
    for content in contents:
        (folder / name).write_bytes(content)
        outcome = run(path, *overrides)
        assert "Traceback" not in outcome.output
        assert outcome.exception is None or isinstance(outcome.exception, SystemExit), (content, outcome.exception)
        told = " ".join(outcome.stderr.split())
        if outcome.exit_code:
            assert name in told, (content, told)
            assert "delete" in told, (content, told)
            (folder / name).unlink()


@pytest.mark.parametrize("content", [b"", b"model: {", b"\xff"])
def test_recipe_yaml_that_is_not_whole_is_mended(copy, content):
    path, folder, overrides = copy
    before = load_recipe(path, overrides).to_yaml().encode()
    (folder / "recipe.yaml").write_bytes(content)
    assert run(path, *overrides).exit_code == 0
    assert (folder / "recipe.yaml").read_bytes() == before
    (folder / "inputs.json").write_text('{"recipe": {"model": 3}, "data": {}}')
    assert run(path, *overrides).exit_code == 0  # either of them tells it
    (folder / "recipe.yaml").write_bytes(content)
    (folder / "inputs.json").unlink()
    told = refused(run(path, *overrides))
    assert "something is trained here, and neither inputs.json nor recipe.yaml can be read" in told
    interrupt(folder)
    shutil.rmtree(folder / "checkpoint-1")
    with open_run(load_recipe(path, overrides)):
        pass
    assert (folder / "recipe.yaml").read_bytes() == before


def test_a_full_disk_at_the_start_leaves_nothing_that_locks_the_folder(copy, monkeypatch, tmp_path):
    path, _, _ = copy
    place = tmp_path / "new"
    original, writes = type(place).write_bytes, []

    def full(self, content):
        writes.append(self)
        if len(writes) == 2:
            original(self, content[:0])
            raise OSError(28, "No space left on device", str(self))
        return original(self, content)

    monkeypatch.setattr(type(place), "write_bytes", full)
    outcome = run(path, f"output={place}", verb="train")
    assert outcome.exit_code == 1
    assert "No space left on device" in outcome.stderr
    monkeypatch.undo()
    assert run(path, f"output={place}", verb="train").exit_code == 0
    assert {"recipe.yaml", "environment.json", "inputs.json"} <= {one.name for one in place.iterdir()}


def test_folders_that_are_no_checkpoints_are_left_alone(copy):
    path, folder, overrides = copy
    interrupt(folder)
    (folder / "checkpoint-notes").mkdir()
    assert run(path, *overrides, verb="train").exit_code == 0
    assert (folder / "checkpoint-notes").is_dir()


def test_a_checkpoint_with_a_changed_byte_in_its_state_is_not_gone_on_from(copy):
    path, folder, overrides = copy
    interrupt(folder)
    state = folder / "checkpoint-1" / "trainer_state.json"
    state.write_bytes(state.read_bytes().replace(b'"global_step": 1', b'"global_step": 7'))
    outcome = run(path, *overrides, verb="train")
    assert outcome.exit_code == 0, outcome.output
    assert "going on from" not in outcome.stderr
    assert "trainer_state.json is not there, or not as it was written" in " ".join(outcome.stderr.split())


@pytest.mark.parametrize(
    ("room", "processes", "parallel"), [(10**6, 2, "fsdp2"), (10**9, 2, "fsdp2"), (10**6, 2, "ddp")]
)
def test_an_evaluation_that_no_gpu_can_hold_is_refused_before_the_training(
    copy, monkeypatch, tmp_path, room, processes, parallel
):
    path, _, overrides = copy
    recipe = load_recipe(path, [*overrides, f"training.parallel={parallel}"])
    base = open_base(recipe, resolve_sources(recipe), tmp_path)
    monkeypatch.setattr(run_module, "gpu_memory", lambda: room)
    monkeypatch.setattr(run_module.collectives, "world_size", lambda: 2)
    monkeypatch.setattr(run_module.collectives, "on_main", lambda step, work: work())
    refuses = room < 10**9 and parallel == "fsdp2"
    expected = (
        pytest.raises(UserError, match=r"a GPU has 1\.0 MiB; leave `evaluation` out") if refuses else nullcontext()
    )
    with expected:
        run_module._require_room_to_evaluate(recipe, base)


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_the_progress_bar_ends_with_whatever_ends_the_training(error):
    state = SimpleNamespace(max_steps=3, global_step=0, is_world_process_zero=True)
    stopped = []
    with pytest.raises(error) if error else nullcontext(), ProgressBar() as bar:
        bar.on_train_begin(None, state, None)
        bar.progress.stop = lambda: stopped.append(bar)
        if error:
            raise error
    assert stopped == [bar]
