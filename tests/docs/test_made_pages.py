"""The parts of docs/ that scripts/make_docs.py makes from the code are up to date."""

import re

import make_docs
import pytest
import yaml

import finetune

ROOT = make_docs.ROOT
PAGES = make_docs.PAGES


def test_every_part_has_its_page():
    made = [name for page in PAGES for _, name, _ in make_docs.PART.findall(page.read_text())]
    assert sorted(made) == sorted(make_docs.PARTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_docs_up_to_date(page):
    """Where this fails: python scripts/make_docs.py"""
    text = page.read_text()
    assert make_docs.rewrite(text) == text


def test_tree_of_a_small_house(tmp_path):
    for name, text in {
        "finetune/__init__.py": '"""Files in, model out."""',
        "finetune/cli.py": '"""One verb\neach. And more."""',
        "finetune/data/__init__.py": '"""Records.\n\nIn short."""',
        "finetune/data/split.py": '"""Long <image> -> `<s>`"""',
        "modeling/__init__.py": '"""Tensors."""',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert make_docs.make_tree(tmp_path) == (
        "### finetune/\n\nFiles in, model out.\n\n| file | what it is |\n| --- | --- |\n"
        "| [cli.py](../finetune/cli.py) | One verb each |\n\n"
        "### finetune/data/\n\nRecords.\n\n| file | what it is |\n| --- | --- |\n"
        "| [split.py](../finetune/data/split.py) | Long &lt;image> -> `<s>` |\n\n"
        "### modeling/\n\nTensors.\n\n| file | what it is |\n| --- | --- |\n"
    )


def test_community_files_are_valid():
    version = finetune.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-format", "ruff-check", "mypy"]
    bounds = set(re.findall(r'"([\w-]+>=[\d.]+)', (ROOT / "pyproject.toml").read_text()))
    oldest = re.findall(r"^([\w-]+)==([\d.]+?)(?:\.0)*$", (ROOT / ".github" / "oldest.txt").read_text(), re.MULTILINE)
    assert {f"{name.lower()}>={version}" for name, version in oldest if name != "pydantic_core"} <= bounds
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    assert {"run": "scripts/test.sh"} in jobs["test"]["steps"]
