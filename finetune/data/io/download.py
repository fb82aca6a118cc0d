"""https URLs -> files, from public addresses only; images are fetched once, and kept."""

import hashlib
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from http.client import HTTPException
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urljoin

from finetune.data.conversation import RecordError
from finetune.data.io import object_storage
from finetune.recipe.urls import is_in_storage, shown
from modeling.errors import UserError

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse
    from urllib3.util import Url

Address = IPv4Address | IPv6Address
Result = TypeVar("Result")

MAX_REDIRECTS = 5
HEADERS = {"User-Agent": "idefics-finetune (fetches the images of a dataset)", "Accept-Encoding": "identity"}

_PUBLIC_V6 = IPv6Network("2000::/3")
"""Global unicast. Other addresses are local, reserved, or contain an IPv4 address (::ffff:0:0/96, 64:ff9b::/96)."""

_NOT_PUBLIC = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/3"),
            *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo is in the first, 6to4 the third
        ),
    )
)
"""IANA's registries of special purposes; the ipaddress module of older Pythons lacks some."""

_ISATAP = (0x00005EFE, 0x02005EFE)
"""The third quarter of an IPv6 address that carries an IPv4 address in its last."""


def is_public(address: Address) -> bool:
    """Return whether an address belongs to the public internet: not local, not special, no other address inside it."""
    if any(address in network for network in _NOT_PUBLIC) or not address.is_global:
        return False
    if isinstance(address, IPv4Address):
        return True
    return address in _PUBLIC_V6 and not address.scope_id and (int(address) >> 32) & 0xFFFFFFFF not in _ISATAP


