"""Cached image features: those of the model itself, computed once per distinct image, whole or not there."""

import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from finetune.data.conversation import Image
from finetune.data.images import Preprocessing, digest
from finetune.training.image_features import FeatureCache
from modeling import loading
from modeling.device import CHOICES
from modeling.errors import UserError
from modeling.image_towers import feature_shape, image_towers_fingerprint, load_image_towers
from modeling.packed_forward import image_features, packed_loss

SIZE = 64
# fp32 products of another batch size, in another order.
RELATIVE = 1e-5


@pytest.fixture
def images(tmp_path):
    """Twenty pictures, and copies of the first two under other names."""
    made = []
    for number in range(20):
        levels = np.random.default_rng(number).integers(0, 255, (12, 9, 3)).astype(np.uint8)
        PIL.Image.fromarray(levels).save(tmp_path / f"{number}.png")
        made.append(Image(tmp_path / f"{number}.png"))
    return [*made, *(Image(shutil.copy(made[number].source, tmp_path / f"copy{number}.png")) for number in range(2))]


@pytest.fixture(autouse=True)
def sixteen_at_once(monkeypatch):
    monkeypatch.setitem(CHOICES, "cpu", replace(CHOICES["cpu"], tower_images=16))


@pytest.fixture
def cache(base_folder, tmp_path):
    config = loading.read_config(str(base_folder))
    processor = loading.load_processor(str(base_folder))
    return FeatureCache(
        tmp_path / "features",
        image_towers_fingerprint(base_folder),
        Preprocessing.of(processor.image_processor),
        feature_shape(config),
        torch.float32,
        limit=10**9,
    )


@pytest.fixture
def towers(base_folder):
    return load_image_towers(base_folder, dtype=torch.float32, device=torch.device("cpu"))


def digests_of(images):
    return np.array([digest(image) for image in images], dtype="S32")


def opened(cache, images, wanted, towers):
    return cache.open(images, digests_of(images), np.array(wanted), towers=towers)


def never():
    raise AssertionError("the towers were asked for")


def test_features_equal_the_model(base_folder, cache, towers, images):
    features = opened(cache, images, range(22), lambda: towers)([21, 3, 3, 0])
    model = loading.load(str(base_folder)).model
    pixels = [cache.preprocessing.pixels(PIL.Image.open(images[number].source)) for number in (1, 3, 3, 0)]
    with torch.no_grad():
        expected = image_features(model, torch.from_numpy(np.stack(pixels)))
    assert features.dtype == expected.dtype
    torch.testing.assert_close(features, expected, rtol=RELATIVE, atol=RELATIVE)


def test_features_computed_once_per_distinct_image(cache, towers, images):
    """Whatever the image files are called."""
    computed = []

    def counted(pixels):
        computed.append(len(pixels))
        return towers(pixels)

    distinct, numbers = np.unique(digests_of(images), return_index=True)
    assert len(distinct) == 20
    cache.open([images[number] for number in numbers], distinct, np.arange(20), towers=lambda: counted)
    assert computed == [16, 4]
    copies = [images[20], images[21]]
    again = opened(cache, copies, [0, 1], never)
    assert torch.equal(again([0, 1]), opened(cache, images[:2], [0, 1], never)([0, 1]))


def test_features_computed_for_wanted_images_alone(cache, towers, images):
    features = opened(cache, images, [5, 2], lambda: towers)
    assert features([2, 5]).shape == (2, *cache.shape)
    assert (features.locations[[2, 5]] >= 0).all()
    with pytest.raises(AssertionError, match="not asked for"):
        features([3])
    more = opened(cache, images, [2, 7], lambda: towers)
    assert torch.equal(more([2]), features([2]))
    assert len(list(cache.path.glob("*.safetensors"))) == 2


def test_features_of_no_images_need_no_towers(cache):
    features = cache.open([], np.zeros(0, "S32"), np.arange(0), towers=never)
    assert features([]).shape == (0, *cache.shape)


