"""The mixtures of the model cards as recipes: their figures, and what becomes of small files in published formats."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture_files import MIXTURES, RECIPES, beside_files

from finetune.data.conversation import Image, Remote
from finetune.data.dataset import make_dataset
from finetune.data.formats import FORMATS
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import resolve_source
from finetune.recipe.load import load_recipe

RATIOS = [
    ("m3it", 7.7),
    ("lrv", 1.7),
    ("llava", 5.9),  # LLaVA-Instruct
    ("llava", 6.3),  # LLaVAR
    ("svit", 11.4),
    ("mimic_it", 2.1),
    ("ultrachat", 29.1),
    ("pairs", 5.1),
    ("obelics", 30.7),
]
HARDWARE_AND_RATES = {
    MIXTURES[0]: ("HuggingFaceM4/idefics-9b", 205_000, 1e-5, 1.2e-6),
    MIXTURES[1]: ("HuggingFaceM4/idefics-80b", 613_000, 3e-6, 3.6e-7),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures")
    return {name: beside_files(name, folder) for name in MIXTURES}


@pytest.fixture(scope="module")
def prepare(places, tiny_tokenizer, tmp_path_factory):
    """prepare(overrides) -> the data of the 9B's mixture, nothing held out."""
    folder = tmp_path_factory.mktemp("prepared")

    def made(*overrides):
        common = [f"data.prepared={folder}", "data.workers=0", "data.eval_split=0"]
        common += ["training.evaluate_every=null", "evaluation=null"]
        recipe = load_recipe(places[MIXTURES[0]], [*common, *overrides])
        return make_dataset(
            recipe.data,
            [resolve_source(source) for source in recipe.data.sources],
            tiny_tokenizer,
            row_images=recipe.training.row_images,
            seed=recipe.training.seed,
        )

    return made


@pytest.fixture(scope="module")
def prepared(prepare):
    return {unit: prepare(f"data.weigh={unit}") for unit in ("tokens", "examples")}


def test_every_mixture_that_ships_is_listed():
    assert {path.name for path in RECIPES.glob("*mixture*.yaml")} == set(MIXTURES)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_ratios_are_the_card_s(name):
    sources = load_recipe(RECIPES / name).data.sources
    assert [(source.format, source.weight) for source in sources] == RATIOS
    assert math.fsum(source.weight for source in sources) == pytest.approx(100, abs=1e-9)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_hyper_parameters_are_the_card_s(name):
    recipe = load_recipe(RECIPES / name)
    base, tokens, rate, final_rate = HARDWARE_AND_RATES[name]
    training = recipe.training
    assert recipe.model.base == base
    assert set(recipe.model.modes.values()) == {"full"}
    assert (recipe.data.max_length, training.row_tokens, training.steps) == (2048, 2048, 22_000)
    assert (training.learning_rate, training.final_learning_rate) == (rate, final_rate)
    assert (training.schedule, training.warmup_steps) == ("linear", 1000)
    assert (training.weight_decay, training.betas, training.clip) == (0.1, (0.9, 0.999), 1.0)
    assert training.gates_learning_rate is training.added_tokens_learning_rate is None
    processes = int(name.split("_")[-1].split("x")[0])
    assert (training.rows_per_step, training.tokens_per_step) == (processes, 2048 * processes)
    assert 1.2 < training.tokens_per_step / tokens < 1.3  # the card counts without the padding of a row a GPU


def test_both_mix_the_same_data():
    first, second = (load_recipe(RECIPES / name).data for name in MIXTURES)
    assert first == second


def test_every_record_is_kept(prepared):
    report = prepared["tokens"].report["sources"]
    assert [(source["read"], source["kept"]) for source in report] == [
        (13, 13), (12, 12), (6, 6), (5, 5), (7, 7), (9, 9), (10, 10), (6, 6), (8, 8),
    ]  # fmt: skip
    assert all(source["rejected"] == source["parts_rejected"] == {} for source in report)


def test_questions_are_joined_and_long_dialogues_divided_at_seven_turns(prepared):
    training = prepared["tokens"].train
    # M3IT 8 about one image = 7 + 1; LRV 9 = 7 + 2 and 3; SVIT 15 = 7 + 7 + 1, five times; UltraChat 9 = 7 + 2
    assert training.sizes == [7, 3, 6, 5, 17, 9, 11, 6, 8]
    turns = [len(dialogue.turns) // 2 for dialogue in training.dialogues if not dialogue.is_document]
    assert max(turns) == 7
    assert sorted(turns[7:10]) == [2, 3, 7]  # LRV


@pytest.mark.parametrize("unit", ["tokens", "examples"])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 100))
def test_an_epoch_is_in_the_ratio_to_one_example(prepared, unit, seed, epoch):
    dataset = prepared[unit]
    drawn = dataset.mix.draw(seed=seed, epoch=epoch)
    sources = np.array([dataset.train.source_of(index) for index in range(len(dataset.train))])
    sizes = dataset.train.lengths if unit == "tokens" else np.ones(len(sources), np.int64)
    total = sizes.sum()
    for source, (_, ratio) in enumerate(RATIOS):
        amount = sizes[drawn[sources[drawn] == source]].sum()
        assert abs(amount - ratio / 100 * total) <= sizes[sources == source].max()


def test_the_images_of_web_pages_may_be_fetched(places):
    source = resolve_source(load_recipe(places[MIXTURES[0]]).data.sources[-1])
    url = "https://example.org/a.jpg"
    dialogue = FORMATS["obelics"].convert({"images": [url, None], "texts": [None, "A walk."]}, ImageRoot(source))
    assert dialogue.images == (Image(Remote(url)),)
