"""Safetensors by offset: equal to safetensors' own reader and writer, and a file that lies is told by name."""

import json
import math
import os
import resource
import shutil
import signal
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import IdeficsForVisionText2Text

from modeling import safetensors_io
from modeling.errors import UserError
from modeling.safetensors_io import (
    DTYPES,
    Planned,
    fingerprint,
    in_threads,
    plan_shards,
    read_checkpoint,
    read_header,
    require_shapes,
    row_blocks,
    write_index,
    write_shard,
)

SHAPES = [(), (0,), (1,), (3,), (0, 4), (4, 0), (1, 5), (7, 3), (5, 1, 3), (2, 3, 4, 5)]


def random_tensor(shape, dtype, seed=0):
    """Any bytes that the dtype has a value for; not-a-numbers are left out, for they are equal to nothing."""
    rng = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=rng) < 0.5
    if dtype.is_floating_point:
        return (100 * torch.randn(shape, generator=rng)).to(dtype)
    kind = torch.iinfo(dtype)
    return torch.randint(max(kind.min, -(2**31)), min(kind.max, 2**31), shape, generator=rng).to(dtype)


def write_raw(path, header, data=b"", *, length=None):
    """A file as its bytes say, right or wrong."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)
    return path


def rows_of(tensor):
    return lambda start, stop: tensor[start:stop] if tensor.ndim else tensor


def planned(tensors):
    return {name: Planned(one.dtype, tuple(one.shape), rows_of(one)) for name, one in tensors.items()}


def entry(first, last, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [last - first] if shape is None else shape, "data_offsets": [first, last]}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_read_every_dtype_and_shape(tmp_path, dtype):
    """Every dtype and shape is read as safetensors wrote it."""
    tensors = {f"of {shape}": random_tensor(shape, dtype) for shape in SHAPES}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "by": "hand"})
    stored = read_header(tmp_path / "a.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = stored[name].rows()
        assert (stored[name].dtype, stored[name].shape) == (dtype, tuple(tensor.shape)) == (got.dtype, tuple(got.shape))
        assert torch.equal(got, tensor)
        assert stored[name].nbytes == tensor.nbytes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_write_every_dtype_and_shape(tmp_path, dtype):
    """Every dtype and shape is written as safetensors reads it."""
    tensors = {f"of {shape}": random_tensor(shape, dtype, seed=1) for shape in SHAPES}
    write_shard(tmp_path / "a.safetensors", planned(tensors))
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.float64]),
    array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9),
    st.integers(-12, 12),
    st.one_of(st.none(), st.integers(-12, 12)),
)
def test_rows_are_slices(tmp_path_factory, dtype, shape, start, stop):
    """Rows are the tensor's slice."""
    path = tmp_path_factory.getbasetemp() / "rows.safetensors"
    before, tensor = torch.ones(3, dtype=torch.uint8), random_tensor(shape, dtype)
    save_file({"before": before, "it": tensor, "z": before.clone()}, path)
    got = read_header(path)["it"].rows(start, stop)
    assert torch.equal(got, tensor[start:stop])
    assert got.shape == tensor[start:stop].shape


@given(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40), st.integers(1, 200), st.integers(1, 7))
def test_row_blocks_cover_all_rows(shape, limit, group):
    """Row blocks cover all rows once in whole groups within the limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_io, "BLOCK_ELEMENTS", limit)
        patch.setattr(safetensors_io, "ROW_GROUP", group)
        blocks = list(row_blocks(shape))
    rows, width = (shape[0] if shape else 1), math.prod(shape[1:])
    assert [row for start, stop in blocks for row in range(start, stop)] == list(range(rows))
    assert all(start % group == 0 and stop - start >= min(group, rows) for start, stop in blocks)
    assert all(stop - start < 2 * group or (stop - start - group + 1) * width <= limit for start, stop in blocks)


def test_row_blocks_of_matrices():
    """Row blocks of true matrices."""
    assert list(row_blocks((11008, 4096)))[-2:] == [(10496, 10752), (10752, 11008)]
    assert list(row_blocks((4096, 11008)))[:2] == [(0, 64), (64, 128)]
    assert list(row_blocks((32003, 4096)))[-2:] == [(31488, 31744), (31744, 32003)]
    assert list(row_blocks((2, 4096))) == [(0, 2)]
    assert list(row_blocks((4096,))) == [(0, 4096)]
    assert list(row_blocks(())) == [(0, 1)]
    assert list(row_blocks((0, 7))) == []


def test_in_threads_order():
    """Blocks made in threads come in order a few ahead and leave torch's threads alone."""
    torch.set_num_threads(3)
    made, release = [], threading.Event()

    def work(start, stop):
        if start == 0:
            release.wait(10)  # the first is the last to be ready
        made.append(start)
        return torch.arange(start, stop)

    blocks = in_threads(work, ((start, start + 2) for start in range(0, 100, 2)), threads=2)
    threading.Timer(0.05, release.set).start()
    assert next(blocks).tolist() == [0, 1]
    assert made[0] == 2
    assert len(made) <= 6
    assert torch.cat(list(blocks)).tolist() == list(range(2, 100))
    assert torch.get_num_threads() == 3
    unfinished = in_threads(work, [(0, 2), (2, 4), (4, 6)], threads=1)
    next(unfinished)
    unfinished.close()
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


