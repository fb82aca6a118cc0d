"""A folder that others load: rows as the datasets library gives them, whole or not there; the same on the hub."""

import io
import json
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from sources import make_source
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl.data_utils import is_conversational, prepare_multimodal_messages
from typer.testing import CliRunner

from finetune.cli import app
from finetune.data.chat_template import render
from finetune.data.images import digest
from finetune.data.prepare import prepare
from finetune.data.read_dialogues import read_dialogues, resolve_source
from finetune.data.stats import SourceStats
from finetune.export.dataset_folder import push_folder, require_repository, share, size_of, write_folder
from modeling.errors import UserError


def picture(color, kind="PNG"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (9, 7), color).save(file, kind)
    return file.getvalue()


FILES = {"cat.png": picture("red"), "dog.jpg": picture("blue", "JPEG")}
IMAGE, CAT = {"type": "image"}, {"type": "image", "image": "cat.png"}
DIALOGUES = [
    [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [CAT, {"type": "text", "text": "Who?"}, {"type": "image", "image": "dog.jpg"}, CAT],
        },
        {"role": "assistant", "content": "A cat.", "weight": 0},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ],
    [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}],
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    """(prepared dialogues and captions, the folder of their files)."""
    folder = tmp_path_factory.mktemp("data")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "said.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in DIALOGUES))
    (folder / "shown.jsonl").write_text(json.dumps({"image": "dog.jpg", "text": "A dog."}))
    sources = [make_source("messages", folder / "said.jsonl"), make_source("pairs", folder / "shown.jsonl")]
    settings = {"max_length": 500, "max_images": 4, "seed": 0, "folder": tmp_path_factory.mktemp("prepared")}
    return prepare(sources, tiny_tokenizer, **settings)[0], folder


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    """(the prepared examples, the folder that they were written to)."""
    prepared, data = made
    folder = tmp_path_factory.mktemp("shared") / "mine"
    held = prepared.select(np.array([2]))
    write_folder(
        {"train": prepared, "eval": held}, folder, "# mine\n", source_name=lambda name: name.replace(f"{data}/", "")
    )
    return prepared, folder


def text(words):
    return {"type": "text", "text": words}


def said(role, *content, weight=None):
    return {"role": role, "content": [{"text": None, **part} for part in content], "weight": weight}


def test_dataset_folder_rows(written):
    prepared, folder = written
    rows = datasets.load_from_disk(folder)
    assert {name: len(split) for name, split in rows.items()} == {"train": 3, "eval": 1}
    first, second, third = rows["train"].cast_column("images", datasets.List(datasets.Image(decode=False)))
    assert first["messages"] == [
        said("system", text("Be brief.")),
        said("user", IMAGE, text("Who?"), IMAGE, IMAGE),
        said("assistant", text("A cat."), weight=0),
        said("user", text("Sure?")),
        said("assistant", text("Yes.")),
    ]
    assert [image["bytes"] for image in first["images"]] == [FILES["cat.png"], FILES["dog.jpg"], FILES["cat.png"]]
    assert (second["messages"], second["images"]) == (
        [said("user", text("Hello?")), said("assistant", text("Hello."))],
        [],
    )
    assert third["messages"] == [said("document", IMAGE, text("A dog."))]
    assert [row["source"] for row in (first, second, third)] == [*["said.jsonl[train]"] * 2, "shown.jsonl[train]"]
    assert [row["record_id"] for row in (first, second, third)] == ["said.jsonl:1", "said.jsonl:2", "shown.jsonl:1"]
    for row, example in zip((first, second, third), prepared.examples, strict=True):
        assert row["input_ids"] == example.input_ids.tolist()
        assert row["labels"] == example.labels.tolist()
    assert rows["eval"][0] == rows["train"][2]


def test_dataset_folder_images_decode(written):
    _, folder = written
    cat, dog, _ = datasets.load_from_disk(folder)["train"][0]["images"]
    assert (cat.format, cat.size, cat.getpixel((4, 3))) == ("PNG", (9, 7), (255, 0, 0))
    assert (dog.format, dog.size) == ("JPEG", (9, 7))


