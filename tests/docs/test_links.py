"""Links between pages lead somewhere, pictures are there, and what pages name exists."""

import ast
import re
from pathlib import Path

import pytest
from make_docs import PAGES

ROOT = Path(__file__).parents[2]
OTHERS = (
    *("CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md", "recipes/own_data/README.md"),
    *("scripts/benchmarks/README.md", "finetune/data/README.md"),
)
ALL = [*PAGES, *(ROOT / name for name in OTHERS)]


def without_code(text):
    """A page without its blocks and its inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page):
    """The anchors that code hosts make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text()))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_linked_from_readme():
    text = (ROOT / "README.md").read_text()
    linked = {name.partition("#")[0] for name in re.findall(r"\]\((docs/[^)\s]+)\)", text)}
    pages = {f"docs/{page.name}" for page in PAGES if page.parent == ROOT / "docs"}
    assert pages <= linked


def test_scripts_named_by_pages_exist():
    named = {
        name for page in ALL for name in re.findall(r"(?<![\w/])scripts/[\w/]+\.(?:py|sh|slurm)", page.read_text())
    }
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_benchmark_is_described():
    text = (ROOT / "scripts" / "benchmarks" / "README.md").read_text()
    assert [path.name for path in (ROOT / "scripts" / "benchmarks").glob("*.py") if path.name not in text] == []


def test_messages_of_troubleshooting_are_those_of_the_code():
    """Each message in the first column is written somewhere in the code, up to what stands for `...`, N and M."""
    texts = []
    for path in [*(ROOT / "finetune").rglob("*.py"), *(ROOT / "modeling").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    rows = re.findall(r"^\| ([^|]*`[^|]*) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 20
    for message in messages:
        pattern = re.escape(message).replace(r"\.\.\.", ".*")
        pattern = re.sub(r"\b[NM]\b", "\0", pattern)
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), message
