"""The recipe: one class per section, each key with its default and its description, which editors and docs/ show.

Keys that contradict each other are refused here, with the reason and the repair.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from finetune.console import parse_size
from finetune.recipe.adapter import Adapter
from finetune.recipe.urls import check_url, is_url, path_of, shown
from finetune.recipe.values import Keys, Name, Paths, Positive, Prompts, Rate, Real, Seed, Share, Whole
from modeling.errors import UserError
from modeling.towers import IMAGE_TOWERS, QUANTIZED_TOWERS

Mode = Literal["frozen", "lora", "full"]
Switch = Literal["frozen", "full"]


class Section(BaseModel):
    """A part of a recipe: an unknown key is an error, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class Model(Section):
    """The base model, and how each of its towers is trained: not at all, through LoRA, or in full."""

    base: Name | None = None
    """Folder or hub id of a base or instruct IDEFICS."""
    init: Literal["tiny", "idefics-9b", "idefics-80b"] | None = None
    """Instead of `base`: the shape of a new, random model, whose vocabulary is learnt from the recipe's own texts."""
    revision: Name | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the frozen weights; auto: bf16 where the hardware has it, else fp32."""
    quantize: Literal["nf4"] | None = None
    """Load the matrices of cross_attention and decoder in 4 bits, in training and evaluation (QLoRA)."""
    vision: Mode = "frozen"
    """The image encoder (CLIP)."""
    resampler: Mode = "frozen"
    """The perceiver resampler, which turns the patches of an image into a fixed number of features."""
    cross_attention: Mode = "lora"
    """The gated cross-attention layers, through which the text looks at images."""
    decoder: Mode = "lora"
    """The language model (LLaMA)."""
    gates: Switch = "full"
    """The factors by which each cross-attention layer is added to the language model."""
    added_tokens: Switch = "full"
    """The embeddings and output rows of the tokens for images and for the end of a turn."""
    embeddings_and_head: Switch = "frozen"
    """The embeddings and the output layer of all other tokens."""
    continue_from: Name | None = None
    """An adapter folder of an earlier run, whose training is continued."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.base is None) == (self.init is None):
            got = "both" if self.base else "neither"
            raise ValueError(f"expected either base (a folder or hub id) or init (a shape), got {got}")
        if self.init and self.revision:
            raise ValueError("revision belongs to a base on the hub, and init builds a fresh model")
        if self.init and self.continue_from:
            raise ValueError("continue_from needs the base of its adapter, and init builds a fresh model")
        if self.quantize:
            self._check_quantized()
        if all(mode == "frozen" for mode in self.modes.values()):
            raise ValueError("everything is frozen: expected at least one tower to be lora or full")
        return self

    def _check_quantized(self) -> None:
        full = [tower for tower in QUANTIZED_TOWERS if self.modes[tower] == "full"]
        if full:
            raise ValueError(
                f"quantize: nf4 holds the matrices of {' and '.join(full)} in 4 bits, too coarse for the small steps "
                f"of training in full: set {', '.join(f'{tower}: lora' for tower in full)}, or leave quantize out"
            )
        if "lora" not in self.modes.values():
            raise ValueError("quantize: nf4 trains through LoRA: expected at least one tower to be lora")

    @property
    def modes(self) -> dict[str, str]:
        towers = ("vision", "resampler", "cross_attention", "decoder", "gates", "added_tokens", "embeddings_and_head")
        return {tower: getattr(self, tower) for tower in towers}

    @property
    def trains_image_towers(self) -> bool:
        return any(self.modes[tower] != "frozen" for tower in IMAGE_TOWERS)


FormatName = Literal[
    "auto", "messages", "sharegpt", "llava", "svit", "lrv", "m3it", "mimic_it", "spot_the_diff", "ultrachat", "alpaca",
    "cauldron", "vqa", "prompt_completion", "preference", "qa", "obelics", "pairs", "image_folder", "class_folders",
    "text", "easy_vqa", "easy_vqa_captions",
]  # fmt: skip
"""Dataset families; auto: recognised from the first records."""

