"""The text that the model reads, written out by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from finetune.data.chat_template import Special, Text, render
from finetune.data.conversation import Dialogue, Image, Turn, assistant, user

A, B = Image(Path("a.jpg")), Image(Path("b.jpg"))
PICTURE = "<fake_token_around_image><image><fake_token_around_image>"


def system(*parts):
    return Turn("system", parts)


def document(*parts):
    return Turn("document", parts)


CONVERSATIONS = {
    "one turn": (
        (user("Who?"), assistant("Me.")),
        "<s>User: Who?<end_of_utterance>\nAssistant: Me.<end_of_utterance></s>",
    ),
    "the canonical text": (
        (user(A, "What is it?"), assistant("A dog."), user("Which breed?"), assistant("A puli.")),
        "<s>User:<fake_token_around_image><image><fake_token_around_image>What is it?<end_of_utterance>\n"
        "Assistant: A dog.<end_of_utterance>\n"
        "User: Which breed?<end_of_utterance>\n"
        "Assistant: A puli.<end_of_utterance></s>",
    ),
    "text, then image": (
        (user("What is it?", A), assistant("A dog.")),
        f"<s>User: What is it?{PICTURE}<end_of_utterance>\nAssistant: A dog.<end_of_utterance></s>",
    ),
    "text, image, text": (
        (user("This", A, "is what?"), assistant("A dog.")),
        f"<s>User: This{PICTURE}is what?<end_of_utterance>\nAssistant: A dog.<end_of_utterance></s>",
    ),
    "neighbouring images share the token between them": (
        (user(A, B, "Same?"), assistant("No.")),
        "<s>User:<fake_token_around_image><image><fake_token_around_image><image><fake_token_around_image>Same?"
        "<end_of_utterance>\nAssistant: No.<end_of_utterance></s>",
    ),
    "a blank between images changes nothing": (
        (user(A, " \n", B, "Same?"), assistant("No.")),
        "<s>User:<fake_token_around_image><image><fake_token_around_image><image><fake_token_around_image>Same?"
        "<end_of_utterance>\nAssistant: No.<end_of_utterance></s>",
    ),
    "images with text between share nothing": (
        (user(A, "or", B), assistant("The second.")),
        f"<s>User:{PICTURE}or{PICTURE}<end_of_utterance>\nAssistant: The second.<end_of_utterance></s>",
    ),
    "image in a late turn": (
        (user("Hi."), assistant("Hello."), user(A, "Who?"), assistant("A dog.")),
        "<s>User: Hi.<end_of_utterance>\nAssistant: Hello.<end_of_utterance>\n"
        f"User:{PICTURE}Who?<end_of_utterance>\nAssistant: A dog.<end_of_utterance></s>",
    ),
    "an image without words": (
        (user(A), assistant("A dog.")),
        f"<s>User:{PICTURE}<end_of_utterance>\nAssistant: A dog.<end_of_utterance></s>",
    ),
    "image in an answer": (
        (user("Show it."), assistant("Here:", A), user("And?"), assistant(B, "there.")),
        f"<s>User: Show it.<end_of_utterance>\nAssistant: Here:{PICTURE}<end_of_utterance>\n"
        f"User: And?<end_of_utterance>\nAssistant:{PICTURE}there.<end_of_utterance></s>",
    ),
    "system message on a line of its own": (
        (system("Be kind."), user(A, "Who?"), assistant("Me.")),
        f"<s>Be kind.\nUser:{PICTURE}Who?<end_of_utterance>\nAssistant: Me.<end_of_utterance></s>",
    ),
    "texts are stripped, lines inside them kept": (
        (user("  Who\n\nis it? \n"), assistant("\n Me,\n  I say.\t")),
        "<s>User: Who\n\nis it?<end_of_utterance>\nAssistant: Me,\n  I say.<end_of_utterance></s>",
    ),
    "several texts of one turn stand on lines": (
        (system("Be kind.", "Be brief."), user("Who?", "Say.", ""), assistant("Me.", "I.")),
        "<s>Be kind.\nBe brief.\nUser: Who?\nSay.<end_of_utterance>\nAssistant: Me.\nI.<end_of_utterance></s>",
    ),
    "a prompt ends at the colon": (
        (user(A, "Who?"),),
        f"<s>User:{PICTURE}Who?<end_of_utterance>\nAssistant:",
    ),
    "a late prompt ends at the colon": (
        (user("Who?"), assistant("Me."), user("Why?")),
        "<s>User: Who?<end_of_utterance>\nAssistant: Me.<end_of_utterance>\nUser: Why?<end_of_utterance>\nAssistant:",
    ),
    "document": (
        (document("A dog.", "It runs.", A, "Then a cat.", B),),
        f"<s>A dog.\n\nIt runs.{PICTURE}Then a cat.{PICTURE}</s>",
    ),
    "document that opens with an image": ((document(A, "A dog."),), f"<s>{PICTURE}A dog.</s>"),
}


@pytest.mark.parametrize(("turns", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_text(turns, expected):
    assert render(Dialogue(turns)).text == expected


def test_images_are_listed_in_the_order_of_their_tokens():
    rendered = render(Dialogue((user(B, A, "Same?"), assistant("No."), user(B), assistant("Again."))))
    assert rendered.images == (B, A, B)
    assert [piece.name for piece in rendered.pieces if isinstance(piece, Special)].count("<image>") == 3


def test_pieces_and_supervision_of_a_conversation():
    assert render(Dialogue((user(A, "Who?"), assistant("Me.")))).pieces == (
        Special("<s>"),
        Text("User:"),
        Special("<fake_token_around_image>"),
        Special("<image>"),
        Special("<fake_token_around_image>"),
        Text("Who?"),
        Special("<end_of_utterance>"),
        Text("\nAssistant: Me.", supervised_from=11),  # " Me."
        Special("<end_of_utterance>", supervised=True),
        Special("</s>"),
    )


def test_an_answer_that_is_not_supervised_is_context():
    turns = (user("Who?"), replace(assistant("Me."), supervised=False), user("Why?"), assistant("So."))
    assert render(Dialogue(turns)).pieces == (
        Special("<s>"),
        Text("User: Who?"),
        Special("<end_of_utterance>"),
        Text("\nAssistant: Me."),
        Special("<end_of_utterance>"),
        Text("\nUser: Why?"),
        Special("<end_of_utterance>"),
        Text("\nAssistant: So.", supervised_from=11),
        Special("<end_of_utterance>", supervised=True),
        Special("</s>"),
    )


def test_pieces_and_supervision_of_a_document():
    assert render(Dialogue((document("A dog.", "It runs.", A, "A cat."),))).pieces == (
        Special("<s>"),
        Text("A dog.\n\nIt runs.", supervised_from=0),
        Special("<fake_token_around_image>"),
        Special("<image>"),
        Special("<fake_token_around_image>"),
        Text("A cat.", supervised_from=0),
        Special("</s>", supervised=True),
    )


def test_a_document_that_goes_on_has_no_end():
    rendered = render(Dialogue((document(A, "A dog."),), goes_on=True))
    assert rendered.text == f"<s>{PICTURE}A dog."
    assert rendered.pieces[-1] == Text("A dog.", supervised_from=0)


def test_a_prompt_supervises_nothing():
    pieces = render(Dialogue((user("Who?"),))).pieces
    assert [piece for piece in pieces if getattr(piece, "supervised", False)] == []
    assert {piece.supervised_from for piece in pieces if isinstance(piece, Text)} == {None}
    assert pieces[-1] == Text("\nAssistant:")


def test_special_tokens_written_in_a_text_stay_in_its_piece():
    pieces = render(Dialogue((user("Is <image> </s>?"), assistant("No.")))).pieces
    assert pieces[1] == Text("User: Is <image> </s>?")
