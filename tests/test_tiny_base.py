"""The shipped base: small, a base and no more, and made of training images alone."""

import hashlib
from pathlib import Path

from sources import make_source

from finetune.data.conversation import Dialogue, Image, RecordError, Turn
from finetune.data.formats import FORMATS
from finetune.data.formats.easy_vqa import read
from finetune.data.images import Preprocessing
from finetune.data.io.image_roots import ImageRoot
from finetune.data.read_dialogues import resolve_source
from finetune.recipe.load import load_recipe
from modeling import loading
from modeling.config import read_config
from modeling.shapes import TINY, tensor_shapes

RECIPES = Path(__file__).parent.parent / "recipes"
FOLDER = RECIPES / "tiny_base"
TEST = make_source("easy_vqa", split="test")


def test_it_is_small_and_no_pickle():
    files = [path for path in FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_it_is_a_base_of_the_tiny_shape():
    config = read_config(str(FOLDER))
    assert config["additional_vocab_size"] == 2
    assert tensor_shapes(config) == tensor_shapes(TINY)
    loaded = loading.load(str(FOLDER), instruct=False)
    assert len(loaded.tokenizer) == 514
    assert loaded.model.config.additional_vocab_size == 2


def test_its_recipe_reads_documents_only_and_no_test_image():
    recipe = load_recipe(RECIPES / "tiny_base.yaml")
    assert recipe.model.init == "tiny"
    formats = [FORMATS[source.format] for source in recipe.data.sources]
    assert formats
    assert all(family.documents for family in formats)
    seen = set()
    for source, family in zip(map(resolve_source, recipe.data.sources), formats, strict=True):
        for _, record in family.read(source):
            try:
                dialogue = family.convert(record, ImageRoot(source))
            except RecordError:
                continue
            assert dialogue.is_document
            seen |= {image.source for image in dialogue.images}
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in seen}
    assert len(digests) > 3_900
    tested = {Path(record["image"]) for _, record in read(TEST)}
    assert len(tested) == 1_000
    assert digests.isdisjoint(hashlib.sha256(path.read_bytes()).hexdigest() for path in tested)


def test_it_completes_text_about_an_image():
    from finetune.data.chat_template import render
    from finetune.data.tokenize import tokenize
    from finetune.evaluation.generate import Assistant, make_inputs
    from modeling.generation import greedy
    from modeling.loading import generation_config

    loaded = loading.load(str(FOLDER), instruct=False)
    assistant = Assistant(loaded.model, loaded.tokenizer, Preprocessing.of(loaded.processor.image_processor))
    _, record = next(iter(read(TEST)))
    rendered = render(Dialogue((Turn("document", (Image(Path(record["image"])), "the color of the shape is")),)))
    example = tokenize(rendered, loaded.tokenizer)
    cut = type(example)(*(part[:-1] for part in (example.input_ids, example.labels, example.image_index)))
    config = generation_config(loaded.tokenizer)
    config.max_new_tokens = 8
    (ids,) = greedy(loaded.model.eval(), make_inputs(assistant, [cut], [rendered]), config)
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True).strip() == "red."
