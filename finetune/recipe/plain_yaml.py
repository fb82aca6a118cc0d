"""YAML -> the plain values that a recipe is made of: dict, list, text, numbers, true, false, null.

Whatever the text is, the answer comes soon: values, or one line that says what a recipe cannot hold, and where. Keys
are text, tags that make objects are refused, and what aliases expand to is counted before it is made.
"""

import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from modeling.errors import UserError

MOST_BYTES = 2**18
"""Of a recipe's file, or of an override."""

MOST_VALUES = 10**6
"""Values, and characters of text, once aliases are replaced by what they stand for."""

DEEPEST = 32

_TAG = "tag:yaml.org,2002:"
_TEXT = {f"{_TAG}{name}" for name in ("str", "timestamp", "value", "merge")}
_TRUE, _FALSE = ("yes", "true", "on"), ("no", "false", "off")


def parse_yaml(content: bytes | str) -> Any:
    """The values of one YAML document, none of them shared. Raises UserError: one line, without the file's name."""
    if len(content) > MOST_BYTES:
        raise UserError(f"too large for a recipe: at most {MOST_BYTES // 1024} KiB were expected")
    try:
        root = yaml.compose(content, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise UserError("not YAML that a recipe can be: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"not YAML: {_one_line(error)}") from error
    if root is None:
        return None
    _measure(root, {})
    return _value(root)


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        return f"{error.problem or error.context}"[:200] + where
    return " ".join(str(error).split())[:200]


def _refused(what: str, node: Node, hint: str = "") -> UserError:
    return UserError(f"not YAML that a recipe can be: {what}, line {node.start_mark.line + 1}{hint}")


def _measure(node: Node, measured: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """(values and characters, depth) of a node, its aliases replaced. Raises UserError where that is too much."""
    if id(node) in measured:
        known = measured[id(node)]
        if known is None:
            raise _refused("an alias of what it is a part of", node)
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
        raise _refused(f"more than {MOST_VALUES:,} values, once its aliases are replaced", node)
    if depth > DEEPEST:
        raise _refused(f"nested more than {DEEPEST} deep", node)
    measured[id(node)] = size, depth
    return size, depth


def _value(node: Node) -> Any:
    if isinstance(node, ScalarNode):
        return _scalar(node)
    if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
        return [_value(child) for child in node.value]
    if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
        return _mapping(node)
    raise _refused(f"the tag {node.tag.replace(_TAG, '!!')!r:.80}", node)


def _scalar(node: ScalarNode) -> Any:
    """A number that is written in another way (0x10, 010, 1:30) is text, for the key to refuse."""
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
        raise _refused("a key that is no text", node, "; is it a template?")
    if not node.tag.startswith(_TAG) or node.tag == f"{_TAG}binary" or "python" in node.tag:
        raise _refused(f"the tag {node.tag.replace(_TAG, '!!')!r:.80}", node)
    if re.search("[\0\ud800-\udfff]", node.value):
        raise _refused("text with a NUL, or half of a character", node)
    return str(node.value)


def _mapping(node: MappingNode) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] | None = None
    for key_node, value_node in node.value:
        if key_node.tag == f"{_TAG}merge" and merged is None:
            merged = _merged(value_node)
            continue
        key = _text(key_node)
        if key in own or key_node.tag == f"{_TAG}merge":
            raise _refused(f"key {key!r:.80} is there twice", key_node)
        own[key] = _value(value_node)
    return {**(merged or {}), **own}


def _merged(node: Node) -> dict[str, Any]:
    """What `<<` takes over: of several mappings, the first one that has a key decides."""
    sources = node.value if isinstance(node, SequenceNode) else [node]
    if not all(isinstance(source, MappingNode) for source in sources):
        raise _refused("`<<` of what is no mapping", node)
    return {key: value for source in reversed(sources) for key, value in _mapping(source).items()}