CAPTIONS = ("pairs", "image_folder", "class_folders", "easy_vqa_captions")
"""Formats of images with their captions."""

DOCUMENTS = ("obelics", "text", *CAPTIONS)
"""Formats whose records become documents; those of the others become dialogues."""


class Source(Section):
    """A dataset; its paths are relative to the recipe file, or to the current folder where key=value sets them."""

    format: FormatName = "auto"
    """Format of the records; auto: recognised from the first ones."""
    path: Paths = ()
    """Files, folders or patterns: json, jsonl (also .gz, .zst), csv, parquet, arrow, webdataset tar, txt, images.
    Also at URLs: s3://, gs://, hf://, and with `download: true` https://."""
    hub: Name | None = None
    """Id of a dataset on the hub, instead of a path."""
    subset: Name | None = None
    """Configuration of a hub dataset."""
    split: Name = "train"
    """Split of the dataset: train, test, ..."""
    revision: Name | None = None
    """Branch, tag or commit of a hub dataset."""
    stream: bool = False
    """Train on the records while they are read, without preparing them first."""
    image_root: Paths = ()
    """Folders, zip or tar archives, or MIMIC-IT image files in which images are looked up; image paths may not lead out
    of them. Also at URLs, as `path`. Default: the folder of the data file."""
    image_name: str | None = None
    """Template of image file names, if records hold only a number: COCO_train2014_{image_id:012d}.jpg."""
    columns: dict[str, str] = {}
    """Names of fields in the records, if other than the format's: {text: caption} reads "text" from "caption"."""
    weight: Rate | None = None
    """Sampling ratio among the sources; without weights, each example is drawn once per epoch."""
    limit: Positive | None = None
    """Number of records to read, from the first on."""
    on_broken: Literal["stop", "keep"] = "stop"
    """If a file cannot be read to its end: stop with an error, or keep the records read so far and report the loss."""
    turns: Positive | None = None
    """Largest number of turns of a dialogue: questions about one image are joined, and longer dialogues divided."""
    ordered: bool | None = None
    """Whether turns build on each other, so that their order is kept; default: depends on the format."""
    prompt: Prompts = ()
    """A question to put before each caption, which turns captions into dialogues; from a list, one is drawn per record.
    Without it, captions are documents, from which a model does not learn to answer."""
    download: Literal[False, True, "http"] = False
    """Download images whose path is a URL, and data files from the web. true: only over https; http: also over plain
    http."""
    placeholders: Literal["images", "text"] = "images"
    """Meaning of "<image>" and the like in a user's text. images: places of the listed images; text: ordinary text."""
    ignore: Keys = ()
    """Keys of records or messages that are ignored: [tools, videos]."""
    license: str | None = None
    """License in the dataset card."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the files, folders and patterns; of a URL, its place on this disk."""
        return tuple(map(path_of, self.path))

    @property
    def image_roots(self) -> tuple[Path, ...]:
        return tuple(map(path_of, self.image_root))

    @property
    def is_remote(self) -> bool:
        """Return whether its data or its images are at URLs."""
        return any(map(is_url, (*self.path, *self.image_root)))

    def at(self, *paths: Path) -> Self:
        """Return a copy of the source with these files or folders."""
        return self.model_copy(update={"path": tuple(map(str, paths))})

    @property
    def label(self) -> str:
        """Return a short name for a progress bar."""
        return self.paths[0].name if self.path else self.hub or self.format

    @property
    def name(self) -> str:
        """Return the name for messages and reports, such as "data/train.jsonl[train]"; always valid Unicode."""
        where = ", ".join(map(shown, self.path)) or self.hub or self.format
        name = f"{where}{f'/{self.subset}' if self.subset else ''}[{self.split}]"
        return name.encode("utf-8", "backslashreplace").decode()

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        packaged = self.format in ("easy_vqa", "easy_vqa_captions")
        given = [key for key in ("path", "hub") if getattr(self, key)]
        if len(given) != (0 if packaged else 1):
            expected = "neither path nor hub" if packaged else "either path or hub"
            raise ValueError(f"format {self.format}: expected {expected}, got {' and '.join(given) or 'neither'}")
        if self.prompt and self.format not in ("auto", *CAPTIONS):
            raise ValueError(f"prompt makes dialogues of captions ({', '.join(CAPTIONS)}), got format {self.format}")
        for url in filter(is_url, (*self.path, *self.image_root)):
            check_url(url, self.download)
        if len({is_url(path) for path in self.path}) == 2:
            raise ValueError("expected all paths at URLs, or none: make two sources of them")
        if not self.hub and (self.subset or self.revision):
            raise ValueError("subset and revision belong to a dataset on the hub")
        return self


