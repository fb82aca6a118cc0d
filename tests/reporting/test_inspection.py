"""The page of what a recipe will train on, and what a browser makes of it."""

import re

import pytest
from pages import (
    BLUE,
    BLUE_PNG,
    CHAT,
    GONE_PNG,
    IMAGES,
    RED,
    RED_PNG,
    SHAPES,
    STATS,
    TWO_IMAGES,
    UNOPENED,
    browse,
    data,
    in_chromium,
    inspection,
    texts,
)

from finetune.data.conversation import Image
from finetune.reporting.html.histogram import histogram
from finetune.reporting.inspect import ShownExample, Token


def test_figures_add_the_sources_up():
    page = inspection()
    assert list(zip(texts(page, "dt"), texts(page, "dd"), strict=False))[:5] == [
        ("dialogues", "509"),
        ("examples", "509"),
        ("tokens", "10,000"),
        ("of the tokens are trained on", "50.0%"),
        ("images", "9"),
    ]


def test_table_has_a_row_per_source_and_their_sums():
    page = inspection()
    heads = ["records read", "kept", "rejected", "dialogues", "examples", "tokens", "trained on", "images"]
    assert texts(page, "th")[:10] == ["source", *heads, "drawn per epoch"]
    assert texts(page, "th")[10:] == [SHAPES, CHAT, "all sources"]
    assert texts(page, "td")[:9] == ["11", "9", "2", "9", "9", "1,000", "250 (25.0%)", "9", "9"]
    sums = ["1,011", "1,009", "2", "509", "509", "10,000", "5,000 (50.0%)", "9", "–"]
    assert texts(page, "td")[18:] == sums


def test_table_of_other_numbers_and_no_sum_of_repeats():
    stats = [
        {**STATS[0], "repeats": 2, "too_long": 3},
        {**STATS[0], "source": "b", "repeats": 0.5, "too_long": 4},
    ]
    page = inspection([], stats)
    assert texts(page, "th")[10:12] == ["repeats", "too long"]
    rows = [texts(row, "td")[-2:] for row in re.findall(r"<tr data-row.*?</tr>|<tr class=.*?</tr>", page, re.DOTALL)]
    assert rows == [["2", "3"], ["0.5", "4"], ["–", "7"]]


def test_losses_are_shown_with_the_first_record():
    page = inspection()
    assert "<b>2</b> corrupt image" in page
    assert "shapes.jsonl:4: b.png: truncated" in page
    broken = {**STATS[1], "broken": ["chat.json breaks off: not JSON: <b>"]}
    assert "<dd>chat.json breaks off: not JSON: &lt;b&gt;</dd>" in inspection(stats=[broken], examples=())
    assert "What is not trained on" not in inspection(stats=STATS[1:], examples=())


def test_tokens_are_written_one_by_one():
    page = inspection([TWO_IMAGES])
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


def test_image_is_embedded_once_and_only_if_shown():
    again = ShownExample("shapes.jsonl:9", SHAPES, (Token("a", 1),), (BLUE_PNG,))
    page = inspection([TWO_IMAGES, again], images={**IMAGES, GONE_PNG: "data:image/png;base64,AAAA"})
    assert data(page) == {"images": [IMAGES[RED_PNG], IMAGES[BLUE_PNG]]}
    assert page.count("data:image/") == 2
    assert re.findall(r'img data-image="(\d)"', page) == ["0", "1", "1"]


def test_images_in_memory_have_thumbnails_of_their_own():
    images = (Image(RED), Image(BLUE), Image(RED))
    page = inspection([ShownExample("shapes.arrow:1", SHAPES, (Token("a", 1),), images)], images=None)
    assert data(page) == {"images": [IMAGES[RED_PNG], IMAGES[BLUE_PNG]]}
    assert re.findall(r'img data-image="(\d)"', page) == ["0", "1", "0"]


def test_image_that_could_not_be_opened():
    assert "could not be opened" in inspection([UNOPENED])
    assert "could not be opened" not in inspection([TWO_IMAGES])


def test_token_sees_an_image_of_its_example():
    with pytest.raises(AssertionError, match="p: tokens see"):
        ShownExample("p", "s", (Token("a", 1, image=1),), (RED_PNG,))


def test_image_must_be_a_data_uri():
    with pytest.raises(AssertionError, match="expected a data URI of an image, got https:"):
        inspection(images={**IMAGES, RED_PNG: "https://example.org/a.jpg"})


def test_page_without_sources():
    page = inspection((), ())
    assert texts(page, "dd")[:5] == ["0", "0", "0", "–", "0"]
    assert "There is no source." in page


@pytest.mark.slow
@in_chromium
def test_pointing_at_tokens_images_and_bars(tmp_path):
    page = inspection(histograms=[histogram([3, 5, 5], name="Length", unit="tokens")])
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
def test_choosing_a_source_filters_the_page(tmp_path):
    values = {"name": "Length", "unit": "tokens"}
    page = inspection(histograms=[histogram([3], **values), histogram([3], source=SHAPES, **values)])
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
