"""Dialogues of the wanted size: every question and answer once, what it is about in front of it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.data.chunking import (
    Piece,
    bound,
    by_last_appearance,
    divide,
    document_of,
    document_part,
    document_units,
    exchanges,
    fill,
    join,
    opening_images,
    without_images,
)
from finetune.data.conversation import Dialogue, Image, Turn, assistant, user

A, B, C = (Image(Path(f"{name}.jpg")) for name in "abc")
SYSTEM = Turn("system", ("Be kind.",))


def talk(*texts):
    """question, answer, question, answer, ..."""
    return tuple((assistant if index % 2 else user)(text) for index, text in enumerate(texts))


def about(images, *texts):
    """The same, opened by images."""
    first, *rest = talk(*texts)
    return Dialogue((user(*images, *first.parts), *rest))


@pytest.mark.parametrize(
    ("images", "turns"),
    [
        ((A,), (user(A, "Who?"), assistant("Me."))),
        ((A, B), (user(A, B, "Who?"), assistant("Me."), user("Why?"), assistant("So."))),
        ((), talk("Who?", "Me.")),
        (None, (user("Who?", A), assistant("Me."))),
        (None, (user(A, "or", B, "?"), assistant("Me."))),
        (None, (user(A), assistant("Me."))),
        (None, (user(A, "Who?"), assistant("Me."), user(B, "Who?"), assistant("You."))),
        (None, (user(A, "Who?"), assistant("Me.", B))),
        (None, (user(A, "Who?"), assistant("Me."), user(A), assistant("You."))),
        (None, (SYSTEM, user(A, "Who?"), assistant("Me."))),
        (None, (Turn("document", (A, "A dog.")),)),
    ],
)
def test_a_dialogue_opens_with_its_images_when_all_stand_before_its_first_words(images, turns):
    assert opening_images(Dialogue(turns)) == images


def test_exchanges_leave_out_what_stands_in_front_of_the_whole():
    dialogue = about((A, B), "1?", "one", "2?", "two")
    assert exchanges(dialogue, 7) == [(user("1?"), assistant("one"), 7), (user("2?"), assistant("two"), 7)]
    late = Dialogue((SYSTEM, user("1?", A), assistant("one")))
    assert exchanges(late, 0) == [(user("1?", A), assistant("one"), 0)]


def test_joined_questions_have_their_images_once_in_front():
    dialogues = [(4, about((A,), "1?", "one", "2?", "two")), (9, about((A,), "3?", "three"))]
    assert join(dialogues, turns=2, rng=None) == [
        Piece(about((A,), "1?", "one", "2?", "two"), (4, 4)),
        Piece(about((A,), "3?", "three"), (9,)),
    ]
    assert join(dialogues, turns=3, rng=None) == [
        Piece(about((A,), "1?", "one", "2?", "two", "3?", "three"), (4, 4, 9))
    ]


def test_references_stay_with_their_answer():
    dialogue = Dialogue((user(A, "1?"), assistant("one", references=("one", "1"))))
    (piece,) = join([(0, dialogue), (1, about((A,), "2?", "two"))], turns=2, rng=None)
    assert [turn.references for turn in piece.dialogue.turns] == [(), ("one", "1"), (), ()]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
def test_joining_keeps_every_exchange_with_its_origin_whatever_its_place(counts, turns, shown, seed):
    names = [[f"{origin}.{number}" for number in range(count)] for origin, count in enumerate(counts)]
    images = (A, B, C)[:shown]
    group = [
        (origin, about(images, *(text for name in own for text in (f"{name}?", name))))
        for origin, own in enumerate(names)
    ]
    pieces = join(group, turns=turns, rng=np.random.default_rng(seed))
    said = [
        (question.text, answer.text, str(origin))
        for piece in pieces
        for question, answer, origin in zip(
            piece.dialogue.turns[::2], piece.dialogue.turns[1::2], piece.origins, strict=True
        )
    ]
    assert sorted(said) == sorted((f"{name}?", name, name[0]) for own in names for name in own)
    assert [len(piece.origins) for piece in pieces[:-1]] == [turns] * (len(pieces) - 1)
    assert 1 <= len(pieces[-1].origins) <= turns
    assert all(piece.dialogue.images == piece.dialogue.turns[0].parts[:-1] == images for piece in pieces)
    assert pieces == join(group, turns=turns, rng=np.random.default_rng(seed))


def test_the_order_of_joined_questions_comes_from_the_generator():
    group = [(number, about((A,), f"{number}?", "x")) for number in range(6)]
    orders = {join(group, turns=6, rng=np.random.default_rng(seed))[0].origins for seed in range(5)}
    assert len(orders) > 2
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders)


def test_a_long_dialogue_is_divided_in_order_and_repeats_what_it_needs():
    dialogue = Dialogue((SYSTEM, user(A, "1?"), assistant("one"), *talk("2?", "two", "3?", "three")))
    assert bound(5, dialogue, turns=2) == [
        Piece(Dialogue((SYSTEM, user(A, "1?"), assistant("one"), *talk("2?", "two"))), (5, 5)),
        Piece(Dialogue((SYSTEM, user(A, "3?"), assistant("three"))), (5,)),
    ]
    assert bound(5, dialogue, turns=3) == [Piece(dialogue, (5, 5, 5))]


@pytest.mark.parametrize(
    ("turns", "places", "parts"),
    [
        (
            (user("1?", A), assistant("one", B), user(C, A, "2?"), assistant("two"), user("3?", B), assistant("three")),
            [1, 2],
            [
                (user("1?", A), assistant("one", B)),
                (user(B, C, A, "2?"), assistant("two")),
                (user(B, C, A, "3?", B), assistant("three")),
            ],
        ),
        (
            (
                user(A, "0"),
                assistant("a0"),
                user(B, "1"),
                assistant("a1"),
                user(A, "2"),
                assistant("a2"),
                *talk("3", "a3"),
            ),
            [3],
            [
                (user(A, "0"), assistant("a0"), user(B, "1"), assistant("a1"), user(A, "2"), assistant("a2")),
                (user(B, A, "3"), assistant("a3")),
            ],
        ),
        (
            (
                user(A, "0"),
                assistant("a0"),
                user(B, "1"),
                assistant("a1"),
                user("compare with", B, "2"),
                assistant("a2"),
            ),
            [2],
            [
                (user(A, "0"), assistant("a0"), user(B, "1"), assistant("a1")),
                (user(A, B, "compare with", B, "2"), assistant("a2")),
            ],
        ),
        (
            (user(A, B, A, "0"), assistant("a0"), *talk("1", "a1")),
            [1],
            [(user(A, B, A, "0"), assistant("a0")), (user(B, A, "1"), assistant("a1"))],
        ),
        (
            (user(A, "0"), assistant("a0"), user(" ", B, "1"), assistant("a1"), user(A), assistant("a2")),
            [1, 2],
            [
                (user(A, "0"), assistant("a0")),
                (user(A, " ", B, "1"), assistant("a1")),
                (user(B, A), assistant("a2")),
            ],
        ),
        (
            (Turn("system", (C, "Be kind.")), *talk("0", "a0"), user(A, "1"), assistant("a1"), *talk("2", "a2")),
            [1, 2],
            [
                (Turn("system", (C, "Be kind.")), *talk("0", "a0")),
                (Turn("system", (C, "Be kind.")), user(A, "1"), assistant("a1")),
                (Turn("system", (C, "Be kind.")), user(A, "2"), assistant("a2")),
            ],
        ),
    ],
    ids=["assistant-shows", "first-shown-again", "words-before-image", "opening-twice", "blank-and-wordless", "system"],
)
def test_dividing_shows_each_part_what_was_shown_before_the_last_one_last(turns, places, parts):
    assert divide(Dialogue(turns), places) == [Dialogue(part) for part in parts]


def test_images_by_last_appearance():
    assert by_last_appearance([A, B, A]) == (B, A)
    assert by_last_appearance([A, B, C, B, B]) == (A, C, B)
    assert by_last_appearance([]) == ()


@given(st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_dividing_keeps_the_order_of_turns(count, turns, system):
    texts = [f"{number}{kind}" for number in range(count) for kind in "?!"]
    dialogue = Dialogue((*((SYSTEM,) if system else ()), *about((A,), *texts).turns))
    pieces = bound(0, dialogue, turns=turns)
    assert [turn.text for piece in pieces for turn in piece.dialogue.turns if turn.role != "system"] == texts
    assert all((piece.dialogue.turns[0] == SYSTEM) == system for piece in pieces)
    assert [len(piece.origins) for piece in pieces] == [turns] * (count // turns) + [count % turns] * (
        count % turns > 0
    )
    assert all(piece.dialogue.images == (A,) for piece in pieces)


def test_halves_share_the_questions_and_the_image():
    piece = Piece(about((A,), "1?", "one", "2?", "two", "3?", "three"), (4, 4, 9))
    assert piece.halves() == (
        Piece(about((A,), "1?", "one"), (4,)),
        Piece(about((A,), "2?", "two", "3?", "three"), (4, 9)),
    )
    assert Piece(about((A,), "1?", "one"), (4,)).halves() is None


@pytest.mark.parametrize(
    ("parts", "units"),
    [
        (("One.", "Two."), [("One.",), ("Two.",)]),
        ((A, "One.", B, C, "Two."), [(A, "One."), (B, C, "Two.")]),
        (("One.", A), [("One.",), (A,)]),
        (("One.", "Two.", " ", A), [("One.",), ("Two.",), (" ", A)]),
        (("One.", "Two.", " "), [("One.",), ("Two.", " ")]),
        ((" ", A, "One."), [(" ", A, "One.")]),
        ((A, B), [(A, B)]),
    ],
)
def test_each_text_of_a_document_takes_the_images_before_it(parts, units):
    assert document_units(Dialogue((Turn("document", parts),))) == units


@pytest.mark.parametrize(
    ("start", "stop", "parts"),
    [
        (0, 2, (A, B, "1", "2")),
        (1, 2, (B, "2")),
        (1, 3, (B, "2", " ", C, "3")),
        (2, 4, (" ", C, "3", "4")),
        (3, 5, (C, "4", A)),
        (4, 5, (A,)),
    ],
)
def test_a_part_of_a_document_repeats_the_image_that_its_first_text_saw(start, stop, parts):
    document = Dialogue((Turn("document", (A, B, "1", "2", " ", C, "3", "4", A)),))
    units = document_units(document)
    expected = Dialogue((Turn("document", parts),), goes_on=stop < 5)
    assert document_part(document, units, start, stop) == expected


@pytest.mark.parametrize(
    ("parts", "lost", "documents"),
    [
        ((A, "a", B, "b"), [False, True], [((A, "a"), True), (("b",), False)]),
        ((A, "a", B, "b"), [True, False], [(("a", B, "b"), False)]),
        ((A, B, "b", "still b"), [False, True], [((A,), True), (("b", "still b"), False)]),
        ((A, "a", B, C, "c"), [False, True, False], [((A, "a", C, "c"), False)]),
        ((A, "a", B, " "), [False, True], [((A, "a", " "), False)]),
        (
            (A, "a", B, "b", C, "c", A, "d"),
            [False, True, False, True],
            [((A, "a"), True), (("b", C, "c"), True), (("d",), False)],
        ),
    ],
)
def test_a_text_that_saw_a_lost_image_sees_none(parts, lost, documents):
    expected = [Dialogue((Turn("document", left),), goes_on) for left, goes_on in documents]
    assert without_images(Dialogue((Turn("document", parts),)), lost) == expected


def test_a_part_of_a_document_goes_on_or_ends():
    units = [(A, "One."), ("Two.",)]
    assert document_of(units, goes_on=True) == Dialogue((Turn("document", (A, "One.", "Two.")),), goes_on=True)
    assert document_of(units[1:], goes_on=False) == Dialogue((Turn("document", ("Two.",)),))


@pytest.mark.parametrize(
    ("sizes", "most", "parts"),
    [
        ((3, 3, 3), 7, [(0, 2), (2, 3)]),
        ((3, 3, 3), 9, [(0, 3)]),
        ((9, 1, 9, 9), 7, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ((1, 1, 9, 1, 1), 7, [(0, 2), (2, 3), (3, 5)]),
        ((5,), 1, [(0, 1)]),
        ((), 1, []),
    ],
)
def test_parts_are_filled_one_after_the_other(sizes, most, parts):
    assert fill(sizes, most=most, fits=lambda start, stop: sum(sizes[start:stop]) <= most) == parts


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), max_size=12),
    st.integers(1, 20),
)
def test_a_wrong_guess_does_not_change_the_parts(units, most):
    sizes, guesses = [size for size, _ in units], [guess for _, guess in units]

    def fits(start, stop):
        return sum(sizes[start:stop]) <= most

    parts = fill(guesses, most=most, fits=fits)
    assert parts == fill(sizes, most=most, fits=fits)
    assert [index for part in parts for index in range(*part)] == list(range(len(sizes)))
    assert all(fits(*part) or part[1] == part[0] + 1 for part in parts)
    assert not any(fits(start, stop + 1) for start, stop in parts[:-1])
