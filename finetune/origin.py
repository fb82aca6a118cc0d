"""What an adapter was trained on: a note beside its weights, written with them, and read when it is merged or used."""

from dataclasses import asdict, dataclass
from pathlib import Path

from modeling.adapter_files import PEFT_CONFIG
from modeling.deltas import Onto
from modeling.errors import UserError
from modeling.files import read_json, write_json

NOTE = "finetune.json"
"""The note's file. An adapter made elsewhere has none."""


@dataclass(frozen=True)
class Origin:
    """What an adapter was trained on."""

    base: str
    """Folder or hub id."""
    revision: str | None = None
    instruct: bool = False
    """Whether a base gained `<end_of_utterance>`."""
    quantize: str | None = None
    """The recipe's `model.quantize`."""
    identity: str | None = None
    """`modeling.checkpoint.identity` of the base."""

    @property
    def onto(self) -> Onto:
        """What training added to."""
        return "nf4" if self.quantize == "nf4" else "full"

    def write(self, adapter: Path) -> None:
        write_json(adapter / NOTE, asdict(self))

    @classmethod
    def of(cls, adapter: Path, base: str | None = None) -> "Origin":
        """As the note says; of an adapter made elsewhere, as PEFT's own file says, or `base`. Raises UserError."""
        if note := read_json(adapter / NOTE):
            return cls(**note)
        config = read_json(adapter / PEFT_CONFIG)
        if config is None:
            found = "a model" if (adapter / "config.json").is_file() else "neither"
            raise UserError(f"{adapter}: expected an adapter folder ({NOTE} or {PEFT_CONFIG}), found {found}")
        if not (named := config.get("base_model_name_or_path") or base):
            raise UserError(f"{adapter}: does not say what base it was made for; name it: --base FOLDER_OR_HUB_ID")
        return cls(named, config.get("revision"))
