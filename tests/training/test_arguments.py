"""What the trainer is told of a plan: how processes share a step, what is installed, which precision."""

from types import SimpleNamespace

import pytest
from training_settings import training
from trl import SFTConfig

from finetune.training import arguments as module
from finetune.training.arguments import training_arguments
from modeling.errors import UserError


def test_a_step_that_processes_cannot_share_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.distributed.collectives.world_size", lambda: 4)
    with pytest.raises(UserError, match="6 rows a step, which 4 processes cannot share out evenly; the nearest is 8"):
        training_arguments(tmp_path, training(6), steps=1)


def test_a_tracker_that_is_not_installed_is_a_user_s_mistake(tmp_path):
    with pytest.raises(UserError, match=r"training\.trackers: wandbb not installed here"):
        training_arguments(tmp_path, training(trackers=["wandbb"]), steps=1)


def test_one_process_trains_on_one_gpu_of_several(tmp_path, monkeypatch):
    class OfTwo(SFTConfig):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(module, "SFTConfig", OfTwo)
    assert training_arguments(tmp_path, training(), steps=1).n_gpu == 1


def test_fp16_products_scale_the_loss(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(module, "SFTConfig", lambda **arguments: seen.update(arguments) or SimpleNamespace(n_gpu=0))
    training_arguments(tmp_path, training(optimizer="adamw_8bit"), steps=1, scaled=True)
    assert (seen["fp16"], seen["bf16"], seen["optim"]) == (True, False, "adamw_8bit")
    training_arguments(tmp_path, training(), steps=1)
    assert (seen["fp16"], seen["bf16"]) == (False, False)
