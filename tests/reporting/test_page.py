"""Pages: what they hold, that hostile text stays text, and what a browser makes of them."""

import base64
import hashlib
import http.server
import io
import json
import re
import shutil
import subprocess
import threading
from html import unescape
from html.parser import HTMLParser
from urllib.parse import unquote

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.console import visible
from finetune.reporting.html.chart import Histogram, draw, histogram
from finetune.reporting.html.inspection import ShownDialogue, Token, choose_shown, inspection_page
from finetune.reporting.html.page import number, share, thumbnail
from finetune.reporting.html.predictions import predictions_page
from modeling.errors import UserError

RED, BLUE = (PIL.Image.new("RGB", (64, 48), color) for color in ("red", "blue"))
IMAGES = {"red": thumbnail(RED), "blue": thumbnail(BLUE)}

SHAPES, CHAT = "shapes.jsonl[train]", "chat.json[train]"
ACCOUNTS = [
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
TWO_IMAGES = ShownDialogue(
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
    ("red", "blue"),
)
NO_IMAGE = ShownDialogue("chat.json:7", CHAT, (Token("Hi", 6324, supervised=True),), longest=True)
UNOPENED = ShownDialogue("shapes.jsonl:2", SHAPES, (Token("a", 29874, image=0),), ("gone",))

HOSTILE = (
    "</script></style></title><script>parent.hit=1</script>\"'><img src=x onerror=hit=1>\u202e\x00\ud800`{{7*7}}&amp;"
)
SHOWN = (
    "</script></style></title><script>parent.hit=1</script>\"'><img src=x onerror=hit=1>[U+202E]␀\ufffd`{{7*7}}&amp;"
)


def inspect(dialogues=(TWO_IMAGES, UNOPENED, NO_IMAGE), accounts=ACCOUNTS, **options):
    settings = {"title": "runs/shapes", "recipe": "seed: 1", "images": IMAGES} | options
    return inspection_page(accounts, dialogues, **settings)


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
    dialogue = ShownDialogue(HOSTILE, HOSTILE, (Token(HOSTILE, 1, image=0), Token(HOSTILE, 2, True, 0)), (HOSTILE,))
    account = {**ACCOUNTS[0], "source": HOSTILE, "rejected": {HOSTILE: 1}, "first_rejected": {HOSTILE: HOSTILE}}
    drawn = Histogram(HOSTILE, HOSTILE, (0, 1), (1,), HOSTILE)
    line = prediction(images=[HOSTILE, None], question=HOSTILE, references=[HOSTILE], answer=HOSTILE)
    return {
        "inspection": inspect([dialogue], [account], title=HOSTILE, recipe=HOSTILE, histograms=[drawn]),
        "predictions": predict([line], title=HOSTILE),
    }


def plain_pages():
    return {
        "inspection": inspect(histograms=[histogram([3, 5, 5], name="Length", unit="tokens")]),
        "predictions": predict([prediction()]),
    }


# ---------------------------------------------------------------- small parts


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x00\x1b\r\x7f", "␀␛␍␡"),
        ("\u202eabc\u2069", "[U+202E]abc[U+2069]"),
        ("\ud83d", "\ufffd"),
        ("\U0001f469\u200d\U0001f680 é 犬", "\U0001f469\u200d\U0001f680 é 犬"),
        ("\U000e0041", "[U+E0041]"),
    ],
)
def test_what_cannot_be_seen_is_written_out(text, shown):
    assert visible(text) == shown


@given(st.text(st.characters(codec=None)))
def test_visible_text_can_be_encoded_and_holds_no_control(text):
    shown = visible({text: [text, 1]})
    ((key, (value, one)),) = shown.items()
    assert key == value == value.encode("utf-8").decode("utf-8")
    assert one == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", value)


def test_numbers_read_well():
    assert [number(value) for value in (1234567, 0, 0.98765, 1.5, None)] == ["1,234,567", "0", "0.988", "1.5", "–"]
    assert [share(1, 3), share(0, 0)] == ["33.3%", "–"]


@pytest.mark.parametrize(
    ("size", "shown"), [((1, 60_000), (1, 320)), ((60_000, 2), (320, 1)), ((65_600, 65), (320, 1))]
)
def test_a_thumbnail_of_extreme_proportions_is_small(size, shown):
    uri = thumbnail(PIL.Image.new("RGB", size))
    assert PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == shown


