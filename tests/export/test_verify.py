"""A merged folder is verified again years later, and what has changed meanwhile is named."""

import json
import shutil

import pytest
import torch
from merging import CHANGES, adapter_for, spoil

from finetune.export.merge import merge
from finetune.export.verify import verify
from modeling.atomic_files import digests
from modeling.errors import UserError


@pytest.fixture
def adapter(base_folder, tmp_path):
    """A small adapter folder: LoRA and gates."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora", "gates": "full"})
    return tmp_path / "adapter"


def test_verify_again(base_folder, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(base_folder.parent)  # a base named from where we are must be found from elsewhere
    record = merge(adapter, base_folder.name, tmp_path / "merged", shard_bytes=600_000)
    monkeypatch.chdir(tmp_path)
    assert verify(tmp_path / "merged") == record["parity"]
    assert record["parity"]["blocks"] == 8


def change_byte(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (
            lambda f: change_byte(f / "merged" / "model.safetensors", -1),
            r"merged: has changed .*: model\.safetensors is an",
        ),
        (
            lambda f: (f / "merged" / "model.safetensors").unlink(),
            r"merged: has changed .*: model\.safetensors is gone$",
        ),
        (
            lambda f: shutil.copy(f / "merged" / "model.safetensors", f / "merged" / "b.safetensors"),
            r"merged: has changed since it was merged: b\.safetensors is new$",
        ),
        (
            lambda f: change_byte(f / "base" / "model.safetensors", -1),
            "base: is not the base that .*merged was made of",
        ),
        (lambda f: change_byte(f / "base" / "model.safetensors", -900_001), "base: is not the base"),
        (lambda f: shutil.rmtree(f / "base"), "base' is neither a folder here nor a hub id"),
        (lambda f: shutil.rmtree(f / "adapter"), "adapter: the adapter that .*merged was made of is gone, or has chan"),
        (lambda f: (f / "adapter" / "trained.safetensors").unlink(), "adapter: the adapter .* is gone, or has changed"),
        (lambda f: CHANGES["alpha"](f / "adapter"), "adapter: the adapter that .* is gone, or has changed"),
        (lambda f: CHANGES["weights"](f / "adapter"), "adapter: the adapter that .* is gone, or has changed"),
        (lambda f: (f / "merged" / "provenance.json").unlink(), "expected a merged model with its provenance.json"),
    ],
)
def test_verify_gone_or_changed(base_folder, adapter, tmp_path, spoiled, message):
    """Verify tells what is gone or has changed."""
    shutil.copytree(base_folder, tmp_path / "base")
    merge(adapter, str(tmp_path / "base"), tmp_path / "merged")
    verify(tmp_path / "merged")
    spoiled(tmp_path)
    with pytest.raises(UserError, match=message):
        verify(tmp_path / "merged")


def write(file, text):
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


@pytest.fixture(scope="module")
def made(base_folder, tmp_path_factory):
    """A merged folder with its base and adapter beside it."""
    folder = tmp_path_factory.mktemp("made")
    adapter_for(base_folder, folder / "adapter", {"gates": "full"})
    shutil.copytree(base_folder, folder / "base")
    merge(folder / "adapter", str(folder / "base"), folder / "merged", card="# card")
    return folder / "merged"


OTHERS = {
    "config": (lambda m: write(m / "config.json", "{}"), r"config\.json is another"),
    "generation config": (lambda m: write(m / "generation_config.json", "{}"), r"generation_config\.json is another"),
    "tokenizer": (lambda m: write(m / "tokenizer.json", "{}"), r"tokenizer\.json is another"),
    "tokenizer's config": (lambda m: (m / "tokenizer_config.json").unlink(), r"tokenizer_config\.json is gone"),
    "image processor": (lambda m: write(m / "processor_config.json", "{}"), r"processor_config\.json is another"),
    "pickled weights": (lambda m: write(m / "pytorch_model.bin", "x"), r"pytorch_model\.bin is new"),
    "code": (lambda m: write(m / "code" / "modeling.py", "x"), r"code/modeling\.py is new"),
    "several": (
        lambda m: (write(m / "a.py", "x"), write(m / "config.json", "{}"), change_byte(m / "model.safetensors", -1)),
        r"a\.py is new, config\.json is another, model\.safetensors is another$",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_verify_covers_all_files(made, tmp_path, kind):
    """Verify covers all files of the model."""
    merged = shutil.copytree(made, tmp_path / "merged")
    spoiled, message = OTHERS[kind]
    spoiled(merged)
    with pytest.raises(UserError, match=rf"merged: has changed since it was merged: {message}"):
        verify(merged)


def test_verify_leaves_card_and_hidden_files(made, tmp_path):
    """Verify leaves the model card and hidden files to their owner."""
    merged = shutil.copytree(made, tmp_path / "merged")
    write(merged / "README.md", "my words")
    write(merged / ".gitattributes", "x")
    write(merged / ".cache" / "x", "x")
    verify(merged)


PROVENANCES = {
    "cut": (lambda record: "{", r"provenance\.json: not JSON .*merge again"),
    "a list": (lambda record: [record], r"provenance\.json: expected a JSON object"),
    "empty": (lambda record: {}, r"provenance\.json: sources\.base: unexpected None; merge again"),
    "sources a text": (lambda record: record | {"sources": "x"}, r"sources\.base: unexpected None"),
    "a base that is no text": (lambda record: nested(record, "sources", base=[1]), r"sources\.base: unexpected \[1\]"),
    "a NUL": (lambda record: nested(record, "sources", adapter="a\0b"), r"sources\.adapter: unexpected 'a\\x00b'"),
    "files out of the adapter": (
        lambda record: nested(record, "made_of", adapter={"../../../etc/passwd": ""}),
        r"made_of\.adapter: unexpected",
    ),
    "hashes that are none": (lambda record: nested(record, "sha256", merged={"a": 3}), r"sha256\.merged: unexpected"),
    "base_precision something": (
        lambda record: nested(record, "made_of", base_precision="int3"),
        r"made_of\.base_precision: unexpected 'int3'",
    ),
    "another adapter": (lambda record: nested(record, "sources", adapter="/proc/self"), "/proc/self: the adapter that"),
    "a base of no place": (
        lambda record: nested(record, "sources", base="../x/y/z"),
        "neither a folder here nor a hub",
    ),
}


def nested(record, part, **changes):
    return record | {part: record[part] | changes}


@pytest.mark.parametrize("kind", PROVENANCES)
def test_verify_odd_provenance(made, tmp_path, kind):
    """Verify names a provenance that is odd."""
    merged = shutil.copytree(made, tmp_path / "merged")
    change, message = PROVENANCES[kind]
    record = change(json.loads((merged / "provenance.json").read_text()))
    (merged / "provenance.json").write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(UserError, match=message):
        verify(merged)


def test_merge_onto_base_or_adapter_refused(made):
    """Merge onto its own base or adapter is refused."""
    base, adapter = made.parent / "base", made.parent / "adapter"
    for out, what in ((base, "base"), (adapter, "adapter")):
        with pytest.raises(UserError, match=rf"{what}: is the {what} itself, .*name another folder: --out"):
            merge(adapter, str(base), out)


def test_merge_completes_spoilt_folder(made, tmp_path):
    """A merge done before that is not whole any more is completed."""
    base, adapter = made.parent / "base", made.parent / "adapter"
    merged = shutil.copytree(made, tmp_path / "merged")
    (merged / "tokenizer.json").unlink()
    merge(adapter, str(base), merged)
    assert (merged / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
    verify(merged)


def test_verify_adapter_rule(made, tmp_path):
    """Also where the provenance was written to go with it."""
    for name in ("adapter", "merged"):
        shutil.copytree(made.parent / name, tmp_path / name)
    weights = tmp_path / "adapter" / "trained.safetensors"
    spoil(weights, lambda t: t.update({"model.gated_cross_attn_layers.0.alpha_dense": torch.zeros(2)}))
    record = json.loads((tmp_path / "merged" / "provenance.json").read_text())
    record["sources"]["adapter"] = str(tmp_path / "adapter")
    record["made_of"]["adapter"] = digests([weights])
    (tmp_path / "merged" / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"made for another base: .*alpha_dense is \(2,\) there and \(1,\) here"):
        verify(tmp_path / "merged")
