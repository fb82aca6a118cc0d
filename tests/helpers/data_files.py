"""Data files of every kind, written for a test and read back."""

import base64
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import zstandard
from sources import make_source

from finetune.data.conversation import RecordError
from finetune.data.formats import FORMATS
from finetune.data.formats.read_records import read_records
from modeling.errors import UserError

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")


def written(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(*paths, **settings):
    """Records as they are, errors by their reason."""
    source = make_source("auto", paths, **{"on_broken": "keep", **settings})
    return [(record_id, got.reason if isinstance(got, RecordError) else got) for record_id, got in read_records(source)]


def refusal(function, *arguments):
    with pytest.raises(UserError) as caught:
        list(function(*arguments))
    assert not isinstance(caught.value, RecordError)
    return str(caught.value)


LINES = '{"a": 1}\n\n  \n{"a": "é"}\r\n{"a": [true, null]}'


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


DEEP = b"[" * 5000 + b"]" * 5000


def shard(members, mode="w", format=tarfile.PAX_FORMAT):
    """A tar archive of (name, content); a TarInfo is taken as it is."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as archive:
        for name, content in members:
            if isinstance(name, tarfile.TarInfo):
                archive.addfile(name)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def write_files(folder, **contents):
    """Files of these contents (anything but text as JSON) in a new folder: their paths, in order."""
    paths = [folder / name.replace("__", ".") for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return tuple(paths)


def read_format(name, *paths, **settings):
    """What a format reads of these paths: records, and errors by their reason."""
    records = [record for _, record in FORMATS[name].read(make_source(name, paths=paths, **settings))]
    return [(record.reason, record.detail) if isinstance(record, RecordError) else record for record in records]
