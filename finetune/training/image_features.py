"""Images -> what the frozen vision tower and resampler make of them: once per distinct image, kept on disk.

A frozen tower gives an image the same features in every step of every run. They are computed the first time an image
is needed, and mapped from disk from then on; the run itself then does without the towers.

    <cache>/<towers>/    towers: a hash of the towers' weights, the preprocessing, the number type
      *.safetensors      images uint8 [n, 32]: SHA-256 of each one's bytes; features [n, latents, D]

A file is written aside and renamed, so it is whole or not there: a writer that is killed loses one file's work. Files
are never changed, so runs may share a cache, and fill it one after the other. The processes of one run fill it
together, each with files of its own. What a run that is alive uses stays, however old: `training.cache_holds`.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from finetune.distributed.device import device
from finetune.training.cache_holds import holding
from modeling.checkpoint import Stored, read_header
from modeling.cores import available_cores
from modeling.device import choices
from modeling.errors import UserError
from modeling.files import put_in_place

FILE_BYTES = 128 * 2**20
"""Of features in one file: what a killed writer loses."""

ENDING = "safetensors"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of numbered images, mapped from disk. Plain data, so workers can have it."""

    files: Sequence[Stored]
    """Their tensors of features."""
    places: np.ndarray
    """int64 [images, 2]: the file and the row of each; -1 where an image was not asked for."""
    shape: tuple[int, int]
    """(latents, D)."""
    dtype: torch.dtype

    def __call__(self, images: Sequence[int]) -> torch.Tensor:
        """[N, latents, D] of these images, in the model's dtype."""
        features = torch.empty(len(images), *self.shape, dtype=self.dtype)
        for row, (file, place) in zip(features, self.places[list(images)].tolist(), strict=True):
            assert file >= 0, "an image whose features were not asked for"
            row.copy_(_mapped(self.files[file])[place])
        return features

    def exchanged(self, other: Mapping[int, int]) -> "ImageFeatures":
        """Image `one` has the features of `other[one]`."""
        places = self.places.copy()
        places[list(other)] = self.places[list(other.values())]
        return ImageFeatures(self.files, places, self.shape, self.dtype)


@lru_cache(maxsize=1024)
def _mapped(stored: Stored) -> torch.Tensor:
    """A tensor in a file, its pages read when they are touched. Raises UserError: the file is gone, or cut short."""
    try:
        content = np.memmap(stored.file, np.uint8, mode="c", offset=stored.offset, shape=(stored.nbytes,))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{stored.file}: image features that were there when this run began cannot be read ({error}); give the "
            "same command again: it computes them anew, and goes on"
        ) from error
    return torch.from_numpy(content).view(stored.dtype).view(stored.shape)


