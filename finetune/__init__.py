"""Instruction fine-tuning for IDEFICS: files in, instruct model out.

    import finetune

    recipe = finetune.load_recipe("quickstart", ["training.steps=50"])
    finetune.check(recipe)  # a second, without torch
    finetune.run(recipe)  # prepares, trains, evaluates and merges
    chat = finetune.Conversation(finetune.load_assistant("runs/quickstart/merged"))
    chat.show("shape.png")
    chat.ask("what color is it?")

Each function returns what the verb of its name prints with `--json`. A mistake of the caller raises `UserError`, whose
message says how to repair it. `import finetune` imports nothing else; a function's module is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.export.merge_command import merge_folder as merge_folder
    from finetune.pipeline import evaluate as evaluate
    from finetune.pipeline import merge as merge
    from finetune.pipeline import prepare as prepare
    from finetune.pipeline import run as run
    from finetune.pipeline import train as train
    from finetune.planning.check import check as check
    from finetune.planning.estimate import plan as plan
    from finetune.recipe.load import load_recipe as load_recipe
    from finetune.serving.chat import Conversation as Conversation
    from finetune.serving.chat import load_assistant as load_assistant
    from modeling.errors import UserError as UserError

__version__ = "0.1.0"

_MODULES = {
    "load_recipe": "finetune.recipe.load",
    "check": "finetune.planning.check",
    "plan": "finetune.planning.estimate",
    "prepare": "finetune.pipeline",
    "run": "finetune.pipeline",
    "train": "finetune.pipeline",
    "evaluate": "finetune.pipeline",
    "merge": "finetune.pipeline",
    "merge_folder": "finetune.export.merge_command",
    "load_assistant": "finetune.serving.chat",
    "Conversation": "finetune.serving.chat",
    "UserError": "modeling.errors",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'finetune' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]
