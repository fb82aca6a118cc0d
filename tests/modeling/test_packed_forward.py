"""The heart: a packed row equals its dialogues run one by one through the stock model, loss and every gradient."""

import copy
import math
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import IdeficsForVisionText2Text

from finetune.data.chat_template import render
from finetune.data.collate import collate, stack_pixels
from finetune.data.conversation import Dialogue, Image, Turn, assistant, user
from finetune.data.tokenize import tokenize
from modeling import loading
from modeling.device import CHOICES
from modeling.layout import Layout, image_runs, supervised_positions
from modeling.packed_forward import forward_arguments, head_loss, image_features, packed_loss, token_losses
from modeling.towers import tower_of

A, B, C, D = (Image(bytes([number])) for number in range(4))

PLAIN = Dialogue((user("Is there a dog?"), assistant("No, a ball.")))
ONE = Dialogue((user(A, "What is this?"), assistant("A small dog.")))
SEVERAL = Dialogue((user(A, B, "Which is red?"), assistant("The ball."), user(C, "And here?"), assistant("The fox.")))
LATE = Dialogue((user("Hello?"), assistant("Hello to you."), user("See", B, "this?"), assistant("A red ball.")))
DOCUMENT = Dialogue((Turn("document", ("The quick brown fox", A, "jumps over", C, "the lazy dog.")),))
SHORTEST = Dialogue((Turn("document", ("a",)),))
IMAGE_ALONE = Dialogue((Turn("document", (A,)),))
IMAGE_LAST = Dialogue((Turn("document", ("The quick brown fox", B)),))

ROWS = {
    "one dialogue": (ONE,),
    "no image": (PLAIN, PLAIN),
    "several images": (SEVERAL,),
    "image in a late turn": (LATE, ONE),
    "text before the first image": (DOCUMENT,),
    "shared image": (ONE, ONE, Dialogue((user(A, B, "Which?"), assistant("Both.")))),
    "shortest": (SHORTEST,),
    "an image and no text": (IMAGE_ALONE,),
    "image at the very end": (SHORTEST, IMAGE_LAST),
    "mixture": (PLAIN, SEVERAL, DOCUMENT, LATE, PLAIN, ONE),
}

# fp32 sums in another order: about 1e-7 a term, over some hundred terms.
RELATIVE = 1e-5


def pixels(number, size=64):
    return np.random.default_rng(number).standard_normal((3, size, size)).astype(np.float32)


def show(pixels, **options):
    return lambda images: {"pixel_values": stack_pixels(images, pixels, size=(64, 64), **options)}


def lay(dialogues, tokenizer, pixels=pixels, **options):
    """(examples, images of each, the packed batch)."""
    rendered = [render(dialogue) for dialogue in dialogues]
    examples = [tokenize(text, tokenizer) for text in rendered]
    ids = [[image.source[0] for image in text.images] for text in rendered]
    return examples, ids, collate(examples, ids, show=show(pixels, **options), filler=0)


@pytest.fixture(scope="module")
def pair(base_folder):
    """(ours with packed attention, the stock model with sdpa), all parameters trained, gates open and uneven."""
    ours = loading.load(str(base_folder))
    for number, block in enumerate(ours.model.model.gated_cross_attn_layers):
        block.alpha_cross_attn.data.fill_(0.4 + number)
        block.alpha_dense.data.fill_(-0.3 - number)
    stock = IdeficsForVisionText2Text.from_pretrained(base_folder, attn_implementation="sdpa").eval()
    loading.extend_vocabulary(stock)
    stock.load_state_dict(ours.model.state_dict())
    return ours, stock.requires_grad_(True), ours.model.requires_grad_(True)


def one_by_one(stock, examples, ids):
    """Sum of losses by the plain definition: padless batch of one, dense image mask, whole decoupled vocabulary."""
    total = torch.zeros((), dtype=torch.float64)
    for example, images in zip(examples, ids, strict=True):
        length, count = len(example), max(1, len(images))
        shown = np.stack([pixels(image) for image in images] or [np.zeros((3, 64, 64), np.float32)])
        mask = torch.zeros(1, length, count, dtype=torch.long)
        for token, image in enumerate(example.image_index):
            if image >= 0:
                mask[0, token, image] = 1
        logits = stock(
            input_ids=torch.from_numpy(example.input_ids)[None],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            pixel_values=torch.from_numpy(shown)[None],
            image_attention_mask=mask,
            use_cache=False,
        ).logits[0]
        assert logits.shape == (length, 303)
        for token in range(length - 1):
            target = example.labels[token + 1]
            if target != -100:
                row = logits[token].double()
                total = total + row.exp().sum().log() - row[target]
    return total


