"""The page of what a model answered, and what a browser makes of it."""

import pytest
from pages import IMAGES, RED_PNG, browse, data, in_chromium, predict, prediction, texts

from modeling.errors import UserError


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
        "exactly right": "50.0%",
        "ended by the model itself": "75.0%",
        "VQA accuracy": "0.65",
    }
    assert dict(zip(texts(predict([]), "dt"), texts(predict([]), "dd"), strict=True)) == {
        "answers": "0",
        "exactly right": "–",
        "ended by the model itself": "–",
    }


def test_card_holds_its_line():
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


def test_wrong_answers_come_first_worst_before():
    lines = [
        prediction(vqa=1.0),
        prediction(exact=False, vqa=0.6),
        prediction(exact=False, vqa=0.0),
        prediction(vqa=0.9),
    ]
    assert [card["number"] for card in data(predict(lines))["cards"]] == [3, 2, 4, 1]


def test_page_says_what_is_left_out():
    lines = [
        prediction(exact=False, images=["gone.png", "red.png"]),
        prediction(images=["red.png", None, "dir/blue.png"]),
        prediction(),
    ]
    page = predict(lines, thumbnails=1, cards=2)
    made = data(page)
    assert made["images"] == [IMAGES[RED_PNG]]
    assert [card["images"] for card in made["cards"]] == [
        ["gone.png: could not be opened", 0],
        [0, "an image without a file of its own", "blue.png: left out"],
    ]
    assert "2 of 3 answers are shown, wrong ones first." in page
    assert "The first 1 of 2 images are shown." in page
    assert 'class="note">\n' not in predict(lines[:1])


def test_image_is_opened_once():
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
def test_line_that_is_not_a_prediction(changes, message):
    with pytest.raises(UserError) as error:
        predict([prediction(), prediction(**changes)])
    assert str(error.value) == message


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
