"""The command `finetune`: one verb per stage. Imports torch only inside a verb that needs it."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from finetune import __version__
from finetune.console import print_text, visible
from finetune.distributed import launcher as launch
from finetune.distributed.writable import check_place
from finetune.exit_codes import DOES_NOT_FIT, NOT_ALL_ANSWERED, fail, finish, guarded, quiet
from modeling.errors import UserError


class _Verbs(TyperGroup):
    """The verbs; what is wrong with a command line is shown in visible characters, as file names come from anywhere."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **options: Any) -> Any:
        """Parse the command line."""
        with _visible_errors():
            return super().make_context(info_name, list(map(_expand_home, args)), *rest, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        with _visible_errors():
            return super().invoke(ctx)


@contextmanager
def _visible_errors() -> Iterator[None]:
    try:
        yield
    except typer.TyperException as error:
        error.message = visible(error.message)
        raise


def _expand_home(argument: str) -> str:
    """Expand ~/x as a shell does, also in --html=~/x and in quotes, where a shell does not."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).expanduser()}" if value == "~" or value.startswith("~/") else argument


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    epilog=f"Status: 0 done, 1 an error, 2 a wrong command line, {DOES_NOT_FIT} `plan`: does not fit, "
    f"{NOT_ALL_ANSWERED} `generate`: not all answered, 128 + N ended by signal N.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from finetune.distributed.environment import versions

        for name, version in {"finetune": __version__, **versions()}.items():
            print_text(f"{name} {version}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the versions, and end.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Instruction fine-tuning for IDEFICS: a recipe in, a merged instruct model out."""


def _complete_recipe(incomplete: str) -> list[str]:
    from finetune.recipe.shipped_recipes import complete_recipe

    return complete_recipe(incomplete)


def _complete_key(incomplete: str) -> list[str]:
    from finetune.recipe.shipped_recipes import complete_key

    return complete_key(incomplete)


RecipeFile = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe: a YAML file, or the name of one that ships (`finetune recipes`).",
        show_default=False,
        autocompletion=_complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Keys of the recipe to change: training.steps=10",
        show_default=False,
        autocompletion=_complete_key,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Processes = Annotated[
    int, typer.Option("--processes", help="Number of processes, one per GPU; without GPUs, on the CPU.", min=1)
]
Restarts = Annotated[
    int, typer.Option("--restarts", help="With --processes: restart all processes so often after one died.", min=0)
]


@app.command(epilog="Example: `finetune recipes`")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that ship: what each does, on which GPUs, and what it needs."""

    def work() -> dict[str, Any]:
        from finetune.console import display, log
        from finetune.recipe.shipped_recipes import list_recipes

        found = list_recipes()
        for recipe in found if not as_json else ():
            display(recipe["name"], "bold")
            display(f"  {recipe['description']}")
            data = ", ".join(
                f"{name} (does not ship)" if name in recipe["missing"] else name for name in recipe["data"]
            )
            display(f"  GPUs: {recipe['gpus'] or 'none'} · base: {recipe['base']} · data: {data}")
        log("to run one: finetune run RECIPE; to copy one and edit it: finetune new NAME --from RECIPE")
        return {"recipes": found}

    finish(guarded(work, interrupted="nothing is written"), as_json)


@app.command(epilog="Example: `finetune new mine --from quickstart`")
def new(
    name: Annotated[Path, typer.Argument(metavar="NAME", help="Folder to create; the recipe gets its name.")],
    source: Annotated[str, typer.Option("--from", metavar="RECIPE", help="Which recipe that ships.")] = "own_data",
    as_json: AsJson = False,
) -> None:
    """Copy a recipe that ships, and the files that it needs, into a new folder. Nothing is overwritten."""

    def work() -> dict[str, Any]:
        from finetune.console import log
        from finetune.recipe.shipped_recipes import new_recipe

        copied = new_recipe(name, source=source)
        if copied["missing"]:
            log(f"needed, and not shipped: {', '.join(copied['missing'])}; see {name / 'README.md'}")
        log(f"{copied['recipe']}: a copy of {source}; edit it, then: finetune check {copied['recipe']}")
        return copied

    finish(guarded(work, interrupted="the same command copies anew"), as_json)


@app.command(epilog="Example: `finetune schema > recipe.schema.json`")
def schema() -> None:
    """Print the JSON schema of recipes, with which editors complete and check a recipe while you write it.

    A recipe whose first line is `# yaml-language-server: $schema=recipe.schema.json` points an editor to this file.
    """
    from finetune.recipe.json_schema import recipe_schema

    finish(guarded(recipe_schema, interrupted="nothing is written"), as_json=True)


@app.command(epilog="Example: `finetune check quickstart`")
def check(recipe: RecipeFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Read the recipe, the first records of every source and the model's config; takes seconds, without torch."""
    from finetune.planning.check import check as check_recipe

    def work() -> dict[str, Any]:
        return check_recipe(_load(recipe, overrides, runs=True), show=not as_json)

    finish(guarded(work, interrupted="nothing is written"), as_json)


@app.command(epilog="Example: `finetune plan idefics-9b_lora_1x80gb --gpu 24GiB --picture plan.png`")
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Memory of the GPU: 24GiB, 80GB; default: this machine's.", show_default=False),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", help="Number of processes, one per GPU; the plan is for each GPU.", min=1)
    ] = 1,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the memory into this file (png, svg).", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict memory, disk and steps of a recipe before anything is loaded, and what would make it fit.

    Ends with status 3 where it does not fit.
    """
    from finetune.planning.estimate import plan as plan_recipe
    from finetune.planning.report import draw_plan, show_plan
    from finetune.recipe.load import load_recipe

    def work() -> dict[str, Any]:
        loaded = load_recipe(recipe, overrides)
        if picture:
            check_place("--picture", picture)
        figures = plan_recipe(loaded, gpu=gpu, processes=processes)
        if not as_json:
            show_plan(figures)
        if picture:
            draw_plan(figures, picture)
        return figures

    figures = guarded(work, interrupted="nothing is written")
    finish(figures, as_json, status=0 if not figures["gpu"] or figures["gpu"]["fits"] else DOES_NOT_FIT)


@app.command(epilog="Example: `finetune prepare mine/mine.yaml`; on many machines: `--shard 3/16`, then without it")
def prepare(
    recipe: RecipeFile,
    overrides: Overrides = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Prepare only the I-th of N shares; without it, all are joined.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="New folder for all examples, which the datasets library loads.", show_default=False),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="NAME", help="Push the same to the hub, as ME/MINE.", show_default=False),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: everyone can read it.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --to or --push: say what would go there, and write nothing there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Convert, tokenise and check the data of a recipe; data that is prepared already is opened in seconds.

    With `--to` and `--push`, others can load and look at it: dialogues, images, tokens and labels.
    """
    if (public and not push) or (dry_run and not (push or to)):
        fail("--public: expected --push NAME with it" if public else "--dry-run: expected --to FOLDER or --push NAME")
    if shard and (to or push):
        fail(f"--shard {shard}: not with --to or --push, which need all shares; give them to the command that joins")

    def work() -> dict[str, Any]:
        share = _share(shard) if shard else None
        loaded = _load(recipe, overrides)
        if to:
            check_place("--to", to, folder=True)
        quiet()
        from finetune.console import display
        from finetune.pipeline import prepare, prepare_shard
        from finetune.reporting.inspect import stats_table

        if share:
            return prepare_shard(loaded, *share)
        report = prepare(loaded, to=to, push=push, private=not public, dry_run=dry_run)
        if not as_json:
            display(stats_table(report["sources"] + report["eval_sources"]))
        return report

    finish(guarded(work, interrupted="what is prepared is kept, and the same command goes on"), as_json)


