"""References in records -> images, from where the source keeps them and nowhere else."""

import re
from collections.abc import Iterable
from pathlib import Path
from string import Formatter
from typing import Any

import PIL.Image

from finetune.data.dialogue import Image, RecordError, Remote, Slice
from finetune.data.images import decode_base64
from finetune.data.sources.source import Source
from finetune.data.sources.stores import Folder, Store, open_store
from modeling.errors import UserError


class ImageRoot:
    """Where the images of a source are looked up. Raises UserError: a root that is not there, or a bad `image_name`.

    Sent to another process, it opens its archives there anew.
    """

    def __init__(self, source: Source):
        self.source = source
        self._stores = tuple(_default_stores(source) if not source.image_root else map(open_store, source.image_root))
        if source.image_name is not None:
            _check_template(source.image_name)

    def __reduce__(self) -> tuple[type["ImageRoot"], tuple[Source]]:
        return ImageRoot, (self.source,)

    def image(self, reference: object) -> Image:
        """The image that a record's value stands for. Raises RecordError.

        A path under a root, an id in a MIMIC-IT file, base64 with `data:image/...;base64,` before it or without, an
        https URL if the source allows it, encoded bytes, {"bytes", "path"}, or what is an image already.
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
            return _from_data_url(reference)
        if _URL.match(reference):
            return self._remote(reference)
        if _BASE64.fullmatch(reference):
            return Image(decode_base64(reference))
        return self._stored(reference)

    def base64(self, text: object) -> Image:
        """An image written as base64, white space allowed. Raises RecordError: it is not that."""
        if not isinstance(text, str):
            raise RecordError("corrupt image", f"expected base64, got {_short(text)}")
        return Image(decode_base64(text))

    def named(self, record: dict[str, Any], default: str) -> Image:
        """The image whose name `image_name`, or else `default`, makes of a record's own fields.

        "COCO_train2014_{image_id:012d}.jpg" and {"image_id": 9} -> COCO_train2014_000000000009.jpg

        Raises RecordError: a field is missing, or neither text nor a whole number.
        """
        template = self.source.image_name or default
        return self.image("".join(_fill(*part, record) for part in _check_template(template)))

    def _remote(self, url: str) -> Image:
        scheme = url.partition(":")[0].lower()
        allowed = self.source.download and (scheme == "https" or (scheme == "http" and self.source.download_http))
        if allowed:
            return Image(Remote(url))
        hint = {"https": "; `download: true` fetches it", "http": "; `download` and `download_http: true` fetch it"}
        raise RecordError("image is a URL", f"{url:.200}: expected a path{hint.get(scheme, '')}")

    def _stored(self, name: str) -> Image:
        if _NO_PATH.search(name):
            raise RecordError("not an image reference", f"{name[:200]!a}: expected a path with forward slashes")
        refusal: RecordError | None = None
        for store in self._stores:
            try:
                found = store.find(name)
            except RecordError as error:
                refusal = refusal or error
                continue
            if found is not None:
                return found
        if refusal:
            raise refusal
        if self._stores and isinstance(self._stores[0], Folder):
            return Image(self._stores[0].place(name))
        where = " or ".join(str(store.path) for store in self._stores)
        raise RecordError("missing image", f"{name:.200}: not in {where}" if where else f"{name:.200}: no image_root")


_BASE64 = re.compile(r"\s*(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\s]{40,}+={0,2}\s*+")
"""An image's first bytes (JPEG, PNG, GIF, WebP, BMP, TIFF) in base64, which has no dot, as names of files do."""
_NO_PATH = re.compile(r"[\0\\\ud800-\udfff]")
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*://|(?:file|https?|ftp):")


def _default_stores(source: Source) -> Iterable[Store]:
    """The folder of the first path; of a dataset on the hub, the folders where its library puts the files."""
    if source.paths:
        first = source.paths[0]
        return [Folder((first if first.is_dir() else first.parent).resolve())]
    if not source.hub:
        return []
    import datasets
    from huggingface_hub import constants

    folders = (Path(source.hub), Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE))
    return [Folder(folder.resolve()) for folder in folders if folder.is_dir()]


def _from_data_url(url: str) -> Image:
    head, _, content = url.partition(",")
    if not re.fullmatch(r"(?i)data:image/.*;base64", head, re.DOTALL):
        raise RecordError("not an image reference", f"expected data:image/...;base64,... got {head[:80]!a}")
    return Image(decode_base64(content))


_Part = tuple[str, str | None, str]
"""(text, name of the field that follows it, format of that field)"""


def _check_template(template: str) -> list[_Part]:
    """The parts of a template. Raises UserError: it is none, or asks for more than a record's own fields."""
    try:
        parts = [(text, name, spec or "") for text, name, spec, _ in Formatter().parse(template)]
        for _, name, spec in parts:
            if name is not None and (not name.isidentifier() or "{" in spec):
                raise ValueError(f"{{{name}}} is no field of a record")
            if name is not None:
                format(0, spec)
    except ValueError as error:
        raise UserError(
            f"image_name: expected a name such as {{image_id:012d}}.jpg, got {template!r}: {error}"
        ) from error
    return parts


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
    """What was got, in a few words, whatever it is."""
    if value is None:
        return "nothing"
    return ascii(value[:80]) if isinstance(value, str) else type(value).__name__
