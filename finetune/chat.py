"""A model -> a conversation, or answers to a file of prompts: loops around generate."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.base import QUANTIZED, load_model
from finetune.data.dialogue import Dialogue, Image, RecordError, Turn, assistant, user
from finetune.data.images import Preprocessing, open_image
from finetune.data.records import to_dialogue
from finetune.data.sources.files import read_records
from finetune.data.sources.roots import ImageRoot
from finetune.data.sources.source import Source
from finetune.data.tracking import Track, silently
from finetune.device import auto_dtype, device
from finetune.generate import Assistant, generate
from modeling.adapters import open_adapter

HELP = (
    "/image FILE  add an image to the next question · /reset  start again · /save FILE  write the conversation · /quit"
)


def open_assistant(model: str, *, adapter: Path | None = None, quantize: str | None = None) -> Assistant:
    """A merged model or an instruct one (folder or hub id), or a base with its `adapter`. Raises UserError."""
    cache = Path("runs") / QUANTIZED
    loaded = load_model(model, dtype=auto_dtype(), instruct=adapter is not None, quantize=quantize, cache=cache)
    wrapped = open_adapter(loaded.model, adapter) if adapter else loaded.model
    return Assistant(wrapped.to(device()), loaded.tokenizer, Preprocessing.of(loaded.processor.image_processor, model))


@dataclass
class Conversation:
    """Turns so far, and the images waiting for the next question."""

    assistant: Assistant
    max_new_tokens: int = 256
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Image] = field(default_factory=list)

    def show(self, path: str) -> None:
        """Add an image to the next question. Raises RecordError if it is none."""
        image = Image(Path(path).expanduser())
        open_image(image)
        self.waiting.append(image)

    def ask(self, question: str) -> str:
        """The model's answer, remembered. Raises RecordError for an empty question."""
        turns = [*self.turns, user(*self.waiting, question)]
        (answer,) = generate(self.assistant, [Dialogue(tuple(turns))], max_new_tokens=self.max_new_tokens)
        self.turns = [*turns, assistant(answer.text or "...")]
        self.waiting = []
        return answer.text

    def reset(self) -> None:
        self.turns, self.waiting = [], []

    def save(self, path: str) -> None:
        """Write the conversation as one `messages` record."""
        record = {"messages": [{"role": turn.role, "content": _content(turn)} for turn in self.turns]}
        Path(path).expanduser().write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")


def converse(conversation: Conversation, read: Callable[[], str], write: Callable[[str], None]) -> None:
    """Questions and commands from `read`, until it ends (EOFError) or /quit; answers to `write`."""
    write(HELP)
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/image":
                conversation.show(argument)
                write(f"({argument} goes with the next question)")
            elif command == "/reset":
                conversation.reset()
                write("(a new conversation)")
            elif command == "/save":
                conversation.save(argument)
                write(f"(written to {argument})")
            elif command.startswith("/"):
                write(HELP)
            elif line:
                write(conversation.ask(line))
        except (RecordError, OSError) as error:
            write(str(error))


def answer_file(
    assistant: Assistant,
    prompts: Path,
    out: Path,
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    track: Track = silently,
) -> dict[str, int]:
    """A line of `out` for every record of `prompts` (`messages`, ending with the user): it, and "answer" or "error"."""
    records = list(_read_prompts(prompts))
    asked = [index for index, (_, prompt) in enumerate(records) if isinstance(prompt, Dialogue)]
    answers = generate(
        assistant,
        [prompt for _, prompt in records if isinstance(prompt, Dialogue)],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        track=track,
    )
    by_index = dict(zip(asked, answers, strict=True))
    partial = out.with_name(f"{out.name}.partial")
    with partial.open("w", encoding="utf-8") as lines:
        for index, (record, prompt) in enumerate(records):
            answer = by_index.get(index)
            found = {"answer": answer.text, "stopped": answer.stopped} if answer else {"error": str(prompt)}
            lines.write(json.dumps({**record, **found}, ensure_ascii=False) + "\n")
    partial.replace(out)
    return {"records": len(records), "answered": len(asked), "errors": len(records) - len(asked)}


def _read_prompts(path: Path) -> Iterator[tuple[dict[str, Any], Dialogue | RecordError]]:
    source = Source("messages", paths=(path,))
    root = ImageRoot(source)
    for place, record in read_records(source):
        shown = {"place": place} if isinstance(record, RecordError) else record
        try:
            dialogue = to_dialogue(place, record, root, prompt=True)
            for image in dialogue.images:
                open_image(image)
        except RecordError as error:
            yield shown, error
            continue
        yield shown, dialogue


def _content(turn: Turn) -> list[dict[str, str]]:
    return [
        {"type": "image", "image": str(part.source)} if isinstance(part, Image) else {"type": "text", "text": part}
        for part in turn.parts
    ]
