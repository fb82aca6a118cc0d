"""The note beside an adapter says what it was trained on; without one, PEFT's own file does, or the user."""

import json
import shutil
from dataclasses import asdict

import pytest
from merging import adapter_for

from finetune.export.adapter_metadata import NOTE, AdapterMetadata, NamedModel, resolve_model
from finetune.serving import chat
from modeling.errors import UserError
from modeling.safetensors_io import fingerprint, read_checkpoint


def test_metadata_round_trip(tmp_path):
    """An origin is read as it was written."""
    metadata = AdapterMetadata("bases/mine", "main", True, "nf4", "0123")
    metadata.write(tmp_path)
    assert AdapterMetadata.read(tmp_path) == metadata
    assert json.loads((tmp_path / NOTE).read_text()) == {**asdict(metadata), "sha256": {}}
    assert (metadata.base_precision, AdapterMetadata("a/b").base_precision) == ("nf4", "full")
    (tmp_path / NOTE).unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say what base it was made for; name it: --base"):
        AdapterMetadata.read(tmp_path)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ('{"base": "a/b"', "not JSON .*copy the adapter again"),
        ("[1]", "expected a JSON object, got list"),
        ("{}", "base: unexpected None; copy the adapter again; or delete this file, and name the base"),
        ('{"zzz": 1}', "unknown key 'zzz'"),
        ('{"base": "a/b", "base_": 1}', "unknown key 'base_'"),
        ('{"base": 3}', "base: unexpected 3"),
        ('{"base": ""}', "base: unexpected ''"),
        ('{"base": "a\\u0000b"}', "base: unexpected"),
        ('{"base": "a/b", "revision": ["main"]}', "revision: unexpected"),
        ('{"base": "a/b", "instruct": "yes"}', "instruct: unexpected 'yes'"),
        ('{"base": "a/b", "instruct": null}', "instruct: unexpected None"),
        ('{"base": "a/b", "quantize": "int3"}', "quantize: expected nf4 or null, got 'int3'"),
        ('{"base": "a/b", "fingerprint": {}}', "fingerprint: unexpected"),
        ('{"base": "a/b", "sha256": [1]}', "sha256: expected hashes of weight files"),
        ('{"base": "a/b", "sha256": {"../../etc/passwd": "0"}}', "sha256: expected hashes of weight files"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_metadata_odd(tmp_path, note, message):
    """A note that is odd is named."""
    (tmp_path / NOTE).write_text(note)
    with pytest.raises(UserError, match=rf"finetune\.json: {message}"):
        AdapterMetadata.read(tmp_path)


@pytest.mark.parametrize("config", ['{"base_model_name_or_path": 3}', '{"base_model_name_or_path": ["a/b"]}'])
def test_metadata_peft_base_odd(tmp_path, config):
    """A base that PEFT's file names oddly is told."""
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=r"adapter_config\.json: base_model_name_or_path: expected a text"):
        AdapterMetadata.read(tmp_path)


def test_metadata_flipped_byte(tmp_path):
    """A flipped byte of an adapter is noticed."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"abc")
    (tmp_path / "trained.safetensors").write_bytes(b"def")
    AdapterMetadata("a/b").write(tmp_path)
    assert AdapterMetadata.read(tmp_path) == AdapterMetadata("a/b")
    (tmp_path / "trained.safetensors").write_bytes(b"dfe")
    with pytest.raises(UserError, match=r"trained\.safetensors: is not the file that training left"):
        AdapterMetadata.read(tmp_path)


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):
    """A run folder after training."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    adapter_for(base_folder, run / "adapter", {"gates": "full"})
    AdapterMetadata(str(base_folder), None, True, None, fingerprint(read_checkpoint(base_folder))).write(
        run / "adapter"
    )
    (run / "recipe.yaml").write_text("model: {}")
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "mine")


def test_resolve_model(run, base_folder):
    """A model is what was named."""
    base, known = str(base_folder), fingerprint(read_checkpoint(base_folder))
    on_base = NamedModel(base, run / "adapter", None, True, known)
    assert resolve_model(base) == NamedModel(base)
    assert resolve_model("owner/name") == NamedModel("owner/name")
    assert resolve_model(str(run / "adapter")) == on_base
    assert resolve_model(str(run)) == on_base
    assert resolve_model(base, run / "adapter") == on_base
    assert resolve_model(base, run) == on_base
    shutil.copytree(base_folder, run / "merged")
    assert resolve_model(str(run)) == NamedModel(str(run / "merged"))
    assert resolve_model(str(run / "adapter")) == on_base


def test_resolve_moved_base(run, base_folder, tmp_path):
    """The base of a run that has moved is found beside its adapter."""
    AdapterMetadata("runs/elsewhere/base", None, True).write(run / "adapter")
    shutil.copytree(base_folder, run / "base")
    assert resolve_model(str(run)).model == str(run / "base")


def test_resolve_foreign_adapter(run):
    """An adapter of others is put on the base that it names."""
    (run / "adapter" / NOTE).unlink()
    (run / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name", "revision": "v1"}')
    assert resolve_model(str(run / "adapter")) == NamedModel("owner/name", run / "adapter", "v1", True)


def test_resolve_no_model(run, tmp_path):
    """What is no model is told."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: expected a model \(config.json\), an adapter or a run folder"):
        resolve_model(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="empty: expected an adapter folder"):
        resolve_model("owner/name", tmp_path / "empty")
    with pytest.raises(UserError, match=r"mine: expected the base of .*adapter, a model; found none"):
        resolve_model(str(run), run / "adapter")
    shutil.rmtree(run / "adapter")
    with pytest.raises(UserError, match="a run folder in which nothing is trained yet; first: finetune train"):
        resolve_model(str(run))


def test_chat_opens_run_and_adapter(run, base_folder, tmp_path):
    """Chat opens a run and its adapter and no other base."""
    gates = [chat.load_assistant(str(place)).idefics.model.gated_cross_attn_layers[0].alpha_dense.item()
             for place in (run, run / "adapter", base_folder)]  # fmt: skip
    assert gates[0] == gates[1] != gates[2]
    shutil.copytree(base_folder, tmp_path / "other")
    content = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"adapter: was trained on other weights than those of .*other"):
        chat.load_assistant(str(tmp_path / "other"), adapter=run / "adapter")