def test_a_thumbnail_keeps_proportions_and_puts_transparency_on_white():
    clear = PIL.Image.new("RGBA", (1000, 500), (255, 0, 0, 0))
    uri = thumbnail(clear)
    assert uri.startswith("data:image/jpeg;base64,")
    opened = PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert (opened.format, opened.size, opened.getpixel((160, 80))) == ("JPEG", (320, 160), (255, 255, 255))
    assert clear.size == (1000, 500)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I;16", "F"])
def test_a_thumbnail_of_every_mode(mode):
    assert thumbnail(PIL.Image.new(mode, (2000, 1)), width=10).startswith("data:image/jpeg;base64,")


def test_the_drawn_and_the_longest_are_chosen_apart():
    assert choose_shown([5, 9, 1, 9, 7], seed=0, drawn=9, longest=2) == [
        (0, False),
        (2, False),
        (4, False),
        (1, True),
        (3, True),
    ]
    assert choose_shown([], seed=0) == []
    assert choose_shown(range(1000), seed=1) == choose_shown(range(1000), seed=1) != choose_shown(range(1000), seed=2)


@given(st.lists(st.integers(0, 500)), st.integers(0, 30), st.integers(0, 30))
def test_none_is_chosen_twice(lengths, drawn, longest):
    chosen = choose_shown(lengths, seed=3, drawn=drawn, longest=longest)
    assert len({index for index, _ in chosen}) == len(chosen) == min(len(lengths), drawn + longest)
    top = [lengths[index] for index, is_long in chosen if is_long]
    assert top == sorted(lengths, reverse=True)[:longest]


# ---------------------------------------------------------------- histograms


def test_bars_have_round_edges():
    made = histogram([12, 18, 21, 39], name="Length", unit="tokens", bars=3)
    assert made == Histogram("Length", "tokens", (10, 20, 30, 40), (2, 1, 1))
    assert histogram([0, 2, 2], name="Images", unit="images").edges == (0, 1, 2, 3)
    assert histogram([], name="Images", unit="images") == Histogram("Images", "images", (0, 1), (0,))


@given(st.lists(st.integers(0, 10**6), min_size=1), st.integers(2, 40))
def test_every_value_is_in_its_bar(values, bars):
    made = histogram(values, name="n", unit="u", bars=bars)
    assert len(made.counts) <= bars
    naive = [
        sum(low <= value < high for value in values) for low, high in zip(made.edges, made.edges[1:], strict=False)
    ]
    assert list(made.counts) == naive
    assert sum(naive) == len(values)


def test_bars_are_drawn_to_scale_and_labelled():
    drawn = draw(Histogram("Length", "tokens", (0, 1000, 2000, 3000), (20, 0, 10)))
    assert [bar.label for bar in drawn["bars"]] == [
        "0–999 tokens: 20",
        "1,000–1,999 tokens: 0",
        "2,000–2,999 tokens: 10",
    ]
    full, none, half = (bar.height for bar in drawn["bars"])
    assert (full, none, half) == (152, 0, 76)
    assert [label for _, label in drawn["up"]] == ["0", "5", "10", "15", "20"]
    assert [label for _, label in drawn["across"]] == ["0", "1,000", "2,000", "3,000"]
    assert drawn["text"] == "0–999 tokens: 20; 2,000–2,999 tokens: 10"


def test_bars_of_single_values_are_labelled_in_their_middle():
    drawn = draw(Histogram("Images", "images", (0, 1, 2), (4, 1)))
    assert [bar.label for bar in drawn["bars"]] == ["0 images: 4", "1 images: 1"]
    middles = [bar.left + bar.width / 2 for bar in drawn["bars"]]
    assert drawn["across"] == [(middles[0], "0"), (middles[1], "1")]


def test_edges_must_rise_and_enclose_the_counts():
    with pytest.raises(AssertionError, match="2 edges, 2 counts"):
        Histogram("n", "u", (0, 1), (1, 2))
    with pytest.raises(AssertionError, match="edges do not rise"):
        Histogram("n", "u", (0, 2, 2), (1, 2))


# ---------------------------------------------------------------- inspection page


def test_the_summary_adds_the_sources_up():
    page = inspect()
    assert list(zip(texts(page, "dt"), texts(page, "dd"), strict=False))[:5] == [
        ("dialogues", "509"),
        ("examples", "509"),
        ("tokens", "10,000"),
        ("of them trained on", "50.0%"),
        ("images", "9"),
    ]


def test_the_table_has_a_row_a_source_and_their_sums():
    page = inspect()
    heads = ["read", "kept", "rejected", "dialogues", "examples", "tokens", "trained on", "images"]
    assert texts(page, "th")[:10] == ["source", *heads, "draws an epoch"]
    assert texts(page, "th")[10:] == [SHAPES, CHAT, "together"]
    assert texts(page, "td")[:9] == ["11", "9", "2", "9", "9", "1,000", "250 (25.0%)", "9", "9"]
    sums = ["1,011", "1,009", "2", "509", "509", "10,000", "5,000 (50.0%)", "9", "–"]
    assert texts(page, "td")[18:] == sums


