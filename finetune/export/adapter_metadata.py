"""Metadata of an adapter (its base, precision and hashes): finetune.json, beside the adapter's weights."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from modeling.adapter_files import PEFT_CONFIG, PEFT_WEIGHTS, TRAINED_FILE, is_adapter, require_adapter
from modeling.adapter_weights import BasePrecision
from modeling.atomic_files import digests, is_text, read_json, write_json
from modeling.config import is_folder
from modeling.errors import UserError

NOTE = "finetune.json"
"""Name of the metadata file. An adapter from another toolkit has none."""

SHA256 = "sha256"
"""Key of the weight files' hashes, which reveal damaged files."""

_REPAIR = "copy the adapter again; or delete this file, and name the base: --base FOLDER_OR_HUB_ID"


@dataclass(frozen=True)
class AdapterMetadata:
    """The content of finetune.json: the model that an adapter was trained on."""

    base: str
    """Folder or hub id."""
    revision: str | None = None
    instruct: bool = False
    """Whether `<end_of_utterance>` was added to the base."""
    quantize: str | None = None
    """The recipe's `model.quantize`."""
    fingerprint: str | None = None
    """`modeling.safetensors_io.fingerprint` of the base."""

    @property
    def base_precision(self) -> BasePrecision:
        """Return the precision of the base in training: the released weights ("full"), or these in NF4."""
        return "nf4" if self.quantize == "nf4" else "full"

    def write(self, adapter: Path) -> None:
        weights = [adapter / name for name in (PEFT_WEIGHTS, TRAINED_FILE) if (adapter / name).is_file()]
        write_json(adapter / NOTE, {**asdict(self), SHA256: digests(weights)})

    @classmethod
    def read(cls, adapter: Path, base: str | None = None) -> "AdapterMetadata":
        """Read finetune.json, or else PEFT's own config (for an adapter from another toolkit), or else use `base`.

        Raises UserError: no base is known, or the weights are no longer those that finetune.json was written with.
        """
        if (note := read_json(adapter / NOTE, repair=_REPAIR)) is not None:
            return cls._of_note(adapter, note)
        require_adapter(adapter)
        config = read_json(adapter / PEFT_CONFIG, repair="fetch or save the adapter again") or {}
        named, revision = config.get("base_model_name_or_path") or base, config.get("revision")
        if named is None:
            raise UserError(f"{adapter}: does not say what base it was made for; name it: --base FOLDER_OR_HUB_ID")
        for key, value in (("base_model_name_or_path", named), ("revision", revision)):
            if not (is_text(value) or (key == "revision" and value is None)):
                raise UserError(f"{adapter / PEFT_CONFIG}: {key}: expected a text, got {repr(value)[:80]}")
        return cls(named, revision)

    @classmethod
    def _of_note(cls, adapter: Path, note: dict[str, Any]) -> "AdapterMetadata":
        hashes = note.pop(SHA256, {})
        if unknown := sorted(note.keys() - {field.name for field in fields(cls)}):
            raise UserError(f"{adapter / NOTE}: unknown key {unknown[0][:80]!r}; {_REPAIR}")
        for key in fields(cls):
            value = note.get(key.name, None if key.name == "base" else key.default)
            right = isinstance(value, bool) if key.name == "instruct" else value is None or is_text(value)
            if not right or (key.name == "base" and value is None):
                raise UserError(f"{adapter / NOTE}: {key.name}: unexpected {repr(value)[:80]}; {_REPAIR}")
        if note.get("quantize") not in (None, "nf4"):
            raise UserError(
                f"{adapter / NOTE}: quantize: expected nf4 or null, got {note['quantize'][:80]!r}; {_REPAIR}"
            )
        if not isinstance(hashes, dict) or not hashes.keys() <= {PEFT_WEIGHTS, TRAINED_FILE}:
            raise UserError(f"{adapter / NOTE}: {SHA256}: expected hashes of weight files; {_REPAIR}")
        for name, digest in digests(adapter / name for name in hashes).items():
            if digest != hashes[name]:
                raise UserError(
                    f"{adapter / name}: is not the file that training left: its SHA-256 is another; copy the adapter "
                    f"again, or, if you changed it yourself, delete {SHA256} from {NOTE}"
                )
        metadata = cls(**note)
        beside = adapter.parent / Path(metadata.base).name
        if (
            not is_folder(metadata.base) and is_folder(str(beside)) and (beside / "config.json").is_file()
        ):  # the run folder, with the base in it, was moved
            return cls(**{**note, "base": str(beside)})
        return metadata


@dataclass(frozen=True)
class NamedModel:
    """The model that a user named, and the adapter to load on it."""

    model: str
    """Folder or hub id."""
    adapter: Path | None = None
    revision: str | None = None
    instruct: bool = False
    """Whether `<end_of_utterance>` is added to the base."""
    fingerprint: str | None = None
    """Fingerprint of the base that the adapter was trained on, where it is known."""


def resolve_model(name: str, adapter: Path | None = None) -> NamedModel:
    """Resolve a name: a model, a run folder, an adapter folder, or a base with its `adapter`.

    A run folder means its merged model or, before merging, its base and adapter. Raises UserError.
    """
    folder = Path(name)
    is_model = not is_folder(name) or (folder / "config.json").is_file()
    if adapter is not None:
        inner = adapter / "adapter" if (adapter / "recipe.yaml").is_file() else adapter
        require_adapter(inner)
        if not is_model:
            raise UserError(f"{name}: expected the base of {inner}, a model; found none; or name the adapter alone")
        return _on_base(name, inner)
    if is_model:
        return NamedModel(name)
    if (folder / "recipe.yaml").is_file():
        if (folder / "merged" / "config.json").is_file():
            return NamedModel(str(folder / "merged"))
        if not is_adapter(folder / "adapter"):
            raise UserError(f"{folder}: a run folder in which nothing is trained yet; first: finetune train RECIPE")
        return _on_base(None, folder / "adapter")
    if is_adapter(folder) or (folder / NOTE).is_file():
        return _on_base(None, folder)
    raise UserError(f"{folder}: expected a model (config.json), an adapter or a run folder; found none of them")


def _on_base(base: str | None, adapter: Path) -> NamedModel:
    """Return an adapter with the named base, or with the base that it was trained on."""
    metadata = AdapterMetadata.read(adapter, base)
    instruct = metadata.instruct if (adapter / NOTE).is_file() else True
    revision = None if base else metadata.revision
    return NamedModel(base or metadata.base, adapter, revision, instruct, metadata.fingerprint)
