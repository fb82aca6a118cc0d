"""`format: auto`: what is recognised of files as people have them, and what is said where that cannot be."""

import base64
import io
import json
import re
import tarfile

import PIL.Image
import pytest
from data_files import write_files
from sources import make_source

from finetune.data.conversation import Dialogue, RecordError, assistant, user
from finetune.data.dataset import contents
from finetune.data.formats import FORMATS
from finetune.data.formats.recognise import Recognised, recognise_source
from finetune.data.images import open_image
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import resolve_source, say_if_documents, to_dialogue
from finetune.recipe import schema as recipe
from modeling.errors import UserError

SPOKEN = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Me."}]
MESSAGES = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}
ALPACA = {"instruction": "Who?", "input": "", "output": "Me."}


def picture(color="red", kind="PNG"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (9, 7), color).save(file, kind)
    return file.getvalue()


def write(folder, **contents):
    """Files of these names ("a__jsonl" is a.jsonl), of bytes, text, or records as JSON lines."""
    for name, content in contents.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, list):
            content = "".join(json.dumps(line) + "\n" for line in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def auto(path, **options):
    return make_source("auto", paths=(path,), **options)


def refusal(source):
    with pytest.raises(UserError) as caught:
        recognise_source(source)
    return str(caught.value).replace(f"{source.name}: ", "").replace(str(source.paths[0].parent), "")


def first_dialogue(source):
    """Of the source, its format recognised; images by their colour in the middle."""
    found = source.model_copy(update={"format": recognise_source(source).format})
    record_id, record = next(iter(FORMATS[found.format].read(found)))
    dialogue = to_dialogue(record_id, record, ImageRoot(found))
    turns = [[part if isinstance(part, str) else open_image(part).getpixel((4, 3)) for part in turn.parts]
             for turn in dialogue.turns]  # fmt: skip
    return found.format, turns


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{'a': 1}\n", "d.jsonl:1: not JSON: "),
        (b'{"a": 1},\n{"a": 2},\n', "d.jsonl:1: not JSON: Extra data"),
        (b'[{"a": 1}]\n', "d.jsonl:1: not an object: expected a JSON object, got list"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8: a byte order mark of UTF-16; expected UTF-8"),
        (b'{"a": "\xff"}\n', "d.jsonl:1: not UTF-8: "),
        (b"", "d.jsonl: no records"),
        (b"\n \n", "d.jsonl: no records"),
    ],
)
def test_auto_no_readable_record(tmp_path, content, why):
    said = refusal(auto(write(tmp_path, d__jsonl=content) / "d.jsonl"))
    assert said.startswith("format: auto: no record can be read\n  d.jsonl cannot be read: ")
    assert why in said
    assert "of no known format" not in said


def test_auto_several_formats(tmp_path):
    write(
        tmp_path, a__jsonl=[MESSAGES] * 3, b__jsonl=[ALPACA], c__jsonl=[MESSAGES], d__csv="file_name,text\na.png,A.\n"
    )
    assert refusal(auto(tmp_path)) == (
        "format: auto: its files are of several formats: a.jsonl, c.jsonl: messages; b.jsonl: alpaca; d.csv: pairs; "
        "give each format its own source"
    )


def test_auto_tie_and_mixture(tmp_path):
    write(tmp_path, tie__jsonl=[MESSAGES, ALPACA, ALPACA, MESSAGES], most__jsonl=[MESSAGES, MESSAGES, ALPACA, {"a": 1}])
    assert refusal(auto(tmp_path / "tie.jsonl")) == (
        "format: auto: of the first 4 records 2 are messages and 2 are alpaca; set format, or give each its own file "
        "and source"
    )
    note = "of its first 4 records, 1 like alpaca, 1 like no known format; all are read as messages"
    assert recognise_source(auto(tmp_path / "most.jsonl")) == Recognised("messages", (note,))


def test_auto_unreadable_file_beside_others(tmp_path):
    write(tmp_path, a__jsonl=[ALPACA], b__jsonl="{oops\n", c__jsonl="")
    found = recognise_source(auto(tmp_path))
    assert found.format == "alpaca"
    assert [note.partition(":")[0] for note in found.notes] == ["b.jsonl cannot be read", "c.jsonl cannot be read"]


def test_auto_equal_converters(tmp_path):
    write(tmp_path, a__jsonl=[{"conversations": SPOKEN, "image": "a.png"}], b__jsonl=[{"conversations": SPOKEN}])
    assert recognise_source(auto(tmp_path)) == Recognised("llava")