class Downloader:
    """Fetches images into a folder, and single files to where they belong.

    content/ab/<sha256 of the bytes> holds an image, by-url/<sha256 of the URL> the digest of its bytes. No cookies, no
    proxies, no credentials. `allow` says which addresses may be connected to. `idle_s` is the longest time without a
    byte, `timeout_s` that of a whole answer. URLs of object storage are fetched through fsspec; they never come from a
    record, but from the recipe's `image_root`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        http: bool = False,
        max_bytes: int = 20_000_000,
        timeout_s: float = 20,
        idle_s: float = 20,
        pauses_s: Sequence[float] = (),
        workers: int = 16,
        allow: Callable[[Address], bool] = is_public,
    ):
        self._folder, self._http, self._max_bytes, self._timeout_s = folder, http, max_bytes, timeout_s
        self._idle_s, self._pauses_s, self._workers, self._allow = idle_s, pauses_s, workers, allow

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()  # when it is first used: it cannot be sent to a worker process

    def fetch_all(self, urls: Iterable[str]) -> dict[str, Path | RecordError]:
        """Return each URL's file, or the error."""

        def fetch(url: str) -> Path | RecordError:
            try:
                return self.fetch(url)
            except RecordError as error:
                return error

        distinct = list(dict.fromkeys(urls))
        with ThreadPoolExecutor(self._workers) as threads:
            return dict(zip(distinct, threads.map(fetch, distinct), strict=True))

    def fetch(self, url: str) -> Path:
        """Return the file with a URL's content. Raises RecordError: not allowed, not found, too large or too slow."""
        known = self._folder / "by-url" / hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        if known.is_file() and (path := self._content(known.read_text(encoding="ascii", errors="replace"))).is_file():
            return path
        content = self._read(url)
        digest = hashlib.sha256(content).hexdigest()
        path = self._content(digest)
        _write(path, content)
        _write(known, digest.encode())
        return path

    def _content(self, digest: str) -> Path:
        return self._folder / "content" / digest[:2] / digest

    def _read(self, url: str) -> bytes:
        if is_in_storage(url):
            try:
                return object_storage.read(url, self._max_bytes)
            except UserError as error:
                raise RecordError("download failed", str(error).partition("\n")[0]) from error

        def read(response: "BaseHTTPResponse", deadline: float) -> bytes:
            body = bytearray()
            for piece in self._pieces(response, deadline):
                body += piece
            return bytes(body)

        return self._get(url, read)

    def save(self, url: str, path: Path) -> object_storage.Entry:
        """Write a URL's content into a file, and return its size and version. Raises RecordError as `find`."""

        def write(response: "BaseHTTPResponse", deadline: float) -> object_storage.Entry:
            with path.open("wb") as file:
                file.writelines(self._pieces(response, deadline))
            return _entry_of(response)

        return self._get(url, write)

    def find(self, url: str) -> object_storage.Entry:
        """Return a file's size and version, as the server states them before it sends the file; the rest is not read.

        Raises RecordError as `fetch`, and where the server says nothing from which a change could be seen.
        """
        return self._get(url, lambda response, _: _entry_of(response))

    def _get(self, url: str, use: Callable[["BaseHTTPResponse", float], Result]) -> Result:
        """Return what `use` makes of the answer and its deadline. An interrupted connection is opened again."""
        from urllib3.exceptions import HTTPError

        for pause in (*self._pauses_s, None):
            deadline = time.monotonic() + self._timeout_s
            try:
                return self._follow(url, deadline, use)
            except (_RefusedError, HTTPError, HTTPException, OSError, ValueError) as error:
                if object_storage.is_of_disk(error):
                    raise
                if pause is not None and not isinstance(error, _RefusedError | ValueError):
                    time.sleep(pause)
                    continue
                late = f"over {self._timeout_s:g} s" if time.monotonic() >= deadline else None
                detail = f"{shown(url)[:200]!a}: {late or error or type(error).__name__}"
                raise RecordError("download failed", detail) from error
        raise AssertionError

    def _follow(self, url: str, deadline: float, use: Callable[["BaseHTTPResponse", float], Result]) -> Result:
        for _ in range(MAX_REDIRECTS + 1):
            with self._request(url, deadline) as response:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or not location:
                    self._check(response)
                    return use(response, deadline)
            url = urljoin(url, location)
        raise _RefusedError(f"over {MAX_REDIRECTS} redirects")

    @contextmanager
    def _request(self, url: str, deadline: float) -> Iterator["BaseHTTPResponse"]:
        """Send a request to a checked address; the connection is closed at the end, or at the deadline."""
        from urllib3.connection import HTTPConnection

        parsed = self._parse(url)
        host, port = str(parsed.host).strip("[]"), parsed.port or (443 if parsed.scheme == "https" else 80)
        connected = self._connect(host, port, deadline)
        if parsed.scheme == "https":
            connected = self._tls.wrap_socket(connected, server_hostname=host, do_handshake_on_connect=False)
        # A socket's own timeout starts again with every byte; the timer's does not.
        end = threading.Timer(deadline - time.monotonic(), _cut, (connected,))
        end.start()
        connection = HTTPConnection(host, port, timeout=self._left(deadline))
        connection.sock = connected
        try:
            if isinstance(connected, ssl.SSLSocket):
                connected.do_handshake()
            headers = {**HEADERS, "Host": str(parsed.netloc)}
            connection.request("GET", parsed.request_uri, headers=headers, preload_content=False, decode_content=False)
            yield connection.getresponse()
        finally:
            end.cancel()
            connection.close()

    def _left(self, deadline: float) -> float:
        """Return how long to wait for the next byte, in seconds."""
        return min(self._idle_s, max(deadline - time.monotonic(), 0.001))

    def _parse(self, url: str) -> "Url":
        from urllib3.util import parse_url

        parsed = parse_url(url)
        schemes = ("https", "http") if self._http else ("https",)
        if parsed.scheme not in schemes or not parsed.host:
            raise _RefusedError(f"expected {' or '.join(schemes)}, got {shown(url)[:200]!a}")
        if parsed.auth:
            raise _RefusedError("credentials in the URL")
        return parsed

    def _connect(self, host: str, port: int, deadline: float) -> socket.socket:
        """Connect to an address that was checked; the host's name could lead to another one the next time."""
        addresses = [str(address[0]) for *_, address in _look_up(host, port, deadline)]
        for address in addresses:
            if not self._allow(ip_address(address)):
                raise _RefusedError(f"{host} is at {address}, which is no public address")
        failure: Exception = _RefusedError(f"{host}: no address")
        for address in addresses:
            try:
                return socket.create_connection((address, port), timeout=self._left(deadline))
            except OSError as error:
                failure = error
        raise failure

    def _check(self, response: "BaseHTTPResponse") -> None:
        """Raise _RefusedError, or ConnectionError where another attempt may help, unless the answer is the file."""
        if response.status != 200:
            said = f"HTTP {response.status} {response.reason or ''}".strip()
            raise ConnectionError(said) if response.status in _BUSY else _RefusedError(said)
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _RefusedError(f"content encoding {response.headers['Content-Encoding']}, which was not requested")

    def _pieces(self, response: "BaseHTTPResponse", deadline: float) -> Iterator[bytes]:
        size = 0
        while piece := response.read(2**16):
            size += len(piece)
            if size > self._max_bytes:
                raise _RefusedError(f"over {self._max_bytes:,} bytes")
            yield piece
        if time.monotonic() >= deadline:
            raise TimeoutError


_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 500, 502, 503, 504)


class _RefusedError(Exception):
    """Why a URL is not fetched."""


def _entry_of(response: "BaseHTTPResponse") -> object_storage.Entry:
    version = response.headers.get("ETag") or response.headers.get("Last-Modified")
    if version is None:
        raise _RefusedError("neither ETag nor Last-Modified, so that a change could not be seen")
    size = int(response.headers.get("Content-Length") or 0)
    return object_storage.Entry(is_folder=False, size=size, version=f"{size} {version}")


def _look_up(host: str, port: int, deadline: float) -> list[Any]:
    """Return the result of getaddrinfo, which has no timeout: a thread waits for it, and is abandoned if it is late."""
    answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # raised in the thread that waits
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=max(deadline - time.monotonic(), 0.001))
    except queue.Empty:
        raise TimeoutError(f"{host}: no answer from DNS") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _cut(connected: socket.socket) -> None:
    """End the connection, also while another thread waits for it."""
    with suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _write(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all; other processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
