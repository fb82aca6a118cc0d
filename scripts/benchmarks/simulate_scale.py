"""What measured rates make of 1 million, 100 million and 141 million web documents, on one node and on sixteen.

    python scripts/benchmarks/preparing.py && python scripts/benchmarks/streaming.py
    python scripts/benchmarks/simulate_scale.py

Arithmetic, not a measurement: it reads the two scripts' JSON, and prints its assumptions beside what follows from them.
A document is one of OBELICS (141,047,697 documents, 353 million images, 114.9 billion tokens): text in Parquet, images
in the tar archives into which img2dataset has downloaded them. The time of each stage is work / speed:

downloading  img2dataset on all nodes
listing      the headers of all archives are read once, by the cores of one node, to find images by their URLs
hashing      the text is read once, by all nodes; archives count by their names and sizes
converting   each node opens and hashes the images of its shards, and tokenises, on all cores, or waits for storage
joining      one node copies all parts into one set: what does not get faster with a second worker, or its disk
opening      at each later start, one process reads and checks the set
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DOCUMENTS, IMAGES, TOKENS = 141_047_697, 353e6, 114.9e9
"""Of OBELICS, as its authors count."""

PREPARED_PIXELS, STREAMED_PIXELS = 224, 512
"""Pixels of a side of the images whose preparing and whose streaming are measured."""

GB, HOUR = 1e9, 3600


@dataclass(frozen=True)
class Assumptions:
    """What is not measured."""

    cores: int = 32
    """Cores of a node, all of which prepare; their speeds add up."""
    memory_gb: float = 256
    """Memory of a node."""
    disk_gb_per_second: float = 1
    """What a node reads from its disks or its network."""
    storage_gb_per_second: float = 10
    """What all nodes read together from shared storage."""
    storage_reads_per_second: float = 50_000
    """Reads at random places, an image each, that shared storage serves."""
    image_pixels: float = 384
    """Pixels of a side of an image; opening it takes time in proportion to their square."""
    image_kb: float = 40
    """Size of such an image's file."""
    bytes_per_token: float = 4.5
    """Bytes of text per token."""
    images_per_file: int = 10_000
    """Images in one tar archive, as img2dataset makes it."""
    documents_per_file: int = 100_000
    """Documents in one Parquet file."""
    shard_bytes: int = 2**25
    """Bytes of Parquet in one shard, as long as there are at most `shards`."""
    shards: int = 4096
    """Largest number of shards into which fewer files are cut."""
    downloads_per_second: float = 1400
    """Images that img2dataset downloads on one node: 100 million in 20 hours, its authors say."""
    listed_per_second: float = 11_000
    """Images of an archive that one core lists (40,000 images with text and JSON took 3.5 s)."""
    bytes_per_url: float = 36
    """Size of the table of URLs per image, which all processes map."""
    bytes_per_digest: float = 196
    """Memory that finding equal images takes where the parts are joined, per image: numpy's sort of their digests."""
    gpu_tokens_per_second: float = 10_420
    """Tokens that an H100 trains on, as scale.py predicts for the 9B in QLoRA."""
    gpus: int = 8
    """GPUs of a node."""


@dataclass(frozen=True)
class Rates:
    """What is measured, for one worker."""

    seconds_per_token: float
    seconds_per_image: float
    joining_seconds_per_token: float
    opening_seconds_per_token: float
    stored_bytes_per_token: float
    stored_bytes_per_image: float
    memory_bytes_per_document: float
    hashed_gb_per_second: float
    streamed_images_per_second: float
    """Images that one worker opens and resizes, in rows of a stream."""


def read_rates(preparing: Sequence[Mapping[str, Any]], streaming: Mapping[str, Any], hashed: float) -> Rates:
    """Return the rates in the results of preparing.py and streaming.py; `hashed`: of SHA-256, in GB/s.

    One and two workers tell apart what is divided (d) and what is not (s): s + d and s + d / 2 seconds.
    """

    def by_size(kind: str, workers: int) -> list[Mapping[str, Any]]:
        found = [one for one in preparing if (one["kind"], one["workers"], one["code"]) == (kind, workers, "now")]
        return sorted((one for one in found if not one["machines"]), key=lambda one: one["dialogues"])

    texts, halved, tars = by_size("text", 1), by_size("text", 2)[-1], by_size("tars", 1)[-1]
    small, text = texts[0], texts[-1]
    divided = min(2 * (text["seconds"] - halved["seconds"]), text["seconds"])
    grown, more_mb = text["dialogues"] - small["dialogues"], text["peak_memory_mb"] - small["peak_memory_mb"]
    per_token = text["stored_mb"] * 2**20 / text["tokens"]
    text_of_tars = text["seconds"] / text["tokens"] * tars["tokens"]
    fastest = max((one for one in streaming["waiting"] if one["code"] == "now"), key=lambda one: one["workers"])
    return Rates(
        seconds_per_token=divided / text["tokens"],
        seconds_per_image=(tars["seconds"] - text_of_tars) / tars["dialogues"],
        joining_seconds_per_token=(text["seconds"] - divided) / text["tokens"],
        opening_seconds_per_token=text["again_seconds"] / text["tokens"],
        stored_bytes_per_token=per_token,
        stored_bytes_per_image=max(tars["stored_mb"] * 2**20 - per_token * tars["tokens"], 0) / tars["dialogues"],
        memory_bytes_per_document=max(more_mb, 0) * 2**20 / max(grown, 1),
        hashed_gb_per_second=hashed,
        streamed_images_per_second=fastest["images_per_second"] / max(fastest["workers"], 1),
    )