def losses_by_dialogue(model, batch):
    """The token losses of each sequence of a row."""
    positions, starts = batch["supervised_positions"], torch.tensor(batch["layout"].sequence_starts)
    with torch.no_grad():
        logits = model(**forward_arguments(batch, model.config), logits_to_keep=positions).logits[0]
    sequence = torch.bucketize(positions, starts, right=True) - 1
    losses = token_losses(logits, batch["targets"])
    return [losses[sequence == number] for number in range(len(starts) - 1)]


@pytest.mark.parametrize("name", ROWS)
def test_packed_equals_one_by_one(pair, name):
    """Loss and gradients equal the dialogues one by one."""
    idefics, stock, model = pair
    examples, ids, batch = lay(ROWS[name], idefics.tokenizer)
    stock.zero_grad()
    model.zero_grad()
    expected = one_by_one(stock, examples, ids)
    loss = packed_loss(model, batch, config=model.config)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=RELATIVE)
    expected.backward()
    loss.backward()
    largest = max(p.grad.norm() for p in stock.parameters() if p.grad is not None)
    compared = 0
    for (parameter, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        got, want = (torch.zeros_like(p) if p.grad is None else p.grad for p in (ours, theirs))
        # Some gradients are zero but for rounding (a key's bias moves all scores alike): hence a floor.
        floor = 1e-3 * largest
        assert (got - want).norm() <= RELATIVE * max(want.norm(), floor), parameter
        compared += bool(want.any())
    # The stand-in has 177 tensors. The vision tower's last norm (2) is unused, and 4 biases of keys may be just zero.
    # Without images: the decoder's 73, the gated blocks' 2 x 5 behind the image gate, 4 of embeddings and head; of them
    # the embedding of the added tokens only where the text has one.
    assert compared in (range(171, 176) if any(ids) else [86 + (name != "shortest")])


def test_gradients_without_images(pair):
    """Every parameter of decoder and cross attention has a gradient without images."""
    idefics, _, model = pair
    model.zero_grad()
    packed_loss(model, lay((PLAIN,), idefics.tokenizer)[2], config=model.config).backward()
    missing = {tower_of(name) for name, parameter in model.named_parameters() if parameter.grad is None}
    assert missing <= {"vision", "resampler"}


@pytest.mark.parametrize("tower", ["vision", "resampler"])
def test_image_towers_gradient_of_blank_image(pair, tower):
    """A tower of the image side has a gradient in a row with only a blank image."""
    idefics, _, model = pair
    model.zero_grad()
    batch = lay((PLAIN,), idefics.tokenizer, blank=True)[2]
    loss = packed_loss(model, batch, config=model.config)
    loss.backward()
    # the last norm of the vision tower plays no part in IDEFICS
    gradients = [p.grad for n, p in model.named_parameters() if tower_of(n) == tower and "post_" not in n]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    without = packed_loss(model, lay((PLAIN,), idefics.tokenizer)[2], config=model.config)
    assert torch.equal(loss, without)


def test_cached_features_equal_pixels(pair):
    """Cached features give the loss of the pixels."""
    idefics, _, model = pair
    batch = lay(ROWS["mixture"], idefics.tokenizer)[2]
    with torch.no_grad():
        features = image_features(model, batch["pixel_values"])
        live = packed_loss(model, batch, config=model.config)
        cached = {key: value for key, value in batch.items() if key != "pixel_values"} | {"image_features": features}
        assert features.shape == (3, 8, 96)
        assert torch.equal(packed_loss(model, cached, config=model.config), live)


def test_forward_arguments(pair):
    """Pinned because the loss hardly shows them: RoPE is relative, and what sees no image is zero already."""
    batch = {
        "input_ids": torch.tensor([[1, 5, 2, 1, 301]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "image_index": torch.tensor([[-1, -1, -1, -1, 0]]),
        "layout": Layout((0, 3, 5), ((4, 5, 0),)),
        "pixel_values": torch.zeros(1, 3, 64, 64),
    }
    arguments = forward_arguments(batch, pair[2].config)
    assert arguments["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert arguments["image_attention_mask"].tolist() == [[[0], [0], [0], [0], [1]]]
    assert (arguments["sequence_starts"], arguments["image_runs"]) == ((0, 3, 5), ((4, 5, 0),))
    assert (arguments["image_latents"], arguments["use_cache"]) == (8, False)


def test_shared_image_computed_once(pair):
    """A shared image is run once and seen by all."""
    idefics, _, model = pair
    batch = lay(ROWS["shared image"], idefics.tokenizer)[2]
    assert len(batch["pixel_values"]) == 2
    assert forward_arguments(batch, model.config)["pixel_values"].shape == (1, 2, 3, 64, 64)
    assert set(batch["image_index"][0].tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("changed", range(6))
def test_dialogues_do_not_leak(pair, changed):
    """The tokens of one dialogue do not reach the others."""
    idefics, _, model = pair
    batch = lay(ROWS["mixture"], idefics.tokenizer)[2]
    before = losses_by_dialogue(model, batch)
    first = batch["layout"].sequence_starts[changed]
    batch["input_ids"][0, first] = 77
    after = losses_by_dialogue(model, batch)
    # Bit for bit: the same products in the same order, whatever stands in the other rows of a matrix.
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old, new) == (number != changed), number


def test_image_reaches_its_dialogues_only(pair):
    """An image reaches only those who see it."""
    idefics, _, model = pair
    dialogues = (PLAIN, ONE, Dialogue((user(D, "What is this?"), assistant("A fox."))), LATE)
    before, after = (
        losses_by_dialogue(model, lay(dialogues, idefics.tokenizer, pixels=image)[2])
        for image in (pixels, lambda number: pixels(number + 10 * (number == 3)))
    )
    assert [torch.equal(old, new) for old, new in zip(before, after, strict=True)] == [True, True, False, True]


def test_text_sees_last_image(pair):
    """Text sees only the last image before it and none before the first."""
    idefics, _, model = pair
    examples, _, batch = lay((DOCUMENT,), idefics.tokenizer)
    (old,) = losses_by_dialogue(model, batch)
    changed = lay((DOCUMENT,), idefics.tokenizer, pixels=lambda number: pixels(number + 50))[2]
    (new,) = losses_by_dialogue(model, changed)
    blind = torch.from_numpy(examples[0].image_index)[batch["supervised_positions"]] == -1
    assert 0 < blind.sum() < len(blind)
    assert torch.equal(old[blind], new[blind])
    assert (old[~blind] != new[~blind]).all()


def test_nothing_supervised(pair):
    """A row with nothing supervised gives zero and zero gradients."""
    _, _, model = pair
    model.zero_grad()
    batch = collate([], [], show=show(pixels), filler=0)
    loss = packed_loss(model, batch, config=model.config)
    assert loss.item() == 0.0
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > 80
    assert not any(gradient.any() for gradient in gradients)  # NaN counts as any


class Products(TorchDispatchMode):
    """Writes down how many rows the products have whose results are so wide."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows = columns, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket is torch.ops.aten.mm and output.shape[1] == self.columns:
            self.rows.append(len(output))
        return output


@pytest.mark.parametrize("limit", [CHOICES["cpu"].head_rows, 7])
def test_head_on_supervised_rows_only(pair, monkeypatch, limit):
    """The head is multiplied with supervised rows only and few at once."""
    monkeypatch.setitem(CHOICES, "cpu", replace(CHOICES["cpu"], head_rows=limit))
    idefics, _, model = pair
    examples, _, batch = lay(ROWS["mixture"], idefics.tokenizer)
    with Products(columns=len(model.lm_head.weight)) as products, torch.no_grad():
        packed_loss(model, batch, config=model.config)
    rows = products.rows
    supervised = sum(example.supervised for example in examples)
    assert sum(rows) == supervised
    assert max(rows) == min(supervised, limit)
    assert len(rows) == -(-supervised // limit)
    assert 0 < supervised < batch["input_ids"].shape[1]


@pytest.mark.parametrize("supervised", [0, 1, 6, 7, 8, 30])
@pytest.mark.parametrize("trained", [("additional_fc",), ("additional_fc", ""), ()], ids=["added", "all", "none"])
def test_head_loss_equals_all_logits(pair, monkeypatch, supervised, trained):
    """The head's loss and gradients are those of all logits at once."""
    monkeypatch.setitem(CHOICES, "cpu", replace(CHOICES["cpu"], head_rows=7))
    head = copy.deepcopy(pair[2].lm_head).requires_grad_(False)
    for name in trained:
        for parameter in head.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(True)
    generator = torch.Generator().manual_seed(supervised)
    hidden = torch.randn(supervised, 64, generator=generator, requires_grad=True)
    targets = torch.randint(303, (supervised,), generator=generator)
    inputs = [hidden, *(parameter for parameter in head.parameters() if parameter.requires_grad)]
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    loss = head_loss(head, hidden, targets)
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(3 * one, inputs) for one in (loss, expected))
    torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        assert torch.equal(head_loss(head, hidden, targets), loss)


def test_head_fp16_keeps_small_gradients():
    """Each has a probability of 1.5e-8, which is zero in fp16; all of them have 5e-4."""
    words = 2**15
    head = torch.nn.Linear(2, words, bias=False, dtype=torch.float16).requires_grad_(False)
    head.weight[:] = torch.tensor([0.0, 1.0])
    head.weight[0] = torch.tensor([18.0, 0.0])
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float16, requires_grad=True)
    head_loss(head, hidden, torch.tensor([0])).backward()
    others = (words - 1) / (math.exp(18) + words - 1)
    # torch adds up in eight lanes of fp32 or more, and in the likely word's lane the unlikely ones are lost; the
    # gradient and its two factors are fp16, of 11 bits.
    assert hidden.grad[0].tolist() == pytest.approx([-18 * others, others], rel=1 / 8 + 3 * 2**-11)


@pytest.mark.parametrize(
    ("labels", "positions", "targets"),
    [
        ([-100, -100, 7, 9], [1, 2], [7, 9]),
        ([-100, 5, -100, -100, 6], [0, 3], [5, 6]),
        ([-100, 0, -100], [0], [0]),
        ([-100, -100], [], []),
        ([-100], [], []),
    ],
)
def test_supervised_positions(labels, positions, targets):
    """A position is supervised by the token after it."""
    got = supervised_positions(torch.tensor([labels]))
    assert [tensor.tolist() for tensor in got] == [positions, targets]
    assert all(tensor.dtype == torch.int64 for tensor in got)


@pytest.mark.parametrize(
    ("seen", "runs"),
    [
        ([-1, 0, 0, 1, -1], [(1, 3, 0), (3, 4, 1)]),
        ([0, 0, 0], [(0, 3, 0)]),
        ([-1, -1], []),
        ([-1], []),
        ([2], [(0, 1, 2)]),
        ([1, 0, -1, 0, 1], [(0, 1, 1), (1, 2, 0), (3, 4, 0), (4, 5, 1)]),
    ],
)
def test_image_runs(seen, runs):
    """Runs of tokens that see one image."""
    assert image_runs(torch.tensor([seen])) == runs


def test_token_losses_by_definition():
    """Token losses are those of the definition in fp32."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 100.0, 0.0, 0.0]], dtype=torch.bfloat16)
    losses = token_losses(logits, torch.tensor([3, 2]))
    assert losses.dtype == torch.float32
    # ln 4 and 100 + ln(1 + 3 e^-100): exact to fp32's last digit.
    assert losses.tolist() == pytest.approx([1.3862943611198906, 100.0], rel=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_equal_torch(rows, dtype):
    """Token losses and their gradient are those of torch."""
    generator = torch.Generator().manual_seed(rows)
    logits = (5 * torch.randn(rows, 37, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(37, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator)
    ours = token_losses(logits, targets)
    theirs = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(ours, theirs)
    (got,), (expected,) = (torch.autograd.grad((one * weights).sum(), logits) for one in (ours, theirs))
    torch.testing.assert_close(got, expected)


def test_generation_left_padded_equals_sdpa(pair):
    """Generation with packed attention equals sdpa on a left padded batch."""
    idefics, stock, model = pair
    image = [picture(number) for number in (1, 2)]
    prompts = [
        ["User:", image[0], "What is in this image?"],
        ["User: Is there a red ball in the image, or a lazy dog?", image[0], "and", image[1], "yes, no"],
        ["User: What is this?"],
    ]
    inputs = idefics.processor(text=prompts, padding=True, return_tensors="pt")
    assert inputs["attention_mask"][:, 0].tolist() == [0, 1, 0]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours, theirs = (one.generate(**inputs, **options) for one in (model, stock))
    assert ours.shape[1] == inputs["input_ids"].shape[1] + 12
    assert torch.equal(ours, theirs)
    assert len(ours[:, -12:].unique()) > 3  # a model that repeats itself would prove little


def picture(number):
    return PIL.Image.fromarray(np.random.default_rng(number).integers(0, 255, (48, 80, 3), dtype=np.uint8))
