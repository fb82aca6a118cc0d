"""Prepared examples -> training and eval examples, without a common image."""

from collections import defaultdict

import numpy as np

from finetune.data.prepared import Prepared
from modeling.errors import UserError


def split_by_image(prepared: Prepared, fraction: float, *, seed: int) -> tuple[Prepared, Prepared]:
    """Return (train, eval), without a common image. Eval has at most `fraction` of the examples, but at least one.

    Raises UserError: shared images connect the examples, so that no such split exists.
    """
    groups = _groups(prepared)
    order = np.random.default_rng([seed, 2]).permutation(len(groups))
    held: list[int] = []
    wanted = max(1, round(fraction * len(prepared))) if fraction else 0
    for group in order:
        if len(held) + len(groups[group]) <= wanted:
            held += groups[group]
    if wanted and len(held) in (0, len(prepared)):
        raise UserError(
            f"data.eval_split: {fraction:g} of {len(prepared)} examples cannot be held out: they share images, and the "
            f"smallest group that does has {min(map(len, groups), default=0)}; set eval_sources, or a larger share"
        )
    mask = np.zeros(len(prepared), bool)
    mask[held] = True
    return prepared.select(np.flatnonzero(~mask)), prepared.select(np.flatnonzero(mask))


def _groups(prepared: Prepared) -> list[list[int]]:
    """Return groups of examples connected by shared images; each example without images is a group of its own."""
    parent: dict[int, int] = {}

    def root(image: int) -> int:
        while parent.setdefault(image, image) != image:
            parent[image] = image = parent[parent[image]]
        return image

    image_ids = list(prepared.image_ids)
    for ids in image_ids:
        for image in ids[1:]:
            parent[root(image)] = root(ids[0])
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for example, ids in enumerate(image_ids):
        groups[("image", root(ids[0])) if ids else ("text", example)].append(example)
    return list(groups.values())