@dataclass(frozen=True)
class FeatureCache:
    """The features of one pair of towers."""

    folder: Path
    """All caches lie in it, one a folder."""
    towers: str
    """`modeling.vision.image_towers_fingerprint`."""
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
        """Of one image's features."""
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
        """Features of the images whose numbers are `wanted` (int64), those that are missing computed first.

        digests: S32, of every one of `images`. `towers` makes [N, latents, D] of pixel values [N, 3, H, W]; it is
        loaded only if something is missing. Raises UserError: the limit or the disk is too small, or an image that was
        there is gone. Of several processes every one asks for the same images, and computes its share of the batches.
        """
        collectives.on_main("make the feature cache", lambda: self.path.mkdir(parents=True, exist_ok=True))
        with FileLock(self.path.with_name(f".{self.path.name}.lock")) if collectives.is_main() else nullcontext():
            places, files = collectives.on_main("find features", lambda: self._find_or_make_room(digests, wanted))
            missing = wanted[places[wanted, 0] < 0]
            if len(missing):
                size = choices(device().type).tower_images
                batches = [missing[start : start + size] for start in range(0, len(missing), size)]
                mine = batches[collectives.rank() :: collectives.world_size()]
                collectives.each("compute features", lambda: self._fill(images, digests, mine, towers, track))
                places, files = collectives.on_main("find features", lambda: self._find_and_hold(digests, wanted))
                if (places[wanted, 0] < 0).any():
                    raise UserError(f"{self.path}: files were deleted while they were computed; start again")
        collectives.on_main("touch features", lambda: _touch(files[file].file for file in np.unique(places[wanted, 0])))
        return ImageFeatures(files, places, self.shape, self.dtype)

    def _find_or_make_room(self, digests: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, list[Stored]]:
        """As `_find`. Where something is missing, there is room for it, and nothing is left of a killed writer.

        From here on no other run deletes a file that this one uses, or will have written.
        """
        with holding(self.folder) as hold:
            places, files = self._find(digests, wanted)
            missing = int((places[wanted, 0] < 0).sum())
            if not missing:
                hold.keep(files[file].file for file in np.unique(places[wanted, 0]))
                return places, files
            hold.keep([self.path])
            self._make_room(len(wanted), missing, used={one.file for one in files}, held=hold.others())
            for leftover in self.path.glob("*.partial"):  # whoever writes does so while the lock is held
                leftover.unlink()
        return places, files

    def _find_and_hold(self, digests: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, list[Stored]]:
        with holding(self.folder) as hold:
            places, files = self._find(digests, wanted)
            hold.kept.discard(self.path)
            hold.keep({files[file].file for file in places[wanted, 0] if file >= 0})
        return places, files

    def _find(self, digests: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, list[Stored]]:
        """(places, files) as `ImageFeatures` has them. Files that are no longer whole are deleted."""
        places = np.full((len(digests), 2), -1, np.int64)
        files: list[Stored] = []
        order = wanted[np.argsort(digests[wanted])]
        for path in sorted(self.path.glob(f"*.{ENDING}")):
            tensors = self._read(path)
            if tensors is None:
                path.unlink(missing_ok=True)
                continue
            held = tensors["images"].rows().numpy().copy().view("S32")[:, 0]
            found = np.searchsorted(held_sorted := held[by := np.argsort(held)], digests[order])
            matches = found < len(held)
            matches[matches] = held_sorted[found[matches]] == digests[order][matches]
            places[order[matches]] = np.stack([np.full(matches.sum(), len(files)), by[found[matches]]], axis=1)
            files.append(tensors["features"])
        return places, files

    def _read(self, path: Path) -> dict[str, Stored] | None:
        """The tensors of a file; None of one that was cut short by a full disk, or is another."""
        try:
            tensors = read_header(path)
        except (UserError, OSError):
            return None
        images, features = tensors.get("images"), tensors.get("features")
        if images is None or features is None or images.dtype != torch.uint8 or images.shape[1:] != (32,):
            return None
        whole = features.dtype == self.dtype and features.shape == (*images.shape[:1], *self.shape)
        return tensors if whole else None

    def _make_room(self, wanted: int, missing: int, *, used: set[Path], held: Callable[[Path], bool]) -> None:
        """Delete what no run has used for longest, and none that is alive uses. Raises UserError."""
        needed = wanted * self.image_bytes
        if needed > self.limit:
            raise UserError(
                f"data.feature_cache_size: the features of {wanted:,} images take {show_size(needed)}, and the cache "
                f"may take {show_size(self.limit)}; allow more, or set data.cache_features=false"
            )
        there = {path: path.stat() for path in self.folder.glob(f"*/*.{ENDING}")}
        total = sum(status.st_size for status in there.values()) + missing * self.image_bytes
        for path in sorted(there.keys() - used, key=lambda path: there[path].st_mtime):
            if total > self.limit and not held(path):
                path.unlink()
                total -= there[path].st_size
        if total > self.limit and any(map(held, there)):
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
        """Compute and write these batches of images, given by number."""
        if not batches:
            return
        model, per_file = towers(), max(1, FILE_BYTES // (len(batches[0]) * self.image_bytes))
        done: list[torch.Tensor] = []
        ahead = _Ahead([batch.tolist() for batch in batches], lambda image: self._pixels(images[image]))
        for number, pixels in enumerate(track(ahead, "features"), start=1):
            done.append(model(pixels).to("cpu", self.dtype))
            if len(done) == per_file or number == len(batches):
                numbers = np.concatenate(batches[number - len(done) : number])
                self._write(torch.cat(done), digests[numbers])
                done = []

    def _pixels(self, image: Image) -> np.ndarray:
        return self.preprocessing.pixels(open_image(image))

    def _write(self, features: torch.Tensor, digests: np.ndarray) -> None:
        path = self.path / f"{uuid.uuid4().hex}.{ENDING}"
        held = torch.from_numpy(np.ascontiguousarray(digests).view(np.uint8).reshape(len(digests), 32).copy())
        partial = path.with_suffix(".partial")
        save_file({"images": held, "features": features.contiguous()}, partial)
        put_in_place(partial, path)


def _touch(files: Iterable[Path]) -> None:
    for file in files:
        os.utime(file)


class _Ahead(Sequence[torch.Tensor]):
    """Batches of pixels in order; the next one is decoded in threads while the last one is used."""

    def __init__(self, batches: Sequence[Sequence[int]], pixels: Callable[[int], np.ndarray]):
        self.batches, self.pixels = batches, pixels

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return torch.from_numpy(np.stack([self.pixels(image) for image in self.batches[index]]))

    def __iter__(self) -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(available_cores()) as pool:

            def start(batch: Sequence[int]) -> list[Future[np.ndarray]]:
                return [pool.submit(self.pixels, image) for image in batch]

            coming = start(self.batches[0])
            for number in range(len(self)):
                ready = coming
                coming = start(self.batches[number + 1]) if number + 1 < len(self) else []
                yield torch.from_numpy(np.stack([one.result() for one in ready]))
