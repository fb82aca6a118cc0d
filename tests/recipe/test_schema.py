"""Recipes: what is read, and how every mistake is told."""

import dataclasses
import json
import os
from pathlib import Path
from typing import get_args

import peft
import pytest
import yaml
from sources import make_source

from finetune.data.formats import FORMATS
from finetune.data.read_dialogues import resolve_source
from finetune.recipe.adapter import LORA_FIELDS
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import FormatName
from modeling.errors import UserError

MINIMAL = """
model: {base: HuggingFaceM4/idefics-9b}
data: {sources: [{format: easy_vqa}]}
training: {epochs: 1}
"""


def written(tmp_path, text=MINIMAL, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def problems(path, *overrides):
    with pytest.raises(UserError) as raised:
        load_recipe(path, list(overrides))
    return str(raised.value).splitlines()


def test_defaults(tmp_path):
    """LoRA on both text towers, gates and added tokens in full; everything else is frozen."""
    recipe = load_recipe(written(tmp_path))
    assert recipe.model.modes == {
        "vision": "frozen",
        "resampler": "frozen",
        "cross_attention": "lora",
        "decoder": "lora",
        "gates": "full",
        "added_tokens": "full",
        "embeddings_and_head": "frozen",
    }
    assert recipe.adapter.lora == {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    assert recipe.output == "runs/mine"
    assert recipe.evaluation is None


def test_overrides_reach_into_lists(tmp_path):
    overrides = ["training.epochs=null", "training.steps=7", "data.sources.0.limit=3", "training.learning_rate=1e-4"]
    recipe = load_recipe(written(tmp_path), overrides)
    assert (recipe.training.epochs, recipe.training.steps) == (None, 7)
    assert recipe.data.sources[0].limit == 3
    assert recipe.training.learning_rate == 1e-4


def test_all_errors_at_once(tmp_path):
    """Each names its key, what was got, and the nearest valid key."""
    path = written(tmp_path)
    assert problems(
        path,
        "model.visoin=full",
        "model.decoder=lorra",
        "data.sources.0.fromat=x",
        "training.learning_rate=fast",
        "adapter.rnak=8",
        "modle=1",
        "nonsense",
    ) == [
        f"{path}: 7 errors",
        "  'nonsense': expected key=value, such as training.steps=10",
        "  model.decoder: input should be 'frozen', 'lora' or 'full', got 'lorra' (str); did you mean lora?",
        "  model.visoin: unknown key; did you mean vision?",
        "  adapter: rnak: unknown key; did you mean rank?",
        "  data.sources.0.fromat: unknown key; did you mean format?",
        "  training.learning_rate: input should be a valid number, unable to parse string as a number, "
        "got 'fast' (str)",
        "  modle: unknown key; did you mean model?",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("model.init=tiny", "model: expected either base (a folder or hub id) or init (a shape), got both"),
        ("model.base=null", "model: expected either base (a folder or hub id) or init (a shape), got neither"),
        ("training={steps: 3, epochs: 1}", "training: expected either epochs or steps, got both"),
        ("training.early_stop=2", "training: early_stop needs evaluate_every"),
        ("training.final_learning_rate=1", "training: final_learning_rate must be below learning_rate (0.0002)"),
        (
            "data.max_length=4096",
            "recipe: data.max_length (4096) must not exceed training.row_tokens (2048): a dialogue is never cut",
        ),
        (
            "evaluation={}",
            "recipe: evaluation needs held-out data: set data.eval_sources or data.eval_split",
        ),
        (
            "data.sources.0.format=messages",
            "data.sources.0: format messages: expected either path or hub, got neither",
        ),
        ("data.sources.0.format=auto", "data.sources.0: format auto: expected either path or hub, got neither"),
        (
            "data.sources.0={path: a.jsonl, hub: some/data}",
            "data.sources.0: format auto: expected either path or hub, got path and hub",
        ),
        ("data.sources.0={path: []}", "data.sources.0: format auto: expected either path or hub, got neither"),
        ("data.sources.0.path=a", "data.sources.0: format easy_vqa: expected neither path nor hub, got path"),
        ("data.sources.0.hub=a", "data.sources.0: format easy_vqa: expected neither path nor hub, got hub"),
        ("data.sources.0={path: 5}", "data.sources.0.path: expected a path or a list of paths, got 5"),
        ("data.sources.0={path: [a, 5]}", "data.sources.0.path.1: input should be a valid string, got 5 (int)"),
        ("data.sources.0={path: ''}", "data.sources.0.path.0: string should have at least 1 character, got '' (str)"),
        (
            "data.sources.0={path: a, image_root: {b: c}}",
            "data.sources.0.image_root: expected a path or a list of paths, got {'b': 'c'}",
        ),
        (
            "data.sources.0={path: a, subset: b}",
            "data.sources.0: subset and revision belong to a dataset on the hub",
        ),
        (
            "data.sources.0={path: a, revision: main}",
            "data.sources.0: subset and revision belong to a dataset on the hub",
        ),
        (
            "data.sources.0={path: a, download: https}",
            "data.sources.0.download: input should be False, True or 'http', got 'https' (str); did you mean http?",
        ),
        ("data.sources.0.turns=0", "data.sources.0.turns: input should be greater than 0, got 0 (int)"),
        (
            "data.sources.0.ordered=maybe",
            "data.sources.0.ordered: input should be a valid boolean, unable to interpret input, got 'maybe' (str)",
        ),
        (
            "data.sources.0.columns=[a]",
            "data.sources.0.columns: input should be a valid dictionary, got ['a'] (list)",
        ),
        (
            "data.weigh=token",
            "data.weigh: input should be 'examples' or 'tokens', got 'token' (str); did you mean tokens?",
        ),
        (
            "data.overlap=drop_image",
            "data.overlap: input should be 'report', 'drop_questions' or 'drop_images', got 'drop_image' (str); "
            "did you mean drop_images?",
        ),
        ("data.shuffle_buffer=0", "data.shuffle_buffer: input should be greater than 0, got 0 (int)"),
        ("data.workers=-1", "data.workers: input should be greater than or equal to 0, got -1 (int)"),
        ("data.prepared=7", "data.prepared: input should be a valid string, got 7 (int)"),
        (
            "data.eval_sources=[{path: a, stream: true}]",
            "data.eval_sources.0: stream belongs to data.sources: held-out data is prepared, and all of it is used",
        ),
        (
            "data.eval_sources=[{path: a, weight: 2}]",
            "data.eval_sources.0: weight belongs to data.sources: held-out data is prepared, and all of it is used",
        ),
        (
            "evaluation={documents: [{path: a, stream: true}]}",
            "evaluation.documents.0: stream belongs to data.sources: held-out data is prepared, and all of it is used",
        ),
        ("data.sources=[]", "data.sources: list should have at least 1 item after validation, not 0, got [] (list)"),
        ("adapter.r=4", "adapter: r is set by rank"),
        ("adapter.target_modules=all-linear", "adapter: target_modules is set by the towers under model"),
        ("adapter.bias=all", "adapter: bias: 'all' could not be merged exactly; expected one of ('none',)"),
        ("data.sources.3.limit=1", "'data.sources.3.limit=1': the recipe has no data.sources.3.limit to set"),
        (
            "training.seed=[",
            "'training.seed=[': the value is not YAML: expected the node content, but found '<stream end>', line 1, "
            "column 2",
        ),
        (
            "training.seed={{ seed }}",
            "'training.seed={{ seed }}': the value is YAML that a recipe cannot hold: a key that is "
            "not text, line 1; is it a template?",
        ),
        ("training.early_stop=true", "training.early_stop: expected a number, got True (bool)"),
        ("training.warmup_steps=yes", "training.warmup_steps: expected a number, got True (bool)"),
        ("training.epochs=on", "training.epochs: expected a number, got True (bool)"),
        ("training.learning_rate=true", "training.learning_rate: expected a number, got True (bool)"),
        ("training.betas=[0.9, false]", "training.betas.1: expected a number, got False (bool)"),
        ("training.instability={spike: true}", "training.instability.spike: expected a number, got True (bool)"),
        (
            "training.instability={rollbacks: true}",
            "training.instability.rollbacks: expected a number, got True (bool)",
        ),
        ("data.augment={shift: true}", "data.augment.shift: expected a number, got True (bool)"),
        ("data.sources.0.turns=true", "data.sources.0.turns: expected a number, got True (bool)"),
        ("data.sources.0.limit=true", "data.sources.0.limit: expected a number, got True (bool)"),
        ("data.sources.0.weight=true", "data.sources.0.weight: expected a number, got True (bool)"),
        ("data.max_length=true", "data.max_length: expected a number, got True (bool)"),
        ("adapter.rank=true", "adapter.rank: expected a number, got True (bool)"),
        ("adapter.dropout=false", "adapter.dropout: expected a number, got False (bool)"),
        ("data.sources.0.limit=0", "data.sources.0.limit: input should be greater than 0, got 0 (int)"),
        (
            "training.epochs=1.5",
            "training.epochs: input should be a valid integer, got a number with a fractional part, got 1.5 (float)",
        ),
        ("training.weight_decay=.inf", "training.weight_decay: input should be a finite number, got inf (float)"),
        ("training.clip=inf", "training.clip: input should be a finite number, got 'inf' (str)"),
        ("training.learning_rate=1e999", "training.learning_rate: input should be a finite number, got '1e999' (str)"),
        ("adapter.alpha=.inf", "adapter.alpha: input should be a finite number, got inf (float)"),
        ("adapter.dropout=.nan", "adapter.dropout: input should be a finite number, got nan (float)"),
        ("training.betas=[0.9, .nan]", "training.betas.1: input should be a finite number, got nan (float)"),
        (
            "training.epochs=9223372036854775808",
            "training.epochs: input should be less than or equal to 1000000000000000, got 9223372036854775808 (int)",
        ),
        ("training.seed=4294967296", "training.seed: input should be less than 4294967296, got 4294967296 (int)"),
        (
            "data.feature_cache_size=9e999GB",
            "data.feature_cache_size: feature_cache_size: expected a size with its unit, such as 5GB or 24GiB, "
            "got '9e999GB'",
        ),
        ("output=", "output: input should be a valid string, got None (NoneType)"),
        ("output=''", "output: string should have at least 1 character, got '' (str)"),
        ("data.prepared=''", "data.prepared: string should have at least 1 character, got '' (str)"),
        ("adapter.use_dora=1", "adapter: use_dora: expected true or false, got 1 (int)"),
        ("adapter.use_rslora='yes'", "adapter: use_rslora: expected true or false, got 'yes' (str)"),
        (
            "adapter.rank_pattern={q_proj: 8.5}",
            "adapter: rank_pattern: expected {pattern of names: rank}, got {'q_proj': 8.5} (dict)",
        ),
        (
            "adapter.rank_pattern={'[': 8}",
            "adapter: rank_pattern: expected {pattern of names: rank}, got {'[': 8} (dict)",
        ),
        (
            "adapter.alpha_pattern={q_proj: true}",
            "adapter: alpha_pattern: expected {pattern of names: alpha}, got {'q_proj': True} (dict)",
        ),
        ("adapter.exclude_modules=3", "adapter: exclude_modules: expected a pattern, or a list of names, got 3 (int)"),
        (
            "adapter.exclude_modules='('",
            "adapter: exclude_modules: expected a pattern, or a list of names, got '(' (str)",
        ),
        ("adapter.lora_bias=0", "adapter: lora_bias: 0 could not be merged exactly; expected one of (False,)"),
        (
            "adapter.eva_config={rho: 2}",
            "adapter: eva_config: expected null: its settings are objects that a recipe cannot hold, "
            "got {'rho': 2} (dict)",
        ),
        (
            "adapter.layers_to_transform=[0]",
            "adapter: layers_to_transform: expected null: PEFT takes it only beside a list of modules, and the towers "
            "are a pattern; see exclude_modules, got [0] (list)",
        ),
    ],
)
def test_one_mistake(tmp_path, override, problem):
    path = written(tmp_path)
    assert problems(path, override) == [f"{path}: 1 error", f"  {problem}"]


def test_weight_for_every_source_or_none(tmp_path):
    path = written(
        tmp_path, MINIMAL.replace("[{format: easy_vqa}]", "[{format: easy_vqa, weight: 2}, {format: easy_vqa}]")
    )
    assert problems(path)[1:] == ["  data: expected a weight for every source or for none, got 1 of 2"]


STREAMED = """
model: {base: HuggingFaceM4/idefics-9b}
data:
  sources: [{path: a.jsonl, stream: true, weight: 2}, {path: b.jsonl, weight: 1}]
  eval_sources: [{path: c.jsonl}]
training: {steps: 5}
"""


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["training.steps=null", "training.epochs=1"],
            "recipe: a streamed source has no epochs: set training.steps instead of training.epochs",
        ),
        (
            ["data.eval_sources=[]", "data.eval_split=0.1"],
            "data: a streamed source cannot be split: set eval_sources instead of eval_split",
        ),
        (
            ["data.overlap=drop_images"],
            "data: overlap: a streamed source cannot be compared with the held-out data before the run",
        ),
        (
            ["model.base=null", "model.init=tiny"],
            "recipe: model.init learns a vocabulary from whole sources, and one is streamed: set model.base",
        ),
        (
            ["data.sources.0.weight=null", "data.sources.1.weight=null"],
            "data: a streamed source has no size: expected a weight for every source",
        ),
        (["data.sources.1.weight=null"], "data: expected a weight for every source or for none, got 1 of 2"),
        (
            ["data.eval_sources.0.stream=true"],
            "data.eval_sources.0: stream belongs to data.sources: held-out data is prepared, and all of it is used",
        ),
    ],
)
def test_streamed_source_refused(tmp_path, overrides, problem):
    path = written(tmp_path, STREAMED)
    load_recipe(path)
    assert problems(path, *overrides) == [f"{path}: 1 error", f"  {problem}"]


