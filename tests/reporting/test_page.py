"""A page is one safe file: hostile text stays text, and nothing is asked of the network."""

import base64
import hashlib
import http.server
import io
import re
import threading
from html import unescape

import PIL.Image
import pytest
from pages import SHOWN, Tags, browse, data, hostile_pages, in_chromium, inspection, plain_pages

from finetune.reporting.html.page import number, share, thumbnail


def test_number_and_share():
    assert [number(value) for value in (1234567, 0, 0.98765, 1.5, None)] == ["1,234,567", "0", "0.988", "1.5", "–"]
    assert [share(1, 3), share(0, 0)] == ["33.3%", "–"]


@pytest.mark.parametrize(
    ("size", "shown"), [((1, 60_000), (1, 320)), ((60_000, 2), (320, 1)), ((65_600, 65), (320, 1))]
)
def test_thumbnail_of_extreme_proportions(size, shown):
    uri = thumbnail(PIL.Image.new("RGB", size))
    assert PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == shown


def test_thumbnail_keeps_proportions_and_puts_transparency_on_white():
    clear = PIL.Image.new("RGBA", (1000, 500), (255, 0, 0, 0))
    uri = thumbnail(clear)
    assert uri.startswith("data:image/jpeg;base64,")
    opened = PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (opened.format, opened.size, opened.getpixel((160, 80))) == ("JPEG", (320, 160), (255, 255, 255))
    assert clear.size == (1000, 500)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16", "F"])
def test_thumbnail_of_every_mode(mode):
    assert thumbnail(PIL.Image.new(mode, (2000, 1)), width=10).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("kind", ["inspection", "predictions"])
def test_hostile_text_adds_no_element_and_no_attribute(kind):
    hostile, plain = hostile_pages()[kind], plain_pages()[kind]
    hostile.encode("utf-8")
    names = {tag for tag, _ in Tags(plain).found}
    found = Tags(hostile).found
    assert {tag for tag, _ in found} <= names | {"p"}
    assert [attributes for tag, attributes in found if tag == "script"] == [
        {"type": "application/json", "id": "data"},
        {},
    ]
    assert not [name for _, attributes in found for name in attributes if name.startswith("on") or name == "style"]
    assert not re.search("[\x00\u202e\ud800]", hostile)
    assert SHOWN in unescape(hostile)


def test_hostile_text_of_a_card_is_data():
    (card,) = data(hostile_pages()["predictions"])["cards"]
    assert (card["question"], card["answer"], card["references"]) == (SHOWN, SHOWN, [[SHOWN, 1]])


@pytest.mark.parametrize("page", [*plain_pages().values(), *hostile_pages().values()])
def test_page_names_nothing_outside_itself(page):
    assert not re.findall(r"https?:|[\"'(=\s]//\w|@import|url\(", page)
    tags = Tags(page).found
    assert [attributes["href"] for _, attributes in tags if "href" in attributes] == ["data:,"]
    assert not [attributes for _, attributes in tags if "src" in attributes or "srcset" in attributes]
    (policy,) = [
        attributes["content"] for _, attributes in tags if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    script = re.findall("<script>(.*?)</script>", page, re.DOTALL)[-1]
    sha = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (style, script)]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{sha[0]}'; script-src 'sha256-{sha[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


@pytest.mark.slow
@in_chromium
@pytest.mark.parametrize("kind", ["inspection", "predictions"])
def test_hostile_text_is_shown_and_not_run(tmp_path, kind):
    selector = {"inspection": ".tokens .token, h1", "predictions": ".question, .answer, .reference, h1"}[kind]
    script = f"await wait(200); return [window.hit ?? 0, all('{selector}').map((element) => element.textContent)];"
    (hit, shown), console = browse(hostile_pages()[kind], tmp_path, script)
    assert console == []
    assert hit == 0
    assert len(shown) >= 3
    assert set(shown) == {SHOWN}


@pytest.mark.slow
@in_chromium
@pytest.mark.parametrize("policy", [True, False])
def test_page_cannot_make_network_requests(tmp_path, policy):
    """Without its policy the same page can, so the server does hear what is asked."""
    heard = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = f"""
const there = "http://127.0.0.1:{server.server_port}";
document.body.append(Object.assign(new Image(), {{src: there + "/image"}}));
const add = (name, values) => document.head.append(Object.assign(document.createElement(name), values));
add("script", {{src: there + "/script"}});
add("link", {{rel: "stylesheet", href: there + "/style"}});
const frame = Object.assign(document.createElement("iframe"), {{src: there + "/frame"}});
document.body.append(frame);
await fetch(there + "/fetch").catch(() => 0);
await wait(500);
return told;
"""
    told, _ = browse(inspection(), tmp_path, script, policy=policy)
    server.shutdown()
    server.server_close()
    asked = {"/image", "/script", "/style", "/frame", "/fetch"}
    assert set(heard) == (set() if policy else asked)
    blocked = {"img-src", "script-src-elem", "style-src-elem", "frame-src", "connect-src"}
    assert set(told) == (blocked if policy else set())


@pytest.mark.slow
@in_chromium
def test_console_errors_are_noticed(tmp_path):
    assert len(browse(inspection(), tmp_path, 'console.error("heard");')[1]) == 1
