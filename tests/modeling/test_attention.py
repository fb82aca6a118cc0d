"""Attention over a packed row equals every sequence and every image run alone."""

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from modeling import flash
from modeling.attention import packed_attention

HEADS, SIZE, LATENTS, SCALE = 2, 8, 3, 0.3

# In double precision both ways round at 1e-16 a term, and no row has 100 terms.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=["slices", "kernels"], autouse=True)
def way(request, monkeypatch):
    """Both ways to compute it; a kernel of torch's signature, spelt out, stands in for the GPU's."""
    if request.param == "kernels":
        monkeypatch.setattr(flash, "serves", lambda query, dropout: True)
        monkeypatch.setattr(flash, "varlen_attn", stand_in_kernel)
    return request.param


def stand_in_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size=(-1, -1)):
    """[T, H, D] -> [T, H, D], sequence by sequence."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[-1], cu_seq_k[-1], len(key)) == (len(query), len(key), len(value))
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    assert len(cu_seq_q) == len(cu_seq_k)
    outputs = []
    for (start, stop), (first, last) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        seen = torch.ones(stop - start, last - first, dtype=torch.bool)
        if window_size == (-1, 0):
            assert stop - start == last - first
            seen = seen.tril()
        parts = (query[start:stop], key[first:last], value[first:last])
        outputs.append(naive(*(part.transpose(0, 1)[None] for part in parts), seen, scale)[0])
    return torch.cat(outputs)


def attend(query, key, value, *, cross=False, **kwargs):
    module = SimpleNamespace(is_cross_attention=cross, is_causal=True, training=False)
    return packed_attention(module, query, key, value, None, scaling=SCALE, **kwargs)[0]


def naive(query, key, value, seen_TS, scale=SCALE):
    """Attention spelt out: [1, H, T, D] and a mask of who sees whom -> [1, T, H, D]; who sees nothing gets zeros."""
    scores = scale * query @ key.transpose(-1, -2)
    weights = torch.where(seen_TS, torch.exp(scores), 0.0)
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total > 0, total, 1.0) @ value).transpose(1, 2)


def tensors(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, HEADS, length, SIZE) for length in lengths]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def same_with_gradients(ours, reference, inputs):
    torch.testing.assert_close(ours, reference, **CLOSE)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    got, expected = (torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True) for out in (ours, reference))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def causal_inside(starts):
    seen = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for start, stop in pairwise(starts):
        seen[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
    return seen


def seen_latents(length, images, runs):
    seen = torch.zeros(length, images * LATENTS, dtype=torch.bool)
    for start, stop, image in runs:
        seen[start:stop, image * LATENTS : (image + 1) * LATENTS] = True
    return seen


@pytest.mark.parametrize(
    "starts",
    [[0, 1], [0, 7], [0, 1, 2, 3], [0, 5, 6, 13], [0, 1, 9], [0, 8, 9]],
    ids=["one token", "one sequence", "three of one token", "one token between", "one first", "one last"],
)
def test_self_attention_causal(starts):
    """Self attention is causal within each sequence."""
    inputs = tensors(starts[-1], starts[-1], starts[-1])
    same_with_gradients(attend(*inputs, sequence_starts=starts), naive(*inputs, causal_inside(starts)), inputs)


def test_self_attention_equals_sdpa():
    """Self attention equals sdpa on each sequence alone."""
    inputs = tensors(12, 12, 12)
    module = SimpleNamespace(is_cross_attention=False, is_causal=True, training=False)
    alone = [
        sdpa_attention_forward(module, *(t[:, :, start:stop] for t in inputs), None, scaling=SCALE)[0]
        for start, stop in [(0, 5), (5, 8), (8, 12)]
    ]
    ours = attend(*inputs, sequence_starts=[0, 5, 8, 12])
    same_with_gradients(ours, torch.cat(alone, dim=1), inputs)


@pytest.mark.parametrize(
    ("length", "images", "runs"),
    [
        (12, 2, [(1, 5, 0), (9, 12, 1)]),
        (6, 1, [(0, 6, 0)]),
        (6, 1, [(0, 1, 0)]),
        (6, 1, [(5, 6, 0)]),
        (6, 3, [(0, 2, 0), (2, 3, 1), (3, 6, 2)]),
        (6, 2, [(0, 2, 1), (2, 6, 0)]),
        (6, 1, [(0, 2, 0), (4, 6, 0)]),
        (1, 1, [(0, 1, 0)]),
        (6, 2, [(2, 4, 1)]),
        (6, 2, []),
        (6, 0, []),
    ],
    ids=[
        "drawn example",
        "everywhere",
        "first token only",
        "last token only",
        "neighbours",
        "images out of order",
        "one image twice",
        "one token",
        "an image nobody sees",
        "nobody sees any",
        "no image at all",
    ],
)
def test_cross_attention_equals_dense_mask(length, images, runs):
    """Cross attention equals a dense mask."""
    inputs = tensors(length, images * LATENTS, images * LATENTS)
    ours = attend(*inputs, cross=True, sequence_starts=[0, length], image_runs=runs, image_latents=LATENTS)
    same_with_gradients(ours, naive(*inputs, seen_latents(length, images, runs)), inputs)


def test_run_across_sequences_sharing_image():
    """A run may cross a boundary where both sequences share an image."""
    inputs = tensors(10, LATENTS, LATENTS)
    common = {"cross": True, "sequence_starts": [0, 4, 10], "image_latents": LATENTS}
    joined = attend(*inputs, image_runs=[(2, 8, 0)], **common)
    parted = attend(*inputs, image_runs=[(2, 4, 0), (4, 8, 0)], **common)
    same_with_gradients(joined, naive(*inputs, seen_latents(10, 1, [(2, 8, 0)])), inputs)
    same_with_gradients(joined, parted, inputs)


def test_no_image_gives_zero():
    """Tokens that see no image get exactly zero."""
    inputs = tensors(6, LATENTS, LATENTS)
    output = attend(*inputs, cross=True, sequence_starts=[0, 6], image_runs=[(2, 4, 0)], image_latents=LATENTS)
    assert (output == 0).all(-1).all(-1)[0].tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize("images", [0, 2])
def test_no_image_row_reaches_every_input(images):
    """A row that sees no image still reaches every input."""
    inputs = tensors(5, images * LATENTS, images * LATENTS)
    attend(*inputs, cross=True, sequence_starts=[0, 5], image_latents=LATENTS).sum().backward()
    for tensor in inputs:
        assert tensor.grad is not None
        assert not tensor.grad.any()


@st.composite
def rows(draw):
    """Lengths of sequences, and the image each token sees (-1 = none)."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    images = draw(st.integers(0, 3))
    seen = draw(st.lists(st.integers(-1, images - 1), min_size=sum(lengths), max_size=sum(lengths)))
    return lengths, images, seen


