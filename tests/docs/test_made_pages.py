"""The parts of docs/ that scripts/make_docs.py makes from the code are up to date."""

from pathlib import Path

import make_docs
import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


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
        "finetune/data/split.py": '"""Long -> short"""',
        "modeling/__init__.py": '"""Tensors."""',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert make_docs.make_tree(tmp_path) == (
        "```\n"
        "finetune/     Files in, model out\n"
        "  cli.py      One verb each\n"
        "  data/       Records\n"
        "    split.py  Long -> short\n"
        "modeling/     Tensors\n"
        "```\n"
    )
