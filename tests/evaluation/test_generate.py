"""Generation uses the template of training, and a batch changes no answer."""

from dataclasses import dataclass, replace

import PIL.Image
import pytest
import torch

from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, Image, assistant, user
from finetune.data.images import Preprocessing
from finetune.data.tokenize import tokenize
from finetune.evaluation.evaluate import draw_questions, eval_loss, swap_images
from finetune.evaluation.generate import Answer, Assistant, features_by_image, generate, make_inputs
from modeling import loading
from modeling.adapters import attach, open_adapter, save_adapter
from modeling.generation import greedy
from modeling.packed_forward import packed_loss


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


def test_generate_padded_equals_one_by_one(asked, prompts):
    """A batch with padding answers as one by one."""
    together = generate(asked, prompts, max_new_tokens=8, batch_size=4)
    alone = [generate(asked, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in together}) > 1


def test_generate_equals_stock_processor(asked, idefics, prompts):
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


@pytest.mark.parametrize("lora", [False, True])
def test_generate_equals_stock_generate(asked, prompts, lora):
    """A batch is answered as the stock generate does with images projected once."""
    torch.manual_seed(0)  # with others the two best tokens may be one rounding apart
    with torch.no_grad():  # a copy of `</s>`'s row, it would be as good as that at every step
        asked.model.lm_head.additional_fc.weight[2].normal_(std=0.1)
    if lora:
        wrapped = attach(asked.model, {"cross_attention": "lora", "decoder": "lora"}, lora={"r": 2}, base="")
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        asked = Assistant(wrapped.eval(), asked.tokenizer, asked.preprocessing)
    rendered = [render(prompt) for prompt in prompts]
    assert {len(text.images) for text in rendered} == {0, 1, 2}
    inputs = make_inputs(asked, [tokenize(text, asked.tokenizer) for text in rendered], rendered)
    config = loading.generation_config(asked.tokenizer)
    config.max_new_tokens = 10
    expected = asked.idefics.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :].tolist()
    modules, calls = list(asked.model.named_modules()), []
    blocks = asked.idefics.model.gated_cross_attn_layers
    for block in blocks:
        block.cross_attn.k_proj.register_forward_hook(lambda *_: calls.append("k"))
        block.cross_attn.v_proj.register_forward_hook(lambda *_: calls.append("v"))
    assert greedy(asked.idefics, inputs, config) == expected
    assert sorted(calls) == ["k", "k"] * len(blocks) + ["v", "v"] * len(blocks)  # all with the prompt, then the last
    assert list(asked.model.named_modules()) == modules
    assert [answer.text for answer in generate(asked, prompts, max_new_tokens=10)] == [
        asked.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected
    ]


def test_generate_stopped(asked, prompts, monkeypatch):
    """An answer that stops is cut there and one that does not says so."""
    end, dog = asked.tokenizer.convert_tokens_to_ids("<end_of_utterance>"), asked.tokenizer("dog")["input_ids"][1:]

    monkeypatch.setattr("finetune.evaluation.generate.greedy", lambda *_: [[*dog, end, *dog], dog])
    assert generate(asked, prompts[1:3], max_new_tokens=3) == [Answer("dog", True), Answer("dog", False)]


def test_generate_writes_no_image_token(asked, prompts):
    """Image tokens are never written."""
    head = asked.model.lm_head.additional_fc.weight
    with torch.no_grad():
        head[:2] = 50 * torch.sign(head[:2])  # the image tokens would win every time
    for answer in generate(asked, prompts, max_new_tokens=6):
        assert "<image>" not in answer.text
        assert "fake_token" not in answer.text


def test_draw_questions(prompts):
    """Questions are every answered turn in its context."""
    dialogue = Dialogue((user("a?"), assistant("A"), user("b?"), assistant("B", references=("C", "B"))))
    questions = draw_questions([dialogue], limit=None, seed=0)
    assert [(len(prompt.turns), references) for prompt, references in questions] == [(1, ("A",)), (3, ("C", "B"))]
    many = [Dialogue((user(f"{n}?"), assistant(str(n)))) for n in range(50)]
    drawn = [references for _, references in draw_questions(many, limit=5, seed=0)]
    assert drawn == [references for _, references in draw_questions(many, limit=5, seed=0)]
    assert len(set(drawn)) == 5
    assert drawn != [references for _, references in draw_questions(many, limit=5, seed=1)]


