"""A folder of images, and limits made small, so that a test reaches them."""

import pytest
from image_files import CAT, FILES

from finetune.data.io import byte_streams


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(byte_streams, "MAX_RECORD_BYTES", 100_000)


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
    (tmp_path / "secret.png").write_bytes(CAT)
    return tmp_path / "images"
