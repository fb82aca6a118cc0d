"""Images -> features from the frozen vision tower and resampler, computed once per distinct image and kept on disk.

A frozen tower gives an image the same features in every step of every run. They are computed the first time an image
is needed, and mapped from disk from then on; the run itself then does without the towers.

    <cache>/<towers>/    towers: a hash of the towers' weights, the preprocessing, the number type
      *.safetensors      images uint8 [n, 32]: SHA-256 of each one's bytes; features [n, latents, D]

A file is written aside and renamed, so it is complete or not there: a writer that is killed loses one file's work.
Files are never changed, so runs may share a cache, and fill it one after the other. The processes of one run fill it
together, each with files of its own. What a live run uses stays, however old: `training.cache_lock`.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn

from finetune.console import Track, show_size, silently
from finetune.data.conversation import Image
from finetune.data.images import Preprocessing, open_image
from finetune.distributed import collectives
from finetune.distributed.environment import device
from finetune.training.cache_lock import choosing_files
from modeling.atomic_files import put_in_place
from modeling.cpu_cores import available_cores
from modeling.device import choices
from modeling.errors import UserError
from modeling.safetensors_io import Stored, read_header

FILE_BYTES = 128 * 2**20
"""Bytes of features in one file: what a killed writer loses."""

ENDING = "safetensors"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of numbered images, mapped from disk. Plain data, so workers can have it."""

    files: Sequence[Stored]
    """Their tensors of features."""
    locations: np.ndarray
    """int64 [images, 2]: the file and the row of each; -1 where an image was not asked for."""
    shape: tuple[int, int]
    """(latents, D)."""
    dtype: torch.dtype

    def __call__(self, images: Sequence[int]) -> torch.Tensor:
        """Return the features [N, latents, D] of these images, in the model's dtype."""
        features = torch.empty(len(images), *self.shape, dtype=self.dtype)
        for row, (file, line) in zip(features, self.locations[list(images)].tolist(), strict=True):
            assert file >= 0, "an image whose features were not asked for"
            row.copy_(_mapped(self.files[file])[line])
        return features

    def exchanged(self, other: Mapping[int, int]) -> "ImageFeatures":
        """Return features in which image `one` has those of `other[one]`."""
        locations = self.locations.copy()
        locations[list(other)] = self.locations[list(other.values())]
        return ImageFeatures(self.files, locations, self.shape, self.dtype)


@lru_cache(maxsize=1024)
def _mapped(stored: Stored) -> torch.Tensor:
    """Return a tensor of a file, whose pages are read when touched. Raises UserError: the file is gone or cut short."""
    try:
        content = np.memmap(stored.file, np.uint8, mode="c", offset=stored.offset, shape=(stored.nbytes,))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{stored.file}: image features that were there when this run began cannot be read ({error}); give the "
            "same command again: it computes them again, and goes on"
        ) from error
    return torch.from_numpy(content).view(stored.dtype).view(stored.shape)