def test_features_have_a_cache_for_each_tower(cache, base_folder, tmp_path):
    """And for each preprocessing and number type."""
    folder = tmp_path / "other"
    shutil.copytree(base_folder, folder)
    loaded = loading.load(str(folder), instruct=False)
    with torch.no_grad():
        loaded.model.model.perceiver_resampler.latents[0, 0] += 1
    loaded.model.save_pretrained(folder)
    others = [
        replace(cache, preprocessing=replace(cache.preprocessing, mean=(0.0, 0.0, 0.0))),
        replace(cache, dtype=torch.bfloat16),
        replace(cache, towers=image_towers_fingerprint(folder)),
    ]
    assert len({cache.path, *(other.path for other in others)}) == 4


def test_features_do_not_depend_on_the_decoder(cache, base_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(base_folder, folder)
    loaded = loading.load(str(folder), instruct=False)
    with torch.no_grad():
        loaded.model.model.norm.weight += 1
    loaded.model.save_pretrained(folder)
    assert image_towers_fingerprint(folder) == cache.towers


def test_features_of_a_killed_writer(cache, towers, images):
    """What it left is no feature."""
    opened(cache, images, [0, 1], lambda: towers)
    (whole,) = cache.path.glob("*.safetensors")
    (cache.path / "a.partial").write_bytes(whole.read_bytes()[:100])
    cut = cache.path / "b.safetensors"
    cut.write_bytes(whole.read_bytes()[:-4])
    features = opened(cache, images, [0, 1, 2], lambda: towers)
    assert not cut.exists()
    assert not (cache.path / "a.partial").exists()
    assert features([0, 1, 2]).isfinite().all()


def test_features_being_written_by_another_process(cache, towers, images):
    """They are left alone."""

    def loaded():
        (cache.path / "another.partial").write_bytes(b"begun")
        return towers

    opened(cache, images, [0, 1], loaded)
    assert (cache.path / "another.partial").read_bytes() == b"begun"


def test_features_resume(cache, towers, images, monkeypatch):
    """After an interruption only what is missing is computed."""
    monkeypatch.setattr("finetune.training.image_features.FILE_BYTES", 1)  # a file for each batch
    computed = []

    def killed(pixels):
        computed.append(len(pixels))
        if len(computed) == 2:
            raise KeyboardInterrupt
        return towers(pixels)

    with pytest.raises(KeyboardInterrupt):
        opened(cache, images[:20], range(20), lambda: killed)
    opened(cache, images[:20], range(20), lambda: killed)
    assert computed == [16, 4, 4]


def test_features_eviction(cache, towers, images):
    """The features that no run has used for longest give way."""
    other = replace(cache, towers="other")
    first = opened(other, images, [0, 1], lambda: towers)
    second = opened(other, images, [2, 3], lambda: towers)
    old, young = ((one.files[one.locations[number, 0]].file) for one, number in ((first, 0), (second, 2)))
    os.utime(old, (1, 1))
    limit = young.stat().st_size + 3 * cache.image_bytes
    opened(replace(cache, limit=limit), images, [4, 5], lambda: towers)
    assert not old.exists()
    assert young.exists()


HOLDER = """
import sys
from pathlib import Path
from finetune.training.cache_lock import choosing_files
cache, *files = map(Path, sys.argv[1:])
with choosing_files(cache) as in_use:
    in_use.add(files)
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def another_run():
    """Starts a process that uses these files of a cache, as a run does; all end with the test."""
    processes = []

    def start(cache, *files):
        command = [sys.executable, "-c", HOLDER, str(cache.folder), *map(str, files)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "holds\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_features_eviction_leaves_files_in_use(cache, towers, images, another_run):
    files = {}
    for number, name in enumerate(("file", "folder", "idle")):
        other = replace(cache, towers=name)
        files[name] = opened(other, images, [number], lambda: towers).files[0].file
        os.utime(files[name], (number + 1, number + 1))
    first, second = another_run(cache, files["file"]), another_run(cache, files["folder"].parent)
    size = files["file"].stat().st_size
    small = replace(cache, limit=2 * size + cache.image_bytes)
    opened(small, images, [4], lambda: towers)
    assert [path.exists() for path in files.values()] == [True, True, False]
    with pytest.raises(UserError, match=r"data\.feature_cache_size: with what other runs use now, .* are needed"):
        opened(small, images, [4, 5], lambda: towers)
    first.kill()
    first.wait()
    opened(small, images, [4, 5], lambda: towers)
    assert [path.exists() for path in files.values()] == [False, True, False]
    second.terminate()
    second.wait()
    opened(small, images, [4, 5, 6], lambda: towers)
    assert not files["folder"].exists()
    assert len(list(cache.folder.glob(".*.in-use"))) == 1  # this process's own


@pytest.mark.parametrize("harm", ["deleted", "cut"])
def test_features_vanished(harm, cache, towers, images):
    """The message names the file and the repair."""
    features = opened(cache, images, [0], lambda: towers)
    file = features.files[0].file
    file.unlink() if harm == "deleted" else file.write_bytes(b"")
    with pytest.raises(UserError, match="give the same command again: it computes them again, and goes on") as error:
        features([0])
    assert str(error.value).startswith(f"{file}: image features that were there when this run began")


@pytest.mark.parametrize("harm", ["empty", "half", "garbage", "other names", "other shape", "other type", "missing"])
def test_features_damaged(harm, cache, towers, images):
    """They are computed again."""
    whole = opened(cache, images, [0, 1], lambda: towers)
    (path,) = cache.path.glob("*.safetensors")
    expected, data = whole([0, 1]), path.read_bytes()
    held = torch.zeros(2, 32, dtype=torch.uint8)
    tensors = {
        "other names": {"images": held},
        "other shape": {"images": held, "features": torch.zeros(2, 1, 1)},
        "other type": {"images": held, "features": torch.zeros(2, *cache.shape, dtype=torch.float16)},
    }
    if harm in tensors:
        save_file(tensors[harm], path)
    elif harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "garbage": b"\xff" * len(data)}[harm])
    again = opened(cache, images, [0, 1], lambda: towers)
    torch.testing.assert_close(again([0, 1]), expected, rtol=RELATIVE, atol=RELATIVE)
    assert not path.exists()


def test_features_used_become_the_youngest(cache, towers, images):
    """What is used stays and becomes the youngest."""
    kept = opened(cache, images, [0], lambda: towers).files[0].file
    os.utime(kept, (1, 1))
    opened(cache, images, [0], never)
    assert kept.stat().st_mtime > 1


def test_features_limit_or_disk_too_small(cache, images, monkeypatch):
    """The message comes before anything is computed."""
    with pytest.raises(UserError, match=r"data\.feature_cache_size: the features of 20 images take"):
        opened(replace(cache, limit=10), images, range(20), lambda: None)
    monkeypatch.setattr(
        "finetune.training.image_features.shutil.disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 0)
    )
    with pytest.raises(UserError, match="are free; make room, or set"):
        opened(cache, images, range(20), lambda: None)


def test_features_pickle_and_exchange(cache, towers, images):
    """They are plain data and can be exchanged."""
    features = opened(cache, images, [0, 1, 2], lambda: towers)
    again = pickle.loads(pickle.dumps(features))
    assert torch.equal(again([0, 1]), features([0, 1]))
    exchanged = features.exchanged({0: 1, 1: 2, 2: 0})
    assert torch.equal(exchanged([0, 1, 2]), features([1, 2, 0]))


# The model without its towers


def test_features_replace_the_towers(base_folder, make_rows, cache, towers):
    """A model without its towers gives the same loss and gradients."""
    rows = make_rows()
    features = cache.open(rows.images, digests_of(rows.images), np.arange(len(rows.images)), towers=lambda: towers)
    losses, gradients = [], []
    for cached in (False, True):
        model = loading.load(str(base_folder), image_towers=not cached).model.requires_grad_(False)
        for layers in (model.model.layers, model.model.gated_cross_attn_layers):
            layers.requires_grad_(True)
        batch = replace(rows, features=features if cached else None).at(0)
        assert ("pixel_values" in batch) != cached
        loss = packed_loss(model, batch, config=model.config)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=RELATIVE)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        difference = float((gradients[1][name] - gradient).abs().max())
        assert difference <= RELATIVE * max(1e-3, float(gradient.abs().max())), name


def test_model_without_towers_holds_none_of_their_weights(base_folder):
    """A model without its towers holds none of their weights and the same config."""
    whole, bare = (loading.load(str(base_folder), image_towers=towers).model for towers in (True, False))
    names = {name for name, _ in bare.named_parameters()}
    assert {name for name, _ in whole.named_parameters()} - names == {
        name for name, _ in whole.named_parameters() if "vision_model" in name or "perceiver_resampler" in name
    }
    assert whole.config.to_dict() == bare.config.to_dict()
    for name, parameter in bare.named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name))
