"""`finetune generate`: a file of prompts -> the same records with answers; each answer is saved as soon as it is made.

OUT.journal   the command and its model, then one line per answer: {"record": 7, "answer": "A cat.", "stopped": true}
OUT           written when all are answered: one line per record, in order; then the journal is deleted
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.console import Track, silently, to_json
from finetune.data.chat_template import render
from finetune.data.conversation import Dialogue, RecordError
from finetune.data.formats.read_records import read_records
from finetune.data.images import open_image
from finetune.data.io.image_roots import ImageRoot
from finetune.data.io.source_files import files_of, fingerprint
from finetune.data.read_dialogues import messages_at, open_images, to_dialogue
from finetune.data.tokenize import tokenize
from finetune.distributed.writable import check_place
from finetune.evaluation.generate import Assistant, generate_each
from finetune.export.adapter_metadata import resolve_model
from finetune.recipe.schema import Source
from modeling.atomic_files import partial_of, put_in_place
from modeling.errors import UserError

AT_ONCE = 1024
"""Number of prompts that are read at once, and put into batches of similar length."""

ADDED_KEYS = ("answer", "stopped", "error")
"""Keys that are added to a record; they replace its own keys of the same names."""


def count_prompts(prompts: Path, out: Path) -> int:
    """Return the number of records in a file. Raises UserError: its answers cannot be written to `out`."""
    check_place("OUT", out)
    source = messages_at(prompts)
    if any(out.exists() and out.samefile(file) for file in files_of(source)):
        raise UserError(f"{out}: would be written over its own prompts; name another file for the answers")
    return sum(1 for _ in read_records(source))


def identify_model(model: str, *, adapter: Path | None, quantize: str | None) -> dict[str, Any]:
    """Return the model's identity for the journal: its name, and size and date of its weight files."""
    named = resolve_model(model, adapter)
    folders = [Path(named.model), *([named.adapter] if named.adapter else [])]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    stats = [(str(file), file.stat()) for file in files]
    weights = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return {"model": model, "adapter": adapter and str(adapter), "quantize": quantize, "weights": weights}


def answer_file(
    assistant: Assistant,
    prompts: Path,
    out: Path,
    *,
    max_new_tokens: int,
    model: Mapping[str, Any],
    batch_size: int = 32,
    track: Track = silently,
) -> dict[str, int]:
    """Write a line of `out` for every record of `prompts`: the record, with "answer" and "stopped", or with "error".

    Records are in the format `messages`, and end with the user. After an interruption, the same call continues.
    `model` is the result of `identify_model`.
    """
    source = messages_at(prompts)
    command = {**model, "max_new_tokens": max_new_tokens, "prompts": fingerprint(source)}
    out.parent.mkdir(parents=True, exist_ok=True)
    journal = out.with_name(f"{out.name}.journal")
    found = _open_journal(journal, command)
    options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with journal.open("a", encoding="utf-8") as lines:
        for number, made in track(_answers(assistant, source, found, **options), "answer"):
            if number not in found and "answer" in made:
                lines.write(to_json({"record": number, **made}) + "\n")
                lines.flush()
            found[number] = made
    _write_whole(out, source, found)
    journal.unlink()
    errors = sum("error" in made for made in found.values())
    return {"records": len(found), "answered": len(found) - errors, "errors": errors}


def _open_journal(journal: Path, command: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return record number -> answer from the journal of the same command, or begin a new journal.

    Raises UserError: the journal is of another command.
    """
    head = to_json(command)
    lines = journal.read_bytes().splitlines(keepends=True) if journal.is_file() else []
    if not lines or not lines[0].endswith(b"\n"):
        journal.write_text(f"{head}\n", encoding="utf-8")
        return {}
    if lines[0] != f"{head}\n".encode():
        raise UserError(
            f"{journal}: holds the answers of another command, or to prompts that have changed since; give that "
            f"command again, delete the journal, or name another file for these answers"
        )
    found = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.endswith(b"\n"):  # cut off while it was written
            with journal.open("r+b") as opened:
                opened.truncate(sum(map(len, lines[: number - 1])))
            break
        try:
            made = json.loads(line)
            record, answer, stopped = made["record"], made["answer"], made["stopped"]
            if not (type(record) is int and isinstance(answer, str) and isinstance(stopped, bool)):
                raise ValueError(line)
            found[record] = {"answer": answer, "stopped": stopped}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{journal}: line {number} is no answer: {line!r:.80}; delete the journal") from error
    return found


def _answers(
    assistant: Assistant, source: Source, found: Mapping[int, dict[str, Any]], **options: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (record number, keys to add), in the order in which answers are made."""
    waiting: list[tuple[int, Dialogue]] = []

    def ask() -> Iterator[tuple[int, dict[str, Any]]]:
        for index, answer in generate_each(assistant, [prompt for _, prompt in waiting], **options):
            yield waiting[index][0], {"answer": answer.text, "stopped": answer.stopped}

    root = ImageRoot(source)
    for number, (record_id, record) in enumerate(read_records(source)):
        if number in found:
            yield number, found[number]
            continue
        try:
            prompt = to_dialogue(record_id, record, root, prompt=True)
            open_images(prompt, open_image)
            tokenize(render(prompt), assistant.tokenizer)
            waiting.append((number, prompt))
        except RecordError as error:
            yield number, {"error": str(error)}
        if len(waiting) == AT_ONCE:
            yield from ask()
            waiting = []
    yield from ask()


def _write_whole(out: Path, source: Source, found: Mapping[int, dict[str, Any]]) -> None:
    """Write all records with their answers; a record that cannot be written as JSON is replaced by its id."""
    partial = partial_of(out)
    with partial.open("w", encoding="utf-8") as lines:
        for number, (record_id, record) in enumerate(read_records(source)):
            line = None
            if not isinstance(record, RecordError):
                kept = {key: value for key, value in record.items() if key not in ADDED_KEYS}
                with suppress(TypeError, ValueError, RecursionError):
                    line = to_json({**kept, **found[number]})
            lines.write((line or to_json({"record_id": record_id, **found[number]})) + "\n")
    put_in_place(partial, out)