@dataclass(frozen=True)
class FeatureCache:
    """The cached features of one vision tower and resampler."""

    folder: Path
    """All caches lie in it, a folder each."""
    towers: str
    """`modeling.image_towers.image_towers_fingerprint`."""
    preprocessing: Preprocessing
    shape: tuple[int, int]
    dtype: torch.dtype
    limit: int
    """Bytes that all caches in `folder` may take; those that no run has used for longest give way."""

    @cached_property
    def path(self) -> Path:
        made_of = f"{self.towers} {self.preprocessing} {self.dtype}"
        return self.folder / hashlib.sha256(made_of.encode()).hexdigest()[:16]

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's features."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def open(
        self,
        images: Sequence[Image],
        digests: np.ndarray,
        wanted: np.ndarray,
        *,
        towers: Callable[[], nn.Module],
        track: Track = silently,
    ) -> ImageFeatures:
        """Return features of the images whose numbers are `wanted` (int64); the missing ones are computed first.

        digests: S32, of every one of `images`. `towers` makes [N, latents, D] of pixel values [N, 3, H, W]; it is
        loaded only if something is missing. Raises UserError: the limit or the disk is too small, or an image that was
        there is gone. Of several processes every one asks for the same images, and computes its share of the batches.
        """
        collectives.on_main("make the feature cache", lambda: self.path.mkdir(parents=True, exist_ok=True))
        with FileLock(self.path.with_name(f".{self.path.name}.lock")) if collectives.is_main() else nullcontext():
            locations, files = collectives.on_main("find features", lambda: self._find_or_make_room(digests, wanted))
            missing = wanted[locations[wanted, 0] < 0]
            if len(missing):
                size = choices(device().type).tower_images
                batches = [missing[start : start + size] for start in range(0, len(missing), size)]
                mine = batches[collectives.rank() :: collectives.world_size()]
                collectives.each("compute features", lambda: self._fill(images, digests, mine, towers, track))
                locations, files = collectives.on_main("find features", lambda: self._find_and_use(digests, wanted))
                if (locations[wanted, 0] < 0).any():
                    raise UserError(f"{self.path}: files were deleted while they were computed; start again")

        def touch() -> None:
            for file in np.unique(locations[wanted, 0]):
                os.utime(files[file].file)

        collectives.on_main("touch features", touch)
        return ImageFeatures(files, locations, self.shape, self.dtype)

    def _find_or_make_room(self, digests: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, list[Stored]]:
        """Return what `_find` does, after making room for what is missing and deleting what a killed run left.

        From here on no other run deletes a file that this one uses, or will have written.
        """
        with choosing_files(self.folder) as in_use:
            locations, files = self._find(digests, wanted)
            missing = int((locations[wanted, 0] < 0).sum())
            if not missing:
                in_use.add(files[file].file for file in np.unique(locations[wanted, 0]))
                return locations, files
            in_use.add([self.path])
            self._make_room(len(wanted), missing, used={one.file for one in files}, used_by_others=in_use.of_others())
            for leftover in self.path.glob("*.partial"):  # a live writer would hold the lock
                leftover.unlink()
        return locations, files

    def _find_and_use(self, digests: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, list[Stored]]:
        """Return what `_find` does; this run uses those files now, and no longer the whole folder."""
        with choosing_files(self.folder) as in_use:
            locations, files = self._find(digests, wanted)
            in_use.paths.discard(self.path)
            in_use.add({files[file].file for file in locations[wanted, 0] if file >= 0})
        return locations, files

    def _find(self, digests: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, list[Stored]]:
        """Return (locations, files) of the `ImageFeatures` of these images. Damaged files are deleted."""
        locations = np.full((len(digests), 2), -1, np.int64)
        files: list[Stored] = []
        order = wanted[np.argsort(digests[wanted])]
        for path in sorted(self.path.glob(f"*.{ENDING}")):
            tensors = self._read(path)
            if tensors is None:
                path.unlink(missing_ok=True)
                continue
            stored = tensors["images"].rows().numpy().copy().view("S32")[:, 0]
            by = np.argsort(stored)
            found = np.searchsorted(stored[by], digests[order])
            matches = found < len(stored)
            matches[matches] = stored[by][found[matches]] == digests[order][matches]
            locations[order[matches]] = np.stack([np.full(matches.sum(), len(files)), by[found[matches]]], axis=1)
            files.append(tensors["features"])
        return locations, files

    def _read(self, path: Path) -> dict[str, Stored] | None:
        """Return the tensors of a file; None where a full disk cut it short, or it is another kind of file."""
        try:
            tensors = read_header(path)
        except (UserError, OSError):
            return None
        images, features = tensors.get("images"), tensors.get("features")
        if images is None or features is None or images.dtype != torch.uint8 or images.shape[1:] != (32,):
            return None
        complete = features.dtype == self.dtype and features.shape == (*images.shape[:1], *self.shape)
        return tensors if complete else None

    def _make_room(self, wanted: int, missing: int, *, used: set[Path], used_by_others: Callable[[Path], bool]) -> None:
        """Delete the files that no run has used for longest, but none that a live run uses. Raises UserError."""
        needed = wanted * self.image_bytes
        if needed > self.limit:
            raise UserError(
                f"data.feature_cache_size: the features of {wanted:,} images take {show_size(needed)}, and the cache "
                f"may take {show_size(self.limit)}; allow more, or set data.cache_features=false"
            )
        there = {path: path.stat() for path in self.folder.glob(f"*/*.{ENDING}")}
        total = sum(status.st_size for status in there.values()) + missing * self.image_bytes
        for path in sorted(there.keys() - used, key=lambda path: there[path].st_mtime):
            if total > self.limit and not used_by_others(path):
                path.unlink()
                total -= there[path].st_size
        if total > self.limit and any(map(used_by_others, there)):
            raise UserError(
                f"data.feature_cache_size: with what other runs use now, {show_size(total)} are needed, and the cache "
                f"may take {show_size(self.limit)}; allow more, wait for them, or set data.cache_features=false"
            )
        free = shutil.disk_usage(self.folder).free
        if missing * self.image_bytes > free:
            raise UserError(
                f"{self.folder}: the features of {missing:,} images take {show_size(missing * self.image_bytes)}, and "
                f"{show_size(free)} are free; make room, or set data.cache_features=false"
            )

    def _fill(
        self,
        images: Sequence[Image],
        digests: np.ndarray,
        batches: Sequence[np.ndarray],
        towers: Callable[[], nn.Module],
        track: Track,
    ) -> None:
        """Compute and write the features of these batches of images, given by number."""
        if not batches:
            return
        model, per_file = towers(), max(1, FILE_BYTES // (len(batches[0]) * self.image_bytes))
        decoded = _decode_ahead(batches, lambda image: self.preprocessing.pixels(open_image(images[image])))
        done: list[torch.Tensor] = []
        for number, (_, pixels) in enumerate(zip(track(batches, "features"), decoded, strict=True), start=1):
            done.append(model(pixels).to("cpu", self.dtype))
            if len(done) == per_file or number == len(batches):
                written = digests[np.concatenate(batches[number - len(done) : number])]
                as_bytes = np.ascontiguousarray(written).view(np.uint8).reshape(len(written), 32)
                path = self.path / f"{uuid.uuid4().hex}.{ENDING}"
                partial = path.with_suffix(".partial")
                save_file({"images": torch.from_numpy(as_bytes.copy()), "features": torch.cat(done)}, partial)
                put_in_place(partial, path)
                done = []


def _decode_ahead(batches: Sequence[np.ndarray], pixels: Callable[[int], np.ndarray]) -> Iterator[torch.Tensor]:
    """Yield the pixels [N, 3, H, W] of each batch; threads decode the next batch while one is used."""
    with ThreadPoolExecutor(available_cores()) as pool:

        def start(batch: np.ndarray) -> list[Future[np.ndarray]]:
            return [pool.submit(pixels, image) for image in batch.tolist()]

        coming = start(batches[0])
        for number in range(len(batches)):
            ready = coming
            coming = start(batches[number + 1]) if number + 1 < len(batches) else []
            yield torch.from_numpy(np.stack([one.result() for one in ready]))
