"""Pages for tests: plain ones, hostile ones, and a browser that runs a script in them."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import PIL.Image
import pytest

from finetune.data.conversation import Image
from finetune.reporting.html.histogram import Histogram, histogram
from finetune.reporting.html.inspection import inspection_page
from finetune.reporting.html.page import thumbnail
from finetune.reporting.html.predictions import predictions_page
from finetune.reporting.inspect import Inspection, ShownExample, Token

RED, BLUE = (PIL.Image.new("RGB", (64, 48), color) for color in ("red", "blue"))

RED_PNG, BLUE_PNG, GONE_PNG = (Image(Path(f"{name}.png")) for name in ("red", "blue", "gone"))

IMAGES = {RED_PNG: thumbnail(RED), BLUE_PNG: thumbnail(BLUE)}

SHAPES, CHAT = "shapes.jsonl[train]", "chat.json[train]"

STATS = [
    {
        "source": SHAPES,
        "read": 11,
        "kept": 9,
        "limited": True,
        "broken": [],
        "rejected": {"corrupt image": 2},
        "first_rejected": {"corrupt image": "shapes.jsonl:4: b.png: truncated"},
        "dialogues": 9,
        "examples": 9,
        "tokens": 1000,
        "supervised_tokens": 250,
        "images": 9,
        "draws_per_epoch": 9,
    },
    {
        "source": CHAT,
        "read": 1000,
        "kept": 1000,
        "limited": False,
        "broken": [],
        "rejected": {},
        "first_rejected": {},
        "dialogues": 500,
        "examples": 500,
        "tokens": 9000,
        "supervised_tokens": 4750,
        "images": 0,
        "draws_per_epoch": None,
    },
]

TWO_IMAGES = ShownExample(
    "shapes.jsonl:1",
    SHAPES,
    (
        Token("<s>", 1, special=True),
        Token("<image>", 32001, image=0, special=True),
        Token(" Who", 11644, image=0),
        Token("<image>", 32001, image=1, special=True),
        Token("?", 29973, image=1),
        Token("\n", 13, image=1),
        Token(" Me", 2191, supervised=True, image=1),
    ),
    (RED_PNG, BLUE_PNG),
)

NO_IMAGE = ShownExample("chat.json:7", CHAT, (Token("Hi", 6324, supervised=True),), longest=True)

UNOPENED = ShownExample("shapes.jsonl:2", SHAPES, (Token("a", 29874, image=0),), (GONE_PNG,))

HOSTILE = (
    "</script></style></title><script>parent.hit=1</script>\"'><img src=x onerror=hit=1>\u202e\x00\ud800`{{7*7}}&amp;"
)

SHOWN = (
    "</script></style></title><script>parent.hit=1</script>\"'><img src=x onerror=hit=1>[U+202E]␀\ufffd`{{7*7}}&amp;"
)


def inspection(examples=(TWO_IMAGES, UNOPENED, NO_IMAGE), stats=STATS, histograms=(), **options):
    settings = {"title": "runs/shapes", "recipe": "seed: 1", "images": IMAGES} | options
    return inspection_page(Inspection(list(stats), list(histograms), list(examples)), **settings)


def prediction(**changes):
    line = {"images": ["red.png"], "question": "What?", "references": ["a dog"], "answer": "a dog"}
    return {**line, "stopped": True, "exact": True, **changes}


def predict(lines, **options):
    opened = {"red.png": RED, "blue.png": BLUE}
    return predictions_page(lines, **{"title": "tuned", "image": opened.get} | options)


def data(page):
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(block)


def texts(page, name):
    """Written content of every element of one kind that holds text alone."""
    return [unescape(text) for text in re.findall(rf"<{name}\b[^>]*>([^<]*)</{name}>", page)]


class Tags(HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def hostile_pages():
    tokens = Token(HOSTILE, 1, image=0), Token(HOSTILE, 2, True, 0)
    example = ShownExample(HOSTILE, HOSTILE, tokens, (Image(Path(HOSTILE)),))
    stats = {**STATS[0], "source": HOSTILE, "rejected": {HOSTILE: 1}, "first_rejected": {HOSTILE: HOSTILE}}
    drawn = Histogram(HOSTILE, HOSTILE, (0, 1), (1,), HOSTILE)
    line = prediction(images=[HOSTILE, None], question=HOSTILE, references=[HOSTILE], answer=HOSTILE)
    return {
        "inspection": inspection([example], [stats], title=HOSTILE, recipe=HOSTILE, histograms=[drawn]),
        "predictions": predict([line], title=HOSTILE),
    }


def plain_pages():
    return {
        "inspection": inspection(histograms=[histogram([3, 5, 5], name="Length", unit="tokens")]),
        "predictions": predict([prediction()]),
    }


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium and no google-chrome on the PATH")


def browse(page, folder, script="", *, policy=True):
    """(what `script` returns when it has run at the page's end, the browser's console)."""
    code = f"""
const out = document.createElement("pre");
out.id = "result";
const told = [];
document.addEventListener("securitypolicyviolation", (event) => told.push(event.effectiveDirective));
const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const point = (element) => element.dispatchEvent(new PointerEvent("pointerover", {{bubbles: true}}));
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const lit = () => all(".lit").map((element) => element.textContent.trim());
(async () => {{ {script} }})().then((value) => {{
  out.textContent = btoa(encodeURIComponent(JSON.stringify(value ?? null)));
  document.body.append(out);
}});
"""
    sha = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    page = page.replace("script-src '", f"script-src 'sha256-{sha}' '", 1)
    page = page if policy else re.sub("<meta http-equiv.*?>", "", page, count=1)
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>{code}</script></body>"), encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--enable-logging=stderr"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    ran = subprocess.run(command, capture_output=True, timeout=120, check=True)
    (result,) = re.findall('<pre id="result">(.*?)</pre>', ran.stdout.decode())
    console = [line for line in ran.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return json.loads(unquote(base64.b64decode(result).decode())), console
