"""Whatever a recipe, an override or a file of our own holds: values, or a short error that names the file, and soon.

`FUZZ=20000 pytest tests/test_fuzz_recipe.py` tries that many inputs of each kind, drawn anew each time.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from fuzzing import fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.verify import _read_provenance
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from finetune.run_dir import _read_inputs, _trained_recipe
from finetune.serving.generate_command import _open_journal
from finetune.training.callbacks import read_metrics
from finetune.training.fit_memory import _changes_of_run
from finetune.training.loss_spikes import read_events
from modeling.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SECONDS = 10
"""Of one example; what a file of a few kilobytes says takes a hundredth of one."""


YAML_TOKENS = (
    *("[", "]", "{", "}", ": ", "? ", "- ", ", ", "\n", "\t", "  ", "&a ", "*a", "<<: *a", "<<: ", "a: &a [*a]", "#"),
    *("!!python/object:os.x ", "!!set ", "!!binary ", "!!int ", "!!float ", "!!str ", "!x ", "|\n", ">-\n", "'", '"'),
    *("%", "@", "`", "~", "null", "true", "no", ".inf", "-.inf", ".nan", "1e400", "1e3", "-1", "0", "0x1f", "010"),
    *("1:30", "9" * 25, "9" * 5000, "2024-01-01", "2024-99-99", "{{ x }}", "---\n", "...\n", '"\\ud800"', '"\\0"'),
    *(
        "\x1b",
        "\u202e",
        "\ufeff",
        "[" * 400,
        "x" * 5000,
        "null\n",
        "training",
        "data",
        "sources",
        "path",
        "hub",
        "base",
    ),
    *("columns", "adapter", "rank_pattern", "model", "evaluation"),
)
JSON_TOKENS = (
    *("[", "]", "{", "}", ":", ",", '"', "\n", "null", "true", "NaN", "Infinity", "1e400", "-1", "9" * 25, "9" * 5000),
    *("0.5", '"\\ud800"', '"\\u0000"', "[" * 3000, '"x"', "[]", "{}", "\\", "\x00", '"answer"', '"record"'),
)


@st.composite
def mutations(draw, contents, tokens):
    """One of the contents with a few spans deleted, doubled, exchanged, or replaced by a token or by any bytes."""
    content = draw(st.sampled_from(contents))
    token = st.sampled_from([token.encode("utf-8", "surrogatepass") for token in tokens])
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 3, 20, 400])))
        new = draw(st.one_of(token, token, st.binary(max_size=4), st.just(content[start:end] * 2), st.just(b"")))
        content = content[:start] + new + content[end:]
    return content


def require_short(error, seconds):
    message = str(error)
    assert len(message) < 8_000
    assert max(map(len, message.splitlines())) < 1_000
    assert seconds < SECONDS


def outcome(work):
    """What `work` returns, or None where it ends with a short error."""
    started = time.monotonic()
    try:
        return work()
    except UserError as error:
        require_short(error, time.monotonic() - started)
        return None
    finally:
        assert time.monotonic() - started < SECONDS


@fuzz(120)
@given(mutations([path.read_bytes() for path in RECIPES], YAML_TOKENS))
def test_fuzz_recipe(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    made = outcome(lambda: load_recipe(path))
    if made is not None:
        assert Recipe.model_validate(made.model_dump()) == made
        path.write_text(made.to_yaml(), encoding="utf-8")
        assert load_recipe(path) == made  # as a run folder keeps it


def keys_of(value, prefix=""):
    """Every place in a recipe's values, as overrides name it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield f"{prefix}{key}"
        yield from keys_of(inner, f"{prefix}{key}.")


RECIPE = load_recipe(next(path for path in RECIPES if path.name == "quickstart.yaml"))
ODD_KEYS = ("adapter.rank_pattern", "adapter.x", "data.sources.-1.path", "x", "model.base.x")
KEYS = [*keys_of(RECIPE.model_dump(mode="json")), *ODD_KEYS]
NESTED = st.recursive(
    st.text(max_size=3) | st.integers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
)
VALUES = st.one_of(
    st.lists(st.sampled_from(YAML_TOKENS), max_size=4).map("".join),
    st.text(st.characters(codec=None), max_size=20),
    st.one_of(st.integers(), st.floats(), st.booleans(), st.none()).map(str),
    NESTED.map(json.dumps),
)
ANY_KEYS = st.lists(st.sampled_from([*KEYS, "0", "-1", "9" * 5000, "", "..", "*"]), max_size=5).map(".".join)
OVERRIDES = st.one_of(
    st.tuples(st.sampled_from(KEYS), VALUES).map("=".join),
    st.text(st.characters(codec=None), max_size=30),
    st.tuples(ANY_KEYS, VALUES).map("=".join),
)