def test_in_threads_error():
    """A block that fails is told where it is used."""

    def work(start, stop):
        if start == 4:
            raise UserError("no such block")
        return torch.zeros(stop - start)

    blocks = in_threads(work, [(0, 1), (1, 4), (4, 5), (5, 6)], threads=2)
    assert [len(next(blocks)), len(next(blocks))] == [1, 3]
    with pytest.raises(UserError, match="no such block"):
        next(blocks)


@pytest.mark.parametrize("block", [safetensors_io.BLOCK_ELEMENTS, 20])
def test_blocks_written_equal_given(tmp_path, monkeypatch, block):
    """Tensors written in blocks and copied are those given."""
    monkeypatch.setattr(safetensors_io, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(safetensors_io, "ROW_GROUP", 3)
    tensor = random_tensor((50, 7), torch.bfloat16)
    save_file({"copied": tensor}, tmp_path / "source.safetensors")
    stored = read_header(tmp_path / "source.safetensors")["copied"]
    turned = random_tensor((7, 50), torch.float32).T  # not contiguous
    write_shard(
        tmp_path / "out.safetensors",
        {
            "blocks": Planned(torch.bfloat16, (50, 7), rows_of(tensor)),
            "copied": Planned(torch.bfloat16, (50, 7), stored.rows),
            "turned": Planned(torch.float32, (50, 7), rows_of(turned)),
        },
    )
    read = load_file(tmp_path / "out.safetensors")
    assert torch.equal(read["blocks"], tensor)
    assert torch.equal(read["copied"], tensor)
    assert torch.equal(read["turned"], turned)


def test_large_tensor_copied(tmp_path, monkeypatch):
    """A large tensor is copied whole."""
    monkeypatch.setattr(safetensors_io, "PIECE_BYTES", 1000)
    tensor = random_tensor((1234,), torch.float32)
    save_file({"a": tensor}, tmp_path / "source.safetensors")
    stored = read_header(tmp_path / "source.safetensors")["a"]
    write_shard(tmp_path / "out.safetensors", {"a": Planned(torch.float32, (1234,), stored.rows)})
    assert (tmp_path / "out.safetensors").read_bytes()[-4936:] == tensor.numpy().tobytes()


@pytest.mark.parametrize(
    "rows", [torch.zeros(3), torch.zeros(5), torch.zeros(2, 4), torch.zeros(4, dtype=torch.float16)]
)
def test_write_shard_wrong_rows(tmp_path, rows):
    """A plan that its rows do not keep leaves no file."""
    with pytest.raises(AssertionError):
        write_shard(tmp_path / "a.safetensors", {"a": Planned(torch.float32, (4,), lambda start, stop: rows)})
    assert not (tmp_path / "a.safetensors").exists()


def test_write_shard_full_disk(tmp_path):
    """The system writes a part of the last block and says so: the rest must be asked for, and then fails."""
    before, tensor = resource.getrlimit(resource.RLIMIT_FSIZE), torch.zeros(100_000)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        with pytest.raises(OSError, match="too large"):
            write_shard(tmp_path / "a.safetensors", planned({"a": tensor}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)
    assert not (tmp_path / "a.safetensors").exists()


def sizes(**nbytes):
    return {name: Planned(torch.uint8, (count,), torch.zeros) for name, count in nbytes.items()}


def test_plan_shards_single_file(tmp_path):
    """One file has the name that needs no index."""
    tensors = sizes(a=4, b=6)
    assert plan_shards(tensors, 10) == {"model.safetensors": ["a", "b"]}
    write_index(tmp_path, plan_shards(tensors, 10), tensors)
    assert list(tmp_path.iterdir()) == []


def test_plan_shards_large_tensor_alone(tmp_path):
    """Shards are filled in order and a tensor larger than one is alone."""
    tensors = sizes(a=4, b=6, c=1, d=25, e=3, f=0, g=7, h=1)
    shards = plan_shards(tensors, 10)
    assert shards == {
        "model-00001-of-00005.safetensors": ["a", "b"],
        "model-00002-of-00005.safetensors": ["c"],
        "model-00003-of-00005.safetensors": ["d"],
        "model-00004-of-00005.safetensors": ["e", "f", "g"],
        "model-00005-of-00005.safetensors": ["h"],
    }
    write_index(tmp_path, shards, tensors)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 47},
        "weight_map": {
            "a": "model-00001-of-00005.safetensors",
            "b": "model-00001-of-00005.safetensors",
            "c": "model-00002-of-00005.safetensors",
            "d": "model-00003-of-00005.safetensors",
            "e": "model-00004-of-00005.safetensors",
            "f": "model-00004-of-00005.safetensors",
            "g": "model-00004-of-00005.safetensors",
            "h": "model-00005-of-00005.safetensors",
        },
    }


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 40))
def test_plan_shards_within_limit(counts, limit):
    """Shards hold every tensor once within the limit."""
    tensors = sizes(**{f"t{number:02}": count for number, count in enumerate(counts)})
    shards = plan_shards(tensors, limit)
    assert [name for names in shards.values() for name in names] == list(tensors)
    assert all(len(names) == 1 or sum(tensors[name].nbytes for name in names) <= limit for names in shards.values())
    assert [name for name in shards if not name.endswith(f"of-{len(shards):05}.safetensors")] == (
        ["model.safetensors"] if len(shards) == 1 else []
    )


