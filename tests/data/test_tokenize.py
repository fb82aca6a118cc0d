"""Ids, labels and the image each token sees: by hand, against transformers' processor, and for any text at all."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.chat_template import Special, render
from finetune.data.conversation import Dialogue, Image, RecordError, Turn, assistant, is_blank, user
from finetune.data.tokenize import SPECIALS, Encoder, tokenize, tokenize_all
from modeling import tiny

A, B = Image(Path("a.jpg")), Image(Path("b.jpg"))
FAKE, EOU = "<fake_token_around_image>", "<end_of_utterance>"


@pytest.fixture(scope="session", params=["llama_tokenizer", "tiny_tokenizer"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def document(*parts):
    return Turn("document", parts)


def supervision(turns, tokenizer):
    """Tokens, "·" where none is supervised: (all, the supervised)."""
    example = tokenize(render(Dialogue(turns)), tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    supervised = [token if label != -100 else "·" for token, label in zip(tokens, example.labels, strict=True)]
    assert example.supervised == (example.labels != -100).sum()
    assert all(label in (-100, id_) for label, id_ in zip(example.labels, example.input_ids, strict=True))
    return " ".join(tokens), " ".join(supervised)


def test_a_conversation_supervises_its_answers_and_their_ends(llama_tokenizer):
    tokens, supervised = supervision(
        (user(A, "Who?"), assistant("Me."), user("Why?"), assistant("So.")), llama_tokenizer
    )
    assert tokens == (
        f"<s> ▁User : {FAKE} <image> {FAKE} ▁Who ? {EOU} ▁ <0x0A> Ass istant : ▁Me . {EOU}"
        f" ▁ <0x0A> User : ▁Why ? {EOU} ▁ <0x0A> Ass istant : ▁So . {EOU} </s>"
    )
    assert supervised == f"{'· ' * 14}▁Me . {EOU} {'· ' * 12}▁So . {EOU} ·"


def test_a_document_supervises_its_texts_and_its_end(llama_tokenizer):
    tokens, supervised = supervision((document("A dog.", "More.", A, B, "A cat."),), llama_tokenizer)
    assert tokens == (f"<s> ▁A ▁dog . <0x0A> <0x0A> More . {FAKE} <image> {FAKE} <image> {FAKE} ▁A ▁cat . </s>")
    assert supervised == "· ▁A ▁dog . <0x0A> <0x0A> More . · · · · · ▁A ▁cat . </s>"


def test_a_system_message_and_an_image_in_an_answer_are_not_supervised(llama_tokenizer):
    turns = (Turn("system", ("Be kind.",)), user("Who?"), assistant("Me", A, "here."))
    tokens, supervised = supervision(turns, llama_tokenizer)
    assert tokens == (
        f"<s> ▁Be ▁kind . <0x0A> User : ▁Who ? {EOU} ▁ <0x0A> Ass istant : ▁Me {FAKE} <image> {FAKE} ▁here . {EOU} </s>"
    )
    assert supervised == f"{'· ' * 15}▁Me · · · ▁here . {EOU} ·"


def test_an_answer_of_several_bytes_a_letter_is_supervised_whole(tiny_tokenizer):
    tokens, supervised = supervision((user("hi"), assistant("é!")), tiny_tokenizer)
    assert tokens == f"<s> ▁ U s e r : ▁ h i {EOU} ▁ <0x0A> A s s i s t a n t : ▁ <0xC3> <0xA9> <0x21> {EOU} </s>"
    assert supervised == f"{'· ' * 23}▁ <0xC3> <0xA9> <0x21> {EOU} ·"


def test_a_prompt_supervises_nothing(tokenizer):
    assert tokenize(render(Dialogue((user(A, "Who?"),))), tokenizer).supervised == 0


def test_each_token_sees_the_last_image_before_it(llama_tokenizer):
    example = tokenize(
        render(Dialogue((user("Or", A, B, "?"), assistant("No."), user(A), assistant("So.")))), llama_tokenizer
    )
    first = [-1, -1, -1, -1, -1, 0, 0, 1, 1, 1, 1]  # <s> ▁User : ▁Or fake <image> fake <image> fake ▁? eou
    answer = [1] * 8  # ▁ \n Ass istant : ▁No . eou
    second = [1] * 5 + [2] * 3  # ▁ \n User : fake <image> fake eou
    assert example.image_index.tolist() == first + answer + second + [2] * 9  # and </s>
    assert len(example) == 36
    assert {array.dtype.name for array in (example.input_ids, example.labels, example.image_index)} == {"int64"}


PARITY = {
    "the card's own": (
        (
            user("What is in this image?", A),
            assistant("This picture depicts Idefix, the dog of Obelix. Idefix is running on the ground."),
            user(B, "And who is that?"),
        ),
        [
            "User: What is in this image?",
            A,
            "<end_of_utterance>",
            "\nAssistant: This picture depicts Idefix, the dog of Obelix. Idefix is running on the ground."
            "<end_of_utterance>",
            "\nUser:",
            B,
            "And who is that?<end_of_utterance>",
            "\nAssistant:",
        ],
    ),
    "images in late turns": (
        (user("Hi."), assistant("Hello."), user(A, B, "Same?"), assistant("No."), user(B), assistant("É, çà!")),
        [
            "User: Hi.<end_of_utterance>\nAssistant: Hello.<end_of_utterance>\nUser:",
            A,
            B,
            "Same?<end_of_utterance>\nAssistant: No.<end_of_utterance>\nUser:",
            B,
            "<end_of_utterance>\nAssistant: É, çà!<end_of_utterance>",
        ],
    ),
    "several images in one turn": (
        (user(A, "is like", B, A), assistant("Yes.\n\nIt is.")),
        ["User:", A, "is like", B, A, "<end_of_utterance>\nAssistant: Yes.\n\nIt is.<end_of_utterance>"],
    ),
    "no image": (
        (user("2 + 2 = ?"), assistant("4  of course.")),
        ["User: 2 + 2 = ?<end_of_utterance>", "\nAssistant: 4  of course.<end_of_utterance>"],
    ),
    "document": ((document(A, "A dog.", B, "A cat 猫."),), [A, "A dog.", B, "A cat 猫."]),
    "system": (
        (Turn("system", ("Be kind.",)), user(A, "Who?"), assistant("Me.")),
        ["Be kind.\nUser:", A, "Who?<end_of_utterance>", "\nAssistant: Me.<end_of_utterance>"],
    ),
}


@pytest.mark.parametrize(("turns", "segments"), PARITY.values(), ids=PARITY)
def test_parity_with_the_processor_of_transformers(turns, segments, tokenizer):
    dialogue = Dialogue(turns)
    pictures = {A: PIL.Image.new("RGB", (9, 7), "red"), B: PIL.Image.new("RGB", (5, 8), "blue")}
    expected = tiny.build_processor(tokenizer, image_size=64)(
        text=[[segment if isinstance(segment, str) else pictures[segment] for segment in segments]],
        add_end_of_utterance_token=False,
        add_eos_token=not dialogue.is_prompt,
        return_tensors="pt",
    )
    example = tokenize(render(dialogue), tokenizer)
    assert example.input_ids.tolist() == expected["input_ids"][0].tolist()
    seen = [row.index(1) if 1 in row else -1 for row in expected["image_attention_mask"][0].int().tolist()]
    assert example.image_index.tolist() == seen
    assert max(seen) == len(dialogue.images) - 1


LITERALS = (
    *SPECIALS,
    "<unk>",
    "<0x0A>",
    "▁",
    " ",
    "\n",
    "User:",
    "\nAssistant:",
    "\u00a0",
    "\u200b",
    "é",
    "e\u0301",
    "👩‍👧",
)
WRITTEN = st.lists(st.text(max_size=8) | st.sampled_from(LITERALS), min_size=1, max_size=5).map("".join)
TEXTS = WRITTEN.filter(lambda text: not is_blank(text))
PARTS = st.lists(TEXTS | st.sampled_from((A, B)), min_size=1, max_size=4)
EXCHANGES = st.lists(st.tuples(PARTS, TEXTS), min_size=1, max_size=3)


def conversation(exchanges):
    turns = [turn for parts, answer in exchanges for turn in (user(*parts), assistant(answer))]
    return Dialogue(tuple(turns))


@given(EXCHANGES)
@settings(max_examples=60, deadline=None)
def test_the_ids_of_a_prompt_are_a_prefix_of_the_ids_of_its_dialogue(tokenizer, exchanges):
    dialogue = conversation(exchanges)
    ids = tokenize(render(dialogue), tokenizer).input_ids.tolist()
    prompts = [tokenize(render(prompt), tokenizer).input_ids.tolist() for prompt, _ in dialogue.prompts()]
    assert len(prompts) == len(exchanges)
    for prompt in prompts:
        assert len(prompt) < len(ids)
        assert ids[: len(prompt)] == prompt


@given(EXCHANGES)
@settings(max_examples=60, deadline=None)
def test_supervision_starts_where_each_prompt_ends_and_stops_at_its_end_of_utterance(tokenizer, exchanges):
    dialogue = conversation(exchanges)
    example = tokenize(render(dialogue), tokenizer)
    ends = [index for index, id_ in enumerate(example.input_ids) if id_ == tokenizer.convert_tokens_to_ids(EOU)]
    expected = [False] * len(example)
    for (prompt, _), end in zip(dialogue.prompts(), ends[1::2], strict=True):
        start = len(tokenize(render(prompt), tokenizer))
        expected[start : end + 1] = [True] * (end + 1 - start)
    assert (example.labels != -100).tolist() == expected


@given(st.lists(TEXTS | st.sampled_from((A, B)), min_size=1, max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_text_becomes_a_special_token(tokenizer, parts, as_document):
    dialogue = Dialogue((document(*parts),) if as_document else (user(*parts), assistant("<image>")))
    rendered = render(dialogue)
    ids = tokenize(rendered, tokenizer).input_ids.tolist()
    for name in SPECIALS:
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == rendered.pieces.count(
            Special(name)
        ) + rendered.pieces.count(Special(name, supervised=True))
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == len(dialogue.images)


@pytest.mark.parametrize("literal", SPECIALS)
def test_a_special_token_written_in_a_text_is_read_as_its_letters(literal, tokenizer):
    ids = tokenize(render(Dialogue((user("x"), assistant(f"Say {literal} now")))), tokenizer)
    answer = [id_ for id_, label in zip(ids.input_ids, ids.labels, strict=True) if label != -100][:-1]
    assert tokenizer.decode(answer) in (f"Say {literal} now", f" Say {literal} now")
    assert len(answer) > 4


class StubBackend:
    """Gives every text the ids it was told, as the fast tokenizer inside a transformers one does."""

    def __init__(self, ids):
        self.ids = ids

    def no_padding(self):
        pass

    no_truncation = no_padding

    def encode_batch_fast(self, texts, *, add_special_tokens):
        assert not add_special_tokens
        return [SimpleNamespace(ids=self.ids(text)) for text in texts]


class StubTokenizer(SimpleNamespace):
    unk_token_id = 0

    def convert_tokens_to_ids(self, names):
        return [10 + SPECIALS.index(name) for name in names]


def stub(ids):
    return StubTokenizer(backend_tokenizer=StubBackend(ids))


def test_a_token_across_the_colon_is_refused():
    tokenizer = stub(lambda text: [1, 2] if text == "\nAssistant:" else [1, 3, 4])  # 3: ": M"
    with pytest.raises(RecordError) as caught:
        tokenize(render(Dialogue((user("Me?"), assistant("Me.")))), tokenizer)
    assert str(caught.value) == (
        "answer not apart from its prompt: one token spans the end of '\\nAssistant:' in '\\nAssistant: Me.'"
    )


def test_a_tokenizer_that_makes_specials_of_text_is_refused():
    tokenizer = stub(lambda text: [1, 13])
    with pytest.raises(RecordError) as caught:
        tokenize(render(Dialogue((document("<image>"),))), tokenizer)
    assert caught.value.reason == "text became a special token"


def test_what_cannot_be_tokenised_stands_among_what_can(tokenizer):
    encoder = Encoder(tokenizer)
    encoder.forbidden |= {tokenizer.encode("@", add_special_tokens=False)[-1]}
    rendered = [render(Dialogue((document(text),))) for text in ("A dog.", "@", "A cat.")]
    first, refused, last = tokenize_all(rendered, encoder)
    assert refused.reason == "text became a special token"
    assert first.input_ids.tolist() == tokenize(rendered[0], tokenizer).input_ids.tolist()
    assert last.input_ids.tolist() == tokenize(rendered[2], tokenizer).input_ids.tolist()
    assert tokenize_all([], encoder) == []


def test_settings_that_other_calls_leave_in_the_tokenizer_change_nothing(tokenizer):
    encoder, rendered = Encoder(tokenizer), render(Dialogue((user("Who is <image>?"), assistant("A long answer."))))
    fingerprint, ids = encoder.fingerprint, tokenize(rendered, tokenizer).input_ids.tolist()
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3, split_special_tokens=False)
    assert Encoder(tokenizer).fingerprint == fingerprint
    assert tokenize(rendered, tokenizer).input_ids.tolist() == ids


def test_an_encoder_is_the_same_in_another_process(tokenizer):
    encoder, texts = Encoder(tokenizer), ["Who is <image>?", "é 猫"]
    sent = pickle.loads(pickle.dumps(encoder))
    assert sent.fingerprint == encoder.fingerprint
    assert sent.encode(texts) == encoder.encode(texts)


def test_each_vocabulary_has_its_fingerprint(llama_tokenizer, tiny_tokenizer):
    assert Encoder(llama_tokenizer).fingerprint != Encoder(tiny_tokenizer).fingerprint
