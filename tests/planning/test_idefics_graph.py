"""IDEFICS's forward as a memory graph: what never costs less, and what checkpointing saves."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from planned import INSTRUCT_9B, LORA

from finetune.planning.estimate import estimate
from finetune.planning.static_memory import RowSize, Setup, fixed_parts
from modeling.shapes import TINY
from modeling.towers import TOWERS

SETUPS = st.builds(
    Setup,
    config=st.just(TINY),
    modes=st.fixed_dictionaries(
        {
            **{tower: st.sampled_from(["frozen", "lora", "full"]) for tower in ("vision", "resampler")},
            **{tower: st.sampled_from(["frozen", "lora"]) for tower in ("cross_attention", "decoder")},
            **{tower: st.sampled_from(["frozen", "full"]) for tower in TOWERS[4:]},
        }
    ),
    rank=st.integers(1, 64),
    dropout=st.sampled_from([0.0, 0.1]),
    item=st.sampled_from([2, 4]),
    quantize=st.booleans(),
    checkpointing=st.integers(0, 3),
    rows_per_step=st.integers(1, 3),
    gpu=st.booleans(),
)


ROWS = st.builds(RowSize, st.integers(1, 2000), st.integers(0, 1), st.integers(0, 8)).flatmap(
    lambda row: st.integers(0, row.tokens - 1).map(lambda supervised: replace(row, supervised=supervised))
)


@settings(max_examples=150, deadline=None)
@given(SETUPS, ROWS, st.sampled_from(["tokens", "supervised", "images"]), st.integers(1, 500))
def test_larger_row_never_costs_less(setup, row, field, more):
    larger = replace(row, **{field: getattr(row, field) + more})
    assert estimate(setup, larger).total >= estimate(setup, row).total


@settings(max_examples=100, deadline=None)
@given(SETUPS, ROWS, st.integers(1, 64))
def test_higher_rank_never_costs_less(setup, row, more):
    assert estimate(replace(setup, rank=setup.rank + more), row).total >= estimate(setup, row).total


@settings(max_examples=100, deadline=None)
@given(SETUPS, ROWS)
def test_quantizing_and_freezing_never_cost_more(setup, row):
    lighter = replace(setup, modes=dict.fromkeys(TOWERS, "frozen"))
    assert estimate(lighter, row).total <= estimate(setup, row).total
    fixed = [sum(fixed_parts(replace(setup, quantize=quantize)).values()) for quantize in (False, True)]
    assert fixed[1] < fixed[0]


def test_checkpointing_keeps_a_tenth_of_the_activations():
    setup, row = Setup(INSTRUCT_9B, LORA, item=2), RowSize(2048, 500, 4)
    layers = setup.config["num_hidden_layers"]
    off, on = (estimate(replace(setup, checkpointing=checkpointing), row).parts for checkpointing in (0, layers))
    assert on["decoder"] + on["cross_attention"] < (off["decoder"] + off["cross_attention"]) / 10
    assert [on[part] for part in ("weights", "adapters", "optimizer")] == [
        off[part] for part in ("weights", "adapters", "optimizer")
    ]