def _share(text: str) -> tuple[int, int]:
    """Return (3, 16) for "3/16". Raises UserError."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise UserError(f"--shard: expected I/N with I from 1 to N, such as 3/16, got {text!r:.80}")
    return int(number), int(of)


@app.command(epilog="Example: `finetune run quickstart training.steps=50`")
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Processes = 1,
    restarts: Restarts = 0,
    as_json: AsJson = False,
) -> None:
    """Prepare, train, evaluate and merge, as far as the recipe asks. Interrupted, the same command goes on."""
    _stages(recipe, overrides, as_json, None, processes=processes, restarts=restarts)


@app.command(epilog="Example: `finetune train quickstart`")
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Processes = 1,
    restarts: Restarts = 0,
    as_json: AsJson = False,
) -> None:
    """Train the adapter of a recipe; interrupted, go on from the last checkpoint."""
    _stages(recipe, overrides, as_json, "train", processes=processes, restarts=restarts)


@app.command(epilog="Example: `finetune evaluate quickstart`")
def evaluate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Processes = 1,
    restarts: Restarts = 0,
    as_json: AsJson = False,
) -> None:
    """Ask the base and the tuned model the held-out questions; the answers are scored, and shown on a page."""
    _stages(recipe, overrides, as_json, "evaluate", processes=processes, restarts=restarts)


@app.command(epilog="Example: `finetune merge runs/mine/adapter --base HuggingFaceM4/idefics-9b --out merged`")
def merge(
    what: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN|ADAPTER", help="A recipe, a run folder, or any adapter folder.")
    ],
    overrides: Overrides = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base of an adapter: folder or hub id.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to.", show_default=False)] = None,
    base_precision: Annotated[
        Literal["full", "nf4"] | None,
        typer.Option(
            "--base-precision", help="full: the released weights; nf4: their 4-bit values.", show_default=False
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option("--dtype", help="Precision of the merged weights; default: the base's.", show_default=False),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="Largest weight file: 5GB, 2GiB.", show_default="5GB")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Verify a merged folder again; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write base + adapter as a standalone model, and verify that it computes the same. Interrupted, it goes on."""
    given = {
        "--base": base,
        "--out": out,
        "--base-precision": base_precision,
        "--dtype": dtype,
        "--shard-size": shard_size,
    }
    options = [option for option, value in given.items() if value is not None]
    is_recipe = what.suffix in (".yaml", ".yml")
    if not is_recipe and not what.exists():
        from finetune.recipe.load import find_recipe

        is_recipe = find_recipe(what) != what  # the name of a recipe that ships
    if is_recipe and (options or verify):
        fail(f"{', '.join(options) or '--verify'}: not with a recipe; give the run's folder instead")
    if overrides and not is_recipe:
        fail(f"{overrides[0]}: only a recipe has keys to change, and {what} is a folder")
    if verify and options:
        fail(f"{', '.join(options)}: not with --verify, which reads in {what} what it was made of")
    if is_recipe:
        _stages(what, overrides, as_json, "merge")
        return

    def work() -> dict[str, Any]:
        quiet()
        from finetune.export.merge_command import merge_folder, verify_folder

        if verify:
            return verify_folder(what, show=not as_json)
        return merge_folder(
            what,
            base=base,
            out=out,
            base_precision=base_precision,
            dtype=dtype,
            shard_size=shard_size,
            show=not as_json,
        )

    finish(guarded(work, interrupted="the same command goes on"), as_json)


