"""References in records -> images, looked up where the source keeps them and nowhere else."""

import os
import re
from copy import copy
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any
from urllib.parse import unquote

import PIL.Image

from finetune.data.conversation import Image, RecordError, Remote, Slice
from finetune.data.images import decode_base64, describe
from finetune.data.io.image_stores import Archive, Folder, JsonImages, ParquetImages, RemoteFolder, Store, Tar, Zip
from finetune.data.io.img2dataset import image_shards
from finetune.data.io.paths import folders_of, is_image_folder, locate
from finetune.data.io.tars import COMPRESSED_TARS
from finetune.data.io.url_images import UrlImages
from finetune.recipe.schema import Source
from finetune.recipe.urls import is_remote, shown
from modeling.errors import UserError


class ImageRoot:
    """Finds the images of a source. Raises UserError: a root that does not exist, or an invalid `image_name`.

    It can be pickled; archives are opened again in the other process.
    """

    def __init__(self, source: Source):
        self.source = source
        folders = [] if source.image_root else _default_folders(source)
        if source.image_root:
            located = [found for path in source.image_roots for found in locate(path)]
            resolved = tuple(found.resolve() for found, _ in located if found.is_dir())
            self._stores = tuple(
                _open_folder(found, resolved) if is_image_folder(found) else _open_file(found, inner)
                for found, inner in located
            )
            if any(isinstance(store, RemoteFolder) for store in self._stores[:-1]):
                listed = ", ".join(map(shown, source.image_root))
                raise UserError(f"image_root: [{listed}]: a remote folder is not listed: put it last, and only one")
        else:
            resolved = tuple(dict.fromkeys(folder.resolve() for folder in folders))
            self._stores = tuple(_open_folder(folder, resolved) for folder in resolved)
        self._common = Path(os.path.commonpath(folders)) if source.paths and folders else None
        """The folder that record ids are relative to; None with `image_root`."""
        self._own: Folder | RemoteFolder | None = None
        """The folder of the record's own file, if `beside` made this root."""
        self._beside: dict[Path, ImageRoot] = {}
        if source.image_name is not None:
            _check_template(source.image_name)

    def __reduce__(self) -> tuple[type["ImageRoot"], tuple[Source]]:
        return ImageRoot, (self.source,)

    def image(self, reference: object) -> Image:
        """Return the image that a record's value refers to. Raises RecordError.

        `reference` is a path under a root, an id in a MIMIC-IT file, base64 (also as `data:image/...;base64,`), a URL
        that img2dataset downloaded to a root, an https URL if the source allows it, encoded bytes, {"bytes", "path"},
        or an image.
        """
        if isinstance(reference, Image):
            return reference
        if isinstance(reference, dict) and ("bytes" in reference or "path" in reference):
            reference = reference.get("bytes") or reference.get("path")
        if isinstance(reference, bytes | Slice | PIL.Image.Image):
            return Image(reference)
        if not isinstance(reference, str) or not reference:
            raise RecordError("not an image reference", f"expected a path, got {_short(reference)}")
        if reference[:5].lower() == "data:":
            head, _, content = reference.partition(",")
            if not re.fullmatch(r"(?i)data:image/.*;base64", head, re.DOTALL):
                raise RecordError("not an image reference", f"expected data:image/...;base64,... got {head[:80]!a}")
            return Image(decode_base64(content))
        if local := _FILE_URL.fullmatch(reference):
            return self._stored(unquote(local["path"]))
        if _URL.match(reference):
            if found := self._downloaded(reference):
                return found
            scheme, fetches = reference.partition(":")[0].lower(), self.source.download
            if fetches and (scheme == "https" or (scheme == "http" and fetches == "http")):
                return Image(Remote(reference))
            if self._by_url:
                where = " or ".join(str(store.folder) for store in self._by_url)
                return Image(RecordError("missing image", f"{reference:.200}: not among the images in {where}"))
            hint = {"https": "; `download: true` fetches it", "http": "; `download: http` fetches it"}.get(scheme, "")
            raise RecordError("image is a URL", f"{reference:.200}: expected a path{hint}")
        if _BASE64.fullmatch(reference):
            return Image(decode_base64(reference))
        return self._stored(reference)

    def _downloaded(self, url: str) -> Image | None:
        """Return the image of a URL from the first folder of `image_root` that has it. Raises RecordError."""
        return next(filter(None, (store.find(url) for store in self._by_url)), None)

    @cached_property
    def _by_url(self) -> tuple[UrlImages, ...]:
        """The folders of `image_root` into which img2dataset has downloaded images."""
        folders = [store.path for store in self._stores if isinstance(store, Folder)] if self.source.image_root else []
        return tuple(UrlImages(folder, shards) for folder in folders if (shards := image_shards(folder)))

    def beside(self, record_id: str) -> "ImageRoot":
        """Return the root for one record: without `image_root`, the folder of its own file comes first."""
        if self._common is None:
            return self
        folder = self._common
        for part in record_id.split("/")[:-1]:
            if not (folder / part).is_dir():
                break
            folder /= part
        if folder not in self._beside:
            self._beside[folder] = copy(self)
            self._beside[folder]._own = _open_folder(folder, tuple(store.path for store in self._stores))
        return self._beside[folder]

    def base64(self, text: object) -> Image:
        """Return an image written as base64, white space allowed. Raises RecordError: not base64."""
        if not isinstance(text, str):
            raise RecordError("corrupt image", f"expected base64, got {_short(text)}")
        return Image(decode_base64(text))

    def named(self, record: dict[str, Any], default: str) -> Image:
        """Return the image whose name is the template `image_name` (or else `default`) filled with a record's fields.

        "COCO_train2014_{image_id:012d}.jpg" and {"image_id": 9} -> COCO_train2014_000000000009.jpg

        Raises RecordError: a field is missing, or neither text nor a whole number.
        """
        template = self.source.image_name or default
        return self.image("".join(_fill(*part, record) for part in _check_template(template)))

    def _stored(self, name: str) -> Image:
        """Return the image of this name from the first store of `image_root` that has it, or a default folder."""
        if _NO_PATH.search(name):
            raise RecordError("not an image reference", f"{name[:200]!a}: expected a path")
        if self._own and (image := self._own.find(name)):
            return image
        refusal: RecordError | None = None
        found: list[Image] = []
        for store in self._stores:
            try:
                image = store.find(name)
            except RecordError as error:
                refusal = refusal or error
                continue
            if image is not None:
                found.append(image)
                if self.source.image_root:  # the first of the list that has it
                    break
        first = self._own or next(iter(self._stores), None)
        if not found and not refusal and isinstance(first, Folder):
            return Image(first.locate(name))  # opening it will report that it is missing; a document leaves it out
        if refusal and not found:
            raise refusal
        if not found:
            near = next(filter(None, (store.near(name) for store in self._stores)), None)
            where = " or ".join(shown(store.path) for store in self._stores)
            hint = f"; did you mean {near:.200}?" if near else ""
            detail = f"{name:.200}: {f'not in {where}{hint}' if where else 'no image_root'}"
            raise RecordError("missing image", detail)
        if any(image != found[0] for image in found):
            both = " and ".join(describe(image) for image in found[:2])
            detail = f"{name:.200}: {both}; name its folder as image_root, or make two sources of them"
            raise RecordError("ambiguous image", detail)
        return found[0]


