"""Statistics of a source's parts, added up."""

from finetune.data.stats import MOST_NAMES, SourceStats, add_up


def test_sum_of_parts_counts_a_bounded_number_of_keys_by_name():
    parts = [SourceStats("a"), SourceStats("a")]
    parts[0].ignore(f"k{number}" for number in range(MOST_NAMES - 1))
    parts[1].ignore(["k0", "new", "second", "third"])
    total = add_up(*parts)
    assert len(total.ignored) == MOST_NAMES + 1
    assert (total.ignored["k0"], total.ignored["new"], total.ignored["other keys"]) == (2, 1, 2)