def test_streamed_source_alone_needs_no_weight(tmp_path):
    load_recipe(written(tmp_path, STREAMED), ["data.sources=[{path: a.jsonl, stream: true}]"])


def test_everything_frozen_refused(tmp_path):
    off = [f"model.{tower}=frozen" for tower in ("cross_attention", "decoder", "gates", "added_tokens")]
    assert problems(written(tmp_path), *off)[1:] == [
        "  model: everything is frozen: expected at least one tower to be lora or full"
    ]


def test_duplicate_key(tmp_path):
    path = written(tmp_path, MINIMAL + "training: {steps: 5}\n")
    assert problems(path) == [f"{path}: YAML that a recipe cannot hold: duplicate key 'training', line 5"]


def test_not_a_recipe(tmp_path):
    assert "expected a mapping" in problems(written(tmp_path, "- 1\n"))[0]
    assert "not YAML" in problems(written(tmp_path, "model: [\n"))[0]
    assert "did you mean" in problems(tmp_path / "mien.yaml")[0]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=2e-4", "learning_rate", 2e-4),
        ("training.learning_rate='2e-4'", "learning_rate", 2e-4),
        ("training.tokens_per_step=1e4", "tokens_per_step", 10_000),
        ("training.tokens_per_step=10000.0", "tokens_per_step", 10_000),
        ("training.tokens_per_step=1_0000", "tokens_per_step", 10_000),
        ("training.warmup_steps=010", "warmup_steps", 10),
        ("training.checkpointing=yes", "checkpointing", True),
        ("training.checkpointing=3.0", "checkpointing", 3),
        ("training.weight_decay=1", "weight_decay", 1.0),
    ],
)
def test_numbers(tmp_path, override, key, value):
    found = getattr(load_recipe(written(tmp_path), [override]).training, key)
    assert (found, type(found)) == (value, type(value))


