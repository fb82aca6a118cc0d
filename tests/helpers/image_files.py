"""Images in folders and archives, and the roots that look them up."""

import base64
import io
import json
import tarfile
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import PIL.Image
import pytest
from sources import make_source

from finetune.data.conversation import RecordError
from finetune.data.io.image_roots import ImageRoot
from modeling.errors import UserError


def picture(seed, extension="PNG"):
    file = io.BytesIO()
    levels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    PIL.Image.fromarray(levels).save(file, extension)
    return file.getvalue()


CAT, DOG = picture(1), picture(2, "JPEG")


FILES = {"cat.png": CAT, "sub/dög.jpg": DOG, "sub/flat.png": CAT + b"\0" * 5000}


def root_of(*paths, **settings):
    return ImageRoot(make_source("auto", image_root=paths, **settings))


def refusal(function, *arguments):
    with pytest.raises(RecordError) as caught:
        function(*arguments)
    return caught.value.reason


def mistake(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert not isinstance(caught.value, RecordError)
    return str(caught.value)


@contextmanager
def at_most(memory):
    """Fails where Python held more bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


def zipped(path, files=FILES, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("sub")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path, files=FILES, kind="w"):
    with tarfile.open(path, kind) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


ARCHIVES = {
    "stored.zip": zipped,
    "deflated.zip": lambda path, files=FILES: zipped(path, files, zipfile.ZIP_DEFLATED),
    "plain.tar": tarred,
}


ENCODED = base64.b64encode(CAT).decode()


IDS = {"DC_1": CAT, 'q"\\é': DOG, "../x": CAT, "": DOG}


def write_json_store(path, indent=None, ascii_only=True):
    content = {name: base64.b64encode(value).decode() for name, value in IDS.items()}
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    return path
