"""The note beside an adapter says what it was trained on; without one, PEFT's own file does, or the user."""

import json
from dataclasses import asdict

import pytest

from finetune.origin import NOTE, Origin
from modeling.errors import UserError


def test_an_origin_is_read_as_it_was_written(tmp_path):
    origin = Origin("bases/mine", "main", True, "nf4", "0123")
    origin.write(tmp_path)
    assert Origin.of(tmp_path) == origin
    assert json.loads((tmp_path / NOTE).read_text()) == asdict(origin)
    assert (origin.onto, Origin("a/b").onto) == ("nf4", "full")
    (tmp_path / NOTE).unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say what base it was made for; name it: --base"):
        Origin.of(tmp_path)
