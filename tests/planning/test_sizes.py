"""Sizes with their units."""

import pytest

from finetune.sizes import parse_size, show_size
from modeling.errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("24GiB", 25_769_803_776),
        ("1.5 gb", 1_500_000_000),
        (" 700mib ", 734_003_200),
        ("400kB", 400_000),
        ("1KiB", 1024),
        ("2TB", 2_000_000_000_000),
    ],
)
def test_sizes(text, size):
    assert parse_size("--gpu", text) == size


@pytest.mark.parametrize(
    "text", ["", "24", "GB", "0GB", "0.0000000001GB", "-5GB", "24XB", "5 G B", "1e9", "5GB5", "nan GiB", "١GB"]
)
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="--shard-size: expected a size with its unit, such as 5GB or 24GiB, got"):
        parse_size("--shard-size", text)


def test_sizes_shown():
    assert show_size(25_769_803_776) == "24.00 GiB"
    assert show_size(700 * 2**20) == "700.0 MiB"
    assert show_size(2**30 - 1) == "1,024.0 MiB"
