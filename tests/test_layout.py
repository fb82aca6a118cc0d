"""The house: imports run one way, and torch stays out of the cheap verbs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "finetune").rglob("*.py"), *(ROOT / "modeling").rglob("*.py")])


def imports(path):
    """Modules of this project that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("finetune", "modeling"):
            inner = ROOT / node.module.replace(".", "/")
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = (inner / f"{alias.name}.py").exists() or (inner / alias.name / "__init__.py").exists()
                yield full if is_module else node.module


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


GRAPH = {module(path): sorted(set(imports(path))) for path in FILES}


def test_the_graph_was_read():
    assert len(GRAPH) > 25
    assert sum(map(len, GRAPH.values())) > 60


def test_imports_have_no_circle():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, f"circle: {' -> '.join([*open_, name])}"
        if name not in done:
            open_.append(name)
            for target in GRAPH.get(name, []):
                visit(target)
            open_.pop()
            done.add(name)

    for name in GRAPH:
        visit(name)


def test_modeling_never_imports_finetune():
    for name, targets in GRAPH.items():
        if name.startswith("modeling"):
            assert not [target for target in targets if target.startswith("finetune")], name


LAYERS = (
    *(
        "modeling",
        "console",
        "recipe",
        "distributed",
        "exit_codes",
        "data",
        "base_model",
        "planning",
        "training",
        "run_dir",
    ),
    *("evaluation", "export", "serving", "reporting", "pipeline", "finetune", "cli"),
)
"""Packages and files of the top folder (finetune: its Python API): each imports from those before it alone."""

READS_RECIPE = (
    *("recipe", "planning", "base_model", "run_dir", "pipeline", "cli", "export.cards"),
    *("training.training_stage", "training.fit_memory"),
    *("evaluation.evaluation_stage", "export.merge_stage"),
)
"""Where the whole recipe is read; everything else takes plain arguments, or its own section."""


def layer(name):
    top, *rest = name.split(".")
    return LAYERS.index(rest[0] if top == "finetune" and rest else top)


def test_packages_import_from_lower_layers_alone():
    modules = [name for name in GRAPH if name != "finetune.__main__"]
    upward = {(name, target) for name in modules for target in GRAPH[name] if layer(target) > layer(name)}
    assert not upward


def test_the_whole_recipe_is_read_in_few_places():
    allowed = tuple(f"finetune.{name}" for name in READS_RECIPE)
    for path in FILES:
        imported = {
            name.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.module == "finetune.recipe.schema"
            for name in node.names
        }
        assert "Recipe" not in imported or module(path).startswith(allowed), path


def test_module_paths_of_idefics_are_spelt_in_towers_alone():
    spelt = re.compile(r"[\"'].*(vision_model\\?\.|perceiver_resampler\\?\.|gated_cross_attn_layers\\?\.)")
    places = {path.name for path in FILES if spelt.search(path.read_text())}
    assert places <= {"towers.py", "shapes.py"}


def test_the_template_is_written_in_chat_template_alone():
    places = {path.name for path in FILES if re.search(r"[\"']\\nAssistant:", path.read_text())}
    assert places <= {"chat_template.py", "loading.py"}  # loading.py: the probe of a saved tokenizer


@pytest.mark.parametrize(
    "code",
    [
        "import finetune.cli",
        "import finetune.planning.check",
        "import finetune.recipe.schema",
        "import finetune.data.prepare, finetune.data.sampling, finetune.data.images",
        "import modeling.config, modeling.shapes, modeling.tokens, modeling.towers",
    ],
)
def test_what_must_be_cheap_leaves_torch_and_transformers_alone(code):
    heavy = "torch transformers datasets peft trl accelerate bitsandbytes"
    script = f"{code}\nimport sys\nprint(*[name for name in '{heavy}'.split() if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert loaded.stdout.split() == []


def test_every_module_says_what_it_turns_into_what():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_names_of_test_files_differ():
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_top_level_is_the_fixed_one():
    """Nothing that a run leaves behind is committed."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    top = {line.partition("/")[0] for line in listed.splitlines()}
    files = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "constraints.txt", "setup.py"}
    folders = {"finetune", "recipes", "modeling", "scripts", "tests", "docs"}
    visible = {name for name in top if not name.startswith(".")}
    assert visible == files | folders | {"pyproject.toml"} or not (ROOT / ".git").exists()