def test_auto_samples_all_files(tmp_path):
    write(tmp_path, **{f"{number:02}__jsonl": [MESSAGES if number < 20 else ALPACA] for number in range(31)})
    assert "30.jsonl: alpaca" in refusal(auto(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", "file_name,text\na.png,A cat.\n"),
        ("d.tsv", "file_name\ttext\na.png\tA cat.\n"),
        ("d.csv", "image,caption,width\na.png,A cat.,9\n"),
        ("d.csv", "path,text\na.png,A cat.\n"),
        ("d.jsonl", '{"image_path": "a.png", "captions": ["A cat.", "A pet."]}\n'),
        ("d.jsonl", json.dumps({"image": base64.b64encode(picture()).decode(), "text": "A cat."})),
        ("d.jsonl", json.dumps({"image_base64": base64.encodebytes(picture(kind="GIF")).decode(), "text": "A cat."})),
    ],
)
def test_auto_captions_in_tables_and_lines(tmp_path, name, content):
    write(tmp_path, **{name.replace(".", "__"): content}, a__png=picture())
    assert first_dialogue(auto(tmp_path / name)) == ("pairs", [[(255, 0, 0), "A cat."]])
    asked = [[(255, 0, 0), "What?"], ["A cat."]]
    assert first_dialogue(auto(tmp_path / name, prompt=("What?",))) == ("pairs", asked)


