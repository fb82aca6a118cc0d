"""Whatever lies in a base, an adapter or a merged folder: it is read, or one line names it, and no more."""

import json
import shutil
import time
from contextlib import contextmanager

import pytest
import torch
from fuzzing import altered, damaged, fuzz
from hypothesis import given
from hypothesis import strategies as st
from merging import adapter_for
from small_models import stand_in

from finetune.export import verify
from finetune.export.adapter_metadata import AdapterMetadata
from finetune.export.merge import merge
from modeling import bounded_regex, loading
from modeling.adapter_files import read_tensors
from modeling.adapter_weights import AdapterWeights
from modeling.config import read_config
from modeling.errors import UserError
from modeling.packed_forward import PackedIdefics
from modeling.safetensors_io import read_checkpoint, require_shapes
from modeling.shapes import IDEFICS_9B, tensor_shapes

SHAPES = tensor_shapes({**stand_in(IDEFICS_9B), "additional_vocab_size": 3})
SECONDS = 20
"""Of one input, on a machine that others use, too."""


@contextmanager
def read_or_named():
    """The two outcomes; a message is one line, and not longer than a screen."""
    started, message = time.monotonic(), "read"
    try:
        yield
    except UserError as error:
        message = str(error)
    assert 0 < len(message) < 3000
    assert time.monotonic() - started < SECONDS


@pytest.fixture(scope="module")
def made(base_folder, tmp_path_factory):
    """base/, adapter/ with its note, merged/."""
    folder = tmp_path_factory.mktemp("fuzz")
    modes = {"decoder": "lora", "added_tokens": "full", "gates": "full"}
    adapter_for(base_folder, folder / "adapter", modes, {"rank_pattern": {"x": 2}, "alpha_pattern": {"y": 3}})
    shutil.copytree(base_folder, folder / "base")
    AdapterMetadata(str(folder / "base"), None, True, None, "0").write(folder / "adapter")
    merge(folder / "adapter", str(folder / "base"), folder / "merged", shard_bytes=600_000)
    return folder


@contextmanager
def written(path, content):
    """A file that holds something else for a while."""
    before = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else as_json(content))
    try:
        yield
    finally:
        path.write_bytes(before)


def as_json(value):
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")


def inputs(path):
    """The file damaged byte by byte, or its JSON altered."""
    content = path.read_bytes()
    return st.one_of(damaged(content), altered(json.loads(content)))


def test_fuzz_safetensors(made, tmp_path):
    path = made / "adapter" / "trained.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def packed(changed):
        head = as_json(changed)
        return len(head).to_bytes(8, "little") + head + whole[8 + length :]

    @fuzz(150)
    @given(st.one_of(damaged(whole), altered(header).map(packed)))
    def check(content):
        with written(path, content), read_or_named():
            for name, tensor in read_tensors(path).items():
                assert isinstance(name, str)
                assert tensor.numel() * tensor.element_size() <= len(content)

    check()


def test_fuzz_adapter_config(made, monkeypatch):
    monkeypatch.setattr(bounded_regex, "LIMIT_S", 1)
    path = made / "adapter" / "adapter_config.json"

    @fuzz(100)
    @given(inputs(path))
    def check(content):
        with written(path, content), read_or_named():
            AdapterWeights.read(made / "adapter").require_fit(SHAPES)
        with written(path, content), read_or_named():
            AdapterMetadata.read(made / "adapter")

    check()


def test_fuzz_note(made):
    path = made / "adapter" / "finetune.json"

    @fuzz(100)
    @given(inputs(path))
    def check(content):
        with written(path, content), read_or_named():
            metadata = AdapterMetadata.read(made / "adapter")
            assert (type(metadata.base), type(metadata.instruct)) == (str, bool)

    check()


def test_fuzz_config(made):
    path = made / "base" / "config.json"

    @fuzz(150)
    @given(inputs(path))
    def check(content):
        with written(path, content), read_or_named():
            config = read_config(str(made / "base"))
            require_shapes(made / "base", read_checkpoint(made / "base"), tensor_shapes(config))
            architecture = loading._read_architecture(made / "base", image_towers=True)
            with torch.device("meta"):
                PackedIdefics(architecture)

    check()


def test_fuzz_index(made):
    path = made / "merged" / "model.safetensors.index.json"

    @fuzz(60)
    @given(inputs(path))
    def check(content):
        with written(path, content), read_or_named():
            read_checkpoint(made / "merged")

    check()


def test_fuzz_provenance(made):
    path = made / "merged" / "provenance.json"

    @fuzz(100)
    @given(inputs(path))
    def check(content):
        with written(path, content), read_or_named():
            verify._read_provenance(made / "merged")

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_fuzz_tokenizer_and_processor(made, name):
    path = made / "base" / name

    @fuzz(12)
    @given(inputs(path))
    def check(content):
        with written(path, content), read_or_named():
            processor = loading.load_processor(str(made / "base"))
            loading.require_agreement(read_config(str(made / "base")), processor, where="base")

    check()
