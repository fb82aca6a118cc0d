"""Source statistics: how many records of a source were read, kept, and rejected under which reason."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from finetune.data.conversation import RecordError, as_unicode

MOST_NAMES = 50
"""Largest number of ignored keys that are counted by name; the rest are \"other keys\"."""

_COUNTERS = ("rejected", "parts_rejected", "ignored")


@dataclass
class SourceStats:
    """The records of one source: read = kept + rejected."""

    source: str
    read: int = 0
    kept: int = 0
    """Records that gave at least one example."""
    limited: bool = False
    """Whether reading stopped at the source's limit, so that later records were not counted."""
    broken: list[str] = field(default_factory=list)
    """Files that break off, each with the fault and how much was not read; those records cannot be counted."""
    rejected: dict[str, int] = field(default_factory=Counter)
    """Reason -> number of records."""
    first_rejected: dict[str, str] = field(default_factory=dict)
    """Reason -> id and detail of the first such record; where shards take turns, the first one of the first shard."""
    parts_rejected: dict[str, int] = field(default_factory=Counter)
    """Reason -> number of turns, texts or images left out of records that were kept nevertheless."""
    documents_cut: int = 0
    """Number of documents cut into several examples, because of their length or a lost image."""
    ignored: dict[str, int] = field(default_factory=Counter)
    """Unknown key, or placeholder that stays text -> number of records that have it."""
    dialogues: int = 0
    """Number of dialogues and documents, before they were joined, divided or cut."""
    examples: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    images: int = 0
    """Number of distinct images in the examples."""
    draws_per_epoch: int | None = None
    repeats_per_epoch: float | None = None
    """How often an example of this source is drawn per epoch, on average."""

    def reject(self, record_id: str, error: RecordError) -> None:
        self.rejected[error.reason] += 1
        self._remember(record_id, error)

    def reject_part(self, record_id: str, error: RecordError, *, parts: int = 1) -> None:
        self.parts_rejected[error.reason] += parts
        self._remember(record_id, error)

    def ignore(self, names: Iterable[str]) -> None:
        """Count the parts of a record that its dialogue does not use."""
        for name in names:
            self._ignore(as_unicode(name[:80]), 1)

    def _ignore(self, name: str, count: int) -> None:
        known = name in self.ignored or len(self.ignored) < MOST_NAMES
        self.ignored[name if known else "other keys"] += count

    def _remember(self, record_id: str, error: RecordError) -> None:
        self.first_rejected.setdefault(error.reason, as_unicode(f"{record_id}: {error.detail}".removesuffix(": ")))

    def add(self, other: "SourceStats") -> None:
        """Add the statistics of further records of the same source."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if name == "ignored":
                for key, count in value.items():
                    self._ignore(key, count)
            elif isinstance(mine, Counter):
                mine.update(value)
            elif isinstance(mine, dict):
                setattr(self, name, {**mine, **value, **mine})
            elif isinstance(mine, list):
                setattr(self, name, [*mine, *value])
            elif isinstance(mine, bool):
                setattr(self, name, mine or value)
            elif isinstance(mine, int):
                setattr(self, name, mine + value)

    @property
    def loss(self) -> str | None:
        """Return "4 of 10 records rejected: corrupt image 2, missing image 2", or None."""
        said = list(self.broken)
        if self.rejected:
            said.append(f"{sum(self.rejected.values())} of {self.read} records rejected: {_list(self.rejected)}")
        if self.parts_rejected:
            said.append(f"parts of kept records left out: {_list(self.parts_rejected)}")
        if self.ignored:
            said.append(f"not used of records: {most_frequent(self.ignored)}")
        return "; ".join(said) or None

    def to_json(self) -> dict[str, Any]:
        assert self.read == self.kept + sum(self.rejected.values()), f"records lost: {self}"
        return self.partial()

    def partial(self) -> dict[str, Any]:
        """Return the statistics of a source that is not complete yet; "ignored" only if something was ignored."""
        values = {**vars(self), **{name: dict(getattr(self, name)) for name in _COUNTERS}}
        return values if self.ignored else {name: value for name, value in values.items() if name != "ignored"}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_json` or `partial` wrote. Raises ValueError: other values."""
        empty = vars(cls(""))
        values = {"ignored": {}, **values}
        if values.keys() != empty.keys():
            raise ValueError("other keys than of a source")
        for name, value in values.items():
            if isinstance(empty[name], dict):
                kind = str if name == "first_rejected" else int
                fits = isinstance(value, dict) and all(isinstance(one, kind) for one in value.values())
            else:
                fits = isinstance(value, type(empty[name])) or (empty[name] is None and isinstance(value, int | float))
            if not fits:
                raise ValueError(f"{name}: {value!r:.80}")
        counters = {name: Counter(values[name]) for name in _COUNTERS}
        return cls(**{**values, **counters})


def add_up(first: SourceStats, *others: SourceStats) -> SourceStats:
    """Return the sum of the statistics of parts of a source."""
    total = SourceStats(first.source)
    for part in (first, *others):
        total.add(part)
    return total


def most_frequent(counts: Mapping[str, int], most: int = 8) -> str:
    """Return the largest counts as text: "score 10, url 3 and 7 more"."""
    first = sorted(counts.items(), key=lambda item: -item[1])[:most]
    return _list(dict(first)) + (f" and {len(counts) - most} more" if len(counts) > most else "")


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def why_nothing_is_left(source_stats: Sequence[SourceStats]) -> str:
    """Return why every record was rejected, one line per reason."""
    reasons = [
        f"  {stats.source}: {count} x {reason} (first: {stats.first_rejected[reason]})"
        for stats in source_stats
        for reason, count in stats.rejected.items()
    ]
    reasons += [f"  {broken}" for stats in source_stats for broken in stats.broken]
    return "\n".join(["no dialogue is left:", *(reasons or ["  the sources are empty"])])


def loss_lines(stats: Mapping[str, Any]) -> list[str]:
    """Return a line for each reason why records of a source, or parts of them, are not trained on.

    `stats` is the result of `to_json`.
    """
    first = stats["first_rejected"]
    lines = [f"{records} x {reason} (first: {first[reason]})" for reason, records in stats["rejected"].items()]
    lines += [
        f"{parts} x {reason} in records that are kept (first: {first[reason]})"
        for reason, parts in stats["parts_rejected"].items()
    ]
    ignored = stats.get("ignored")
    return [*lines, *stats["broken"], *([f"ignored in records: {most_frequent(ignored)}"] if ignored else [])]
