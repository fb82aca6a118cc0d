"""Stand-ins for the files that recipes/*_mixture_*.yaml name: a handful of records each, in the published formats."""

import base64
import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet

RECIPES = Path(__file__).parents[2] / "recipes"
MIXTURES = ("idefics-9b_mixture_128x80gb.yaml", "idefics-80b_mixture_384x80gb.yaml")


def beside_files(name, folder):
    """A recipe's path; a mixture, whose data is not in the repository, is copied beside stand-ins of its files."""
    if name not in MIXTURES:
        return RECIPES / name
    if not (folder / "data").is_dir():
        for write in (m3it, lrv, llava, llavar, svit, mimic_it, ultrachat, pairs, obelics):
            write(folder / "data")
    return Path(shutil.copy(RECIPES / name, folder))


def m3it(data):
    """13 records: 8 questions about one image, which has the bytes of another file in each, and 5 captions."""
    asked = [record("Answer the question.", f"how many birds {n}?", f"{n} of them", "birds") for n in range(8)]
    captioned = [record("Describe the image briefly.", "", f"a kite over hill {n}", f"hill{n}") for n in range(5)]
    write_parquet(data / "M3IT" / "data" / "train-00000-of-00002.parquet", asked)
    write_parquet(data / "M3IT" / "data" / "train-00001-of-00002.parquet", captioned)


def record(instruction, inputs, outputs, image):
    picture = {"bytes": draw(image), "path": None}
    return {"instruction": instruction, "inputs": inputs, "outputs": outputs, "image": picture}


def lrv(data):
    """12 records: 9 questions about one image, 3 about another."""
    asked = [("2392588", n) for n in range(9)] + [("2316934", n) for n in range(3)]
    records = [
        {
            "image_id": image,
            "question": f"Is there a red car behind tree {n}?",
            "answer": f"No, behind tree {n} stands a bench.",
            "task": "negative" if n % 2 else "positive",
        }
        for image, n in asked
    ]
    write_json(data / "LRV" / "filter_cap1.json", records)
    save_images(data / "LRV" / "image", "2392588.jpg", "2316934.jpg")


def llava(data):
    """6 records, half of them with the image after the question."""
    names = [f"{n:012}" for n in (33471, 52846, 334872, 319154, 398214, 520873)]
    records = [
        llava_record(name, "What colour is the bus?\n<image>" if index % 2 else "<image>\nWhat colour is the bus?")
        for index, name in enumerate(names)
    ]
    write_json(data / "llava_instruct_150k.json", records)
    save_images(data / "coco" / "train2017", *(f"{name}.jpg" for name in names))


def llava_record(name, question):
    later = [("human", "Is it moving?"), ("gpt", "No, it is parked.")]
    said = [("human", question), ("gpt", f"The bus is white, with the number {name}."), *later]
    talk = [{"from": speaker, "value": value} for speaker, value in said]
    return {"id": name, "image": f"{name}.jpg", "conversations": talk}


def llavar(data):
    """5 records."""
    names = [f"{n:012}" for n in (1001, 1002, 1003, 1004, 1005)]
    records = [llava_record(name, "<image>\nWho wrote the book on this cover?") for name in names]
    write_json(data / "LLaVAR" / "llavar_15k.json", records)
    save_images(data / "LLaVAR" / "finetune", *(f"{name}.jpg" for name in names))


def svit(data):
    """7 records: 3 of 3 conversations of 5 questions, 2 of 15 questions, 2 descriptions; images in either folder."""
    kinds = {
        "conversation": [(2410153, [5, 5, 5]), (1, [5, 5, 5]), (2, [5, 5, 5])],
        "complex_reasoning": [(2410153, [15]), (1, [15])],
        "detail_description": [(2, [1]), (3, [1])],
    }
    for kind, about in kinds.items():
        records = [
            {"image_id": image, "conversations": [{"content": svit_talk(kind, count)} for count in counts]}
            for image, counts in about
        ]
        write_json(data / "SVIT" / f"{kind}.json", records)
    save_images(data / "VG_100K", "2410153.jpg", "1.jpg")
    save_images(data / "VG_100K_2", "2.jpg", "3.jpg")


def svit_talk(kind, count):
    return [
        {"from": speaker, "value": f"{kind} {number}{mark}"}
        for number in range(count)
        for speaker, mark in (("user", "?"), ("gpt", "."))
    ]


def mimic_it(data):
    """4 and 5 records, each about two images."""
    for name, count in (("SD", 4), ("CGD", 5)):
        instructions = {
            f"{name}_INS_{n:05}": {
                "instruction": "What is different in the second image?",
                "answer": f"Truck {n} is gone.",
                "image_ids": [f"{name}_IMG_{n}_1", f"{name}_IMG_{n}_2"],
                "rel_ins_ids": [],
            }
            for n in range(count)
        }
        meta = {"version": "0.0.1", "time": "2023-06", "author": "stand-in"}
        write_json(data / "MIMIC-IT" / f"{name}_instructions.json", {"meta": meta, "data": instructions})
        shown = [image for instruction in instructions.values() for image in instruction["image_ids"]]
        encoded = {image: base64.b64encode(draw(image)).decode() for image in shown}
        write_json(data / "MIMIC-IT" / f"{name}.json", encoded)


def ultrachat(data):
    """10 records in two files, of 2 turns each but for one of 9."""
    for file in range(2):
        turns = {"4": 9}
        numbers = [str(5 * file + n) for n in range(5)]
        lines = [{"id": n, "data": ["How can I sleep better?", f"Read page {n}."] * turns.get(n, 2)} for n in numbers]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write(data / "UltraChat" / f"train_{file}.jsonl", text.encode())


def pairs(data):
    """6 records in a webdataset shard."""
    path = data / "pairs" / "00000.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as shard:
        for n in range(6):
            key, caption = f"{n:09}", f"a painting of lighthouse {n}"
            beside = {"caption": caption, "url": f"https://example.org/{n}.jpg", "key": key, "status": "success"}
            add_member(shard, f"{key}.jpg", draw(f"pair{n}"))
            add_member(shard, f"{key}.json", json.dumps(beside).encode())
            add_member(shard, f"{key}.txt", caption.encode())


def add_member(shard, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))


def obelics(data):
    """8 records; in the place of its URLs stand files."""
    folder = data / "OBELICS" / "opt_out_docs_removed"
    records = [
        {
            "images": [f"page{n}.jpg", None, None],
            "metadata": "[{}, null, null]",
            "general_metadata": json.dumps({"url": f"https://example.org/{n}"}),
            "texts": [None, f"A walk to village {n}.\n\nIt rained.", "The end."],
        }
        for n in range(8)
    ]
    write_parquet(folder / "train-00000-of-00001.parquet", records)
    save_images(folder, *(f"page{n}.jpg" for n in range(8)))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_json(path, value):
    write(path, json.dumps(value).encode())


def write_parquet(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)


def save_images(folder, *names):
    for name in names:
        write(folder / name, draw(f"{folder.name}/{name}"))


def draw(name):
    """A plain JPEG of a colour of its own."""
    red, green, blue, _ = zlib.crc32(name.encode()).to_bytes(4, "big")
    file = io.BytesIO()
    PIL.Image.new("RGB", (20, 16), (red, green, blue)).save(file, "JPEG")
    return file.getvalue()
