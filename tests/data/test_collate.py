"""One packed row as tensors, written out by hand."""

import pickle

import numpy as np
import PIL.Image
import pytest
import torch

from finetune.data.collate import RowCollator, collate, stack_pixels
from finetune.data.conversation import Image
from finetune.data.images import Preprocessing
from finetune.data.sampling import Row
from finetune.data.tokenize import Example
from finetune.recipe.schema import Augment
from modeling.layout import Layout

DTYPES = {
    "input_ids": torch.int64,
    "labels": torch.int64,
    "position_ids": torch.int64,
    "image_index": torch.int64,
    "supervised_positions": torch.int64,
    "targets": torch.int64,
    "pixel_values": torch.float32,
}


def example(ids, labels, image_index):
    return Example(*(np.array(values, dtype=np.int64) for values in (ids, labels, image_index)))


TEXT = example([1, 5, 6], [-100, 5, 6], [-1, -1, -1])
ONE = example([1, 7], [-100, 7], [0, 0])
TWO = example([1, 8, 8, 9], [-100, -100, 8, 9], [-1, 0, 1, 1])


def pixels(image):
    return np.full((3, 2, 4), image, dtype=np.float32)


def show(images):
    return {"pixel_values": stack_pixels(images, pixels, size=(2, 4))}


def batch(examples, image_ids):
    return collate(examples, image_ids, show=show, filler=2)


def dtypes(row):
    return {name: one.dtype for name, one in row.items() if name != "layout"}


def test_a_batch_by_hand():
    row = batch([TEXT, TWO, ONE], [(), (7, 4), (9,)])
    assert row["input_ids"].tolist() == [[1, 5, 6, 1, 8, 8, 9, 1, 7]]
    assert row["labels"].tolist() == [[-100, 5, 6, -100, -100, 8, 9, -100, 7]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 1]]
    assert row["supervised_positions"].tolist() == [0, 1, 4, 5, 7]
    assert row["targets"].tolist() == [5, 6, 8, 9, 7]
    assert row["layout"] == Layout((0, 3, 7, 9), ((4, 5, 0), (5, 7, 1), (7, 9, 2)))
    assert row["image_index"].tolist() == [[-1, -1, -1, -1, 0, 1, 1, 2, 2]]
    assert row["pixel_values"].shape == (3, 3, 2, 4)
    assert row["pixel_values"][:, 0, 0, 0].tolist() == [7, 4, 9]
    assert dtypes(row) == DTYPES


def test_an_image_shared_by_examples_is_there_once():
    row = batch([ONE, TWO, ONE], [(7,), (4, 7), (4,)])
    assert row["image_index"].tolist() == [[0, 0, -1, 1, 0, 0, 1, 1]]
    assert row["pixel_values"][:, 0, 0, 0].tolist() == [7, 4]


def test_an_image_shown_twice_in_one_example_is_there_once():
    row = batch([TWO], [(7, 7)])
    assert row["image_index"].tolist() == [[-1, 0, 0, 0]]
    assert row["pixel_values"][:, 0, 0, 0].tolist() == [7]


def test_each_distinct_image_is_asked_for_once():
    asked = []

    def shown(images):
        asked.append(images)
        return show(images)

    collate([ONE, TWO], [(7,), (7, 4)], show=shown, filler=2)
    assert asked == [[7, 4]]


def test_a_row_without_images_has_none_padded():
    row = batch([TEXT], [()])
    assert row["image_index"].tolist() == [[-1, -1, -1]]
    assert row["pixel_values"].shape == (0, 3, 2, 4)
    assert dtypes(row) == DTYPES


def test_a_filler_row_is_one_unsupervised_token():
    row = batch([], [])
    assert row.pop("layout") == Layout((0, 1), ())
    assert {name: tensor.tolist() for name, tensor in row.items() if name != "pixel_values"} == {
        "input_ids": [[2]],
        "labels": [[-100]],
        "position_ids": [[0]],
        "image_index": [[-1]],
        "supervised_positions": [],
        "targets": [],
    }
    assert row["pixel_values"].shape == (0, 3, 2, 4)
    assert dtypes(row) == DTYPES


def gradient(start):
    levels = (start + np.arange(48).reshape(4, 4, 3)).astype(np.uint8)
    return Image(PIL.Image.fromarray(levels))


@pytest.fixture
def collator():
    return RowCollator(
        rows=[Row(0, (1, 0)), Row(0), Row(1, (1, 0))],
        examples=[TEXT, ONE],
        image_ids=[(), (1,)],
        images=[gradient(100), gradient(0)],
        preprocessing=Preprocessing((4, 4), mean=(0.0,) * 3, std=(1.0,) * 3),
        filler=2,
    )


def test_the_collator_builds_the_row_it_is_asked_for(collator):
    row = collator.at(0)
    assert row["input_ids"].tolist() == [[1, 7, 1, 5, 6]]
    assert row["layout"] == Layout((0, 2, 5), ((0, 2, 0),))
    assert (row["pixel_values"] * 255).round()[0, :, 0, 0].tolist() == [0, 1, 2]
    assert collator.at(1)["input_ids"].tolist() == [[2]]


def test_without_augmentation_every_epoch_has_the_same_pixels(collator):
    assert torch.equal(collator.at(0)["pixel_values"], collator.at(2)["pixel_values"])


def test_augmented_pixels_depend_on_seed_epoch_and_image_alone(collator):
    def augmented(row, seed):
        changes = {"augment": Augment(shift=3), "seed": seed}
        return RowCollator(**{**vars(collator), **changes}).at(row)["pixel_values"]

    assert torch.equal(augmented(0, 5), augmented(0, 5))
    assert len({augmented(row, seed).numpy().tobytes() for row in (0, 2) for seed in (5, 6, 7)}) > 3
    assert augmented(0, 5).shape == (1, 3, 4, 4)


def test_two_images_of_a_row_are_moved_apart(collator):
    twins = {"images": [gradient(0), gradient(0)], "image_ids": [(0,), (1,)], "examples": [ONE, ONE]}
    changed = RowCollator(**{**vars(collator), **twins, "augment": Augment(shift=3)})
    first, second = changed.at(0)["pixel_values"]
    assert not torch.equal(first, second)


def test_workers_can_have_the_collator(collator):
    again = pickle.loads(pickle.dumps(collator))
    assert torch.equal(again.at(0)["pixel_values"], collator.at(0)["pixel_values"])
