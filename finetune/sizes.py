"""Sizes of memory and disk, as people write them and read them."""

import re

from modeling.errors import UserError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(option: str, text: str) -> int:
    """ "24GiB" -> 25_769_803_776; "24GB" -> 24_000_000_000. Raises UserError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    size = float(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0.0
    if not 1 <= size < 2**63:
        raise UserError(f"{option}: expected a size with its unit, such as 5GB or 24GiB, got {text!r:.80}")
    return int(size)


def show_size(nbytes: int) -> str:
    """Of at least a GiB in GiB, else in MiB."""
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