# The two ways are the same for every example.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows())
def test_any_row_equals_dense_reference(row):
    """Any row equals the dense reference."""
    lengths, images, seen = row
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    inputs = tensors(starts[-1], starts[-1], starts[-1])
    same_with_gradients(attend(*inputs, sequence_starts=starts), naive(*inputs, causal_inside(starts)), inputs)
    runs = [(index, index + 1, image) for index, image in enumerate(seen) if image >= 0]
    inputs = tensors(starts[-1], images * LATENTS, images * LATENTS)
    ours = attend(*inputs, cross=True, sequence_starts=starts, image_runs=runs, image_latents=LATENTS)
    same_with_gradients(ours, naive(*inputs, seen_latents(starts[-1], images, runs)), inputs)


@pytest.mark.parametrize("way", ["slices"], indirect=True)
@pytest.mark.parametrize("cross", [False, True], ids=["sequences", "images"])
def test_backward_joins_gradients_once(cross):
    """A slice's own backward would write as many zeros as the row is long, for every slice."""
    inputs = tensors(9, 9, 9)
    runs = [(0, 2, 0), (2, 5, 2), (6, 9, 0)]
    output = attend(*inputs, cross=cross, sequence_starts=[0, 4, 9], image_runs=runs, image_latents=LATENTS)
    steps, names = [output.grad_fn], []
    for step in steps:
        names.append(step.name())
        steps += [earlier for earlier, _ in step.next_functions if earlier is not None and earlier not in steps]
    assert names.count("SplitWithSizesBackward0") == 3
    assert "SliceBackward0" not in names


@pytest.mark.parametrize("masked", [False, True])
def test_without_sequences_is_sdpa(masked):
    """Without sequences it is the sdpa of transformers."""
    query, key, value = tensors(6, 6, 6)
    mask = torch.ones(1, 1, 6, 6).tril().bool() if masked else None
    module = SimpleNamespace(is_causal=True, training=False)  # the vision tower's has no is_cross_attention
    ours, weights = packed_attention(module, query, key, value, mask, scaling=SCALE)
    theirs, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=SCALE)
    assert weights is None
    assert torch.equal(ours, theirs)


def test_stand_in_kernel_signature():
    """The stand in has the signature of torch's kernel."""
    theirs = inspect.signature(varlen_attn).parameters
    for name, parameter in inspect.signature(stand_in_kernel).parameters.items():
        assert parameter.kind == theirs[name].kind
    assert theirs["window_size"].default == (-1, -1)


CASES = {
    "an A100 in bf16": ((8, 0), torch.bfloat16, 128, 0.0, True),
    "an H100 in fp16": ((9, 0), torch.float16, 64, 0.0, True),
    "a T4": ((7, 5), torch.float16, 64, 0.0, False),
    "fp32": ((9, 0), torch.float32, 64, 0.0, False),
    "a head too large": ((9, 0), torch.float16, 264, 0.0, False),
    "a head of an odd size": ((9, 0), torch.float16, 20, 0.0, False),
    "dropout": ((9, 0), torch.float16, 64, 0.1, False),
}


@pytest.mark.parametrize("way", ["slices"], indirect=True)
@pytest.mark.parametrize("name", CASES)
def test_flash_serves(name, monkeypatch):
    """Kernels are chosen by what the GPU can."""
    capability, dtype, size, dropout, expected = CASES[name]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(shape=(1, 2, 5, size), dtype=dtype, is_cuda=True, device="cuda:0")
    assert flash.serves(query, dropout) is expected
    query.is_cuda = False
    assert not flash.serves(query, dropout)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("way", ["slices"], indirect=True)
@pytest.mark.parametrize("cross", [False, True], ids=["sequences", "images"])
def test_flash_equals_slices(cross, monkeypatch):
    """The GPU's kernels give what the slices give."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, length, 64) for length in (40, 40, 40)]
    inputs = [torch.randn(s, generator=generator).to("cuda", torch.bfloat16).requires_grad_() for s in shapes]
    options = {"cross": cross, "sequence_starts": [0, 7, 40], "image_runs": [(2, 9, 1), (12, 40, 0)]}
    outputs = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(flash, "serves", lambda query, dropout: False)
        output = attend(*inputs, image_latents=20, **options)
        outputs.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
    # bf16 has 8 bits, and sums are taken in another order.
    torch.testing.assert_close(*outputs, rtol=2**-6, atol=2**-6)
