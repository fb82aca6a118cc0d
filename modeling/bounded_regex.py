"""Match untrusted regular expressions in bounded time and memory.

PEFT passes the patterns of an adapter's config to `re`, where `(\\w+\\.?)*x` can take years for one name. Here, a
pattern with a quantifier is matched by another process, which is killed when its time is over.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from modeling.errors import UserError

LIMIT_S = 10
"""Time limit in seconds for all patterns of one call; an ordinary pattern takes a millisecond."""

MEMORY_BYTES = 2**30
"""Limit of the matching process's address space."""

FEW = 10**6
"""Largest number of patterns x names that are matched in this process, if no match can take long."""

_LINEAR = re.compile(r"[\w.\\-]*")
"""Matches patterns without quantifiers and alternatives, which can be matched in this process."""


@dataclass(frozen=True)
class Pattern:
    """A pattern from a file, and the text around it."""

    text: str
    before: str = ""
    after: str = ""
    whole: bool = False
    """Whether it must match a whole name."""


def matching(
    patterns: Sequence[Pattern], names: Sequence[str], *, where: str, known: Collection[str] = ()
) -> list[dict[str, str]]:
    """Return, for each pattern, {name that it matches from the beginning: text of its group `idx`, or ""}.

    `known` patterns are our own. Raises UserError, beginning with `where`: not a regular expression, or a match that
    takes longer than `LIMIT_S`.
    """
    try:
        few = len(patterns) * len(names) <= FEW
        if few and all(one.text in known or _LINEAR.fullmatch(one.text) for one in patterns):
            return _match(patterns, names)
        return _match_elsewhere(patterns, names)
    except re.error as error:
        raise UserError(f"{where}: {repr(error.pattern)[:80]} is no regular expression: {error.msg[:200]}") from error
    except subprocess.TimeoutExpired as error:
        texts = ", ".join(repr(one.text)[:80] for one in patterns[:3])
        raise UserError(
            f"{where}: {texts}: matching takes longer than {LIMIT_S} s (nested quantifiers?); name the modules instead"
        ) from error


def _match(patterns: Sequence[Pattern], names: Sequence[str]) -> list[dict[str, str]]:
    found = []
    for one in patterns:
        try:
            compiled = re.compile(f"{one.before}{one.text}{one.after}")
        except (re.error, RecursionError, OverflowError) as error:
            raise re.error(str(error), one.text) from error
        match = compiled.fullmatch if one.whole else compiled.match
        matches = {name: hit for name in names if (hit := match(name))}
        found.append({name: hit.groupdict().get("idx") or "" for name, hit in matches.items()})
    return found


def _match_elsewhere(patterns: Sequence[Pattern], names: Sequence[str]) -> list[dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "modeling.bounded_regex"],
        input=json.dumps([[asdict(one) for one in patterns], list(names)]),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise re.error(f"it cannot be matched in {MEMORY_BYTES >> 20} MiB", patterns[0].text)
    answer = json.loads(done.stdout)
    if isinstance(answer, dict):
        raise re.error(answer["message"], answer["pattern"])
    return answer


def _main() -> None:
    """Read patterns and names from stdin, and write the matches, or the error of a pattern, to stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    patterns, names = json.load(sys.stdin)
    try:
        answer: object = _match([Pattern(**one) for one in patterns], names)
    except re.error as error:
        answer = {"message": error.msg, "pattern": error.pattern}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