def test_transformers_reads_shards(base_folder, tmp_path):
    """Plain transformers reads what was written in shards."""
    shutil.copy(base_folder / "config.json", tmp_path)
    base = read_checkpoint(base_folder)
    tensors = {name: Planned(one.dtype, one.shape, one.rows) for name, one in base.items()}
    shards = plan_shards(tensors, 500_000)
    for file, names in shards.items():
        write_shard(tmp_path / file, {name: tensors[name] for name in names})
    write_index(tmp_path, shards, tensors)
    assert len(shards) > 3
    got = IdeficsForVisionText2Text.from_pretrained(tmp_path).state_dict()
    expected = IdeficsForVisionText2Text.from_pretrained(base_folder).state_dict()
    assert got.keys() == expected.keys() == base.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    again = read_checkpoint(tmp_path)
    assert [(name, *one.rows().shape) for name, one in again.items()] == [
        (name, *one.shape) for name, one in base.items()
    ]
    assert fingerprint(again) == fingerprint(base)  # how it is divided into files is no matter


LIES = {
    "empty file": (b"", "not a safetensors file, or a truncated one (0 bytes)"),
    "seven bytes": (b"\x01" * 7, "not a safetensors file, or a truncated one (7 bytes)"),
    "header longer than the file": (
        (11).to_bytes(8, "little") + b"{}        ",
        "not a safetensors file, or a truncated one (18 bytes)",
    ),
    "negative header length": (b"\xff" * 8 + b"{}", "not a safetensors file, or a truncated one (10 bytes)"),
    "a pickle": (b"\x80\x02}q\x00." + b"x" * 90, "not a safetensors file, or a truncated one (96 bytes)"),
    "no JSON": ((4).to_bytes(8, "little") + b"{a:}", "the safetensors header cannot be read: JSONDecodeError"),
    "no text": ((2).to_bytes(8, "little") + b"\xff\xff", "the safetensors header cannot be read: UnicodeDecodeError"),
    "a list": ((2).to_bytes(8, "little") + b"[]", "the safetensors header cannot be read: TypeError"),
    "deep": ((90_000).to_bytes(8, "little") + b"[" * 90_000, "the safetensors header cannot be read: RecursionError"),
}


@pytest.mark.parametrize("lie", LIES)
def test_not_safetensors(tmp_path, lie):
    """A file that is no safetensors."""
    content, message = LIES[lie]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_header(tmp_path / "a.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'a.safetensors'}: {message}")
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "a.safetensors")