@app.command(epilog="Example: `finetune inspect mine/mine.yaml --html mine.html`")
def inspect(
    recipe: RecipeFile,
    overrides: Overrides = None,
    count: Annotated[
        int, typer.Option(help="Number of dialogues drawn at random, shown after the longest ones.", min=1)
    ] = 20,
    ids: Annotated[bool, typer.Option("--ids", help="Show the id, the label and the image of every token.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page, one self-contained file, instead.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what became of each record, and dialogues as the model will see them, token by token."""

    def work() -> dict[str, Any]:
        loaded = _load(recipe, overrides)
        if html:
            check_place("--html", html)
        quiet()
        from finetune.console import log
        from finetune.pipeline import open_dataset
        from finetune.reporting.html.inspection import inspection_page
        from finetune.reporting.inspect import inspect as inspect_data
        from finetune.reporting.inspect import show_inspection
        from modeling.atomic_files import atomic_write

        sources, dataset, tokenizer = open_dataset(loaded)
        inspection = inspect_data(sources, dataset, tokenizer, loaded.data, loaded.training, count=count)
        if html:
            html.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(html, inspection_page(inspection, title=Path(loaded.output).name, recipe=loaded.to_yaml()))
            log(f"the page: {html}")
        elif not as_json:
            show_inspection(inspection, ids=ids)
        return {"sources": inspection.stats, "overlap": dataset.report["overlap"]}

    finish(guarded(work, interrupted="what is prepared is kept, and the same command goes on"), as_json)


ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model (folder or hub id), a run, or an adapter.", show_default=False)
]
AdapterFolder = Annotated[
    Path | None, typer.Option("--adapter", help="Adapter folder, where MODEL is its base.", show_default=False)
]
Quantize = Annotated[
    Literal["nf4"] | None,
    typer.Option("--quantize", help="Load the matrices of both text towers in 4 bits.", show_default=False),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.", min=1)]


@app.command(epilog='Example: `finetune chat runs/quickstart/merged --image shape.png "what color is it?"`')
def chat(
    model: ModelName,
    question: Annotated[str | None, typer.Argument(help="One question; without it, a conversation.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", help="Image for the question; repeatable.")] = None,
    adapter: AdapterFolder = None,
    quantize: Quantize = None,
    max_new_tokens: NewTokens = 256,
    as_json: AsJson = False,
) -> None:
    """Ask a model one question, or hold a conversation in which images can be added."""
    if as_json and not question:
        fail("--json: prints one answer; expected a QUESTION with it")

    def work() -> dict[str, Any]:
        quiet()
        from finetune.console import log, print_text
        from finetune.serving.chat import Conversation, converse, load_assistant

        conversation = Conversation(load_assistant(model, adapter=adapter, quantize=quantize), max_new_tokens)
        for path in image or []:
            conversation.show(str(path))
        if question:
            answer = conversation.ask(question)
            if not as_json:
                print_text(answer)
            return {"answer": answer}
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is not Unicode is refused as a question
        converse(conversation, lambda: input("> " if sys.stdin.isatty() else ""), print_text, log)
        return {}

    finish(guarded(work, interrupted="nothing is written" if question else "the conversation is not saved"), as_json)


@app.command(epilog="Example: `finetune generate runs/mine/merged prompts.jsonl answers.jsonl`")
def generate(
    model: ModelName,
    prompts: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="`messages` records that end with the user.")],
    answers: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The same records, with answers.")],
    adapter: AdapterFolder = None,
    quantize: Quantize = None,
    max_new_tokens: NewTokens = 256,
    as_json: AsJson = False,
) -> None:
    """Answer a file of prompts, one per line; a record that cannot be asked gets the reason instead.

    Interrupted, the same command goes on. Ends with status 4 where a record could not be asked.
    """

    def work() -> dict[str, Any]:
        quiet()
        from finetune.console import log, track
        from finetune.serving.chat import load_assistant
        from finetune.serving.generate_command import answer_file, count_prompts, identify_model

        total = count_prompts(prompts, answers)
        assistant = load_assistant(model, adapter=adapter, quantize=quantize)
        counts = answer_file(
            assistant,
            prompts,
            answers,
            model=identify_model(model, adapter=adapter, quantize=quantize),
            max_new_tokens=max_new_tokens,
            track=partial(track, total=total),
        )
        log(f"{answers}: {counts['answered']} answers, {counts['errors']} errors")
        return dict(counts)

    counts = guarded(work, interrupted=f"what is answered is kept beside {answers}, and the same command goes on")
    finish(counts, as_json, status=NOT_ALL_ANSWERED if counts["errors"] else 0)


def _load(path: Path, overrides: list[str] | None, *, runs: bool = False) -> Any:
    """Load a recipe, and check that its folders can be written: for prepared data and, where it `runs`, its own."""
    from finetune.recipe.load import load_recipe

    recipe = load_recipe(path, overrides)
    check_place("data.prepared", Path(recipe.data.prepared), folder=True)
    if runs:
        check_place("output", Path(recipe.output), folder=True)
    return recipe


def _stages(
    recipe: Path,
    overrides: list[str] | None,
    as_json: bool,
    stage: str | None,
    *,
    processes: int = 1,
    restarts: int = 0,
) -> None:
    interrupted = {"evaluate": {"interrupted": "the same command evaluates anew"}}.get(stage or "", {})
    if restarts and processes == 1:
        fail(f"--restarts {restarts}: one process has no launcher to restart it; expected --processes 2 or more")

    def work() -> dict[str, Any]:
        loaded = _load(recipe, overrides, runs=True)
        if processes > 1:
            arguments = [stage or "run", str(recipe), *(overrides or []), *(["--json"] if as_json else [])]
            parallel = loaded.training.parallel
            raise typer.Exit(launch.launch(arguments, processes=processes, parallel=parallel, restarts=restarts))
        quiet()
        from finetune.pipeline import run as run_stages
        from finetune.reporting.summary import show_result

        result = run_stages(loaded, (stage,) if stage else None)
        if launch.is_main_process() and not as_json:
            show_result(Path(loaded.output), result)
        return result

    finish(guarded(work, **interrupted), as_json and launch.is_main_process())
    launch.end_process()
