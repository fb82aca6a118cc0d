"""Examples that fit: within the limits, nothing lost, as full as they can be; and what became of each dialogue."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import make_source

from finetune.data.chat_template import render
from finetune.data.chunking import Limits, Outcomes, Piece, Splitter, opening_images, splitter
from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.stats import SourceStats
from finetune.data.tokenize import Encoder, Example, tokenize

A, B, C = IMAGES = tuple(Image(Path(f"{name}.jpg")) for name in "abc")
SAME_AS_A = Image(Path("same-as-a.jpg"))
WORDS = st.text("dog cat.", min_size=1, max_size=40).filter(str.strip)


@pytest.fixture(scope="session", params=["llama_tokenizer", "tiny_tokenizer"])
def encoder(request):
    return Encoder(request.getfixturevalue(request.param))


def same(image):
    return A if image == SAME_AS_A else image


def fitting(encoder, *, max_length=1000, max_images=9, turns=None, ordered=True, seed=0):
    return Splitter(encoder, Limits(max_length, max_images), turns, ordered, seed)


def examples(splitter, *dialogues, number=0):
    """(dialogue of the piece, its example or its reason)."""
    pieces = splitter.arrange(list(enumerate(dialogues)), number=number)
    return [
        (piece.dialogue, example.reason if isinstance(example, RecordError) else example)
        for piece, example in splitter.fit(pieces, same=same)
    ]


def length(dialogue, encoder):
    (example,) = [example for _, example in fitting(encoder).fit([Piece(dialogue, (0,))], same=same)]
    return len(example)


def document(*parts, goes_on=False):
    return Dialogue((Turn("document", parts),), goes_on)


def sight(dialogues):
    """(role, text, the image it sees, or None) of all that is written, in any order."""
    seen = []
    for dialogue in dialogues:
        shown = None
        for turn in dialogue.turns:
            for part in turn.parts:
                if isinstance(part, Image):
                    shown = part
                elif part.strip():
                    seen.append((turn.role, part, str(shown and shown.source)))
    return sorted(seen)


def ask(*texts, images=(A,)):
    turns = [(assistant if index % 2 else user)(text) for index, text in enumerate(texts)]
    return Dialogue((user(*images, *turns[0].parts), *turns[1:]))


def test_a_dialogue_that_fits_is_tokenised_as_it_stands(encoder, llama_tokenizer, tiny_tokenizer):
    dialogue = ask("Who?", "Me.")
    ((made, example),) = examples(fitting(encoder), dialogue)
    tokenizer = llama_tokenizer if encoder.fingerprint == Encoder(llama_tokenizer).fingerprint else tiny_tokenizer
    expected = tokenize(render(dialogue), tokenizer)
    assert made == dialogue
    assert example.input_ids.tolist() == expected.input_ids.tolist()
    assert example.labels.tolist() == expected.labels.tolist()


def test_the_length_limit_is_exact(encoder):
    dialogue = ask("Who?", "Me.")
    most = length(dialogue, encoder)
    assert [type(example) for _, example in examples(fitting(encoder, max_length=most), dialogue)] == [Example]
    ((_, error),) = fitting(encoder, max_length=most - 1).fit([Piece(dialogue, (0,))], same=same)
    assert str(error) == f"too long: {most} tokens, max_length is {most - 1}"


def test_images_that_are_the_same_count_once(encoder):
    dialogue = ask("Which?", "None.", images=(A, B, SAME_AS_A, B))
    assert [type(example) for _, example in examples(fitting(encoder, max_images=2), dialogue)] == [Example]
    ((_, error),) = fitting(encoder, max_images=1).fit([Piece(dialogue, (0,))], same=same)
    assert str(error) == "too many images: 2, row_images is 1"


def test_without_turns_dialogues_stay_as_they_are(encoder):
    dialogues = [ask("1?", "one", "2?", "two"), ask("3?", "three")]
    assert [dialogue for dialogue, _ in examples(fitting(encoder), *dialogues)] == dialogues
    assert [reason for _, reason in examples(fitting(encoder, max_length=10), *dialogues)] == ["too long", "too long"]


def test_ordered_dialogues_are_not_joined_but_divided(encoder):
    dialogues = [ask("1?", "one", "2?", "two", "3?", "three"), ask("4?", "four")]
    made = [dialogue for dialogue, _ in examples(fitting(encoder, turns=2), *dialogues)]
    assert made == [ask("1?", "one", "2?", "two"), ask("3?", "three"), ask("4?", "four")]


def test_the_group_and_the_seed_decide_the_order_of_joined_turns(encoder):
    dialogues = [ask(f"{number}?", "x") for number in range(6)]

    def order(seed, number):
        ((dialogue, _),) = examples(fitting(encoder, turns=6, ordered=False, seed=seed), *dialogues, number=number)
        return tuple(turn.text for turn in dialogue.turns[::2])

    assert order(0, 0) == order(0, 0)
    assert len({order(seed, 0) for seed in range(4)}) > 1
    assert len({order(0, number) for number in range(4)}) > 1


def test_a_joined_dialogue_that_is_too_long_is_divided_in_its_order(encoder):
    dialogues = [ask(f"Is it {number}?", "a dog " * 9) for number in range(5)]
    whole = fitting(encoder, turns=5, ordered=False)
    ((joined, example),) = examples(whole, *dialogues)
    parts = examples(
        fitting(encoder, turns=5, ordered=False, max_length=len(example) - 1),
        *dialogues,
    )
    assert [turn.text for part, _ in parts for turn in part.turns] == [turn.text for turn in joined.turns]
    assert [len(part.turns) for part, _ in parts] == [4, 6]
    assert all(part.images == (A,) and isinstance(example, Example) for part, example in parts)


def test_only_the_exchange_that_is_too_long_is_lost(encoder):
    dialogue = ask("1?", "one", "2?", "two " * 200, "3?", "three")
    made = examples(fitting(encoder, turns=3, max_length=150), dialogue)
    assert [(part.turns[0].text, example if isinstance(example, str) else "kept") for part, example in made] == [
        ("1?", "kept"),
        ("2?", "too long"),
        ("3?", "kept"),
    ]


def test_what_supervises_nothing_is_refused(encoder):
    assert [reason for _, reason in examples(fitting(encoder), Dialogue((user("Who?"),)))] == ["nothing supervised"]


def test_a_long_document_is_cut_between_its_texts_and_ends_once(encoder):
    texts = ("A dog.", "It runs.", "A cat.", "It sleeps.")
    whole = document(A, texts[0], texts[1], B, texts[2], texts[3])
    most = length(document(A, texts[0], texts[1], goes_on=True), encoder)
    made = examples(fitting(encoder, max_length=max(most, length(document(B, *texts[2:]), encoder))), whole)
    assert [dialogue for dialogue, _ in made] == [
        document(A, "A dog.", "It runs.", goes_on=True),
        document(B, "A cat.", "It sleeps."),
    ]
    ends = [encoder.specials["</s>"] in example.input_ids for _, example in made]
    assert ends == [False, True]


def test_a_document_is_cut_by_its_distinct_images(encoder):
    whole = document(A, "1", SAME_AS_A, "2", B, "3", C, "4")
    assert [dialogue for dialogue, _ in examples(fitting(encoder, max_images=2), whole)] == [
        document(A, "1", SAME_AS_A, "2", B, "3", goes_on=True),
        document(C, "4"),
    ]


def test_a_cut_document_repeats_the_image_that_the_next_text_saw(encoder):
    whole = document(A, "1 dog", "2 dog", B, "3 dog", "4 dog", C)
    most = length(document(A, "1 dog", goes_on=True), encoder) + 1
    parts = [(A, "1 dog"), (A, "2 dog"), (B, "3 dog"), (B, "4 dog"), (C,)]
    assert examples(fitting(encoder, max_length=most), whole)[-1][1] == "nothing supervised"
    assert [dialogue for dialogue, _ in examples(fitting(encoder, max_length=most), whole)] == [
        document(*part, goes_on=part != (C,)) for part in parts
    ]


def test_images_after_the_last_text_never_cost_a_text(encoder):
    ((first, _), (last, kept), (images, lost)) = examples(fitting(encoder, max_images=1), document(A, "1", B, "2", C))
    assert (first, last, images) == (document(A, "1", goes_on=True), document(B, "2", goes_on=True), document(C))
    assert isinstance(kept, Example)
    assert lost == "nothing supervised"


def test_a_document_of_images_alone_teaches_nothing(encoder):
    ((_, error),) = fitting(encoder).fit([Piece(document(A, B), (0,))], same=same)
    assert str(error) == "nothing supervised: no text of it is trained on"


def test_a_text_too_long_alone_is_lost_alone(encoder):
    whole = document("A dog.", "A cat. " * 200, "It sleeps.")
    made = examples(fitting(encoder, max_length=60), whole)
    assert [example if isinstance(example, str) else "kept" for _, example in made] == ["kept", "too long", "kept"]
    assert [dialogue.goes_on for dialogue, _ in made] == [True, True, False]


@given(st.lists(WORDS | st.sampled_from((*IMAGES, SAME_AS_A)), min_size=1, max_size=14), st.integers(8, 60))
@settings(max_examples=80, deadline=None)
def test_parts_of_a_document_hold_all_of_it_and_are_as_full_as_they_can_be(encoder, parts, max_length):
    limits = fitting(encoder, max_length=max_length, max_images=2)
    whole = document(*parts)
    made = examples(limits, whole)
    parts, own = whole.turns[0].parts, []
    for dialogue, _ in made:
        held, start = dialogue.turns[0].parts, sum(map(len, own))
        if held != parts[start : start + len(held)]:
            assert held[0] == [part for part in parts[:start] if isinstance(part, Image)][-1]
            held = held[1:]
        assert held == parts[start : start + len(held)]
        own.append(held)
    assert sum(own, ()) == parts
    assert sight([dialogue for dialogue, _ in made]) == sight([whole])
    assert [dialogue.goes_on for dialogue, _ in made] == [True] * (len(made) - 1) + [False]
    for dialogue, example in made:
        if isinstance(example, str):
            assert sum(isinstance(part, str) for part in dialogue.turns[0].parts) <= 1
        else:
            assert dialogue.turns[0].text
            assert len(example) <= max_length
            assert len({same(image) for image in dialogue.images}) <= 2
            assert (example.input_ids == encoder.specials["<image>"]).sum() == len(dialogue.images)
            assert example.supervised > 0
    for number, ((first, one), (second, other)) in enumerate(pairwise(made), start=1):
        if isinstance(one, Example) and isinstance(other, Example):
            both = document(*first.turns[0].parts, *own[number], goes_on=second.goes_on)
            crowded = len({same(image) for image in both.images}) > 2
            assert crowded or length(both, encoder) > max_length


@given(
    st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(20, 80),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_dialogues_of_any_length_keep_every_exchange_and_their_image(encoder, exchanges, turns, max_length, ordered):
    dialogues = [ask(f"{number} {question}", answer) for number, (question, answer) in enumerate(exchanges)]
    made = examples(fitting(encoder, turns=turns, ordered=ordered, max_length=max_length), *dialogues)
    said = sorted((turn.role, turn.text) for dialogue, _ in made for turn in dialogue.turns)
    assert said == sorted((turn.role, turn.text) for dialogue in dialogues for turn in dialogue.turns)
    for dialogue, example in made:
        assert dialogue.images == dialogue.turns[0].images == (A,)
        assert len(dialogue.turns) <= 2 * turns
        if isinstance(example, str):
            assert (example, len(dialogue.turns)) == ("too long", 2)
        else:
            assert len(example) <= max_length
            assert (example.input_ids == encoder.specials["<image>"]).sum() == 1
            assert example.supervised > 0


@st.composite
def conversations(draw):
    """Dialogues with images anywhere, the texts all different; some open with the same images."""
    opening = draw(st.lists(st.sampled_from(IMAGES), max_size=3))
    numbers = iter(range(1000))
    dialogues = []
    for _ in range(draw(st.integers(1, 3))):
        turns = []
        for index in range(2 * draw(st.integers(1, 6))):
            mixed = draw(st.lists(st.sampled_from((*IMAGES, "", " ")), max_size=3)) if draw(st.booleans()) else []
            parts = [part if isinstance(part, Image) or part == " " else f"text {next(numbers)}" for part in mixed]
            turns.append((assistant if index % 2 else user)(*parts, f"text {next(numbers)}"))
        turns[0] = user(*opening, *turns[0].parts)
        system = [Turn("system", ("Be kind.",))] if draw(st.booleans()) else []
        dialogues.append(Dialogue((*system, *turns)))
    return dialogues


@given(conversations(), st.integers(1, 4), st.booleans(), st.integers(25, 90), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_dividing_and_joining_leave_every_text_the_image_that_it_saw(
    tiny_tokenizer, dialogues, turns, ordered, max_length, max_images
):
    limits = fitting(
        Encoder(tiny_tokenizer), turns=turns, ordered=ordered, max_length=max_length, max_images=max_images
    )
    groups = {}
    for number, dialogue in enumerate(dialogues):
        groups.setdefault(opening_images(dialogue) or number, []).append((number, dialogue))
    pieces = [piece for number, group in enumerate(groups.values()) for piece in limits.arrange(group, number=number)]
    fitted = list(limits.fit(pieces, same=same))
    spoken = [Dialogue(tuple(turn for turn in one.turns if turn.role != "system")) for one in dialogues]
    made = [Dialogue(tuple(turn for turn in piece.dialogue.turns if turn.role != "system")) for piece, _ in fitted]
    assert sight(made) == sight(spoken)
    for piece, example in fitted:
        if isinstance(example, Example):
            assert len(example) <= max_length
            assert len(set(piece.dialogue.images)) <= max_images


def made(tokens, supervised):
    labels = [1] * supervised + [-100] * (tokens - supervised)
    return Example(*(np.array(values) for values in ([1] * tokens, labels, [-1] * tokens)))


def test_a_dialogue_is_kept_if_any_of_its_turns_is():
    stats = SourceStats("x", read=3)
    outcomes, dialogue, error = Outcomes(stats), ask("1?", "one"), RecordError("too long", "9 tokens")
    outcomes.take(Piece(dialogue, (0, 1, 0)), made(5, 2))
    outcomes.take(Piece(dialogue, (0, 2)), error)
    outcomes.take(Piece(dialogue, (2,)), RecordError("too long", "8 tokens"))
    outcomes.count({0: "x:1", 1: "x:2", 2: "x:3"})
    assert (stats.kept, stats.examples, stats.tokens, stats.supervised_tokens) == (2, 1, 5, 2)
    assert stats.rejected == {"too long": 1}
    assert stats.parts_rejected == {"too long": 1}
    assert stats.first_rejected == {"too long": "x:1: 9 tokens"}
    assert stats.documents_cut == 0
    stats.to_json()


def test_documents_that_became_several_are_counted_unless_all_of_it_was_lost():
    stats, text = SourceStats("x", read=3), document("A dog.")
    outcomes, error = Outcomes(stats), RecordError("too long", "9 tokens")
    for origin, example in ((0, made(3, 2)), (1, made(3, 2)), (1, error), (2, error), (2, error)):
        outcomes.take(Piece(text, (origin,)), example)
    outcomes.count({0: "x:1", 1: "x:2", 2: "x:3"})
    assert (stats.kept, stats.documents_cut) == (2, 1)
    assert (stats.rejected, stats.parts_rejected) == ({"too long": 1}, {"too long": 1})


@pytest.mark.parametrize(
    ("source", "turns", "ordered"),
    [
        (make_source("messages"), None, True),
        (make_source("messages", turns=3, ordered=False), 3, False),
        (make_source("vqa", turns=2), 2, False),
        (make_source("vqa", turns=2, ordered=True), 2, True),
    ],
)
def test_a_source_that_is_silent_about_order_has_that_of_its_format(encoder, source, turns, ordered):
    made = splitter(source, encoder, Limits(9, 2), seed=4)
    assert made == Splitter(encoder, Limits(9, 2), turns, ordered, 4)