def test_other_numbers_of_an_account_have_columns_and_repeats_are_not_added():
    accounts = [
        {**ACCOUNTS[0], "repeats": 2, "too_long": 3},
        {**ACCOUNTS[0], "source": "b", "repeats": 0.5, "too_long": 4},
    ]
    page = inspect([], accounts)
    assert texts(page, "th")[10:12] == ["repeats", "too long"]
    rows = [texts(row, "td")[-2:] for row in re.findall(r"<tr data-row.*?</tr>|<tr class=.*?</tr>", page, re.DOTALL)]
    assert rows == [["2", "3"], ["0.5", "4"], ["–", "7"]]


def test_rejections_are_shown_with_their_first():
    page = inspect()
    assert "<b>2</b> corrupt image" in page
    assert "shapes.jsonl:4: b.png: truncated" in page
    broken = {**ACCOUNTS[1], "broken": ["chat.json breaks off: not JSON: <b>"]}
    assert "<dd>chat.json breaks off: not JSON: &lt;b&gt;</dd>" in inspect(accounts=[broken], dialogues=())
    assert "Rejected records" not in inspect(accounts=ACCOUNTS[1:], dialogues=())


def test_tokens_are_written_one_by_one():
    page = inspect([TWO_IMAGES])
    (box,) = re.findall(r'<div class="tokens".*?>(.*?)</div>', page, re.DOTALL)
    assert box == (
        '<span class="run"><span class="token special" data-id="1">&lt;s&gt;</span></span>'
        '<span class="run" data-sees="0"><span class="token special" data-id="32001">&lt;image&gt;</span>'
        '<span class="token" data-id="11644"> Who</span></span>'
        '<span class="run" data-sees="1"><span class="token special" data-id="32001">&lt;image&gt;</span>'
        '<span class="token" data-id="29973">?</span><span class="token" data-id="13"><i class="newline"></i>\n</span>'
        '<span class="token supervised" data-id="2191"> Me</span></span>'
    )
    assert "7 tokens, 1 trained on, 2 images" in page


def test_an_image_is_in_the_page_once_and_only_if_it_is_shown():
    again = ShownDialogue("shapes.jsonl:9", SHAPES, (Token("a", 1),), ("blue",))
    page = inspect([TWO_IMAGES, again], images={**IMAGES, "unused": "data:image/png;base64,AAAA"})
    assert data(page) == {"images": [IMAGES["red"], IMAGES["blue"]]}
    assert page.count("data:image/") == 2
    assert re.findall(r'img data-image="(\d)"', page) == ["0", "1", "1"]


def test_an_image_that_does_not_open_is_shown_as_such():
    assert "could not be opened" in inspect([UNOPENED])
    assert "could not be opened" not in inspect([TWO_IMAGES])


def test_a_token_cannot_see_an_image_its_dialogue_lacks():
    with pytest.raises(AssertionError, match="p: tokens see"):
        ShownDialogue("p", "s", (Token("a", 1, image=1),), ("red",))


def test_a_page_image_must_be_in_the_page():
    with pytest.raises(AssertionError, match="expected a data URI of an image, got https:"):
        inspect(images={"red": "https://example.org/a.jpg", "blue": IMAGES["blue"]})


def test_an_empty_recipe_still_has_a_page():
    page = inspect((), ())
    assert texts(page, "dd")[:5] == ["0", "0", "0", "–", "0"]
    assert "No source." in page


# ---------------------------------------------------------------- predictions page


def test_figures_count_every_line():
    lines = [
        prediction(vqa=1.0),
        prediction(exact=False, stopped=False, vqa=0.3),
        prediction(exact=False),
        prediction(),
    ]
    page = predict(lines)
    figures = dict(zip(texts(page, "dt"), texts(page, "dd"), strict=True))
    assert figures == {
        "answers": "4",
        "right, word for word": "50.0%",
        "stopped by themselves": "75.0%",
        "VQA accuracy": "0.65",
    }
    assert dict(zip(texts(predict([]), "dt"), texts(predict([]), "dd"), strict=True)) == {
        "answers": "0",
        "right, word for word": "–",
        "stopped by themselves": "–",
    }