def test_dataset_folder_in_the_form_of_trl(written):
    """TRL puts the images into the messages, as its trainers do before they apply a model's chat template."""
    row = datasets.load_from_disk(written[1])["train"][0]
    assert is_conversational(row)
    filled = prepare_multimodal_messages(row["messages"], row["images"])
    shown = [part["image"].format for message in filled for part in message["content"] if part["type"] == "image"]
    assert shown == ["PNG", "JPEG", "PNG"]
    parts = "{% for part in message.content %} {{ part.text or '<image>' }}{% endfor %}"
    template = "{% for message in messages %}{{ message.role }}:" + parts + "/{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()), chat_template=template)
    assert tokenizer.apply_chat_template(filled, tokenize=False) == (
        "system: Be brief./user: <image> Who? <image> <image>/assistant: A cat./user: Sure?/assistant: Yes./"
    )


def test_dataset_folder_is_read_again_as_the_same(written):
    """The toolkit reads its own folder: the same dialogues, images and supervision."""
    prepared, folder = written
    stats = SourceStats("again")
    source = resolve_source(make_source("auto", folder, ignore=("input_ids", "labels", "record_id")))
    assert source.format == "messages"
    again = [dialogue for _, (dialogue,) in read_dialogues(source, stats)]
    for before, after in zip(list(prepared.dialogues)[:2], again, strict=True):
        assert render(after).pieces == render(before).pieces
        assert [digest(image) for image in after.images] == [digest(image) for image in before.images]
    assert stats.loss == "1 of 3 records rejected: unknown role 1"  # a document is no dialogue


def test_dataset_folder_is_whole_or_not_there(made, tmp_path):
    prepared, data = made
    folder = tmp_path / "mine"
    (data / "dog.jpg").rename(data / "away.jpg")
    try:
        with pytest.raises(UserError, match=r"said\.jsonl:1: .*dog\.jpg was there when it was prepared: missing image"):
            write_folder({"train": prepared}, folder, "")
    finally:
        (data / "away.jpg").rename(data / "dog.jpg")
    assert list(tmp_path.iterdir()) == []
    write_folder({"train": prepared}, folder, "")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="mine exists already, and nothing is overwritten"):
        write_folder({"train": prepared}, folder, "")


def test_size_of_what_is_shared(made):
    prepared, _ = made
    cat, dog = len(FILES["cat.png"]), len(FILES["dog.jpg"])
    assert size_of(prepared) == {"examples": 3, "images": 4, "image_bytes": 2 * cat + 2 * dog}


class Hub:
    """Stands in for the hub: what is asked of it, in order, and what it holds."""

    def __init__(self, monkeypatch, *, files=None, private=True, token=True):
        self.calls, self.pushed = [], None

        def whoami(api):
            if not token:
                raise OSError("Token is required, but no token found.")

        def repo_info(api, name, repo_type):
            if files is None:
                raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
            return SimpleNamespace(private=private)

        def create_repo(api, name, repo_type, private, exist_ok):
            self.calls.append(("create", name, repo_type, private))
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_file(api, path_or_fileobj, path_in_repo, repo_id, repo_type):
            self.calls.append(("upload", repo_id, path_in_repo, path_or_fileobj.read_text()))

        def push_to_hub(rows, repo_id, private):
            self.calls.append(("push", repo_id, {name: len(split) for name, split in rows.items()}, private))

        for function in (whoami, repo_info, create_repo, upload_file):
            monkeypatch.setattr(HfApi, function.__name__, function)
        monkeypatch.setattr(HfApi, "list_repo_files", lambda *_, **__: files)
        monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", push_to_hub)


def test_push(written, monkeypatch):
    hub = Hub(monkeypatch)
    require_repository("mine", private=True)
    assert hub.calls == []
    push_folder(written[1], "mine", private=True)
    assert hub.calls == [
        ("create", "mine", "dataset", True),
        ("upload", "me/mine", "README.md", "# mine\n"),
        ("push", "me/mine", {"train": 3, "eval": 1}, True),
    ]


