"""What the trainer is told of a plan: how processes share a step, what is installed, which precision."""

from types import SimpleNamespace

import pytest
from training_settings import training
from trl import SFTConfig

from finetune.training import arguments as module
from finetune.training.arguments import training_arguments
from modeling.errors import UserError


def test_rows_per_process_uneven(tmp_path, monkeypatch):
    """A step that the processes cannot share out is refused; the message names the nearest."""
    monkeypatch.setattr("finetune.distributed.collectives.world_size", lambda: 4)
    with pytest.raises(UserError, match="6 rows a step, which 4 processes cannot share out evenly; the nearest is 8"):
        training_arguments(tmp_path, training(6), steps=1)


def test_tracker_not_installed(tmp_path):
    """A tracker that is not installed is a user's mistake."""
    with pytest.raises(UserError, match=r"training\.trackers: wandbb not installed here"):
        training_arguments(tmp_path, training(trackers=["wandbb"]), steps=1)


def test_one_process_uses_one_gpu(tmp_path, monkeypatch):
    """One process trains on one GPU of several."""

    class OfTwo(SFTConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(module, "SFTConfig", OfTwo)
    assert training_arguments(tmp_path, training(), steps=1).n_gpu == 1


def test_fp16_scales_the_loss(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(module, "SFTConfig", lambda **arguments: seen.update(arguments) or SimpleNamespace(n_gpu=0))
    training_arguments(tmp_path, training(optimizer="adamw_8bit"), steps=1, scaled=True)
    assert (seen["fp16"], seen["bf16"], seen["optim"]) == (True, False, "adamw_8bit")
    training_arguments(tmp_path, training(), steps=1)
    assert (seen["fp16"], seen["bf16"]) == (False, False)
