"""What a recipe may say: one class a section, every key with its default, what does not fit together refused."""

import difflib
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from modeling.towers import EXACT_LORA

Mode = Literal["frozen", "lora", "full"]
Switch = Literal["frozen", "full"]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: a key nobody asked for is an error, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section):
    """Where the run starts, and what it trains."""

    base: str | None = None
    """Folder or hub id of a base or instruct IDEFICS."""
    init: Literal["tiny", "idefics-9b", "idefics-80b"] | None = None
    """Instead of `base`: a shape, for a fresh one with a vocabulary learnt from the recipe's own texts."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of what is not trained; auto: bf16 where the hardware has it, else fp32."""
    vision: Mode = "frozen"
    resampler: Mode = "frozen"
    cross_attention: Mode = "lora"
    decoder: Mode = "lora"
    gates: Switch = "full"
    added_tokens: Switch = "full"
    embeddings_and_head: Switch = "frozen"
    continue_from: str | None = None
    """An adapter folder made earlier, trained on from where it stands."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.base is None) == (self.init is None):
            got = "both" if self.base else "neither"
            raise ValueError(f"expected either base (a folder or hub id) or init (a shape), got {got}")
        if self.init and self.revision:
            raise ValueError("revision belongs to a base on the hub, and init makes a fresh model")
        if self.init and self.continue_from:
            raise ValueError("continue_from needs the base its adapter was made for, and init makes a fresh model")
        if all(mode == "frozen" for mode in self.modes.values()):
            raise ValueError("everything is frozen: expected at least one tower to be lora or full")
        return self

    @property
    def modes(self) -> dict[str, str]:
        towers = ("vision", "resampler", "cross_attention", "decoder", "gates", "added_tokens", "embeddings_and_head")
        return {tower: getattr(self, tower) for tower in towers}


LORA_FIELDS = (
    *("bias", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "use_dora", "velora_config", "alora_invocation_tokens", "use_qalora"),
    *("qalora_group_size", "monteclora_config", "layer_replication", "runtime_config", "lora_bias"),
    *("target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying", "exclude_modules"),
    *("fan_in_fan_out",),
)
"""Fields of peft.LoraConfig a recipe may set: a literal, because importing peft takes seconds. A test compares."""


class Adapter(BaseModel):
    """LoRA. Any other field of `peft.LoraConfig` is passed through to it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    rank: Positive = 16
    alpha: Positive = 32
    dropout: Share = 0.0

    @model_validator(mode="after")
    def _known_fields(self) -> Self:
        ours = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        ours |= dict.fromkeys(("target_modules", "modules_to_save"), "the towers under model")
        for key in self.model_extra or {}:
            if key in ours:
                raise ValueError(f"{key} is set by {ours[key]}")
            if key not in LORA_FIELDS:
                near = difflib.get_close_matches(key, ("rank", "alpha", "dropout", *LORA_FIELDS), n=1)
                raise ValueError(f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
            if key in EXACT_LORA and (value := (self.model_extra or {})[key]) not in EXACT_LORA[key]:
                raise ValueError(f"{key}: {value!r} could not be merged exactly; expected one of {EXACT_LORA[key]}")
        return self

    @property
    def lora(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`."""
        return {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout, **(self.model_extra or {})}


class Source(Section):
    """Where records come from; paths are relative to the recipe's folder."""

    format: Literal["messages", "easy_vqa", "easy_vqa_captions"]
    path: str | None = None
    image_root: str | None = None
    """Folder the records' image paths are relative to, and may not leave; without it, the data file's own."""
    split: str = "train"
    weight: Rate | None = None
    """Sampling ratio among the sources that have one; without weights each example is drawn once an epoch."""
    limit: Positive | None = None
    """Take only the first so many records."""
    turns: Positive = 1
    """Join questions about one image into dialogues of at most so many question-answer turns."""

    @model_validator(mode="after")
    def _path_where_needed(self) -> Self:
        if self.format == "messages" and self.path is None:
            raise ValueError(f"format {self.format} needs a path")
        return self


class Augment(Section):
    """Random changes to training images."""

    flip: bool = False
    """Mirror left to right, by a coin."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Move by up to so many pixels of the model's input, each way."""


class Data(Section):
    """What is trained on, and what is held out."""

    sources: Annotated[list[Source], Field(min_length=1)]
    eval_sources: list[Source] = []
    """Held-out data that comes as its own split or file."""
    eval_split: Share = 0.0
    """Without `eval_sources`: the share of the examples to hold out, no image on both sides."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest dialogue in tokens; a longer one is rejected and counted."""
    augment: Augment = Augment()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.eval_sources and self.eval_split:
            raise ValueError("expected eval_sources or eval_split, got both")
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(f"expected a weight for every source or for none, got {sum(weighted)} of {len(weighted)}")
        return self


class Training(Section):
    """How long, how much at once, and how fast."""

    epochs: Positive | None = None
    steps: Positive | None = None
    row_tokens: Positive = 2048
    """Most tokens of one packed row, the micro-batch."""
    row_images: Positive = 16
    """Most distinct images of one packed row."""
    tokens_per_step: Positive = 16384
    """Tokens of one optimiser step: round(tokens_per_step / row_tokens) rows, over all processes."""
    learning_rate: Rate = 2e-4
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 does not clip."""
    gates_learning_rate: Rate | None = None
    added_tokens_learning_rate: Rate | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; without it, a tenth of the run, or `evaluate_every`."""
    evaluate_every: Positive | None = None
    """Steps between held-out losses; each new best is a checkpoint, is kept, and in the end becomes the adapter."""
    early_stop: Positive | None = None
    """Stop after so many held-out losses without a better one."""
    trackers: list[str] = []
    """The trainer's own: tensorboard, wandb, trackio, mlflow, ..."""

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
    def packs_per_step(self) -> int:
        return max(1, round(self.tokens_per_step / self.row_tokens))


class Evaluation(Section):
    """Asking the base and the tuned model the held-out questions."""

    max_new_tokens: Positive = 64
    limit: Positive | None = None
    """Ask only so many questions, drawn by the seed."""
    batch_size: Positive = 32
    documents: list[Source] = []
    """Held-out documents: the loss on them before and after tells what was forgotten."""


class Recipe(Section):
    """One run, from data to merged model."""

    model: Model
    adapter: Adapter = Adapter()
    data: Data
    training: Training
    evaluation: Evaluation | None = None
    """Leave out to skip this stage."""
    merge: bool = True
    output: str
    """The run folder, relative to where the command is given."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.max_length > self.training.row_tokens:
            raise ValueError(
                f"data.max_length ({self.data.max_length}) must not exceed training.row_tokens "
                f"({self.training.row_tokens}): a dialogue is never cut"
            )
        held_out = self.data.eval_sources or self.data.eval_split
        if not held_out and (self.evaluation or self.training.evaluate_every):
            asker = "evaluation" if self.evaluation else "training.evaluate_every"
            raise ValueError(f"{asker} needs held-out data: set data.eval_sources or data.eval_split")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