@fuzz(200)
@given(st.lists(OVERRIDES, min_size=1, max_size=3))
def test_fuzz_override(overrides):
    path = next(path for path in RECIPES if path.name == "quickstart.yaml")
    made = outcome(lambda: load_recipe(path, overrides))
    assert made is None or isinstance(made.to_yaml(), str)


JOURNAL = b"""{"model": "m"}
{"record": 3, "answer": "A cat.", "stopped": true}
{"record": 1, "answer": "", "stopped": false}
"""


@fuzz(150)
@given(mutations([JOURNAL], JSON_TOKENS))
@example(JOURNAL.replace(b"3", b"1e400"))
def test_fuzz_journal(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.journal"
    path.write_bytes(content)
    found = outcome(lambda: _open_journal(path, {"model": "m"}))
    for number, made in (found or {}).items():
        assert (type(number), type(made["answer"]), type(made["stopped"])) == (int, str, bool)


def as_json(value):
    return json.dumps(value, indent=2).encode()


EVENT = {"step": 7, "reason": "a spike", "action": "skip", "back_to": 5}
SEEN = {"source": "a.jsonl", "record_id": "a.jsonl:3", "loss": 9.5, "blamed": True}
HASH = "0" * 64
OWN = {
    "finetune.json": (as_json(asdict(AdapterMetadata("b", None, True, "nf4", HASH))), AdapterMetadata.read),
    "inputs.json": (
        as_json({"recipe": RECIPE.model_dump(mode="json"), "data": {"sources": [{"source": "a", "sha256": HASH}]}}),
        lambda folder: (began := _read_inputs(folder)) and _trained_recipe(folder, began),
    ),
    "auto_fit.json": (
        as_json({"gpu": 1, "changed": {"training.checkpointing": {"asked": False, "run": 4}}}),
        lambda folder: _changes_of_run(RECIPE, folder),
    ),
    "unstable.jsonl": (json.dumps({**EVENT, "dialogues": [SEEN]}).encode() + b"\n", read_events),
    "metrics.jsonl": (
        b'{"step": 1, "loss": 2.5, "tokens": 9}\n' * 3,
        lambda folder: [line["step"] + line.get("tokens", 0) for line in read_metrics(folder / "metrics.jsonl")],
    ),
    "provenance.json": (
        as_json(
            {
                "sources": {"base": "b", "revision": None, "adapter": "a"},
                "made_of": {"adapter": {"trained.safetensors": HASH}, "base_precision": "full"},
                "sha256": {"base": {"model.safetensors": HASH}, "merged": {"config.json": HASH}},
            }
        ),
        _read_provenance,
    ),
}
"""Of each file of our own that a verb begins with: what it holds, and what reads it in its folder."""


@pytest.mark.parametrize("name", OWN)
def test_the_own_files_that_are_fuzzed_are_read_when_they_are_whole(tmp_path, name):
    content, read = OWN[name]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path)


@pytest.mark.parametrize("name", OWN)
@fuzz(60)
@given(data=st.data())
def test_fuzz_own_file(tmp_path_factory, name, data):
    content, read = OWN[name]
    folder = tmp_path_factory.getbasetemp() / f"fuzz_{name}"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data.draw(mutations([content], JSON_TOKENS)))
    outcome(lambda: read(folder))


def test_the_examples_are_made_of_real_recipes():
    assert len(RECIPES) >= 10
    assert len(KEYS) > 60
    for path in RECIPES:
        load_recipe(path)


@pytest.mark.parametrize("content", [b"", b"\xff", b"a: [", b"- 1", b"5", b"{}", b"? [a]\n"])
def test_fuzz_s_outcome_sees_an_error(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert outcome(lambda: load_recipe(path)) is None