def need_end_of_utterance(sources: Iterable[Source]) -> bool:
    """Return whether training on these sources needs `<end_of_utterance>`: dialogues end with it, documents do not.

    A source of `format: auto` counts as dialogues until its format is recognised. A base that is trained only on
    documents stays a base.
    """
    return any(source.format not in DOCUMENTS or source.prompt for source in sources)


class HeldOut(Source):
    """A source that is only evaluated on."""

    @model_validator(mode="after")
    def _not_trained_on(self) -> Self:
        for key in ("stream", "weight"):
            if getattr(self, key):
                raise ValueError(f"{key} belongs to data.sources: held-out data is prepared, and all of it is used")
        return self


def _size(text: str) -> str:
    try:
        parse_size("feature_cache_size", text)
    except UserError as error:
        raise ValueError(str(error)) from error
    return text


class Augment(Section):
    """Random changes to training images."""

    flip: bool = False
    """Mirror left to right, with probability one half."""
    shift: Whole = 0
    """Largest shift in each direction, in pixels of the model's input."""


class Data(Section):
    """The data for training and for evaluation, and how it is prepared."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Training data."""
    eval_sources: list[HeldOut] = []
    """Eval data in its own split or file."""
    eval_split: Share = 0.0
    """Share of the examples kept for evaluation, if there are no `eval_sources`; no image is on both sides."""
    max_length: Annotated[Positive, Field(ge=8)] = 1024
    """Longest example in tokens. A longer document is cut between its texts; a longer dialogue is divided if `turns`
    allows it, else rejected and counted."""
    weigh: Literal["examples", "tokens"] = "examples"
    """Unit of the weights of the sources."""
    overlap: Literal["report", "drop_questions", "drop_images"] = "report"
    """Handling of training examples that ask an eval question about the same image, or show an eval image. report:
    count them; drop_questions, drop_images: leave them out of training."""
    shuffle_buffer: Positive = 1000
    """Number of records of a streamed source that are in memory at once, and shuffled; at least about 500, and at least
    32 for each row of a step."""
    prepared: Name = "runs/prepared"
    """Folder of prepared data, shared by runs; relative to the current folder."""
    changed: Literal["refuse", "keep"] = "refuse"
    """Behaviour if the data of a finished run has changed. refuse: end with an error; keep: keep the trained adapter,
    which can still be merged."""
    workers: Whole | None = None
    """Number of processes for preparing; default: one per core. In training, so many for each GPU make the rows of
    streams, and of images that are decoded in every step; default: one per core but one. 0: no further process."""
    augment: Augment = Augment()
    """Random changes to training images."""
    cache_features: bool = True
    """Compute the features of each image once, if vision and resampler are frozen, and keep them on disk beside the
    prepared data. With `augment`, and for streamed sources, they are computed in every step."""
    feature_cache_size: Annotated[str, AfterValidator(_size)] = "50GB"
    """Largest size of all cached features on disk; the least recently used ones are deleted."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.eval_sources and self.eval_split:
            raise ValueError("expected eval_sources or eval_split, got both")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(f"expected a weight for every source or for none, got {sum(weighted)} of {len(weighted)}")
        if self.streams:
            if len(self.sources) > 1 and self.sources[0].weight is None:
                raise ValueError("a streamed source has no size: expected a weight for every source")
            if self.eval_split:
                raise ValueError("a streamed source cannot be split: set eval_sources instead of eval_split")
            if self.overlap != "report":
                raise ValueError("overlap: a streamed source cannot be compared with the held-out data before the run")
        return self

    @property
    def streams(self) -> bool:
        return any(source.stream for source in self.sources)


Action = Literal["skip", "lower_rate", "stop"]
"""Reaction to an unstable step; see `Instability`."""


class Instability(Section):
    """Reaction to a loss or a gradient that is not finite, and to a loss spike.

    Such a step is never applied. The run goes back to its last checkpoint, and `unstable.jsonl` lists the dialogues.
    """

    action: Action = "skip"
    """skip: from then on, leave out the dialogues with the highest losses; lower_rate: halve the learning rates; stop:
    end the run with the reason."""
    spike: Rate | None = 20.0
    """Threshold of a loss spike, in robust standard deviations above the median of the last 64 losses; a spike is also
    at least 1 nat above it. null: spikes are not detected."""
    rollbacks: Whole = 3
    """Largest number of returns to a checkpoint; then the run ends with the reason."""


class Training(Section):
    """Length of the training, size of a step, and optimiser."""

    epochs: Positive | None = None
    """Number of passes through the data; either this or `steps`."""
    steps: Positive | None = None
    """Number of optimiser steps; either this or `epochs`."""
    row_tokens: Positive = 2048
    """Largest number of tokens of one packed row, the micro-batch."""
    row_images: Positive = 16
    """Largest number of distinct images of one packed row."""
    tokens_per_step: Positive = 16384
    """Tokens of one optimiser step: round(tokens_per_step / row_tokens) rows, over all processes."""
    learning_rate: Rate = 2e-4
    """Peak learning rate."""
    final_learning_rate: Real = 0.0
    """Learning rate at the end of a linear or cosine schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: Whole = 0
    """Steps in which the learning rate rises from 0 to its peak."""
    weight_decay: Real = 0.0
    """AdamW's weight decay."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """8bit: both moments are stored in 8 bits; paged: they move to main memory when the GPU's memory is short."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    clip: Real = 1.0
    """Largest gradient norm; 0 does not clip."""
    checkpointing: bool | Positive = False
    """Gradient checkpointing: store only the input of each layer, and compute the rest again in the backward pass: less
    memory, a third more work. A number: only in so many decoder layers, and in the cross-attention before them."""
    gates_learning_rate: Rate | None = None
    """Peak learning rate of the gates; default: `learning_rate`."""
    added_tokens_learning_rate: Rate | None = None
    """Peak learning rate of the added tokens; default: `learning_rate`."""
    seed: Seed = 0
    """Seed of all random draws: order, split, LoRA's initial weights, dropout, augmentation."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; default: `evaluate_every`, else a tenth of the run."""
    evaluate_every: Positive | None = None
    """Steps between evaluations of the eval loss. Each new best step is saved; the best one becomes the adapter."""
    early_stop: Positive | None = None
    """Number of evaluations without a better eval loss after which training stops."""
    trackers: list[str] = []
    """Experiment trackers of the transformers trainer: tensorboard, wandb, trackio, mlflow, ..."""
    instability: Instability = Instability()
    """Reaction to a loss that is not finite, or far too high."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes, each holds the whole model (ddp), or a shard of each layer (fsdp2)."""
    auto_fit: bool = False
    """If the recipe does not fit this machine's GPU, apply the cheapest change that makes it fit, as `finetune plan`
    suggests it. The run folder's recipe.yaml and auto_fit.json record it."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"expected either epochs or steps, got {'both' if self.epochs else 'neither'}")
        if self.early_stop and not self.evaluate_every:
            raise ValueError("early_stop needs evaluate_every")
        if self.schedule != "constant" and self.final_learning_rate >= self.learning_rate:
            raise ValueError(f"final_learning_rate must be below learning_rate ({self.learning_rate:g})")
        if self.schedule == "constant" and self.final_learning_rate:
            raise ValueError("final_learning_rate needs schedule: linear or cosine")
        return self

    @property
    def rows_per_step(self) -> int:
        return max(1, round(self.tokens_per_step / self.row_tokens))


class Evaluation(Section):
    """Questions of the eval data, which the base and the tuned model answer."""

    max_new_tokens: Positive = 64
    """Longest answer in tokens."""
    limit: Positive | None = None
    """Largest number of questions, drawn with the seed."""
    batch_size: Positive = 32
    """Number of questions in one batch."""
    documents: list[HeldOut] = []
    """Eval documents: the loss on them before and after training shows how much the model has forgotten."""


class Recipe(Section):
    """One run, from data to merged model."""

    model: Model
    """The base model, and which of its towers are trained."""
    adapter: Adapter = Adapter()
    """LoRA's settings."""
    data: Data
    """Data for training and evaluation."""
    training: Training
    """Length of the training, size of a step, and optimiser."""
    evaluation: Evaluation | None = None
    """Questions of the eval data, which the base and the tuned model answer; without this section, no evaluation."""
    merge: bool = True
    """Whether the run ends with a standalone model, base + adapter."""
    output: Name
    """The run folder, relative to the current folder; default: runs/ and the name of the recipe file."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.max_length > self.training.row_tokens:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) must not exceed training.row_tokens "
                f"({self.training.row_tokens}): a dialogue is never cut"
            )
        if self.data.streams and self.training.epochs:
            raise ValueError("a streamed source has no epochs: set training.steps instead of training.epochs")
        if self.data.streams and self.model.init:
            raise ValueError("model.init learns a vocabulary from whole sources, and one is streamed: set model.base")
        if self.training.parallel == "fsdp2" and self.model.quantize:
            raise ValueError(
                "training.parallel: fsdp2 divides matrices over processes, and those of model.quantize: nf4 are packed "
                "in blocks that cannot be divided: set training.parallel: ddp, or leave model.quantize out"
            )
        if self.training.parallel == "fsdp2" and self.training.optimizer != "adamw":
            raise ValueError(
                f"training.parallel: fsdp2 divides the optimiser's moments over processes, and those of "
                f"training.optimizer: {self.training.optimizer} cannot be: set training.optimizer: adamw, or "
                f"training.parallel: ddp"
            )
        held_out = self.data.eval_sources or self.data.eval_split
        if not held_out and (self.evaluation or self.training.evaluate_every):
            asker = "evaluation" if self.evaluation else "training.evaluate_every"
            raise ValueError(f"{asker} needs held-out data: set data.eval_sources or data.eval_split")
        return self

    def doubts(self, steps: int | None) -> list[str]:
        """Return warnings about settings without effect in a run of this many `steps` (default: the recipe's)."""
        training, steps = self.training, steps or self.training.steps
        found = []
        if steps and training.warmup_steps >= steps:
            found.append(f"warmup_steps ({training.warmup_steps}) lasts for the whole run: the rate is never reached")
        if steps and (training.checkpoint_every or 0) > steps:
            found.append(f"checkpoint_every ({training.checkpoint_every}) is longer: the only checkpoint is the last")
        if steps and (training.evaluate_every or 0) > steps:
            found.append(f"evaluate_every ({training.evaluate_every}) is longer: nothing is evaluated on the way")
        if steps and (training.early_stop or 0) * (training.evaluate_every or 0) >= steps:
            found.append(f"early_stop ({training.early_stop} x {training.evaluate_every} steps) is never reached")
        return [f"training, {steps:,} steps: {doubt}" for doubt in found]

    @property
    def caches_features(self) -> bool:
        """Return whether image features are constant during the run, and the recipe caches them."""
        same = not self.model.trains_image_towers and self.data.augment == Augment()
        return self.data.cache_features and same and not self.data.streams

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


MAY_CHANGE = (
    *("evaluation", "merge", "output", "data.prepared", "data.workers", "data.feature_cache_size", "data.changed"),
    *("training.checkpointing", "training.checkpoint_every", "training.trackers", "training.instability"),
)
"""Keys that may change after training has begun in a run folder: they concern later stages, places, speed, memory or
safety, and do not change the result of training."""