def shard(path, **members):
    """A tar of one sample: members "7.jpg", or "seg__png" for 7.seg.png; anything but bytes as JSON."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(f"7.{name.replace('__', '.')}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return auto(path)


RED, BLUE = picture(), picture("blue")
ASKED = [[(255, 0, 0), "\nWho?"], ["Me."]]


@pytest.mark.parametrize(
    ("name", "members", "turns"),
    [
        ("llava", {"png": RED, "json": {"id": "7", "image": "7.png", "conversations": SPOKEN}}, ASKED),
        ("llava", {"json": {"image": "train/elsewhere.png", "conversations": SPOKEN}, "png": RED}, ASKED),
        ("llava", {"png": RED, "json": {"conversations": SPOKEN}}, ASKED),
        ("llava", {"png": RED, "json": SPOKEN}, ASKED),
        ("llava", {"png": RED, "conversations__json": SPOKEN}, ASKED),
        ("messages", {"png": RED, "json": MESSAGES}, [[(255, 0, 0), "Who?"], ["Me."]]),
        ("messages", {"png": RED, "json": MESSAGES["messages"]}, [[(255, 0, 0), "Who?"], ["Me."]]),
        ("lrv", {"png": RED, "json": {"question": "Who?", "answer": True}}, [[(255, 0, 0), "Who?"], ["true"]]),
        ("llava", {"a__png": RED, "b__png": BLUE, "json": {"images": ["7.b.png", "7.a.png"],
                   "conversations": [{"from": "human", "value": "<image> or <image>?"}, SPOKEN[1]]}},
         [[(0, 0, 255), " or ", (255, 0, 0), "?"], ["Me."]]),
        ("pairs", {"png": RED, "txt": b"A cat."}, [[(255, 0, 0), "A cat."]]),
        ("pairs", {"png": RED, "json": {"caption": "A cat.", "image": "x/7.png"}}, [[(255, 0, 0), "A cat."]]),
    ],
)  # fmt: skip
def test_webdataset_dialogues(tmp_path, name, members, turns):
    assert first_dialogue(shard(tmp_path / "s.tar", **members)) == (name, turns)


def test_webdataset_image_count(tmp_path):
    source = shard(tmp_path / "s.tar", png=RED, json={"images": ["1.png", "2.png"], "conversations": SPOKEN})
    ((_, record),) = FORMATS["llava"].read(make_source("llava", paths=source.paths))
    assert isinstance(record, RecordError)
    assert str(record) == "image count: 2 images named in the JSON, 1 files in the sample"


@pytest.fixture
def classes(tmp_path):
    for name in ("wild_dog", "cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
        write(tmp_path / "train" / name, a__png=RED)
    return tmp_path / "train"


def test_auto_class_folders_need_prompt(classes):
    said = refusal(auto(classes))
    assert "images without captions, in folders such as cat; format: class_folders with prompt: " in said
    assert first_dialogue(auto(classes, prompt=("What?",))) == ("class_folders", [[(255, 0, 0), "What?"], ["cat"]])


def test_auto_class_folders_with_other_files(classes):
    write(classes, README__md="About.", labels__txt="cat\nwild_dog\n")
    write(classes / "cat", Thumbs__db=b"", _DS_Store=b"")
    (classes / ".hidden.json").write_text("{}")
    assert recognise_source(auto(classes, prompt=("What?",))).format == "class_folders"
    write(classes / "cat", a__txt="A cat.")
    assert recognise_source(auto(classes, prompt=("What?",))).format == "image_folder"


def test_class_folders(classes):
    write(classes, b__png=RED)
    records = [record for _, record in FORMATS["class_folders"].read(make_source("class_folders", paths=(classes,)))]
    assert [record.reason if isinstance(record, RecordError) else record["text"] for record in records] == [
        "no class", "cat", "wild dog",
    ]  # fmt: skip


def test_auto_image_file_alone(tmp_path):
    assert "expected folders of images, got a file" in refusal(auto(write(tmp_path, a__png=RED) / "a.png"))


def test_auto_unknown_keys_name_nearest_formats(tmp_path):
    said = refusal(auto(write(tmp_path, d__jsonl=[{"promt": "Who?", "completions": "Me."}]) / "d.jsonl"))
    assert said.startswith("format: auto: 1 records with the keys completions, promt are of no known format")
    assert "\n  prompt_completion reads prompt, completion, image|images|image_path|..., " in said
    assert "\n  formats: messages, svit, " in said


def source_of(path, **options):
    return recipe.Source(path=(str(path),), **options)


def test_columns_unknown_to_format(tmp_path):
    path = write(tmp_path, d__jsonl=[{"image": "a.png", "alt": "A cat."}]) / "d.jsonl"
    found = resolve_source(source_of(path, format="pairs", columns={"text": "alt"}))
    assert found.columns == {"text": "alt"}
    with pytest.raises(UserError, match="columns: format pairs reads no txt2; it reads image, images, "):
        resolve_source(source_of(path, format="pairs", columns={"txt2": "alt"}))


def test_auto_logs_format(tmp_path, capsys):
    write(tmp_path, d__jsonl=[{"image": "a.png", "alt": "A cat."}])
    source = {"path": str(tmp_path / "d.jsonl"), "columns": {"text": "alt"}, "prompt": ["What?", "Who?"]}
    made = recipe.Recipe.model_validate(
        {
            "model": {"base": "x"},
            "data": {"sources": [source], "prepared": str(tmp_path)},
            "training": {"steps": 1},
            "output": "x",
        }
    )
    (content,) = contents(made.data)["sources"]
    assert content["source"] == f"{tmp_path / 'd.jsonl'}[train]"
    assert len(content["sha256"]) == 64
    assert capsys.readouterr().err == ""


def test_prompt_needs_captions(tmp_path):
    path = write(tmp_path, d__jsonl=[MESSAGES]) / "d.jsonl"
    with pytest.raises(UserError, match=re.escape("prompt makes dialogues of captions (pairs, image_folder")):
        resolve_source(source_of(path, prompt="Who?"))
    for bad in ("", " ", 7, [], ["Who?", ""], [7]):
        if bad != []:
            with pytest.raises(ValueError, match="expected a prompt or a list of prompts"):
                source_of(path, prompt=bad)
    with pytest.raises(ValueError, match="got format messages"):
        source_of(path, prompt="Who?", format="messages")


def test_documents_alone_logged(capsys):
    def said(*sources):
        say_if_documents(sources)
        return capsys.readouterr().err

    captions, asked = make_source("pairs"), make_source("pairs", prompt=("What?",))
    assert "documents alone" in said(make_source("text"))
    assert "prompt:" not in said(make_source("text"))
    assert 'prompt: "Describe the image." in a source makes dialogues of its captions' in said(captions)
    assert said(asked) == said(captions, make_source("messages")) == ""


def test_preference_logged(tmp_path, capsys):
    records = [{"prompt": "Who?", "chosen": "Me.", "rejected": "You."}]
    path = write(tmp_path, d__jsonl=records) / "d.jsonl"
    assert resolve_source(source_of(path)).format == "preference"
    assert capsys.readouterr().err.count("the chosen answers are trained on, the rejected ones not") == 1
    assert first_dialogue(auto(path)) == ("preference", [["Who?"], ["Me."]])


def test_preference_chosen_without_prompt(tmp_path):
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    root = ImageRoot(make_source("preference", paths=(tmp_path,)))
    with pytest.raises(RecordError, match="prompt and chosen do not match"):
        to_dialogue("d:1", {"prompt": "Who?", "chosen": said, "rejected": said}, root)
    dialogue = to_dialogue("d:1", {"prompt": "Why?", "chosen": said, "rejected": said}, root)
    assert dialogue == Dialogue((user("Why?"), assistant("So.")))


@pytest.mark.parametrize(
    ("reason", "extra"),
    [
        ("multiple choice", {"choices": ["a cat", "a dog"], "answer": 1}),
        ("multiple choice", {"options": "(A) a cat (B) a dog", "answer": "A"}),
        ("image not read", {"page": "scans/7.png", "answer": "Me."}),
        ("image not read", {"page": {"bytes": RED, "path": None}, "answer": "Me."}),
        ("image not read", {"shown": RED, "answer": "Me."}),
    ],
)
def test_qa_context_not_dropped(tmp_path, reason, extra):
    root = ImageRoot(make_source("qa", paths=(tmp_path,)))
    with pytest.raises(RecordError) as caught:
        to_dialogue("d:1", {"question": "Who?", **extra}, root)
    assert caught.value.reason == reason
    (key,) = extra.keys() - {"answer"}
    assert f"`ignore: [{key}]` does without it" in caught.value.detail


def test_recognise_source(tmp_path):
    def told(path):
        return recognise_source(make_source("auto", paths=(path,))).format

    mimic = {"meta": {}, "data": {"I1": {"instruction": "Who?", "answer": "Me.", "image_ids": ["X"]}}}
    paths = write_files(
        tmp_path,
        a__txt="A.",
        b__jsonl={"text": "A."},
        c__json=[{"data": ["A?", "B."]}],
        d__json=mimic,
        e__json={"questions": [{"image_id": 9, "question": "What?", "question_id": 9000}]},
    )
    assert list(map(told, paths)) == ["text", "text", "ultrachat", "mimic_it", "vqa"]
