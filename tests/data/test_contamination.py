"""What training and held-out examples share, by content and by words; and what the recipe's rule drops for it."""

import json

import PIL.Image
import pytest
from sources import make_source

from finetune.data.contamination import find_contamination
from finetune.data.dataset import log_losses, make_dataset
from finetune.data.prepare import prepare
from finetune.data.prepared import question_key
from finetune.data.read_dialogues import resolve_source
from finetune.recipe.schema import Recipe
from modeling.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        PIL.Image.new("RGB", (8, 8), color).save(folder / f"{name}.png")
    (folder / "also-a.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def ask(question, *images):
    content = [{"type": "image", "image": f"{image}.png"} for image in images] + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "Me."}]


def write(folder, name, dialogues):
    path = folder / name
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues))
    return path


@pytest.fixture
def compare(folder, tiny_tokenizer, tmp_path):
    """compare(training, held, **source) -> what they share."""

    def run(training, held, **source):
        sides = [
            prepare(
                [make_source("messages", (write(folder, name, dialogues),), **source)],
                tiny_tokenizer,
                max_length=200,
                max_images=3,
                seed=0,
                folder=tmp_path,
            )[0]
            for name, dialogues in (("training.jsonl", training), ("held.jsonl", held))
        ]
        overlap = find_contamination(*sides)
        return (
            overlap.images,
            overlap.questions,
            overlap.examples_with_images.tolist(),
            overlap.examples_with_questions.tolist(),
        )

    return run


CASES = {
    "nothing": ([ask("Who?", "a")], [ask("Who?", "b")], (0, 0, [], [])),
    "nothing held out": ([ask("Who?", "a")], [], (0, 0, [], [])),
    "an image": ([ask("Who?", "a"), ask("Who?", "c")], [ask("Why?", "a")], (1, 0, [0], [])),
    "an image under two names": ([ask("Who?", "b"), ask("Who?", "also-a")], [ask("Why?", "a")], (1, 0, [1], [])),
    "a question": ([ask("Why?", "a"), ask("Who?", "also-a")], [ask("Who?", "a")], (1, 1, [0, 1], [1])),
    "but for case and spacing": ([ask("  who\n IS it? ", "a")], [ask("Who is it?", "a")], (1, 1, [0], [0])),
    "but for a letter": ([ask("Who is he?", "a")], [ask("Who is she?", "a")], (1, 0, [0], [])),
    "the question on another image": ([ask("Who?", "a")], [ask("Who?", "b")], (0, 0, [], [])),
    "the question on more images": ([ask("Who?", "a", "b")], [ask("Who?", "a")], (1, 0, [0], [])),
    "a question about none": ([ask("Who?"), ask("Who?", "a")], [ask("who?")], (0, 1, [], [0])),
    "several times": ([ask("Who?", "a")] * 3, [ask("Who?", "also-a")] * 2, (1, 1, [0, 1, 2], [0, 1, 2])),
    "in a late turn": ([[*ask("Who?", "a"), *ask("Why?")]], [ask("Why?", "a")], (1, 1, [0], [0])),
    "before a later image": ([[*ask("Who?", "a"), *ask("Why?", "b")]], [ask("Who?", "a")], (1, 1, [0], [0])),
    "an image in a late turn": ([[*ask("Who?"), *ask("Why?", "b")]], [ask("Why?", "b")], (1, 1, [0], [0])),
}


@pytest.mark.parametrize(("training", "held", "expected"), CASES.values(), ids=CASES)
def test_what_is_on_both_sides(training, held, expected, compare):
    assert compare(training, held) == expected


def test_joined_questions_are_found_as_those_asked_alone(compare):
    joined = [ask(f"{number}?", "a") for number in range(4)]
    assert compare(joined, [ask("2?", "also-a"), ask("9?", "also-a")], turns=4, ordered=False) == (1, 1, [0], [0])


