"""Text from data, names and models, made safe to show: on a page, on the terminal, as JSON."""

import json
import math
import re
from typing import Any


def visible(value: Any) -> Any:
    r"""A value with all its text made safe to show: control, bidi and other unseen characters are written out.

    Newlines, tabs and the joiners of emoji stay.

    >>> visible("\x1b[2Jaé\u202e\n")
    '␛[2Jaé[U+202E]\n'
    """
    if isinstance(value, str):
        return value.translate(_WRITTEN_OUT)
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    return [visible(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any, *, indent: int | None = None) -> str:
    r"""JSON that every reader takes and no terminal obeys: unseen characters as \uXXXX, NaN and infinity as null."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)
    return _ESCAPED.sub(lambda found: json.dumps(found[0])[1:-1], text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


_SURROGATES = range(0xD800, 0xE000)
_UNSEEN = (
    *range(0x7F, 0xA0),
    *(0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180E, 0x200B, 0x200E, 0x200F),
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    *(0x3164, 0xFEFF, 0xFFA0),
    *range(0xFDD0, 0xFDF0),
    *range(0xFFF9, 0xFFFC),
    *(0xFFFE, 0xFFFF),
    *range(0x1D173, 0x1D17B),
    *range(0xE0000, 0xE0080),
)
"""Codes of characters that take no room, turn the writing around, or control a terminal; below U+0020 come more."""

_WRITTEN_OUT = {
    **{code: f"[U+{code:04X}]" for code in _UNSEEN},
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    **dict.fromkeys(_SURROGATES, "\N{REPLACEMENT CHARACTER}"),
    0x7F: "\N{SYMBOL FOR DELETE}",
}

_ESCAPED = re.compile(f"[{''.join(map(chr, (*_UNSEEN, *_SURROGATES)))}]")
