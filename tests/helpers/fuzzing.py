"""Damage done at random, and always the same: bytes of real files changed, and JSON whose values are others.

`FUZZ=2000 pytest tests/modeling/test_fuzz_models.py` tries that many inputs of each kind, drawn anew each time.
"""

import copy
import os
import struct

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = os.environ.get("FUZZ")


def fuzz(examples):
    """Settings of a test that tries so many inputs, or as many as `FUZZ` says."""
    return settings(
        max_examples=int(EXAMPLES) if EXAMPLES else examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**53, 2**63, 2**64 - 1, -(2**63), 10**30, 10**4000]),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", ".", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "~", "a/b/c", "(", "(a+)+$"]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def damaged(draw, content, first=0, donor=b""):
    """Bytes that are mostly those of `content`: some changed, cut out, put in, the end cut off; from `first` on.

    With a donor, also numbers of other sizes and signs, and parts of that other file.
    """
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(first, max(first, len(changed) - 1)))
        kinds = ["set", "flip", "cut", "drop", "insert", "repeat", *(["number", "splice"] if donor else [])]
        kind = draw(st.sampled_from(kinds))
        if kind == "set":
            changed[place : place + 1] = bytes([draw(st.sampled_from([0, 1, 9, 34, 45, 48, 91, 123, 127, 128, 255]))])
        elif kind == "flip" and place < len(changed):
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[place:]
        elif kind == "drop":
            del changed[place : place + draw(st.integers(1, 40))]
        elif kind == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "repeat":
            changed[place:place] = changed[place : place + draw(st.integers(1, 40))]
        elif kind == "number":
            number = draw(st.sampled_from([0, 1, -1, 7, 127, 2**15, 2**31 - 1, -(2**31), 2**40, 2**62, -(2**63)]))
            place, size = place - place % 4, draw(st.sampled_from([4, 8]))
            changed[place : place + size] = struct.pack("<q", number)[:size]
        elif kind == "splice":
            start, size = draw(st.integers(0, len(donor))), draw(st.integers(1, 60))
            changed[place : place + size] = donor[start : start + size]
    return bytes(changed)


@st.composite
def altered(draw, value):
    """A JSON object with some of its values, however deep, replaced, left out, or added."""
    changed = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        inner = changed
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not (isinstance(inner[key], dict | list) and inner[key] and draw(st.booleans())):
                break
            inner = inner[key]
        if key is None or (isinstance(inner, dict) and draw(st.integers(0, 9)) == 0):
            new = draw(VALUES)
            if isinstance(inner, dict):
                inner[draw(TEXTS)] = new
            else:
                inner.append(new)
        elif draw(st.integers(0, 4)) == 0:
            del inner[key]
        else:
            inner[key] = draw(VALUES)
    return changed