def test_questions_of_a_dialogue_that_was_divided_are_found(compare):
    dialogue = [*ask("0?", "a"), *ask("1?", "b"), *ask("2?", "a"), *ask("3?"), *ask("4?", "c")]
    found = compare([dialogue], [dialogue, ask("3?", "b", "a"), ask("3?", "a", "b")], turns=1, ordered=True)
    assert found == (3, 5, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    whole, divided = [dialogue], [ask("2?", "b", "a"), ask("3?", "b", "a"), ask("4?", "b", "a", "c")]
    assert compare(whole, divided) == (3, 3, [0], [0])


def test_a_question_is_its_words_and_its_images():
    key = question_key([b"a" * 32], "Who is it?")
    assert question_key([b"a" * 32], " who  is\tit? ") == key
    others = [
        ([b"b" * 32], "Who is it?"),
        ([], "Who is it?"),
        ([b"a" * 32] * 2, "Who is it?"),
        ([b"a" * 32], "Whois it?"),
    ]
    assert len({key, *(question_key(*other) for other in others)}) == 5
    assert 0 <= key < 2**64


@pytest.fixture
def dataset(folder, tiny_tokenizer, tmp_path):
    """dataset(training, held, overlap=...) -> the data of a recipe."""

    def make(training, held, **data):
        sources = [{"format": "messages", "path": str(write(folder, "training.jsonl", training))}]
        eval_sources = [{"format": "messages", "path": str(write(folder, "held.jsonl", held))}] if held else []
        recipe = Recipe.model_validate(
            {
                "model": {"base": "base"},
                "data": {
                    "sources": sources,
                    "eval_sources": eval_sources,
                    "max_length": 200,
                    "prepared": str(tmp_path / "prepared"),
                    "workers": 1,
                    **data,
                },
                "training": {"epochs": 1, "row_tokens": 200},
                "output": str(tmp_path / "run"),
            }
        )
        return make_dataset(
            recipe.data,
            [resolve_source(source) for source in recipe.data.sources],
            tiny_tokenizer,
            row_images=recipe.training.row_images,
            seed=recipe.training.seed,
        )

    return make


TRAINING = [ask("1?", "a"), ask("2?", "a"), ask("3?", "b"), ask("4?"), ask("5?")]
HELD = [ask("1?", "also-a"), ask("4?")]


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("report", ["1?", "2?", "3?", "4?", "5?"]),
        ("drop_questions", ["2?", "3?", "5?"]),
        ("drop_images", ["3?", "5?"]),
    ],
)
def test_a_rule_drops_what_is_held_out_from_training_alone(rule, left, dataset, capsys, tmp_path):
    made = dataset(TRAINING, HELD, overlap=rule)
    assert [dialogue.turns[0].text for dialogue in made.train.dialogues] == left
    assert len(made.eval) == 2
    assert made.report["overlap"] == {
        "images": 1,
        "questions": 2,
        "training_examples_with_images": 2,
        "training_examples_with_questions": 2,
        "dropped": rule != "report",
    }
    assert (made.report["training_examples"], made.report["held_out_examples"]) == (len(left), 2)
    assert made.mix.sizes == [len(left)]
    assert [stats.examples for stats in made.source_stats] == [5, 2]
    log_losses(made, tmp_path / "data.json")
    said = " ".join(capsys.readouterr().err.split())
    assert "share 1 images (in 2 training examples) and 2 questions about equal images (in 2)" in said
    assert said.endswith("kept" if rule == "report" else "dropped")


def test_nothing_left_to_train_on_is_an_error(dataset):
    with pytest.raises(UserError, match="every training example would be dropped"):
        dataset(HELD, HELD, overlap="drop_questions")


def test_without_held_out_data_nothing_is_shared(dataset):
    made = dataset(TRAINING, [])
    assert (len(made.train), len(made.eval)) == (5, 0)
    assert made.report["overlap"]["images"] == made.report["overlap"]["questions"] == 0


def test_a_split_shares_no_image(dataset):
    made = dataset(TRAINING, [], eval_split=0.4)
    assert (len(made.train), len(made.eval)) == (3, 2)
    assert made.report["overlap"]["images"] == 0