HEADERS = {
    "unknown dtype": (
        {"a": entry(0, 8, dtype="F8")},
        "expected a dtype of F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U8, BO",
    ),
    "no dtype": ({"a": {"shape": [8], "data_offsets": [0, 8]}}, "KeyError('dtype')"),
    "an entry that is none": ({"a": 3}, "TypeError"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4, 8]}}, "too many values"),
    "wrong size": ({"a": entry(0, 8, [3])}, "8 bytes for (3,) U8"),
    "wrong size for its dtype": ({"a": entry(0, 8, [8], "F32")}, "8 bytes for (8,) F32"),
    "two negative sides": ({"a": entry(0, 8, [-2, -4])}, "whole numbers, got [-2, -4] and [0, 8]"),
    "a fraction": ({"a": entry(0, 8, [8.0])}, "whole numbers, got [8.0] and [0, 8]"),
    "a truth": ({"a": entry(0, 8, [True, 8])}, "whole numbers, got [True, 8] and [0, 8]"),
    "before the data": ({"a": entry(-8, 0, [8])}, "whole numbers, got [8] and [-8, 0]"),
    "backwards": ({"a": entry(8, 0, [8])}, "-8 bytes for (8,) U8"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 8)}, "tensors overlap or leave gaps: b is at "),
    "twice the same bytes": ({"a": entry(0, 8), "b": entry(0, 8)}, "tensors overlap or leave gaps: b is at "),
    "gap": ({"a": entry(0, 3), "b": entry(4, 8)}, "tensors overlap or leave gaps: b is at "),
    "not from the beginning": ({"a": entry(1, 8)}, "tensors overlap or leave gaps: a is at "),
    "past the end": ({"a": entry(0, 9)}, "truncated, or not whole"),
    "far past the end": ({"a": entry(0, 2**60)}, "truncated, or not whole"),
    "more bytes than tensors": ({"a": entry(0, 7)}, "truncated, or not whole"),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_header_lies_refused(tmp_path, lie):
    """A header that lies is refused as safetensors refuses it."""
    header, message = HEADERS[lie]
    path = write_raw(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(UserError) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    with pytest.raises(SafetensorError):
        load_file(path)


def test_right_header_accepted(tmp_path):
    """The right header is no lie."""
    header = {"b": entry(3, 8), "empty": entry(3, 3), "a": entry(0, 3), "__metadata__": {"format": "pt"}}
    stored = read_header(write_raw(tmp_path / "a.safetensors", header, bytes(range(8))))
    assert {name: one.rows().tolist() for name, one in stored.items()} == {
        "b": [3, 4, 5, 6, 7],
        "empty": [],
        "a": [0, 1, 2],
    }


@pytest.mark.parametrize("cut", [1, 100, 398])
def test_truncated_file(tmp_path, cut):
    """A truncated file is told."""
    save_file({"a": torch.ones(100)}, tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size - cut)
    with pytest.raises(UserError, match=r"model\.safetensors: \d+ bytes, and its header names \d+: truncated"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("read", ["rows", "copy"])
def test_file_shrinks_while_read(tmp_path, read):
    """A file that shrinks while it is read is told."""
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file({"a": torch.ones(100)}, path)
    stored = read_header(path)["a"]
    os.truncate(path, path.stat().st_size - 40)
    copy = {"a": Planned(stored.dtype, stored.shape, stored.rows)}
    with pytest.raises(UserError, match=r"model\.safetensors: ends in the middle of a tensor"):
        stored.rows() if read == "rows" else write_shard(out, copy)
    assert not out.exists()


def indexed(folder, weight_map, **files):
    """A folder of files, each with tensors of three zeros, and an index."""
    for name, tensors in files.items():
        save_file({tensor: torch.zeros(3) for tensor in tensors}, folder / f"{name}.safetensors")
    content = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(content)
    return folder


def test_files_in_order_of_index(tmp_path):
    """Files are read in the order of the index."""
    weight_map = {"x": "two.safetensors", "y": "one.safetensors", "a": "two.safetensors"}
    folder = indexed(tmp_path, weight_map, one=["y"], two=["x", "a"])
    stored = read_checkpoint(folder)
    assert [(name, one.file.name) for name, one in stored.items()] == [
        ("a", "two.safetensors"),
        ("x", "two.safetensors"),
        ("y", "one.safetensors"),
    ]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors"}, "1 of 2 weight files are missing: two.safetensors"),
        (
            {"a": "one.safetensors", "q": "one.safetensors"},
            "names 1 tensors that their files do not have: [('q', 'one.safetensors')]",
        ),
        ({"a": "../one.safetensors"}, "expected names of files beside it, got '../one.safetensors'"),
        ({"a": "/etc/passwd"}, "expected names of files beside it, got '/etc/passwd'"),
        ({"a": "sub/one.safetensors"}, "expected names of files beside it, got 'sub/one.safetensors'"),
        ({"a": ".."}, "expected names of files beside it, got '..'"),
        ({"a": 3}, "expected names of files beside it, got 3"),
        (["a"], "expected an index with a weight_map of file names"),
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected an index with a weight_map of file names"),
    ],
)
def test_index_lies(tmp_path, weight_map, message):
    """An index that lies."""
    (tmp_path / "model").mkdir()
    save_file({"a": torch.zeros(3)}, tmp_path / "one.safetensors")  # outside: must not be read
    indexed(tmp_path / "model", weight_map, one=["a"])
    with pytest.raises(UserError) as error:
        read_checkpoint(tmp_path / "model")
    assert message in str(error.value)


