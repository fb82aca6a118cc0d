"""Downloading from a server of our own: what is fetched, what is refused, and that nothing is fetched twice."""

import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pytest

from finetune.data.conversation import RecordError
from finetune.data.io import download
from finetune.data.io.download import Downloader, is_public

IMAGE = b"\x89PNG not really"
DIGEST = hashlib.sha256(IMAGE).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """/redirect/N leads over N steps to /image; other paths do what their names say."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path.startswith("/redirect/"):
            number = int(path.rpartition("/")[2])
            self.answer(302, b"", Location=f"/redirect/{number - 1}" if number > 1 else "/image")
        elif path in self.server.redirects:
            self.answer(301, b"", Location=self.server.redirects[path])
        elif path == "/image":
            self.answer(200, IMAGE)
        elif path == "/chunked":
            self.answer(200, None, Transfer_Encoding="chunked")
            for piece in (IMAGE[:3], IMAGE[3:], b""):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        elif path == "/endless":
            self.answer(200, None, Connection="close")
            self.drip(bytes(1000), 0)
        elif path == "/slow":
            self.answer(200, None, Content_Length="1000")
            self.drip(b"x", 0.05)
        elif path == "/slow-without-length":
            self.answer(200, None, Connection="close")
            self.drip(b"x", 0.05)
        elif path == "/slow-headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self.drip(b"X: y\r\n", 0.05)
        elif path == "/cut":
            self.answer(200, None, Content_Length="1000")
            self.wfile.write(b"half")
            self.close_connection = True
        elif path == "/gzip":
            self.answer(200, b"\x1f\x8b", Content_Encoding="gzip")
        elif path == "/garbage":
            self.wfile.write(b"\0\1\2 this is no HTTP\r\n\r\n")
            self.close_connection = True
        elif path == "/nowhere":
            self.answer(302, b"")
        else:
            self.answer(404, b"not here")

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body or b"")

    def drip(self, piece, pause):
        self.close_connection = True
        try:
            for _ in range(100_000):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(pause)
        except OSError:
            pass

    def log_message(self, *arguments):
        pass


def serve(wrap=lambda listening: listening):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = wrap(server.socket)
    server.requests, server.redirects, server.daemon_threads = [], {}, True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture
def server():
    server = serve()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def site(server):
    return f"http://127.0.0.1:{server.server_port}"


def anyone(address):
    return True


@pytest.fixture
def downloader(tmp_path):
    return Downloader(tmp_path, http=True, max_bytes=5000, timeout_s=5, allow=anyone)


def failure(downloader, url):
    with pytest.raises(RecordError) as caught:
        downloader.fetch(url)
    assert caught.value.reason == "download failed"
    assert not [path for path in downloader._folder.rglob("*") if path.is_file()]
    return caught.value.detail


def test_download_once(downloader, server, site, tmp_path):
    """A file lies under its digest, and is fetched once."""
    path = downloader.fetch(f"{site}/image")
    assert path == tmp_path / "content" / DIGEST[:2] / DIGEST
    assert path.read_bytes() == IMAGE
    known = tmp_path / "by-url" / hashlib.sha256(f"{site}/image".encode()).hexdigest()
    assert known.read_text() == DIGEST
    assert Downloader(tmp_path, allow=anyone).fetch(f"{site}/image") == path
    assert len(server.requests) == 1
    assert downloader.fetch(f"{site}/image?again") == path
    assert len(server.requests) == 2
    path.unlink()
    assert downloader.fetch(f"{site}/image").read_bytes() == IMAGE
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == sorted(
        [path, *(tmp_path / "by-url").iterdir()]
    )


def test_download_request_headers(downloader, server, site, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    downloader.fetch(f"{site}/image?a=b c")
    [(path, headers)] = server.requests
    assert path == "/image?a=b%20c"
    assert headers == {
        "Host": f"127.0.0.1:{server.server_port}",
        "User-Agent": "idefics-finetune (fetches the images of a dataset)",
        "Accept-Encoding": "identity",
    }


def test_download_chunked_body(downloader, site):
    assert downloader.fetch(f"{site}/chunked").read_bytes() == IMAGE


def test_download_redirects(downloader, server, site):
    assert downloader.fetch(f"{site}/redirect/5").read_bytes() == IMAGE
    assert len(server.requests) == 6
    assert "over 5 redirects" in failure(
        Downloader(downloader._folder / "new", http=True, allow=anyone), f"{site}/redirect/6"
    )


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/missing", "HTTP 404"),
        ("/nowhere", "HTTP 302"),
        ("/endless", "over 5,000 bytes"),
        ("/cut", "IncompleteRead"),
        ("/gzip", "content encoding gzip"),
        ("/garbage", ""),
    ],
)
def test_download_failures(path, detail, downloader, site):
    message = failure(downloader, f"{site}{path}")
    assert message.startswith(f"'{site}{path}': ")
    assert detail in message


@pytest.mark.parametrize("path", ["/slow", "/slow-without-length", "/slow-headers"])
def test_download_slow_body(path, tmp_path, site):
    """A server that sends byte by byte is cut off at the deadline."""
    started = time.monotonic()
    assert "over 0.3 s" in failure(Downloader(tmp_path, http=True, timeout_s=0.3, allow=anyone), f"{site}{path}")
    assert time.monotonic() - started < 3


def test_download_no_answer(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert "over 0.3 s" in failure(
            Downloader(tmp_path, http=True, timeout_s=0.3, allow=anyone), f"http://127.0.0.1:{port}/"
        )
    assert "refused" in failure(Downloader(tmp_path, http=True, timeout_s=3, allow=anyone), f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize(
    "url",
    [
        "http://a.b/c",
        "ftp://a.b/c",
        "file:///etc/hostname",
        "a.png",
        "",
        "https://",
        "https:///x",
        "//a.b/c",
        "data:,x",
    ],
)
def test_download_https_only(url, tmp_path):
    assert "expected https, got" in failure(Downloader(tmp_path, allow=anyone), url)


BROKEN = ("a b/c", "a:x/c", "[::1/c", "a:99999/", "\ud800.b/", "a\0b/", "a" * 70 + ".b/")


@pytest.mark.parametrize("url", [f"https://{rest}" for rest in BROKEN])
def test_download_bad_url(url, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: host.encode("idna") and [])
    assert failure(Downloader(tmp_path, allow=anyone), url)


def test_download_credentials_refused(downloader, site):
    assert "credentials" in failure(downloader, site.replace("//", "//me:secret@") + "/image")


def test_download_redirect_checked(server, site, tmp_path):
    server.redirects |= {
        "/a": "ftp://127.0.0.1/x",
        "/b": "http://me:x@127.0.0.1/",
        "/c": "http://10.0.0.7/",
        "/d": "file:///x",
    }
    downloader = Downloader(tmp_path, http=True, allow=lambda address: str(address) == "127.0.0.1")
    details = [failure(downloader, f"{site}/{name}") for name in "abcd"]
    for detail, expected in zip(details, ("ftp:", "credentials", "10.0.0.7, which is no public", "file:"), strict=True):
        assert expected in detail


PRIVATE = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.169.254",
    "172.16.0.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "fc00::1",
    "fe80::1",
    "ff02::1",
    "ff0e::1",
    "2001:db8::1",
    *("64:ff9b::808:808", "64:ff9b:1::a9fe:a9fe", "64:ff9b:1:ffff::7f00:1", "64:ff9b:1::808:808"),  # NAT64
    *("fec0::1", "feff::1"),  # site-local
    *("::127.0.0.1", "::8.8.8.8", "::ffff:8.8.8.8", "::ffff:169.254.169.254", "::ffff:0:7f00:1"),  # IPv4 inside
    *("2002:808:808::1", "2002:a9fe:a9fe::", "2001:0:808:808::1", "2001:0:4136:e378:8000:63bf:80ff:fffe"),  # tunnels
    *("2606:4700::5efe:7f00:1", "2606:4700::200:5efe:808:808"),  # ISATAP
    *("192.0.0.192", "192.0.0.1", "192.88.99.1", "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.19.255.255"),
    *("100.127.255.255", "169.254.0.1", "172.31.255.255", "239.255.255.255", "247.0.0.1", "0.1.2.3"),
    *("3fff::1", "2001:2::1", "2001:10::1", "100::1", "4000::1", "fdff::1", "febf::1", "ff05::2", "5f00::1"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_download_private_address(address, tmp_path, monkeypatch):
    assert not is_public(ip_address(address))
    host = f"[{address}]" if ":" in address else address
    assert f"is at {address}, which is no public address" in failure(Downloader(tmp_path), f"https://{host}/x")


@pytest.mark.parametrize("address", ["2606:4700::1111%1", "fe80::1%eth0", "ff02::1%lo"])
def test_is_public_zone(address):
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *(
            "8.8.8.8",
            "1.1.1.1",
            "192.0.1.1",
            "100.63.255.255",
            "100.128.0.1",
            "172.32.0.1",
            "198.20.0.1",
            "223.255.255.1",
        ),
        *("2606:4700::1111", "2001:4860:4860::8888", "2a00:1450:4001:80b::200e", "2003::1", "3ffe:ffff::1"),
    ],
)
def test_is_public(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "127.1", "017700000001", "localhost", "[::1]", "[::ffff:7f00:1]"]
)
def test_download_loopback_spellings(host, tmp_path):
    assert "which is no public address" in failure(Downloader(tmp_path), f"https://{host}/x")


def test_dns_no_answer(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer.wait() and [])
    started = time.monotonic()
    assert "over 0.2 s" in failure(Downloader(tmp_path, timeout_s=0.2), "https://slow.example/x")
    assert time.monotonic() - started < 3
    answer.set()


def test_dns_after_redirect(tmp_path, server, site, monkeypatch):
    server.redirects["/a"] = "http://slow.example/x"
    answer, original = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host, *rest, **options):
        return original(host, *rest, **options) if host != "slow.example" else answer.wait() and []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    downloader = Downloader(tmp_path, http=True, timeout_s=0.3, allow=anyone)
    assert "over 0.3 s" in failure(downloader, f"{site}/a")
    answer.set()


def test_dns_rebinding(tmp_path, server, monkeypatch):
    """Rebinding: the name is public when it is checked, and local when it is asked for again."""
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    original = socket.getaddrinfo

    def getaddrinfo(host, port, *rest, **options):
        if host != "a.example":
            return original(host, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    downloader = Downloader(tmp_path, http=True, allow=lambda address: str(address) == "127.0.0.1")
    url = f"http://a.example:{server.server_port}/image"
    assert downloader.fetch(url).read_bytes() == IMAGE
    assert "a.example is at 127.0.0.2" in failure(Downloader(tmp_path / "new", http=True), url)


def test_tls_slow_handshake(tmp_path):
    listening = socket.create_server(("127.0.0.1", 0))

    def drip():
        connected, _ = listening.accept()
        with connected, suppress(OSError):
            while True:  # a record of the handshake, announced as 16 KiB
                connected.sendall(b"\x16\x03\x03\x40\x00")
                for _ in range(2**14):
                    connected.sendall(b"\0")
                    time.sleep(0.02)

    threading.Thread(target=drip, daemon=True).start()
    url = f"https://127.0.0.1:{listening.getsockname()[1]}/x"
    started = time.monotonic()
    assert "over 0.3 s" in failure(Downloader(tmp_path, timeout_s=0.3, allow=anyone), url)
    assert time.monotonic() - started < 3
    listening.close()


@pytest.mark.parametrize("known", [b"", b"\xff\xfe", b"../../../etc/passwd", b"a\0b"])
def test_download_damaged_index(known, downloader, site, tmp_path):
    path = tmp_path / "by-url" / hashlib.sha256(f"{site}/image".encode()).hexdigest()
    path.parent.mkdir()
    path.write_bytes(known)
    assert downloader.fetch(f"{site}/image").read_bytes() == IMAGE


def resolving(monkeypatch, *answers):
    """Makes every host resolve to the first answer, the next time to the second, ..."""
    asked = []
    answers = iter(answers)

    def getaddrinfo(host, port, *_, **__):
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_download_one_private_address(tmp_path, monkeypatch):
    resolving(monkeypatch, ["8.8.8.8", "127.0.0.1"])
    assert "a.example is at 127.0.0.1" in failure(Downloader(tmp_path), "https://a.example/x")


def test_download_connects_to_checked_address(tmp_path, server, monkeypatch):
    connected = []
    create_connection = socket.create_connection

    def record(address, *arguments, **options):
        connected.append(address[0])
        return create_connection(address, *arguments, **options)

    monkeypatch.setattr(socket, "create_connection", record)
    checked = []
    downloader = Downloader(tmp_path, http=True, allow=lambda address: not checked.append(str(address)))
    addresses = []
    original = socket.getaddrinfo

    def getaddrinfo(host, port, *arguments, **options):
        addresses.append(host)
        return original("127.0.0.1" if host == "a.example" else host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    downloader.fetch(f"http://a.example:{server.server_port}/image")
    assert checked == ["127.0.0.1"]
    assert addresses.count("a.example") == 1
    assert server.requests[0][1]["Host"] == f"a.example:{server.server_port}"


@pytest.mark.parametrize(("url", "port"), [("https://a.b/x", 443), ("http://a.b/x", 80), ("https://a.b:8443/x", 8443)])
def test_download_default_port(url, port, tmp_path, monkeypatch):
    asked = []

    def look_up(host, port, deadline):
        asked.append((host, port))
        return []

    monkeypatch.setattr("finetune.data.io.download._look_up", look_up)
    assert "a.b: no address" in str(Downloader(tmp_path, http=True).fetch_all([url])[url])
    assert asked == [("a.b", port)]


def test_download_next_address(tmp_path, server, monkeypatch):
    original = socket.getaddrinfo

    def getaddrinfo(host, port, *arguments, **options):
        if host == "a.example":
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{last}", port)) for last in (9, 1)]
        return original(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    downloader = Downloader(tmp_path, http=True, allow=anyone)
    assert downloader.fetch(f"http://a.example:{server.server_port}/image").read_bytes() == IMAGE


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for a.example, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem"
    subject = ["-days", "2", "-subj", "/CN=a.example", "-addext", "subjectAltName=DNS:a.example"]
    subprocess.run([*command.split(), *subject], cwd=folder, check=True, capture_output=True)
    return folder


def test_tls_certificate(certificate, tmp_path, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    named = []
    context.sni_callback = lambda _, name, __: named.append(name)
    server = serve(lambda listening: context.wrap_socket(listening, server_side=True))
    server.redirects["/down"] = f"http://a.example:{server.server_port}/image"
    original = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **options: original("127.0.0.1", *rest, **options))
    site = f"https://a.example:{server.server_port}"
    assert "certificate verify failed" in failure(Downloader(tmp_path, allow=anyone), f"{site}/image")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    trusting = Downloader(tmp_path, allow=anyone, timeout_s=5)
    assert "expected https, got 'http://a.example" in failure(trusting, f"{site}/down")
    assert "Hostname mismatch" in failure(trusting, site.replace("a.example", "b.example") + "/image")
    assert trusting.fetch(f"{site}/image").read_bytes() == IMAGE
    assert set(named) == {"a.example", "b.example"}
    slow = Downloader(tmp_path, allow=anyone, timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(RecordError, match=r"over 0\.5 s"):
        slow.fetch(f"{site}/slow")
    assert time.monotonic() - started < 4
    server.shutdown()
    server.server_close()


def test_download_many_at_once(downloader, server, site):
    """Many URLs at once: each is fetched once, and every failure is returned."""
    urls = [f"{site}/image?{number % 20}" for number in range(60)] + [f"{site}/missing", "ftp://x"]
    fetched = downloader.fetch_all(urls)
    assert list(fetched) == list(dict.fromkeys(urls))
    assert len(server.requests) == 21
    assert {path.read_bytes() for path in list(fetched.values())[:20]} == {IMAGE}
    assert [error.reason for error in list(fetched.values())[20:]] == ["download failed"] * 2


def test_download_file_whole_or_absent(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(download.Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        download._write(tmp_path / "content" / "x", b"abc")
    assert list((tmp_path / "content").iterdir()) == []


def test_download_from_storage(storage, tmp_path):
    """An image below a remote root is fetched once, and kept; one that is too large or missing is an error."""
    downloader = Downloader(tmp_path, max_bytes=20)
    storage.pipe_file("/b/cat.png", IMAGE)
    assert downloader.fetch("memory://b/cat.png").read_bytes() == IMAGE
    storage.rm("/b/cat.png")
    assert downloader.fetch("memory://b/cat.png") == tmp_path / "content" / DIGEST[:2] / DIGEST
    storage.pipe_file("/b/large.png", bytes(21))
    found = downloader.fetch_all(["memory://b/large.png", "memory://b/none.png"])
    assert [str(error) for error in found.values()] == [
        "download failed: memory://b/large.png: over 20 bytes",
        "download failed: memory://b/none.png: nothing is there",
    ]


def test_download_message_hides_the_query(downloader, site):
    got = failure(downloader, f"{site}/missing?signature=1f")
    assert got == f"'{site}/missing?...': HTTP 404 Not Found"
