"""What a dialogue is, and the reason by which everything else is refused."""

import pickle
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, user
from modeling.errors import UserError

CAT, DOG = Image(Path("cat.jpg")), Image(Path("dog.jpg"))


def document(*parts):
    return Turn("document", parts)


def system(*parts):
    return Turn("system", parts)


@pytest.mark.parametrize(
    "turns",
    [
        (user("Who?"), assistant("Me.")),
        (user("Who?"), assistant("Me."), user("Why?"), assistant("So.")),
        (user("Who?"),),
        (user(CAT),),
        (user("Who?"), assistant("Me."), user("Why?")),
        (system("Be kind."), user("Who?"), assistant("Me.")),
        (user("Who?"), assistant("Me.", CAT)),
        (document("A text."),),
        (document(CAT, "A text.", DOG),),
        (document(CAT),),
    ],
)
def test_a_conversation_or_a_document_is_accepted(turns):
    assert Dialogue(turns).turns == turns


@pytest.mark.parametrize(
    ("reason", "turns"),
    [
        ("no turns", ()),
        ("roles do not alternate", (assistant("Me."),)),
        ("roles do not alternate", (assistant("Me."), user("Who?"))),
        ("roles do not alternate", (user("Who?"), user("Who?"))),
        ("roles do not alternate", (user("Who?"), assistant("Me."), assistant("Me."))),
        ("roles do not alternate", (system("Be kind."),)),
        ("roles do not alternate", (system("Be kind."), assistant("Me."))),
        ("roles do not alternate", (system("Be kind."), system("Be kind."), user("Who?"))),
        ("roles do not alternate", (user("Who?"), system("Be kind."), assistant("Me."))),
        ("roles do not alternate", (document("A text."), document("A text."))),
        ("roles do not alternate", (document("A text."), user("Who?"))),
        ("roles do not alternate", (user("Who?"), document("A text."))),
        ("roles do not alternate", (Turn("tool", ("42",)),)),
        ("empty answer", (user("Who?"), assistant())),
        ("empty answer", (user("Who?"), assistant(""))),
        ("empty answer", (user("Who?"), assistant(" \n\t\u00a0"))),
        ("empty answer", (user("Who?"), assistant("\u200b\ufeff \x00"))),
        ("empty answer", (user("Who?"), assistant(CAT))),
        ("empty answer", (user("Who?"), assistant("Me."), user("Who?"), assistant(" "))),
        ("empty question", (user(), assistant("Me."))),
        ("empty question", (user("", " \n"), assistant("Me."))),
        ("empty question", (user("Who?"), assistant("Me."), user(""))),
        ("empty system message", (system(" "), user("Who?"))),
        ("empty system message", (system(CAT), user("Who?"))),
        ("empty document", (document(),)),
        ("empty document", (document(" ", "\n"),)),
        ("text is not Unicode", (user("Who \ud800?"), assistant("Me."))),
        ("text is not Unicode", (user("Who?"), assistant("Me.", "\udfff"))),
        ("text is not Unicode", (document(CAT, "\udc80"),)),
    ],
)
def test_anything_else_is_refused_with_its_reason(reason, turns):
    with pytest.raises(RecordError) as caught:
        Dialogue(turns)
    assert caught.value.reason == reason


def test_a_refusal_says_where_and_what_was_got():
    with pytest.raises(RecordError) as caught:
        Dialogue((user("Who?"), assistant("Me."), user("Who?"), assistant("")))
    assert str(caught.value) == "empty answer: turn 4"
    with pytest.raises(RecordError) as caught:
        Dialogue((user("Who?"),) * 7)
    assert caught.value.detail == (
        "expected [system,] user, assistant, user, ...; got user, user, user, user, user, user, ..."
    )


def test_a_record_error_is_a_user_error():
    assert isinstance(RecordError("too long"), UserError)
    assert str(RecordError("too long")) == "too long"
    assert str(RecordError("too long", "9 tokens")) == "too long: 9 tokens"


def test_a_dialogue_that_ends_with_the_user_is_a_prompt():
    assert Dialogue((user("Who?"),)).is_prompt
    assert not Dialogue((user("Who?"), assistant("Me."))).is_prompt
    assert not Dialogue((document("A text."),)).is_prompt


def test_only_a_document_is_a_document():
    assert Dialogue((document("A text."),)).is_document
    assert not Dialogue((system("Be kind."), user("Who?"), assistant("Me."))).is_document


def test_images_come_in_the_order_they_are_shown_and_as_often():
    dialogue = Dialogue((user(DOG, "Who?", CAT), assistant("Both."), user(DOG)))
    assert dialogue.images == (DOG, CAT, DOG)
    assert dialogue.turns[0].images == (DOG, CAT)


def test_two_references_to_one_file_are_equal():
    assert Image(Path("cat.jpg")) == CAT
    assert Image(b"cat") == Image(b"cat")
    assert CAT != DOG
    assert len({CAT, Image(Path("cat.jpg")), DOG, Image(b"cat"), Image(b"cat")}) == 3


def test_a_picture_in_memory_is_equal_to_itself_alone():
    picture = PIL.Image.new("RGB", (2, 2))
    assert len({Image(picture), Image(picture), Image(picture.copy())}) == 2


def test_text_leaves_images_and_blanks_out():
    assert user(" Who ", CAT, "", "is it?\n").text == "Who is it?"
    assert user(CAT).text == ""


def test_prompts_are_everything_before_each_answer_with_its_references():
    first, second = user(CAT, "Who?"), user("Why?")
    answer = assistant("A cat.", references=("A cat.", "Tom."))
    dialogue = Dialogue((system("Be kind."), first, answer, second, assistant(" So. ")))
    assert list(dialogue.prompts()) == [
        (Dialogue((system("Be kind."), first)), ("A cat.", "Tom.")),
        (Dialogue((system("Be kind."), first, answer, second)), ("So.",)),
    ]


def test_an_answer_that_is_not_supervised_is_no_prompt_of_its_own():
    turns = (user("Who?"), replace(assistant("You."), supervised=False), user("Who?"), assistant("Me."))
    assert list(Dialogue(turns).prompts()) == [(Dialogue(turns[:3]), ("Me.",))]


def test_a_document_has_no_prompts():
    assert list(Dialogue((document("A text."),)).prompts()) == []


def test_a_document_that_was_cut_goes_on():
    cut = Dialogue((document("A text."),), goes_on=True)
    assert (cut.is_document, cut.is_prompt, cut.goes_on) == (True, False, True)
    assert cut != Dialogue((document("A text."),))


@pytest.mark.parametrize("error", [RecordError("too long", "9 tokens"), RecordError("too long")])
def test_a_record_error_keeps_reason_and_detail_on_its_way_between_processes(error):
    sent = pickle.loads(pickle.dumps(error))
    assert (type(sent), sent.reason, sent.detail) == (RecordError, error.reason, error.detail)
    assert str(sent) == str(error)
