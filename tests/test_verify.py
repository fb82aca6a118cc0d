"""A merged folder is proved again years later, and what has changed meanwhile is named."""

import shutil

import pytest
from merging import CHANGES, adapter_for

from finetune.merge import merge
from finetune.verify import verify
from modeling.errors import UserError


@pytest.fixture
def adapter(base_folder, tmp_path):
    """A small adapter folder: LoRA and gates."""
    adapter_for(base_folder, tmp_path / "adapter", {"decoder": "lora", "gates": "full"})
    return tmp_path / "adapter"


def test_verify_repeats_the_proof(base_folder, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(base_folder.parent)  # a base named from where we are must be found from elsewhere
    record = merge(adapter, base_folder.name, tmp_path / "merged", shard_bytes=600_000)
    monkeypatch.chdir(tmp_path)
    assert verify(tmp_path / "merged") == record["proof"]
    assert record["proof"]["blocks"] == 8


def change_byte(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (lambda f: change_byte(f / "merged" / "model.safetensors", -1), "merged: its weights have changed"),
        (lambda f: (f / "merged" / "model.safetensors").unlink(), "merged: its weights have changed"),
        (
            lambda f: shutil.copy(f / "merged" / "model.safetensors", f / "merged" / "b.safetensors"),
            "weights have chang",
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
def test_verify_tells_what_is_gone_or_has_changed(base_folder, adapter, tmp_path, spoiled, message):
    shutil.copytree(base_folder, tmp_path / "base")
    merge(adapter, str(tmp_path / "base"), tmp_path / "merged")
    verify(tmp_path / "merged")
    spoiled(tmp_path)
    with pytest.raises(UserError, match=message):
        verify(tmp_path / "merged")