def test_a_card_holds_its_line():
    line = prediction(references=["yes", "no", "yes"], answer="", exact=False, cider=0.1234, rouge_l=1)
    assert data(predict([line]))["cards"] == [
        {
            "number": 1,
            "images": [0],
            "question": "What?",
            "references": [["yes", 2], ["no", 1]],
            "answer": "",
            "stopped": True,
            "right": False,
            "scores": [["CIDEr", "0.123"], ["ROUGE-L", "1"]],
        }
    ]


def test_wrong_answers_come_first_the_worst_before():
    lines = [
        prediction(vqa=1.0),
        prediction(exact=False, vqa=0.6),
        prediction(exact=False, vqa=0.0),
        prediction(vqa=0.9),
    ]
    assert [card["number"] for card in data(predict(lines))["cards"]] == [3, 2, 4, 1]


def test_what_is_left_out_is_said():
    lines = [
        prediction(exact=False, images=["gone.png", "red.png"]),
        prediction(images=["red.png", None, "dir/blue.png"]),
        prediction(),
    ]
    page = predict(lines, thumbnails=1, cards=2)
    made = data(page)
    assert made["images"] == [IMAGES["red"]]
    assert [card["images"] for card in made["cards"]] == [
        ["gone.png: could not be opened", 0],
        [0, "an image without a file of its own", "blue.png: left out"],
    ]
    assert "Of 3 answers 2 have a card" in page
    assert "Of 2 pictures the first 1 are shown" in page
    assert 'class="note">\n' not in predict(lines[:1])


def test_an_image_is_opened_once():
    opened = []
    predict([prediction(), prediction()], image=lambda path: opened.append(path))
    assert opened == ["red.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exact": None}, 'prediction 2: expected "exact": true or false, got None'),
        ({"images": "a.png"}, "prediction 2: expected \"images\": [path or null, ...], got 'a.png'"),
        ({"references": [1]}, 'prediction 2: expected "references": [text, ...], got [1]'),
        ({"answer": 3}, 'prediction 2: expected "answer": text, got 3'),
        ({"vqa": "high"}, "prediction 2: expected \"vqa\": a number, got 'high'"),
    ],
)
def test_a_line_that_is_no_prediction_is_told(changes, message):
    with pytest.raises(UserError) as error:
        predict([prediction(), prediction(**changes)])
    assert str(error.value) == message


# ---------------------------------------------------------------- safety


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
def test_a_page_names_nothing_outside_itself(page):
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


# ---------------------------------------------------------------- in a browser

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


@pytest.mark.slow
@in_chromium
def test_pointing_at_a_token_lights_its_image_and_the_other_way_round(tmp_path):
    page = inspect(histograms=[histogram([3, 5, 5], name="Length", unit="tokens")])
    script = """
await Promise.all(all("img").map((image) => image.decode()));
const [first, second] = all("article");
const tokens = all(".token", first), images = all(".image", first);
const told = () => all("#tip span").map((span) => span.textContent);
const got = {sources: all("img").map((image) => [image.src.slice(0, 23), image.naturalWidth])};
point(tokens[6]); got.supervised = [lit(), told(), document.getElementById("tip").hidden];
point(tokens[2]); got.read = [lit(), told()];
point(tokens[0]); got.blind = [lit(), told()];
point(images[0]); got.image = [lit(), document.getElementById("tip").hidden];
point(second.querySelector(".token")); got.unopened = lit();
point(all(".bar")[0]); got.bar = told();
point(document.body); got.nothing = lit();
first.querySelector(".tokens").focus();
const pressed = (key) => new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true});
const press = (key) => document.activeElement.dispatchEvent(pressed(key));
got.keys = ["ArrowRight", "ArrowRight", "End", "ArrowRight", "ArrowLeft", "Home"].map((key) => (press(key), told()[3]));
press("Escape"); got.escaped = lit();
tokens[4].click(); got.tapped = told()[0];
return got;
"""
    got, console = browse(page, tmp_path, script)
    assert console == []
    assert got == {
        "sources": [["data:image/jpeg;base64,", 64], ["data:image/jpeg;base64,", 64]],
        "supervised": [["Me", "image 2"], ['" Me"', "id 2191", "label 2191", "position 6", "sees image 2"], False],
        "read": [["Who", "image 1"], ['" Who"', "id 11644", "not trained on", "position 2", "sees image 1"]],
        "blind": [["<s>"], ['"<s>"', "id 1", "not trained on", "position 0", "sees no image"]],
        "image": [["<image> Who", "image 1"], True],
        "unopened": ["a", "could not be opened\nimage 1"],
        "bar": ["3 tokens: 1"],
        "nothing": [],
        "keys": [f"position {position}" for position in (0, 1, 6, 6, 5, 0)],
        "escaped": [],
        "tapped": '"?"',
    }