_BASE64 = re.compile(r"\s*(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\s]{40,}+={0,2}\s*+")
"""An image's first bytes (JPEG, PNG, GIF, WebP, BMP, TIFF) in base64, which has no dot, as names of files do."""
_NO_PATH = re.compile(r"[\0\ud800-\udc7f\udd00-\udfff]")
r"""\udc80 to \udcff are allowed: os.fsdecode writes the bytes of a file's name that is not UTF-8 as these."""
_FILE_URL = re.compile(r"(?i)file:(?://(?:localhost)?)?(?P<path>/[^/].*)", re.DOTALL)
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*://|(?:file|https?|ftp):")


def _open_folder(folder: Path, roots: tuple[Path, ...]) -> Folder | RemoteFolder:
    return RemoteFolder(folder) if is_remote(folder) else Folder(folder, roots)


def _open_file(found: Path, inner: str) -> Store:
    name = found.name.lower()
    if name.endswith(COMPRESSED_TARS):
        raise UserError(
            f"{shown(found)}: a compressed tar archive has to be read from its start for every image; "
            "unpack it, or make a plain .tar or a .zip of it"
        )
    kind = _KINDS.get(found.suffix.lower())
    if kind is None or not (is_remote(found) or found.is_file()):
        raise UserError(f"{shown(found)}: expected a folder of images, or a file that ends in {', '.join(_KINDS)}")
    if inner != "." and not issubclass(kind, Archive):
        raise UserError(f"{shown(found / inner)}: {found.name} holds no folders")
    return kind(found, inner)


_KINDS: dict[str, type[Store]] = {".zip": Zip, ".tar": Tar, ".json": JsonImages, ".parquet": ParquetImages}


def _default_folders(source: Source) -> list[Path]:
    """Return the folders of the paths; of a dataset on the hub, those into which its library puts the files."""
    if source.paths:
        try:
            return folders_of(source.paths)
        except UserError:  # the reader of the files raises it again
            return [path.absolute().parent for path in source.paths]
    if not source.hub:
        return []
    import datasets
    from huggingface_hub import constants

    folders = (Path(source.hub), Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
    return [folder for folder in folders if folder.is_dir()]


_Part = tuple[str, str | None, str]
"""(text, name of the field after it, format of that field)"""


def _check_template(template: str) -> list[_Part]:
    """Return the parts of a template. Raises UserError: no template, or it asks for more than a record's own fields."""
    try:
        parsed = list(Formatter().parse(template))
        for _, name, spec, conversion in parsed:
            if name is None:
                continue
            if not name.isidentifier() or "{" in (spec or "") or conversion:
                raise ValueError(f"{{{name}}} is no field of a record")
            if max(map(int, re.findall(r"\d+", spec or "")), default=0) > 255:
                raise ValueError(f"{spec:.20} asks for more characters than a name may have")
            format(0, spec or "")
    except ValueError as error:
        raise UserError(
            f"image_name: expected a name such as {{image_id:012d}}.jpg, got {template!r}: {error}"
        ) from error
    return [(text, name, spec or "") for text, name, spec, _ in parsed]


def _fill(text: str, name: str | None, spec: str, record: dict[str, Any]) -> str:
    if name is None:
        return text
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int):
        got = f"fields {', '.join(map(str, record))}" if name not in record else _short(value)
        raise RecordError("no image name", f"expected text or a whole number under {name!r}, got {got:.200}")
    number = isinstance(value, str) and spec.endswith("d") and value.isascii() and value.isdecimal()
    try:
        return text + format(int(value) if number else value, spec)
    except (ValueError, OverflowError) as error:
        raise RecordError("no image name", f"{name!r} is {_short(value)}: {error}") from error


def _short(value: object) -> str:
    """Return a value in a few words, for a message."""
    if value is None:
        return "nothing"
    return ascii(value[:80]) if isinstance(value, str) else type(value).__name__
