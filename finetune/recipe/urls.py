"""URLs as paths of a recipe: which ones there are, the place of their files on this disk, and how they are shown.

    s3://bucket/d/a.jsonl  <->  <cache>/s3/bucket/d/a.jsonl

The place is fixed by the URL, whether the file has been fetched or not. So names, folders and record ids of remote
files are found as those of local ones; only what lists or opens a file has to know the difference
(finetune/data/io/remote.py).
"""

import hashlib
import os
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from urllib.parse import parse_qsl, quote

SCHEMES = ("s3", "gs", "hf", "https", "http")
WEB = ("https", "http")
"""Schemes under which there are files, but no folders that could be listed."""

CACHE = "FINETUNE_REMOTE_CACHE"
"""Environment variable: the folder of fetched files. Each machine has its own; by default it is in the user's cache."""

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_SECRETS = ("signature", "sig", "token", "credential", "password", "secret", "apikey", "api_key", "api-key")
"""Endings of the names of a query's parameters that give access to a file; no recipe holds them."""

_QUERY = ".query-"
"""A folder of this name and a hash holds the file of a URL with a query, and in `.url` the URL, for its owner alone."""


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def is_in_storage(url: str) -> bool:
    """Return whether a URL belongs to object storage or to the hub, where folders can be listed; the web has none."""
    scheme = url.partition("://")[0]
    return scheme in SCHEMES and scheme not in WEB


def check_url(url: str, download: bool | str) -> None:
    """Raise ValueError, with the repair, for a URL that cannot be a path. `download` is the source's key."""
    scheme, rest = _split(url)
    if scheme not in SCHEMES:
        expected = ", ".join(f"{known}://" for known in SCHEMES)
        raise ValueError(f"{shown(url)}: expected a path on this machine, or {expected}")
    host, *folders = _without_query(scheme, rest).rstrip("/").split("/")
    if "@" in host:
        raise ValueError(f"{shown(url)}: credentials in the URL; set them where the storage's own tools read them")
    if not host or (scheme in WEB and not folders) or any(part in ("", ".", "..") or "\0" in part for part in folders):
        names = "host/file" if scheme in WEB else "bucket/folder"
        raise ValueError(f"{shown(url)}: expected {scheme}://{names}, without empty parts, '.' and '..'")
    if scheme in WEB and "#" in rest:
        raise ValueError(f"{shown(url)}: expected a URL without '#'")
    named = [name.lower() for name, _ in parse_qsl(rest.partition("?")[2], keep_blank_values=True)]
    if scheme in WEB and any(name.endswith(_SECRETS) for name in named):
        repair = "give s3:// or gs://, whose credentials stay where their tools keep them, or download the file"
        raise ValueError(
            f"{shown(url)}: a signature or a token; a recipe is kept, and published with its model: {repair}"
        )
    if (scheme == "https" and not download) or (scheme == "http" and download != "http"):
        raise ValueError(
            f"{shown(url)}: `download: {'true' if scheme == 'https' else 'http'}` on the source fetches it"
        )


def path_of(path: str) -> Path:
    """Return the place of a URL's file on this disk, or a local path as it is.

    The URL is one that `check_url` accepts.
    """
    if not is_url(path):
        return Path(path)
    scheme, rest = _split(path)
    place = cache_folder().joinpath(scheme, *_without_query(scheme, rest).rstrip("/").split("/"))
    if scheme not in WEB or "?" not in rest:
        return place
    folder = place.parent / f"{_QUERY}{hashlib.sha256(path.encode()).hexdigest()[:16]}"
    if not (folder / ".url").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)  # only its owner can read it: a query may be private
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(path)
        Path(name).replace(folder / ".url")
    return folder / place.name


def is_remote(path: Path) -> bool:
    """Return whether a path is the place of a remote file or folder: below the cache."""
    return path.is_relative_to(cache_folder())


def url_of(place: Path) -> str:
    """Return the URL whose file has this place."""
    if place.parent.name.startswith(_QUERY):
        return (place.parent / ".url").read_text(encoding="utf-8")
    scheme, *rest = place.relative_to(cache_folder()).parts
    return f"{scheme}://{'/'.join(rest)}"


def url_below(folder: Path, name: str) -> str:
    """Return the URL of a file below a remote folder; `name` is relative, and does not lead up.

    In a web URL, signs of the name that mean something there are escaped.
    """
    if folder.name.startswith(_QUERY):  # of the folder of one file, without its query
        folder = folder.parent
    base = url_of(folder)
    return f"{base}/{quote(os.fsencode(name)) if _split(base)[0] in WEB else name}"


def shown(path: str | Path) -> str:
    """Return a path for messages and reports: a remote one as its URL, without what may be a secret.

    >>> shown("https://me:secret@host/a.jsonl?signature=1f")
    'https://...@host/a.jsonl?...'
    """
    if isinstance(path, Path) and is_remote(path):
        path = url_of(path)
    if not is_url(str(path)):
        return str(Path(path))
    scheme, rest = _split(str(path))
    rest = re.sub(r"^[^/?#]*@", "...@", rest)
    return f"{scheme}://{re.sub(r'[?#].*', '?...', rest, flags=re.DOTALL) if scheme in WEB else rest}"


def cache_folder() -> Path:
    """Return the absolute folder below which the places of remote files are."""
    default = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/idefics-finetune/remote"
    return _resolved(os.environ.get(CACHE) or default)


@lru_cache
def _resolved(folder: str) -> Path:
    return Path(folder).expanduser().resolve()


def _split(url: str) -> tuple[str, str]:
    match = _URL.fullmatch(url)
    assert match
    return match["scheme"].lower(), match["rest"]


def _without_query(scheme: str, rest: str) -> str:
    return rest.partition("?")[0] if scheme in WEB else rest  # elsewhere "?" belongs to a pattern
