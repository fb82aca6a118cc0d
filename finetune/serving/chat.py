"""`finetune chat`: load a model, and talk to it on the terminal."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune.base_model import QUANTIZED, load_model, local_base
from finetune.console import to_json
from finetune.data.conversation import Dialogue, Image, Turn, assistant, user
from finetune.data.formats.placeholders import place_images
from finetune.data.images import Preprocessing, open_image
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import messages_at
from finetune.distributed.environment import device
from finetune.distributed.writable import check_place
from finetune.evaluation.generate import Assistant, generate
from finetune.export.adapter_metadata import resolve_model
from modeling.adapters import open_adapter
from modeling.atomic_files import atomic_write
from modeling.device import auto_dtype
from modeling.errors import UserError
from modeling.safetensors_io import fingerprint, read_checkpoint

HELP = (
    "/image FILE  add an image to the next question · /reset  start again · /save FILE  write the conversation · /quit"
)


def load_assistant(model: str, *, adapter: Path | None = None, quantize: str | None = None) -> Assistant:
    """Load a model for questions: an instruct model (folder or hub id), a run, an adapter, or a base and its `adapter`.

    `quantize`: "nf4" loads the matrices of decoder and gated blocks in 4 bits. Raises UserError.
    """
    named, cache = resolve_model(model, adapter), Path("runs") / QUANTIZED
    base = local_base(named.model, revision=named.revision)
    if named.fingerprint and named.fingerprint != fingerprint(read_checkpoint(base)):
        raise UserError(f"{named.adapter}: was trained on other weights than those of {named.model}")
    loaded = load_model(
        named.model,
        revision=named.revision,
        dtype=auto_dtype(),
        instruct=named.instruct,
        quantize=quantize,
        cache=cache,
    )
    wrapped = open_adapter(loaded.model, named.adapter) if named.adapter else loaded.model
    return Assistant(
        wrapped.to(device()), loaded.tokenizer, Preprocessing.of(loaded.processor.image_processor, named.model)
    )


@dataclass
class Conversation:
    """The turns so far, and the images that go with the next question."""

    assistant: Assistant
    max_new_tokens: int = 256
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Image] = field(default_factory=list)

    def show(self, path: str) -> None:
        """Add an image to the next question. Raises RecordError: it is not an image."""
        image = Image(Path(path).expanduser())
        open_image(image)
        self.waiting.append(image)

    def ask(self, question: str) -> str:
        """Return the model's answer, and keep both turns; "<image>" in a question marks the place of an added image.

        Raises RecordError: an empty question, or unequal numbers of places and images.
        """
        asked: tuple[Turn, ...] = (user(question),)
        if self.waiting:
            asked, _ = place_images(asked, self.waiting, ImageRoot(messages_at()))
        turns = [*self.turns, *asked]
        prompt = Dialogue(tuple(turns))
        (answer,) = generate(self.assistant, [prompt], max_new_tokens=self.max_new_tokens)
        self.turns = [*turns, assistant(answer.text or "...")]
        self.waiting = []
        return answer.text

    def reset(self) -> None:
        self.turns, self.waiting = [], []

    def save(self, path: str) -> None:
        """Write the conversation as one `messages` record."""
        record = {"messages": [{"role": turn.role, "content": _to_content(turn)} for turn in self.turns]}
        out = Path(path).expanduser()
        check_place("/save", out)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(out, to_json(record) + "\n")


def converse(
    conversation: Conversation, read: Callable[[], str], write: Callable[[str], None], note: Callable[[str], None]
) -> None:
    """Read questions and commands until /quit or EOFError; answers go to `write`, everything else to `note`."""
    note(HELP)
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
                note(f"({argument} goes with the next question)")
            elif command == "/reset":
                conversation.reset()
                note("(a new conversation)")
            elif command == "/save":
                conversation.save(argument)
                note(f"(written to {argument})")
            elif command.startswith("/"):
                note(HELP)
            elif line:
                write(conversation.ask(line))
        except (ValueError, OSError) as error:  # UserError, or a name that no file can have
            note(str(error))


def _to_content(turn: Turn) -> list[dict[str, str]]:
    return [
        {"type": "image", "image": str(part.source)} if isinstance(part, Image) else {"type": "text", "text": part}
        for part in turn.parts
    ]