@pytest.mark.slow
@in_chromium
def test_a_source_is_chosen_for_the_whole_page(tmp_path):
    values = {"name": "Length", "unit": "tokens"}
    page = inspect(histograms=[histogram([3], **values), histogram([3], source=SHAPES, **values)])
    script = """
const choose = (value) => {
  const select = document.getElementById("source");
  select.value = value;
  select.dispatchEvent(new Event("change", {bubbles: true}));
  const shown = (selector) => all(selector).filter((element) => !element.hidden);
  return [
    shown("article").map((article) => article.getAttribute("aria-label")),
    shown(".chart").map((chart) => chart.dataset.source),
    shown(".rejected").length,
    all(".count").map((count) => count.textContent),
    shown(".none").length,
  ];
};
const got = [choose("0"), choose("1"), choose("")];
const box = document.getElementById("borders");
box.click();
return [...got, document.body.classList.contains("borders")];
"""
    got, console = browse(page, tmp_path, script)
    assert console == []
    everything = ["shapes.jsonl:1", "shapes.jsonl:2", "chat.json:7"]
    assert got == [
        [everything[:2], ["0"], 1, ["2", "0"], 1],
        [everything[2:], [""], 0, ["0", "1"], 1],
        [everything, [""], 1, ["2", "1"], 0],
        True,
    ]


@pytest.mark.slow
@in_chromium
def test_answers_are_filtered_searched_and_paged(tmp_path):
    lines = [prediction(question=f"number {index}?", exact=index % 4 > 0, stopped=index != 5) for index in range(120)]
    lines[8] |= {"references": ["Einstein"], "answer": "", "images": ["gone.png", None]}
    script = """
const range = () => document.getElementById("range").textContent;
const questions = () => all(".card .question").map((question) => question.textContent);
const which = (value) => document.querySelector(`[name=which][value=${value}]`).click();
const search = (text) => {
  const box = document.getElementById("search");
  box.value = text;
  box.dispatchEvent(new Event("input", {bubbles: true}));
};
const [back, next] = all("#controls [data-turn]");
const got = {counts: all("[data-count]").map((count) => count.textContent)};
got.first = [range(), questions().length, questions()[1], back.disabled, next.disabled];
next.click(); next.click(); got.last = [range(), questions().length, back.disabled, next.disabled];
which("wrong"); got.wrong = [range(), all(".card.wrong").length, all(".card.right").length];
which("unstopped"); got.unstopped = [range(), questions(), all(".warning").length];
which("all"); search("EINSTEIN");
got.found = [questions(), all(".answer")[0].textContent, all(".missing").map((missing) => missing.textContent)];
search("number 7?"); got.image = [questions(), all(".card img")[0].src.slice(0, 23)];
search("nowhere"); got.none = [range(), questions(), document.getElementById("none").hidden];
return got;
"""
    got, console = browse(predict(lines), tmp_path, script)
    assert console == []
    assert got == {
        "counts": ["120", "30", "90", "1"],
        "first": ["1–50 of 120", 50, "number 4?", True, False],
        "last": ["101–120 of 120", 20, False, True],
        "wrong": ["1–30 of 30", 30, 0],
        "unstopped": ["1–1 of 1", ["number 5?"], 1],
        "found": [
            ["number 8?"],
            "(nothing)",
            ["gone.png: could not be opened", "an image without a file of its own"],
        ],
        "image": [["number 7?"], "data:image/jpeg;base64,"],
        "none": ["0", [], False],
    }


@pytest.mark.slow
@in_chromium
def test_ten_thousand_answers_draw_fifty_cards(tmp_path):
    lines = [prediction(question="What? " * 20) for _ in range(10_000)]
    page = predict(lines)
    assert len(page) < 5_000_000
    assert browse(page, tmp_path, 'return all(".card").length;')[0] == 50


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
def test_a_page_cannot_ask_the_network_for_anything(tmp_path, policy):
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
    told, _ = browse(inspect(), tmp_path, script, policy=policy)
    server.shutdown()
    server.server_close()
    asked = {"/image", "/script", "/style", "/frame", "/fetch"}
    assert set(heard) == (set() if policy else asked)
    blocked = {"img-src", "script-src-elem", "style-src-elem", "frame-src", "connect-src"}
    assert set(told) == (blocked if policy else set())


@pytest.mark.slow
@in_chromium
def test_errors_would_be_heard(tmp_path):
    assert len(browse(inspect(), tmp_path, 'console.error("heard");')[1]) == 1