def test_override_of_an_alias(tmp_path):
    """An override of a list's entry changes no other entry that is an alias of the same."""
    text = MINIMAL.replace("[{format: easy_vqa}]", "[&one {format: easy_vqa}, *one]")
    recipe = load_recipe(written(tmp_path, text), ["data.sources.0.limit=3"])
    assert [source.limit for source in recipe.data.sources] == [3, None]


def test_override_fills_a_null_section(tmp_path):
    text = MINIMAL + "evaluation:\n"
    recipe = load_recipe(written(tmp_path, text), ["data.eval_split=0.1", "evaluation.limit=7"])
    assert recipe.evaluation.limit == 7


def test_many_errors_are_counted(tmp_path):
    """The first twenty are listed."""
    path = written(tmp_path)
    found = problems(path, "data.sources=[" + "{fromat: x}, " * 300 + "]", "y" * 100_000)
    assert found[0] == f"{path}: 301 errors"
    assert found[-1] == "  and 281 more"
    assert (len(found), max(map(len, found)) < 500) == (22, True)


@pytest.mark.parametrize(
    "keys", ["a." * 50_000 + "b", "data.sources.0.columns" + ".a" * 5_000, "data.sources." + "9" * 6_000]
)
def test_override_of_an_unknown_key_is_short(tmp_path, keys):
    path = written(tmp_path)
    (_, line) = problems(path, f"{keys}=1")
    assert line == f"  {keys + '=1'!r:.200}: the recipe has no {keys:.200} to set"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "expected a file, found a folder"),
        (lambda path: os.mkfifo(path), "expected a file, found a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "expected a file, found a device"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_recipe_that_is_no_file(tmp_path, make, reason):
    path = tmp_path / "r.yaml"
    make(path)
    assert problems(path) == [f"{str(path)!r}: cannot be read as a recipe: {reason}"]


@pytest.mark.parametrize(("name", "reason"), [("x" * 300, "File name too long"), ("a\0b", "embedded null byte")])
def test_recipe_with_an_impossible_name(tmp_path, name, reason):
    (line,) = problems(tmp_path / name)
    assert line.endswith(f": cannot be read as a recipe: {reason}")


def test_recipe_too_large(tmp_path):
    path = tmp_path / "r.yaml"
    with path.open("wb") as sparse:
        sparse.truncate(2**40)
    assert problems(path) == [f"{path}: too large for a recipe: expected at most 256 KiB"]


def test_path_too_long(tmp_path):
    (_, line) = problems(written(tmp_path), "model.base=" + "x" * 300)
    assert line.endswith(": File name too long")
    (line,) = problems(written(tmp_path, MINIMAL.replace("HuggingFaceM4/idefics-9b", "x" * 300)))
    assert line.endswith(": File name too long")


@pytest.mark.parametrize(
    ("changes", "steps", "doubts"),
    [
        ({}, 100, []),
        ({"warmup_steps": 99, "checkpoint_every": 100, "evaluate_every": 25, "early_stop": 3}, 100, []),
        (
            {"warmup_steps": 100, "checkpoint_every": 101, "evaluate_every": 101},
            None,
            [
                "warmup_steps (100) lasts for the whole run: the rate is never reached",
                "checkpoint_every (101) is longer: the only checkpoint is the last",
                "evaluate_every (101) is longer: nothing is evaluated on the way",
            ],
        ),
        ({"evaluate_every": 25, "early_stop": 4}, 100, ["early_stop (4 x 25 steps) is never reached"]),
        ({"warmup_steps": 60}, 50, ["warmup_steps (60) lasts for the whole run: the rate is never reached"]),
    ],
)
def test_doubts(tmp_path, changes, steps, doubts):
    """Settings that a run of so many steps never reaches are named."""
    overrides = ["data.eval_split=0.1", "training.epochs=null", "training.steps=100"]
    recipe = load_recipe(written(tmp_path), overrides + [f"training.{key}={value}" for key, value in changes.items()])
    assert recipe.doubts(steps) == [f"training, {steps or 100} steps: {doubt}" for doubt in doubts]


def test_doubts_of_unknown_steps(tmp_path):
    assert load_recipe(written(tmp_path), ["training.warmup_steps=1000000"]).doubts(None) == []


def test_lora_fields_pass_through(tmp_path):
    recipe = load_recipe(written(tmp_path), ["adapter.use_rslora=true"])
    assert recipe.adapter.lora["use_rslora"] is True


def test_lora_fields_are_those_of_peft():
    ours = {"r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"}
    peft_s_own = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"}
    peft_s_own |= {"revision", "inference_mode"}
    assert set(LORA_FIELDS) == {field.name for field in dataclasses.fields(peft.LoraConfig)} - ours - peft_s_own


EVERY_KEY = """
model: {base: base}
data:
  sources:
    - format: vqa
      path: [questions/*.json, ../answers.json]
      split: val
      image_root: [images, more.zip]
      image_name: "COCO_train2014_{image_id:012d}.jpg"
      columns: {question: asked}
      weight: 1.5
      limit: 9
      turns: 7
      ordered: false
      download: http
      license: cc-by-4.0
    - {hub: local, subset: coco, revision: main, download: true, image_root: images, stream: true, weight: 1}
    - {hub: some/data, weight: 1, ordered: true}
  eval_sources: [{path: a.jsonl, image_root: images}]
  weigh: tokens
  shuffle_buffer: 7
  prepared: elsewhere/prepared
  workers: 3
training: {steps: 1}
evaluation: {documents: [{format: text, path: texts}]}
"""


def test_every_key_of_data(tmp_path):
    for name in ("base", "local"):
        (tmp_path / name).mkdir()
    recipe = load_recipe(written(tmp_path, EVERY_KEY))
    assert recipe.model.base == str(tmp_path / "base")
    files, local, hub = recipe.data.sources
    assert files.path == (str(tmp_path / "questions" / "*.json"), str(tmp_path.parent / "answers.json"))
    assert files.image_root == (str(tmp_path / "images"), str(tmp_path / "more.zip"))
    assert (local.hub, local.image_root) == (str(tmp_path / "local"), (str(tmp_path / "images"),))
    assert (hub.hub, hub.path) == ("some/data", ())
    (held,) = recipe.data.eval_sources
    assert (held.path, held.image_root) == ((str(tmp_path / "a.jsonl"),), (str(tmp_path / "images"),))
    assert recipe.evaluation.documents[0].path == (str(tmp_path / "texts"),)
    data = recipe.data
    assert (data.weigh, data.shuffle_buffer, data.prepared, data.workers) == ("tokens", 7, "elsewhere/prepared", 3)
    assert resolve_source(files) == make_source(
        format="vqa",
        paths=(tmp_path / "questions" / "*.json", tmp_path.parent / "answers.json"),
        split="val",
        image_root=(tmp_path / "images", tmp_path / "more.zip"),
        image_name="COCO_train2014_{image_id:012d}.jpg",
        columns={"question": "asked"},
        weight=1.5,
        download="http",
        limit=9,
        turns=7,
        ordered=False,
        license="cc-by-4.0",
    )
    streamed = resolve_source(local.model_copy(update={"format": "cauldron"}))
    assert (streamed.hub, streamed.subset, streamed.revision) == (str(tmp_path / "local"), "coco", "main")
    assert (streamed.stream, streamed.download) == (True, True)
    assert resolve_source(hub.model_copy(update={"format": "llava"})).ordered is True


def test_defaults_of_data(tmp_path):
    recipe = load_recipe(written(tmp_path, MINIMAL.replace("format: easy_vqa", "path: a.jsonl, format: text")))
    (source,) = recipe.data.sources
    assert resolve_source(source) == make_source(
        format="text",
        paths=(tmp_path / "a.jsonl",),
        hub=None,
        subset=None,
        split="train",
        revision=None,
        stream=False,
        image_root=(),
        image_name=None,
        columns={},
        download=False,
        limit=None,
        turns=None,
        ordered=None,
        license=None,
    )
    data = recipe.data
    assert (data.weigh, data.overlap, data.shuffle_buffer) == ("examples", "report", 1000)
    assert (data.prepared, data.workers) == ("runs/prepared", None)


def test_format_auto(tmp_path, capsys):
    record = {"id": "1", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    recipe = load_recipe(written(tmp_path, MINIMAL.replace("format: easy_vqa", "path: a.jsonl")))
    assert recipe.data.sources[0].format == "auto"
    assert resolve_source(recipe.data.sources[0]).format == "sharegpt"
    said = " ".join(capsys.readouterr().err.split())
    assert "format sharegpt (recognised from its first records)" in said
    (tmp_path / "a.jsonl").write_text('{"a": 1, "b": 2}\n')
    with pytest.raises(UserError, match="format: auto: 1 records with the keys a, b are of no known format"):
        resolve_source(recipe.data.sources[0])


def test_format_names_are_those_of_the_readers():
    assert sorted(get_args(FormatName)) == sorted(["auto", *FORMATS])


def test_resolved_recipe_reads_back(tmp_path):
    for text in (MINIMAL, STREAMED, EVERY_KEY):
        recipe = load_recipe(written(tmp_path, text))
        again = load_recipe(written(tmp_path, recipe.to_yaml(), "again.yaml"))
        assert again == recipe
    assert yaml.safe_load(recipe.to_yaml())["training"]["betas"] == [0.9, 0.999]


def test_rows_per_step_rounds(tmp_path):
    recipe = load_recipe(written(tmp_path), ["training.row_tokens=2048", "training.tokens_per_step=5200"])
    assert recipe.training.rows_per_step == 3


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_fsdp2_refuses_8bit_optimizers(tmp_path, optimizer):
    told = problems(written(tmp_path), "training.parallel=fsdp2", f"training.optimizer={optimizer}")
    assert any(f"those of training.optimizer: {optimizer} cannot be" in line for line in told)
    assert load_recipe(written(tmp_path), ["training.parallel=fsdp2"]).training.parallel == "fsdp2"


RECIPES = Path(__file__).parents[2] / "recipes"


def test_steps_replace_epochs(tmp_path, capsys):
    """README's own: finetune run RECIPE training.steps=50."""
    own_data, mixture = (
        Path(__file__).parents[2] / "recipes" / "own_data.yaml",
        Path(__file__).parents[2] / "recipes" / "idefics-9b_mixture_128x80gb.yaml",
    )
    training = load_recipe(own_data, ["training.steps=50", "output=runs/short"]).training
    assert (training.epochs, training.steps) == (None, 50)
    assert "training.steps=50 replaces training.epochs: 3 of the recipe" in capsys.readouterr().err
    training = load_recipe(mixture, ["training.epochs=2"]).training
    assert (training.epochs, training.steps) == (2, None)
    assert "training.epochs=2 replaces training.steps: 22000 of the recipe" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected either epochs or steps, got both"):
        load_recipe(own_data, ["training.steps=50", "training.epochs=1"])
    assert load_recipe(own_data, ["training.steps=null"]).training.epochs == 3
    assert capsys.readouterr().err == ""


def test_placeholders_and_ignored_keys_of_a_source(tmp_path):
    def written_source(**more):
        return written(tmp_path, MINIMAL.replace("format: easy_vqa", json.dumps({"path": "a.jsonl", **more})[1:-1]))

    for ignore in ("tools", ["tools"]):
        (source,) = load_recipe(written_source(format="messages", placeholders="text", ignore=ignore)).data.sources
        assert (resolve_source(source).placeholders, resolve_source(source).ignore) == ("text", ("tools",))
    (source,) = load_recipe(written_source(format="messages")).data.sources
    assert (resolve_source(source).placeholders, resolve_source(source).ignore) == ("images", ())
    with pytest.raises(UserError, match=r"placeholders: .*'images' or 'text'"):
        load_recipe(written_source(placeholders="html"))
    with pytest.raises(UserError, match=r"ignore: expected a key or a list of keys, got 7"):
        load_recipe(written_source(ignore=7))
