"""Generation uses the template of training, and a batch changes no answer."""

import PIL.Image
import pytest
import torch

from finetune.data.dialogue import Dialogue, Image, assistant, user
from finetune.data.images import Preprocessing
from finetune.data.template import render
from finetune.evaluate import draw_questions, evaluate, held_out_loss
from finetune.generate import Answer, Assistant, generate
from modeling.forward import packed_loss


@pytest.fixture
def asked(idefics):
    return Assistant(idefics.model, idefics.tokenizer, Preprocessing.of(idefics.processor.image_processor))


@pytest.fixture(scope="module")
def prompts():
    red, blue = (Image(PIL.Image.new("RGB", (9, 9), color)) for color in ("red", "blue"))
    return [
        Dialogue((user(red, "what color is it?"),)),
        Dialogue((user("hello"),)),
        Dialogue((user("look:", red), assistant("red"), user(blue, "and this? and what would you say it shows?"))),
        Dialogue((user(blue, red, "both"),)),
    ]


def test_a_batch_with_padding_answers_as_one_by_one(asked, prompts):
    together = generate(asked, prompts, max_new_tokens=8, batch_size=4)
    alone = [generate(asked, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in together}) > 1


def test_it_is_the_stock_processor_and_model(asked, idefics, prompts):
    """The same prompt through transformers' own processor, pixel values and generate."""
    image = prompts[0].images[0].source
    segments = ["User:", image, "what color is it?<end_of_utterance>", "\nAssistant:"]
    inputs = idefics.processor(text=[segments], add_end_of_utterance_token=False, return_tensors="pt")
    output = idefics.model.generate(**inputs, max_new_tokens=8)
    text = idefics.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert generate(asked, prompts[:1], max_new_tokens=8)[0].text == text
    assert render(prompts[0]).text == idefics.tokenizer.decode(inputs["input_ids"][0]).replace("<s> ", "<s>").replace(
        "> ", ">"
    )


def test_an_answer_that_stops_is_cut_there_and_one_that_does_not_says_so(asked, prompts, monkeypatch):
    end, dog = asked.tokenizer.convert_tokens_to_ids(["<end_of_utterance>", "▁dog"])

    def scripted(assistant, inputs, max_new_tokens):
        return [[dog, end, dog], [dog, dog, dog]]

    monkeypatch.setattr("finetune.generate._continue", scripted)
    assert generate(asked, prompts[1:3], max_new_tokens=3) == [Answer("dog", True), Answer("dog dog dog", False)]


def test_image_tokens_are_never_written(asked, prompts):
    head = asked.model.lm_head.additional_fc.weight
    with torch.no_grad():
        head[:2] = 50 * torch.sign(head[:2])  # the image tokens would win every time
    for answer in generate(asked, prompts, max_new_tokens=6):
        assert "<image>" not in answer.text
        assert "fake_token" not in answer.text


def test_questions_are_every_answered_turn_in_its_context(prompts):
    dialogue = Dialogue((user("a?"), assistant("A"), user("b?"), assistant("B")))
    assert [(len(prompt.turns), reference) for prompt, reference in draw_questions([dialogue], limit=None, seed=0)] == [
        (1, "A"),
        (3, "B"),
    ]
    many = [Dialogue((user(f"{n}?"), assistant(str(n)))) for n in range(50)]
    drawn = [reference for _, reference in draw_questions(many, limit=5, seed=0)]
    assert drawn == [reference for _, reference in draw_questions(many, limit=5, seed=0)]
    assert len(set(drawn)) == 5
    assert drawn != [reference for _, reference in draw_questions(many, limit=5, seed=1)]


def test_scores_count_exact_open_yes_no_and_stopped(asked, make_rows, monkeypatch, tmp_path):
    answers = {"a?": ("yes", True), "b?": ("no", True), "c?": ("dog", False), "d?": ("Dog", True)}

    def scripted(assistant, prompts, **options):
        return [Answer(*answers[prompt.turns[-1].text]) for prompt in prompts]

    monkeypatch.setattr("finetune.evaluate.generate", scripted)
    references = {"a?": "yes", "b?": "yes", "c?": "dog", "d?": "dog"}
    questions = [(Dialogue((user(question),)), reference) for question, reference in references.items()]
    file = tmp_path / "predictions.jsonl"
    scores = evaluate(asked, make_rows(), questions, max_new_tokens=4, batch_size=2, predictions=file)
    assert (scores.exact, scores.exact_yes_no, scores.exact_open, scores.stopped) == (0.5, 0.5, 0.5, 0.75)
    assert file.read_text().splitlines()[2] == (
        '{"images": [], "question": "c?", "reference": "dog", "text": "dog", "stopped": false}'
    )


def test_the_held_out_loss_weighs_every_token_the_same_however_rows_are_packed(asked, make_rows):
    loss, supervised = held_out_loss(asked, make_rows(row_tokens=160))
    other, same = held_out_loss(asked, make_rows(row_tokens=512))
    assert supervised == same
    assert loss == pytest.approx(other, rel=1e-5)  # fp32 sums in another order
    rows = make_rows(row_tokens=160)
    losses = []
    for row in rows.rows:
        batch = rows.batch(row)
        loss_sum = packed_loss(asked.model, batch, config=asked.model.config)
        losses.append(loss_sum.detach() / (batch["labels"] != -100).sum())
    assert float(torch.stack(losses).mean()) != pytest.approx(loss, rel=1e-4)  # a mean of packs is another figure
