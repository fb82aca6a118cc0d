"""Recipe -> what its stages work with: base, tokenizer, prepared data, rows, models; each made when first asked."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.base import QUANTIZED, learn_tokenizer, load_model, local_base, make_base
from finetune.console import log, parse_size, track
from finetune.data.collate import Features, RowCollator, Rows
from finetune.data.conversation import Image
from finetune.data.dataset import Dataset, make_dataset, prepare_sources, tell_losses, write_report
from finetune.data.fit import Limits, fitter
from finetune.data.formats import hold_dialogues
from finetune.data.images import Preprocessing
from finetune.data.mixing import prepared_pass, read_pass
from finetune.data.packing import pack_in_order
from finetune.data.prepare import require_examples
from finetune.data.prepared import Prepared
from finetune.data.sampling import Row, build_schedule
from finetune.data.sources import resolve_source, say_if_documents
from finetune.data.streaming import StreamedRows, downloads
from finetune.data.tokenize import Encoder
from finetune.distributed import collectives
from finetune.distributed.device import auto_dtype, device
from finetune.evaluation.generate import Assistant
from finetune.recipe.schema import Recipe, Source
from finetune.run_dir import held_out_decides, note_prepared
from finetune.training.image_features import FeatureCache, ImageFeatures
from finetune.training.loss_spikes import read_events
from modeling import loading
from modeling.config import read_config
from modeling.files import flush, partial_of, put_in_place
from modeling.shapes import SHAPES
from modeling.vision import ImageTowers, feature_shape, image_towers_fingerprint, load_image_towers

FEATURES = "features"
"""Folder of image features, beside that of prepared sets."""


class Materials:
    """What the stages of one recipe share. A fresh base and data.json are left in the run folder.

    Of several processes, all ask for the same things in the same order: they make them together.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder

    @cached_property
    def base(self) -> str:
        """Folder or hub id of the base; a fresh one is made first."""
        model = self.recipe.model
        if model.base:
            return model.base
        shape, folder = model.init, self.folder / "base"
        assert shape

        def make() -> None:
            if not folder.is_dir():
                partial = partial_of(folder)
                shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
                make_base(shape, self.sources, partial, seed=self.recipe.training.seed)
                for path in partial.iterdir():
                    flush(path)
                put_in_place(partial, folder)

        _require_all_here()
        collectives.on_main("make the base", make)
        return str(folder)

    @cached_property
    def sources(self) -> list[Source]:
        sources = [resolve_source(source) for source in self.recipe.data.sources]
        say_if_documents(sources)
        return sources

    def load(self, *, image_towers: bool | None = None, divided: bool = False) -> loading.Idefics:
        """The base as this recipe trains it, on its device; quantised weights are kept beside the prepared sets.

        `image_towers`: None leaves them out where features are cached. `divided`: as `load_model`.
        """
        return load_model(
            self.base,
            revision=self.recipe.model.revision,
            dtype=self.dtype,
            instruct=self.instruct,
            quantize=self.recipe.model.quantize,
            cache=Path(self.recipe.data.prepared).with_name(QUANTIZED),
            image_towers=not self.recipe.caches_features if image_towers is None else image_towers,
            divided=divided,
        )

    @property
    def instruct(self) -> bool:
        """Dialogues need `<end_of_utterance>`; a run on documents alone leaves a base a base."""
        return hold_dialogues(self.sources)

    @cached_property
    def processor(self) -> Any:
        return loading.load_processor(self.base, revision=self.recipe.model.revision, instruct=self.instruct)

    @cached_property
    def dtype(self) -> torch.dtype:
        named = {"auto": auto_dtype(), "fp32": torch.float32, "bf16": torch.bfloat16}
        return named[self.recipe.model.dtype]

    @cached_property
    def dataset(self) -> Dataset:
        """Writes data.json."""
        _require_all_here()
        prepared = Path(self.recipe.data.prepared)
        collectives.on_main("make the folder of prepared sets", lambda: prepared.mkdir(parents=True, exist_ok=True))
        collectives.require_shared("data.prepared", prepared)
        made = make_dataset(self.recipe, self.sources, self.processor.tokenizer, team=collectives.nodes())
        decides = held_out_decides(self.recipe)
        collectives.on_main("write data.json", lambda: write_report(made.report, self.folder, held_out_decides=decides))
        sets = dict.fromkeys(one.folder for one in (*made.training.sets, *(made.held.sets if decides else ())))
        collectives.on_main("note the prepared sets", lambda: note_prepared(self.folder, list(sets)))
        tell_losses(made, self.folder / "data.json")
        return made

    def train_rows(self, *, cached: bool = True) -> Rows:
        """Made anew each time: without what unstable.jsonl says by then. Not `cached`, images run live."""
        training, settings = self.dataset.training, self.recipe.training
        common: dict[str, Any] = {
            "augment": self.recipe.data.augment,
            "seed": settings.seed,
            "blank_image": self.recipe.model.trains_image_towers,
            "skipped": frozenset().union(*(event.skipped for event in read_events(self.folder))),
        }
        if self.recipe.data.streams:
            return self._streamed_rows(training, **common)
        rows = build_schedule(
            self.dataset.mix,
            training.image_counts,
            row_tokens=settings.row_tokens,
            row_images=settings.row_images,
            rows_per_step=settings.rows_per_step,
            seed=settings.seed,
            epochs=settings.epochs,
            steps=settings.steps,
        )
        return replace(self._rows(training, cached=cached), rows=rows, **common)

    @cached_property
    def held_rows(self) -> RowCollator:
        return self._held_rows(self.dataset.held)

    def rows_to_ask(self) -> Rows:
        """Held-out rows, or training rows where nothing is held out. Images run live: few of them are looked at."""
        held = self.dataset.held
        return self._held_rows(held, cached=False) if len(held) else self.train_rows(cached=False)

    @cached_property
    def documents(self) -> RowCollator | None:
        """Held-out documents, where the evaluation names some."""
        evaluation = self.recipe.evaluation
        if not evaluation or not evaluation.documents:
            return None
        sources = [resolve_source(source) for source in evaluation.documents]
        _require_all_here()
        prepared, accounts = prepare_sources(self.recipe, sources, self.processor.tokenizer, team=collectives.nodes())
        require_examples(prepared, accounts)
        return self._held_rows(prepared)

    def streamed(self, rows: Rows) -> list[dict[str, Any]]:
        """What became of the records that were read while training, per streamed source."""
        rows.restore(collectives.gather(rows.state(len(rows))))
        accounts = rows.accounts if isinstance(rows, StreamedRows) else []
        for broken in (broken for account in accounts for broken in account.broken):
            log(broken)
        return [account.to_json() for account, source in zip(accounts, self.sources, strict=False) if source.stream]

    def _streamed_rows(self, training: Prepared, **common: Any) -> StreamedRows:
        settings, data = self.recipe.training, self.recipe.data
        assert settings.steps
        limits = Limits(data.max_length, settings.row_images)
        encoder, sets = Encoder(self.processor.tokenizer), iter(training.sets)
        return StreamedRows(
            passes=[
                read_pass(source, fitter(source, encoder, limits, seed=settings.seed), number)
                if source.stream
                else prepared_pass(next(sets), number, settings.seed)
                for number, source in enumerate(self.sources)
            ],
            names=[source.name for source in self.sources],
            weights=[source.weight for source in data.sources],
            unit=data.weigh,
            rows=settings.steps * settings.rows_per_step,
            row_tokens=settings.row_tokens,
            row_images=settings.row_images,
            buffer=data.shuffle_buffer,
            remembered=4 * settings.rows_per_step,  # a step's, and those that are made ahead
            preprocessing=self.preprocessing,
            filler=self.processor.tokenizer.bos_token_id,
            downloader=downloads(Path(data.prepared) / "downloads", self.sources),
            **common,
        )

    def _held_rows(self, held: Prepared, *, cached: bool = True) -> RowCollator:
        settings = self.recipe.training
        packs = pack_in_order(
            held.lengths.tolist(), held.image_ids, row_tokens=settings.row_tokens, row_images=settings.row_images
        )
        return replace(self._rows(held, cached=cached), rows=[Row(0, tuple(pack)) for pack in packs])

    def _rows(self, prepared: Prepared, *, cached: bool) -> RowCollator:
        return RowCollator(
            rows=[],
            examples=prepared.examples,
            image_ids=prepared.image_ids,
            images=prepared.images,
            origins=prepared.origins,
            preprocessing=self.preprocessing,
            filler=self.processor.tokenizer.bos_token_id,
            features=self._features(prepared) if cached and self.recipe.caches_features else None,
        )

    def _features(self, prepared: Prepared) -> ImageFeatures:
        """Of the images that these examples show."""
        _require_all_here()
        _, shown = prepared.shown_images()
        wanted = np.flatnonzero(np.isin(prepared.digests, shown))
        return self._feature_cache.open(
            prepared.images, prepared.digests, wanted, towers=self._image_towers, track=track
        )

    @cached_property
    def _feature_cache(self) -> FeatureCache:
        data = self.recipe.data
        return FeatureCache(
            Path(data.prepared).with_name(FEATURES),
            image_towers_fingerprint(self._base_folder),
            self.preprocessing,
            shape=feature_shape(read_config(str(self._base_folder))),
            dtype=self.dtype,
            limit=parse_size("data.feature_cache_size", data.feature_cache_size),
        )

    def _image_towers(self) -> ImageTowers:
        return load_image_towers(self._base_folder, dtype=self.dtype, device=device())

    @cached_property
    def _base_folder(self) -> Path:
        return local_base(self.base, revision=self.recipe.model.revision)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.of(self.processor.image_processor, str(self.base))

    def assistant(self, model: Any, rows: RowCollator | None = None) -> Assistant:
        """`rows`: has the features of the images that will be shown, where the model has no image towers."""
        looked_up = _by_image(rows, rows.features) if rows is not None and rows.features is not None else None
        return Assistant(model, self.processor.tokenizer, self.preprocessing, looked_up)


def _require_all_here() -> None:
    assert collectives.all_here(), "made together by all processes, and asked for by one alone"


def _by_image(rows: RowCollator, features: Features) -> Callable[[Sequence[Image]], torch.Tensor]:
    """The features of the images that rows show, by image instead of by number."""
    numbers = {rows.images[number]: number for images in rows.image_ids for number in images}
    return lambda images: features([numbers[image] for image in images])


def open_dataset(recipe: Recipe) -> tuple[list[Source], Dataset, Any]:
    """(training sources, what is prepared, tokenizer), without a run folder or a model."""
    sources = [resolve_source(source) for source in recipe.data.sources]
    say_if_documents(sources)
    instruct = hold_dialogues(sources)
    if recipe.model.init:
        # The ids of the fresh base that a run would make; the extension to an instruct vocabulary comes on top.
        tokenizer = learn_tokenizer(SHAPES[recipe.model.init], sources, seed=recipe.training.seed, instruct=instruct)
    else:
        revision = recipe.model.revision
        tokenizer = loading.load_processor(str(recipe.model.base), revision=revision, instruct=instruct).tokenizer
    return sources, make_dataset(recipe, sources, tokenizer), tokenizer