def test_index_tensor_missing_or_twice(tmp_path):
    """A tensor that the index does not name or that is in two files."""
    folder = indexed(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=["a"], two=["b", "a"])
    with pytest.raises(UserError, match=r"1 tensors that its index does not name: \[\('a', 'two.safetensors'\)\]"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "a.pth", "b.ckpt"]
)
def test_pickles_refused(tmp_path, name):
    """Pickles are refused with the conversion named."""
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=f"holds pickles \\({name}\\).*save_pretrained writes safetensors"):
        read_checkpoint(tmp_path)


def test_folder_without_weights(tmp_path):
    """A folder without weights."""
    with pytest.raises(UserError, match=r"expected safetensors weights \(model\.safetensors, or .*\), found none"):
        read_checkpoint(tmp_path)


def test_require_shapes_missing_tensor(tmp_path):
    """The tensors of a config must be there."""
    save_file({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    stored = read_checkpoint(tmp_path)
    require_shapes(tmp_path, stored, {"a": (3,), "b": (2, 2)})
    with pytest.raises(UserError, match=r"lacks 1 tensors of its own config: \['c'\]"):
        require_shapes(tmp_path, stored, {"a": (3,), "c": (1,)})
    with pytest.raises(UserError, match=r"b is \(2, 2\), its config says \(4,\)"):
        require_shapes(tmp_path, stored, {"a": (3,), "b": (4,)})


def test_fingerprint_of_equal_shapes(tmp_path):
    """Fingerprint tells checkpoints of equal shapes apart."""

    def fingerprint_of(tensors):
        save_file(tensors, tmp_path / "model.safetensors")
        return fingerprint(read_checkpoint(tmp_path))

    tensors = {"a": torch.arange(10_000.0), "b": torch.zeros(2, 3), "c": torch.zeros(())}
    whole = fingerprint_of(tensors)
    assert fingerprint_of({name: tensor.clone() for name, tensor in tensors.items()}) == whole
    others = [
        {**tensors, "a": torch.arange(10_000.0).index_fill(0, torch.tensor([0]), 1)},
        {**tensors, "a": torch.arange(10_000.0).index_fill(0, torch.tensor([9_999]), 1)},
        {**tensors, "b": torch.ones(2, 3)},
        {**tensors, "b": torch.zeros(3, 2)},
        {**tensors, "b": torch.zeros(2, 3, dtype=torch.int32)},
        {**tensors, "c": torch.ones(())},
        {"a": tensors["a"], "d": tensors["b"], "c": tensors["c"]},
        {**tensors, "d": torch.zeros(0)},
    ]
    assert len({whole, *map(fingerprint_of, others)}) == 9


def test_fingerprint_reads_both_ends(tmp_path):
    """What it promises, and what it does not: hashes of whole files are in the provenance."""
    tensor = torch.zeros(10_000, dtype=torch.uint8)
    fingerprints = []
    for place in (None, 0, 4095, 4096, 5903, 5904, 9999):
        changed = tensor.clone()
        if place is not None:
            changed[place] = 1
        save_file({"a": changed}, tmp_path / "model.safetensors")
        fingerprints.append(fingerprint(read_checkpoint(tmp_path)))
    assert fingerprints[3] == fingerprints[4] == fingerprints[0]
    assert len({fingerprints[0], *fingerprints[1:3], *fingerprints[5:]}) == 5
