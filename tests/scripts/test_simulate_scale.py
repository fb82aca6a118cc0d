"""The simulation's arithmetic, on rates and sizes that can be checked by hand."""

import pytest
from simulate_scale import DOCUMENTS, IMAGES, TOKENS, Assumptions, Rates, read_rates, show, simulate


def measured(kind, workers, dialogues, seconds, **others):
    ready = {"code": "now", "machines": None, "tokens": 100 * dialogues, "stored_mb": 0.0, "again_seconds": 0.0}
    one = {"kind": kind, "workers": workers, "dialogues": dialogues, "seconds": seconds, "peak_memory_mb": 400}
    return {**ready, **one, **others}


PREPARING = [
    measured("text", 1, 1000, 1.0),
    measured("text", 1, 2000, 10.0, stored_mb=2.0, again_seconds=4.0, peak_memory_mb=410),
    measured("text", 2, 2000, 6.0),
    measured("text", 1, 2000, 99.0, code="v1"),
    measured("text", 1, 2000, 99.0, machines=1),
    measured("tars", 1, 500, 7.5, stored_mb=1.0),
]
STREAMING = {
    "waiting": [
        {"code": "now", "workers": 1, "images_per_second": 100},
        {"code": "now", "workers": 2, "images_per_second": 180},
        {"code": "v1", "workers": 4, "images_per_second": 900},
    ]
}


def test_rates_of_results():
    """Of the 10 s with one worker, 4 s are halved by a second one: 8 s are divided, and 2 s are not."""
    rates = read_rates(PREPARING, STREAMING, hashed=1.5)
    assert rates == Rates(
        seconds_per_token=8 / 200_000,
        seconds_per_image=0.01,  # 7.5 s less 50,000 tokens at 10 s / 200,000, of 500 images
        joining_seconds_per_token=2 / 200_000,
        opening_seconds_per_token=4 / 200_000,
        stored_bytes_per_token=2 * 2**20 / 200_000,
        stored_bytes_per_image=2**20 / 1000,  # 1 MB less 50,000 tokens of 10.5 bytes, of 500 images
        memory_bytes_per_document=10 * 2**20 / 1000,
        hashed_gb_per_second=1.5,
        streamed_images_per_second=90,
    )


RATES = Rates(
    seconds_per_token=1e-5,
    seconds_per_image=1e-3,
    joining_seconds_per_token=1e-7,
    opening_seconds_per_token=1e-8,
    stored_bytes_per_token=10,
    stored_bytes_per_image=100,
    memory_bytes_per_document=100,
    hashed_gb_per_second=1,
    streamed_images_per_second=100,
)
GIVEN = Assumptions(cores=10, image_pixels=448, disk_gb_per_second=1, storage_gb_per_second=10)


def test_figures_of_all_documents():
    one, sixteen = simulate(RATES, GIVEN, DOCUMENTS, 1), simulate(RATES, GIVEN, DOCUMENTS, 16)
    text, images = 114.9e9 * 4.5 / 1e9, 353e6 * 40e3 / 1e9  # GB
    assert one["files"] == 1_411 + 35_300
    assert one["shards"] == 4096  # of 32 MiB they would be 15,409
    assert one["TB of text and images"] == pytest.approx((text + images) / 1000)
    assert one["hours of downloading"] == pytest.approx(353e6 / 1400 / 3600)
    assert one["hours of listing"] == sixteen["hours of listing"] == pytest.approx(353e6 / 110_000 / 3600)
    assert one["hours of hashing"] == pytest.approx(text / 1 / 3600)
    assert sixteen["hours of hashing"] == pytest.approx(text / 10 / 3600)  # shared storage reads 10 GB/s
    work = 114.9e9 * 1e-5 + 353e6 * 4e-3  # images have four times the pixels of those measured
    assert one["hours of converting, processors"] == pytest.approx(work / 10 / 3600)
    assert sixteen["hours of converting, processors"] == pytest.approx(work / 160 / 3600)
    assert one["hours of converting, storage"] == pytest.approx((text + images) / 1 / 3600)
    assert sixteen["hours of converting, storage"] == pytest.approx(353e6 / 50_000 / 3600)  # reads, not bytes
    assert one["hours of joining"] == sixteen["hours of joining"] == pytest.approx(114.9e9 * 1e-7 / 3600)
    stages = (one[f"hours of {stage}"] for stage in ("listing", "hashing", "converting, processors", "joining"))
    assert one["hours to prepare"] == pytest.approx(sum(stages))
    stored = 114.9e9 * 10 + 353e6 * 100
    assert one["hours to open, each start"] == pytest.approx(stored / 1e9 / 3600)  # the disk, not 1e-8 s a token
    assert one["TB prepared"] == pytest.approx(stored / 1e12)
    assert one["GB of the table of URLs"] == pytest.approx(12.708)
    assert one["GB of memory to join"] == pytest.approx((353e6 * 196 + 141_047_697 * 100) / 1e9)


def test_second_worker_that_more_than_halves_the_time_leaves_nothing_undivided():
    """Measurements scatter: no rate becomes negative."""
    fast = [{**one, "seconds": 4.0} if one["workers"] == 2 else one for one in PREPARING]
    rates = read_rates(fast, STREAMING, hashed=1.5)
    assert (rates.seconds_per_token, rates.joining_seconds_per_token) == (10 / 200_000, 0)


@pytest.mark.parametrize(
    ("changed", "limit"),
    [
        ({}, "downloading"),
        ({"memory_gb": 64}, "memory of joining"),
        ({"downloads_per_second": 100_000, "cores": 1}, "converting, processors"),
        ({"downloads_per_second": 100_000, "storage_reads_per_second": 100}, "converting, storage"),
    ],
)
def test_first_limit_is_named(changed, limit):
    assert simulate(RATES, Assumptions(**changed), DOCUMENTS, 1)["first limit"] == limit


def test_table_prints_every_assumption():
    column = simulate(RATES, GIVEN, 1_000_000, 1)
    assert column["stream: worker processes a GPU"] == pytest.approx(10_420 * IMAGES / TOKENS / 100 * (448 / 512) ** 2)
    printed = show(RATES, GIVEN, {"1M, 1 node": column})
    assert "image pixels                                 448\n" in printed
    assert "hashed gb per second                           1\n" in printed
    assert printed.splitlines()[-len(column) - 1].strip() == "1M, 1 node"