def test_swap_images(make_rows):
    """Every image is exchanged for another everywhere the same way."""
    rows = make_rows()
    order = sorted({index for row in rows.rows for index in row.examples})
    dialogues = [
        Dialogue((user(*[rows.images[image] for image in rows.image_ids[index]], "which?"), assistant("red")))
        for index in order
    ]
    questions = draw_questions(dialogues, limit=None, seed=0)
    blind, swapped = swap_images(rows, dialogues, questions, seed=0)
    assert all(ours != theirs for ours, theirs in zip(rows.images, blind.images, strict=True))
    assert set(rows.images) == set(blind.images)
    for (before, given), (after, kept), ids in zip(questions, swapped, rows.image_ids, strict=True):
        assert given == kept
        assert [turn.text for turn in before.turns] == [turn.text for turn in after.turns]
        assert list(after.images) == [blind.images[image] for image in ids]


@dataclass(frozen=True)
class Numbered:
    """Cached features: of each image its own number."""

    numbers: tuple[int, ...]

    def __call__(self, images):
        return torch.tensor([self.numbers[image] for image in images])

    def exchanged(self, other):
        return Numbered(tuple(self.numbers[other.get(image, image)] for image in range(len(self.numbers))))


def test_swap_images_cached_features(make_rows):
    """Cached features are exchanged with their images."""
    rows = make_rows()
    rows = replace(rows, features=Numbered(tuple(range(len(rows.images)))))
    dialogues = [Dialogue((user(*[rows.images[image] for image in ids], "which?"),)) for ids in rows.image_ids]
    blind, _ = swap_images(rows, dialogues, [], seed=0)
    shown = sorted({image for images in rows.image_ids for image in images})
    seen = blind.features(shown).tolist()
    assert all(number != image for number, image in zip(seen, shown, strict=True))
    assert [rows.images[number] for number in seen] == [blind.images[image] for image in shown]
    assert blind.at(0)["image_features"].tolist() != rows.at(0)["image_features"].tolist()
    looked_up = features_by_image(blind)([rows.images[image] for image in shown])
    assert looked_up.tolist() == shown


def test_eval_loss_however_packed(asked, make_rows):
    """The held out loss weighs every token the same however rows are packed."""
    loss, supervised = eval_loss(asked, make_rows(row_tokens=160))
    other, same = eval_loss(asked, make_rows(row_tokens=512))
    assert supervised == same
    assert loss == pytest.approx(other, rel=1e-5)  # fp32 sums in another order
    rows = make_rows(row_tokens=160)
    losses = []
    for row in rows.rows:
        batch = rows.batch(row)
        loss_sum = packed_loss(asked.model, batch, config=asked.model.config)
        losses.append(loss_sum.detach() / (batch["labels"] != -100).sum())
    assert float(torch.stack(losses).mean()) != pytest.approx(loss, rel=1e-4)  # a mean of packs is another figure


@pytest.mark.parametrize("tower", ["vision", "resampler", "decoder", "embeddings_and_head"])
def test_generate_full_tower_on_bf16_base(base_folder, make_rows, prompts, tmp_path, tower):
    """A bf16 base whose tower was trained in full can be asked."""
    modes = {tower: "full", "gates": "full", "added_tokens": "full", "cross_attention": "lora"}
    model = loading.load(str(base_folder), dtype=torch.bfloat16)
    attached = attach(model.model, modes, lora={"r": 2}, base="")
    save_adapter(attached, tmp_path)
    plain = loading.load(str(base_folder), dtype=torch.bfloat16).model
    opened = open_adapter(plain, tmp_path)
    asked = Assistant(opened, model.tokenizer, Preprocessing.of(model.processor.image_processor))
    assert len(generate(asked, prompts, max_new_tokens=4)) == len(prompts)
    untouched = Assistant(
        loading.load(str(base_folder), dtype=torch.bfloat16).model, asked.tokenizer, asked.preprocessing
    )
    assert eval_loss(asked, make_rows()) == eval_loss(untouched, make_rows())  # nothing was trained yet
