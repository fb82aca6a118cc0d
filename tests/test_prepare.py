"""Every record accounted for; questions joined; no image on both sides of a split."""

import json
from collections import Counter

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data import prepare as module
from finetune.data.dialogue import Dialogue, Image, RecordError, assistant, user
from finetune.data.prepare import Account, Prepared, Source, prepare, read_dialogues, require_examples, split_by_image
from finetune.data.template import render
from finetune.data.tokens import Example
from modeling.errors import UserError


def record(*images, question="Who?", answer="Me."):
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Four readable images, two of them with the same content, and two broken ones."""
    folder = tmp_path_factory.mktemp("dataset")
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        PIL.Image.new("RGB", (8, 8), color).save(folder / f"{name}.png")
    (folder / "same-as-a.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "empty.png").write_bytes(b"")
    return folder


def write(folder, records):
    path = folder / "data.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return path


def run(folder, records, tokenizer, *, limit=None, turns=1, max_length=200, max_images=2, seed=0):
    source = Source("messages", write(folder, records), limit=limit, turns=turns)
    prepared, (account,) = prepare([source], tokenizer, max_length=max_length, max_images=max_images, seed=seed)
    return prepared, account


KINDS = {
    "good": (record("a.png"), None),
    "good, no image": (record(), None),
    "good, the same content": (record("same-as-a.png", "a.png", "b.png", question="Same?"), None),
    "good, no words": (record("b.png", question=""), None),
    "too long": (record(question="Who? " * 60), "too long"),
    "too many images": (record("a.png", "b.png", "c.png"), "too many images"),
    "missing image": (record("none.png"), "missing image"),
    "corrupt image": (record("broken.png"), "corrupt image"),
    "empty image": (record("b.png", "empty.png"), "corrupt image"),
    "outside": (record("../a.png"), "image outside the image root"),
    "URL": (record("https://example.org/a.png"), "image is a URL"),
    "empty answer": (record(answer=" "), "empty answer"),
    "prompt": ({"messages": [{"role": "user", "content": "Who?"}]}, "no answer to the last question"),
    "broken line": ('{"messages": [', "not JSON"),
    "list": ("[]", "not an object"),
    "no messages": ({"text": "Who?"}, "no messages"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_reason_is_counted_with_the_place_of_the_first(kind, folder, tiny_tokenizer):
    line, reason = KINDS[kind]
    prepared, account = run(folder, [record("a.png"), line, line], tiny_tokenizer)
    assert account.read == 3
    assert account.rejected == ({reason: 2} if reason else {})
    assert account.kept == len(prepared) == (1 if reason else 3)
    assert [place.partition(":")[2].partition(":")[0] for place in account.first_rejected.values()] == ["2"] * bool(
        reason
    )
    assert list(account.first_rejected) == list(account.rejected)


@given(
    st.lists(st.sampled_from(sorted(KINDS)), max_size=12),
    st.none() | st.integers(0, 12),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_read_is_kept_and_rejected_and_not_taken(folder, tiny_tokenizer, kinds, limit, turns):
    prepared, account = run(folder, [KINDS[kind][0] for kind in kinds], tiny_tokenizer, limit=limit, turns=turns)
    taken = [KINDS[kind][1] for kind in kinds[:limit]]
    assert account.read == len(kinds)
    assert account.not_taken == len(kinds) - len(taken)
    assert account.kept == taken.count(None)
    assert account.rejected == Counter(reason for reason in taken if reason)
    assert account.read == account.kept + sum(account.rejected.values()) + account.not_taken
    assert account.kept == sum(dialogue.records for dialogue in prepared.dialogues)
    assert account.to_json()["rejected"] == dict(account.rejected)


def test_what_is_counted_of_what_is_kept(folder, tiny_tokenizer):
    records = [record("a.png"), record("same-as-a.png", "b.png"), record(), record("none.png"), "[]"]
    prepared, account = run(folder, records, tiny_tokenizer)
    assert (account.dialogues, account.examples, account.images) == (4, 3, 2)
    assert account.tokens == sum(prepared.lengths) == sum(len(example.input_ids) for example in prepared.examples)
    assert account.supervised_tokens == sum((example.labels != -100).sum() for example in prepared.examples)
    assert account.source.endswith("data.jsonl[train]")


def test_images_of_equal_content_are_one(folder, tiny_tokenizer):
    prepared, _ = run(folder, [record("a.png"), record("same-as-a.png", "b.png", "a.png"), record()], tiny_tokenizer)
    assert prepared.image_ids == [(0,), (0, 1, 0), ()]
    assert prepared.image_counts == [1, 2, 0]
    assert prepared.images == [Image(folder / "a.png"), Image(folder / "b.png")]


def test_the_length_limit_is_exact(folder, tiny_tokenizer):
    (length,) = run(folder, [record("a.png")], tiny_tokenizer)[0].lengths
    assert len(run(folder, [record("a.png")], tiny_tokenizer, max_length=length)[0]) == 1
    _, account = run(folder, [record("a.png")], tiny_tokenizer, max_length=length - 1)
    assert account.first_rejected == {"too long": f"data.jsonl:1: {length} tokens, max_length is {length - 1}"}


def test_a_file_is_decoded_once(folder, tiny_tokenizer, monkeypatch):
    opened = []
    original = module.open_image
    monkeypatch.setattr(module, "open_image", lambda image: (opened.append(image.source.name), original(image))[1])
    run(folder, [record("a.png"), record("broken.png")] * 3, tiny_tokenizer)
    assert opened == ["a.png", "broken.png"]


def test_sources_keep_their_order_and_sizes(folder, tiny_tokenizer):
    first = Source("messages", write(folder, [record("a.png"), "[]", record("b.png")]))
    nothing, few = (Source("messages", first.path, limit=limit) for limit in (0, 1))
    prepared, accounts = prepare([first, nothing, few], tiny_tokenizer, max_length=200, max_images=2, seed=0)
    assert prepared.sizes == [2, 0, 1]
    assert [account.kept for account in accounts] == [2, 0, 1]
    assert prepared.image_ids == [(0,), (1,), (0,)]
    assert prepared.select([1, 2]).sizes == [1, 0, 1]
    assert prepared.select([1, 2]).image_ids == [(1,), (0,)]
    assert prepared.select([]).sizes == [0, 0, 0]


def texts(folder, records, *, turns, seed=0):
    source = Source("messages", write(folder, records), turns=turns)
    return {render(dialogue).text: dialogue.records for _, dialogue in read_dialogues(source, Account("x"), seed=seed)}


PICTURE = "<fake_token_around_image><image><fake_token_around_image>"


def test_questions_about_one_image_become_turns_of_one_dialogue(folder):
    records = [record("a.png", question="1?", answer="one"), record("a.png", question="2?", answer="two")]
    first = f"<s>User:{PICTURE}1?<end_of_utterance>\nAssistant: one<end_of_utterance>"
    second = f"<s>User:{PICTURE}2?<end_of_utterance>\nAssistant: two<end_of_utterance>"
    either = (
        {f"{first}\nUser: 2?<end_of_utterance>\nAssistant: two<end_of_utterance></s>": 2},
        {f"{second}\nUser: 1?<end_of_utterance>\nAssistant: one<end_of_utterance></s>": 2},
    )
    seen = [texts(folder, records, turns=2, seed=seed) for seed in range(12)]
    assert all(joined in either for joined in seen)
    assert all(joined in seen for joined in either)
    assert texts(folder, records, turns=2, seed=3) == seen[3]
    assert texts(folder, records, turns=1) == {f"{first}</s>": 1, f"{second}</s>": 1}


def test_joining_loses_no_question(folder):
    records = [record("a.png", question=f"{number}?") for number in range(7)] + [record("b.png", question="b?")]
    joined = texts(folder, records, turns=3)
    assert sorted(joined.values()) == [1, 1, 3, 3]
    assert all(text.count("<image>") == 1 for text in joined)
    assert all(sum(f"{name}?" in text for text in joined) == 1 for name in (*range(7), "b"))


def test_dialogues_of_another_form_are_not_joined(folder):
    late = record("a.png")
    late["messages"][0]["content"].reverse()
    longer = {"messages": record("a.png")["messages"] * 2}
    system = {"messages": [{"role": "system", "content": "Be kind."}, *record("a.png")["messages"]]}
    others = [late, longer, system, record(), record("a.png", "b.png"), record("a.png", question="")]
    source = Source("messages", write(folder, others * 2), turns=5)
    dialogues = [dialogue for _, dialogue in read_dialogues(source, Account("x"), seed=0)]
    assert [dialogue.records for dialogue in dialogues] == [1] * 12


def made(*image_ids, sizes=None):
    """A prepared set of which only the images matter."""
    row = Example(*(np.zeros(1, dtype=np.int64) for _ in range(3)))
    dialogues = [Dialogue((user(f"{index}?"), assistant("x"))) for index in range(len(image_ids))]
    return Prepared([row] * len(image_ids), dialogues, list(image_ids), [], sizes or [len(image_ids)])


def sides(prepared, fraction, seed):
    return [[turn.turns[0].text for turn in side.dialogues] for side in split_by_image(prepared, fraction, seed=seed)]


@given(
    st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), min_size=1, max_size=15),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_no_image_is_on_both_sides_and_no_example_is_lost(image_ids, fraction, seed):
    prepared = made(*image_ids)
    wanted = max(1, round(fraction * len(image_ids))) if fraction else 0
    lonely = [ids for ids in image_ids if sum(bool(set(ids) & set(other)) for other in image_ids) < 2]
    try:
        training, held = split_by_image(prepared, fraction, seed=seed)
    except UserError:
        assert wanted == len(image_ids) or not lonely  # one that shares no image can always be held out
        return
    assert not {i for ids in training.image_ids for i in ids} & {i for ids in held.image_ids for i in ids}
    assert sorted(training.image_ids + held.image_ids) == sorted(image_ids)
    assert (training.sizes, held.sizes) == ([len(training)], [len(held)])
    assert bool(wanted) <= len(held) <= wanted
    assert sides(prepared, fraction, seed) == sides(prepared, fraction, seed)


@pytest.mark.parametrize("seed", range(6))
def test_examples_chained_by_their_images_stay_together(seed):
    prepared = made((0, 1), (5,), (1, 2), (), (3, 2), (6,), sizes=[3, 3])
    training, held = split_by_image(prepared, 0.3, seed=seed)
    chain = {(0, 1), (1, 2), (3, 2)}
    assert chain <= set(training.image_ids) or chain <= set(held.image_ids)
    assert 1 <= len(held) <= 2
    assert [a + b for a, b in zip(training.sizes, held.sizes, strict=True)] == [3, 3]


def test_a_split_is_about_its_fraction_and_depends_on_its_seed():
    prepared = made(*[(image,) for image in range(40)])
    assert [len(side) for side in split_by_image(prepared, 0.25, seed=0)] == [30, 10]
    assert [len(side) for side in split_by_image(prepared, 0.0, seed=0)] == [40, 0]
    assert sides(prepared, 0.25, 0) != sides(prepared, 0.25, 1)


def test_nothing_to_train_on_is_an_error_with_its_reasons(folder, tiny_tokenizer):
    prepared, account = run(folder, ["[]", record("none.png"), "[]"], tiny_tokenizer)
    with pytest.raises(UserError) as caught:
        require_examples(prepared, [account])
    where = account.source
    missing = folder.resolve() / "none.png"
    assert str(caught.value).splitlines() == [
        "no dialogue is left:",
        f"  {where}: 2 x not an object (first: data.jsonl:1: expected a JSON object, got list)",
        f"  {where}: 1 x missing image (first: data.jsonl:2: {missing})",
    ]


def test_empty_sources_are_an_error_that_says_so():
    with pytest.raises(UserError, match="the sources are empty"):
        require_examples(made(), [Account("x")])
    require_examples(made(()), [Account("x")])


def test_a_lost_record_is_never_reported():
    account = Account("x", read=2, kept=1)
    with pytest.raises(AssertionError, match="records lost"):
        account.to_json()
    account.reject("data.jsonl:1", RecordError("too long"))
    assert account.to_json()["first_rejected"] == {"too long": "data.jsonl:1"}
