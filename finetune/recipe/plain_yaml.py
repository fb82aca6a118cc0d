"""YAML -> the plain values of a recipe: dict, list, text, numbers, true, false, null.

Any input quickly gives either values, or an error of one line with its place. Keys must be text, tags that build
objects are refused, and the size of expanded aliases is computed before they are expanded.
"""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from modeling.errors import UserError

MOST_BYTES = 2**18
"""Largest size of a recipe's file, or of an override."""

MOST_VALUES = 10**6
"""Largest number of values and of characters, with aliases expanded."""

DEEPEST = 32
"""Deepest nesting."""

_TAG = "tag:yaml.org,2002:"
_TRUE, _FALSE = ("yes", "true", "on"), ("no", "false", "off")


def parse_yaml(content: bytes | str) -> Any:
    """Return the values of one YAML document, without shared objects. Raises UserError: one line, without a file name.

    >>> parse_yaml("{steps: 1_000, betas: [0.9, 0.95], evaluation: null}")
    {'steps': 1000, 'betas': [0.9, 0.95], 'evaluation': None}
    """
    if len(content) > MOST_BYTES:
        raise UserError(f"too large for a recipe: expected at most {MOST_BYTES // 1024} KiB")
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise UserError("YAML that a recipe cannot hold: nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"not YAML: {error.problem or error.context:.200}{where}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not YAML: {' '.join(str(error).split()):.200}") from error
    if root is None:
        return None
    _measure(root, {})
    return _value(root)


def _measure(node: Node, measured: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return (values and characters, depth) of a node with aliases expanded. Raises UserError: too many, or too deep.

    `measured` holds the results by node, and None for a node whose children are being measured.
    """
    if id(node) in measured:
        known = measured[id(node)]
        if known is None:
            raise _refused("an alias inside its own anchor", node)
        return known
    measured[id(node)] = None
    size, depth = 1, 1
    if isinstance(node, ScalarNode):
        size += len(node.value)
    else:
        children = node.value if isinstance(node, SequenceNode) else [one for pair in node.value for one in pair]
        for child in children:
            more, below = _measure(child, measured)
            size, depth = size + more, max(depth, below + 1)
    if size > MOST_VALUES:
        raise _refused(f"more than {MOST_VALUES:,} values with aliases expanded", node)
    if depth > DEEPEST:
        raise _refused(f"nested more than {DEEPEST} deep", node)
    measured[id(node)] = size, depth
    return size, depth


def _value(node: Node) -> Any:
    if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(child) for child in node.value]
    if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
        return _mapping(node)
    if not isinstance(node, ScalarNode):
        raise _refused(f"the tag {node.tag.replace(_TAG, '!!')!r:.80}", node)
    # A number in another notation (0x10, 010, 1:30) stays text, which is then an error for its key.
    text = node.value
    if node.tag == f"{_TAG}null":
        return None
    if node.tag == f"{_TAG}bool" and text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    if node.tag == f"{_TAG}int" and re.fullmatch(r"[-+]?(0|[1-9][0-9_]{0,17})", text):
        return int(text.replace("_", ""))
    if node.tag == f"{_TAG}float" and ":" not in text:
        try:
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()).replace("_", ""))
        except ValueError:
            return text
    return _text(node)


def _text(node: Node) -> str:
    if not isinstance(node, ScalarNode):
        raise _refused("a key that is not text", node, "; is it a template?")
    if not node.tag.startswith(_TAG) or node.tag == f"{_TAG}binary" or "python" in node.tag:
        raise _refused(f"the tag {node.tag.replace(_TAG, '!!')!r:.80}", node)
    if re.search("[\0\ud800-\udfff]", node.value):
        raise _refused("text with a NUL or a lone surrogate", node)
    return str(node.value)


def _mapping(node: MappingNode) -> dict[str, Any]:
    """Return a mapping with its `<<` expanded; if several mappings in a `<<` have a key, the first one is used."""
    own: dict[str, Any] = {}
    merged: dict[str, Any] | None = None
    for key_node, value_node in node.value:
        if key_node.tag == f"{_TAG}merge" and merged is None:
            sources = value_node.value if isinstance(value_node, SequenceNode) else [value_node]
            if not all(isinstance(source, MappingNode) for source in sources):
                raise _refused("`<<` of something that is not a mapping", value_node)
            merged = {key: value for source in reversed(sources) for key, value in _mapping(source).items()}
            continue
        key = _text(key_node)
        if key in own or key_node.tag == f"{_TAG}merge":
            raise _refused(f"duplicate key {key!r:.80}", key_node)
        own[key] = _value(value_node)
    return {**(merged or {}), **own}


def _refused(what: str, node: Node, hint: str = "") -> UserError:
    return UserError(f"YAML that a recipe cannot hold: {what}, line {node.start_mark.line + 1}{hint}")