@pytest.mark.parametrize(
    ("state", "private", "why"),
    [
        ({"files": ["README.md", "data/train.parquet"]}, True, r"holds files already \(data/train.parquet\)"),
        ({"files": [".gitattributes"], "private": False}, True, "expected a private repository, and it is public"),
        ({"files": [], "private": True}, False, "expected a public repository, and it is private"),
        ({"token": False}, True, r"no token found.*\n  expected a name such as me/mine, a token that may write"),
    ],
)
def test_push_refused(monkeypatch, state, private, why):
    hub = Hub(monkeypatch, **state)
    with pytest.raises(UserError, match=why):
        require_repository("me/mine", private=private)
    assert hub.calls == []


def test_push_into_an_empty_repository(monkeypatch):
    Hub(monkeypatch, files=[".gitattributes", "README.md"])
    require_repository("me/mine", private=True)


def test_push_without_a_folder_leaves_none(made, monkeypatch, tmp_path):
    hub = Hub(monkeypatch)
    options = {"private": False, "dry_run": False, "scratch": tmp_path, "source_name": str}
    share({"train": made[0], "eval": made[0].select(np.arange(0))}, "# mine\n", to=None, push="me/mine", **options)
    assert hub.calls[-1] == ("push", "me/me/mine", {"train": 3}, False)
    assert list(tmp_path.iterdir()) == []


def test_share_needs_room(made, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    options = {"push": None, "private": True, "dry_run": False, "scratch": tmp_path, "source_name": str}
    with pytest.raises(UserError, match=r"are free, and the images need .* until the folder is written"):
        share({"train": made[0]}, "", to=tmp_path / "mine", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_share(made, tmp_path):
    none = made[0].select(np.arange(0))
    options = {"push": None, "private": True, "dry_run": False, "scratch": tmp_path, "source_name": str}
    with pytest.raises(UserError, match="nothing to share"):
        share({"train": none, "eval": none}, "", to=tmp_path / "mine", **options)


def test_prepare_to_folder(recipe_file, tmp_path):
    """The command: a dry run says what would go, and writes nothing; the folder has the card, without local paths."""
    to = tmp_path / "mine"
    dry = CliRunner().invoke(app, ["prepare", str(recipe_file), "--to", str(to), "--dry-run", "--json"])
    assert (dry.exit_code, to.exists()) == (0, False)
    assert "of images, with the dataset card: would go to " in dry.stderr
    done = CliRunner().invoke(app, ["prepare", str(recipe_file), "--to", str(to), "--json"])
    assert done.exit_code == 0, done.output
    shared = json.loads(done.stdout)["shared"]
    assert shared == {**json.loads(dry.stdout)["shared"], "dry_run": False}
    assert {name: one["examples"] for name, one in shared["splits"].items()} == {"train": 10, "eval": 2}
    rows = datasets.load_from_disk(to)
    assert {name: len(split) for name, split in rows.items()} == {"train": 10, "eval": 2}
    assert set(rows["train"]["source"]) == {"dialogues.jsonl[train]"}
    card = (to / "README.md").read_text()
    assert "| dialogues.jsonl\\[train\\] | 12 | 12 | 0 |" in card
    assert str(tmp_path) not in card.replace("\\", "")
    again = CliRunner().invoke(app, ["prepare", str(recipe_file), "--to", str(to)])
    assert again.exit_code == 1
    assert "exists already, and nothing is overwritten" in again.stderr


@pytest.mark.parametrize("options", [["--public"], ["--dry-run"], ["--shard", "1/2", "--to", "mine"]])
def test_prepare_options_alone(options):
    done = CliRunner().invoke(app, ["prepare", "quickstart", *options])
    assert (done.exit_code, done.stderr.split()[0].rstrip(":")) == (1, options[0])