def simulate(rates: Rates, given: Assumptions, documents: int, nodes: int) -> dict[str, float | str]:
    """Return the figures of one column: a number of documents on a number of nodes."""
    images, tokens = documents * IMAGES / DOCUMENTS, documents * TOKENS / DOCUMENTS
    text_gb, images_gb = tokens * given.bytes_per_token / GB, images * given.image_kb * 1e3 / GB
    reading = min(nodes * given.disk_gb_per_second, given.storage_gb_per_second)
    per_image = rates.seconds_per_image * (given.image_pixels / PREPARED_PIXELS) ** 2
    stored_gb = (tokens * rates.stored_bytes_per_token + images * rates.stored_bytes_per_image) / GB
    copying, checking = 2 * stored_gb / given.disk_gb_per_second, stored_gb / given.disk_gb_per_second
    hours = {
        "downloading": images / (nodes * given.downloads_per_second),
        "listing": images / (given.cores * given.listed_per_second),
        "hashing": text_gb / min(nodes * given.cores * rates.hashed_gb_per_second, reading),
        "converting, processors": (tokens * rates.seconds_per_token + images * per_image) / (nodes * given.cores),
        "converting, storage": max((text_gb + images_gb) / reading, images / given.storage_reads_per_second),
        "joining": max(tokens * rates.joining_seconds_per_token, copying),
    }
    hours = {stage: seconds / HOUR for stage, seconds in hours.items()}
    converting = max(hours["converting, processors"], hours["converting, storage"])
    files, archives = math.ceil(documents / given.documents_per_file), math.ceil(images / given.images_per_file)
    join_gb = (images * given.bytes_per_digest + documents * rates.memory_bytes_per_document) / GB
    limit = "memory of joining" if join_gb > given.memory_gb else max(hours, key=lambda stage: hours[stage])
    needed = given.gpu_tokens_per_second * images / tokens / rates.streamed_images_per_second
    return {
        "files": files + archives,
        "TB of text and images": (text_gb + images_gb) / 1e3,
        "shards": max(files, min(given.shards, math.ceil(text_gb * GB / given.shard_bytes))),
        **{f"hours of {stage}": value for stage, value in hours.items()},
        "hours to prepare": hours["listing"] + hours["hashing"] + converting + hours["joining"],
        "first limit": limit,
        "TB prepared": stored_gb / 1e3,
        "GB of the table of URLs": images * given.bytes_per_url / GB,
        "GB of memory to join": join_gb,
        "hours to open, each start": max(tokens * rates.opening_seconds_per_token, checking) / HOUR,
        "stream: worker processes a GPU": needed * (given.image_pixels / STREAMED_PIXELS) ** 2,
        "stream: hours of an epoch": tokens / (given.gpu_tokens_per_second * given.gpus * nodes) / HOUR,
    }


def show(rates: Rates, given: Assumptions, columns: Mapping[str, Mapping[str, float | str]]) -> str:
    """Return assumptions, rates and figures as text."""
    lines = ["assumed"]
    lines += [f"  {name.replace('_', ' '):36}{_short(value):>12}" for name, value in asdict(given).items()]
    lines += ["measured, one worker"]
    lines += [f"  {name.replace('_', ' '):36}{_short(value):>12}" for name, value in asdict(rates).items()]
    lines += ["", f"{'':34}" + "".join(f"{name:>16}" for name in columns)]
    for figure in next(iter(columns.values())):
        lines.append(f"{figure:34}" + "".join(f"{_short(column[figure]):>16}" for column in columns.values()))
    return "\n".join(lines)


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2g}"


def hash_rate(seconds: float = 0.5, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how many GB one core hashes in a second, measured now."""
    block, count, started = bytes(2**24), 0, clock()
    while clock() - started < seconds:
        hashlib.sha256(block)
        count += 1
    return count * len(block) / (clock() - started) / GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preparing", type=Path, nargs="+", default=[Path("runs/preparing/preparing.json")])
    parser.add_argument("--streaming", type=Path, default=Path("runs/streaming/streaming.json"))
    parser.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 100_000_000, DOCUMENTS])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 16])
    for name, value in asdict(Assumptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="assumed: %(default)s")
    arguments = vars(parser.parse_args())
    preparing = [one for path in arguments["preparing"] for one in json.loads(path.read_text())]
    streaming = json.loads(arguments["streaming"].read_text())
    given = Assumptions(**{name: arguments[name] for name in asdict(Assumptions())})
    rates = read_rates(preparing, streaming, hash_rate())
    columns = {
        f"{documents / 1e6:.0f}M, {nodes} node{'s' if nodes > 1 else ''}": simulate(rates, given, documents, nodes)
        for documents in arguments["documents"]
        for nodes in arguments["nodes"]
    }
    print(show(rates, given, columns))


if __name__ == "__main__":
    main()
