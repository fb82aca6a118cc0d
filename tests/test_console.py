"""Everything printed passes one place: nothing in data commands a terminal, markup is text, a log has few lines."""

import ast
import io
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.columns import Columns
from rich.console import Group
from rich.text import Text
from typer.testing import CliRunner

from finetune import console
from finetune.cli import app
from finetune.console import parse_size, show_size, to_json, visible
from modeling.errors import UserError

ROOT = Path(__file__).parent.parent
HOSTILE = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202eabc\u200b\r[bold]b[/i] :smile: \ud800 \U000e0041"
SHOWN = "␛]52;c;ZXZpbA==␇␛[2J[U+009B]31m[U+202E]abc[U+200B]␍[bold]b[/i] :smile: \ufffd [U+E0041]"


@pytest.fixture
def printed(monkeypatch):
    """printed(renderable) -> what a terminal of 200 columns gets, without the colours of our own."""

    def show(what):
        out = io.StringIO()
        monkeypatch.setattr(console.results, "_file", out)
        monkeypatch.setattr(console.results, "_width", 200)
        monkeypatch.setattr(console.results, "_color_system", None)
        console.display(what)
        return out.getvalue()

    return show


@pytest.mark.parametrize(
    "made",
    [
        lambda text: text,
        lambda text: console.table(text, ["a", "b"], [("c", "d")]),
        lambda text: console.table("t", [text, "b"], [("c", "d")]),
        lambda text: console.table("t", ["a", "b"], [(text, 1), ("c", text)]),
        lambda text: console.panel("body", title=text),
        lambda text: console.panel("body", title="t", subtitle=text),
        lambda text: console.panel(text, title="t"),
        lambda text: console.panel(Group(Text("a"), Columns([Text(visible(text)), text])), title="t"),
    ],
)
def test_printed_text_is_visible(printed, made):
    """Nothing that is printed obeys the data."""
    shown = printed(made(HOSTILE))
    assert re.sub(r"\s", "", SHOWN) in re.sub(r"[\s│┃]", "", shown)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b\u202e\ud800]", shown)


def test_visible_text_keeps_styles():
    text = Text.assemble("a\x1b", ("b\u202ec", "red"), ("d", "green"))
    seen = console._visible_text(text)
    assert seen.plain == "a␛b[U+202E]cd"
    assert [(seen.plain[span.start : span.end], span.style) for span in seen.spans] == [
        ("b[U+202E]c", "red"),
        ("d", "green"),
    ]


def test_messages_are_visible_and_not_wrapped(capsys):
    long = "word " * 60
    console.log(HOSTILE + long)
    console.log_error(HOSTILE + long)
    console.print_text(HOSTILE + long)
    out, err = capsys.readouterr()
    assert [line.rstrip() for line in err.splitlines()] == [(SHOWN + long).rstrip()] * 2
    assert out == f"{SHOWN}{long}\n"


@pytest.mark.parametrize(
    "text", ["\U0001f469\u200d\U0001f680 ❤\ufe0f é 犬 e\u0301 שלום नमस्ते", "two\nlines\tand a tab", "ﾊﾛｰ", "a\u200cb"]
)
def test_visible_keeps_visible_text(text):
    assert visible(text) == text


@pytest.mark.parametrize(
    "character",
    [
        *("\x00", "\x08", "\x1b", "\x7f", "\x85", "\x9d", "\xad", "\u034f", "\u061c", "\u115f", "\u200e", "\u2028"),
        *("\u202d", "\u2060", "\u2066", "\u206f", "\u3164", "\ufeff", "\ufdd0", "\ufff9", "\uffff", "\U0001d173"),
        "\U000e007f",
    ],
)
def test_visible_spells_out_each_kind(character):
    shown = visible(f"a{character}b")
    assert character not in shown
    assert shown.isprintable()


@given(st.text(st.characters(codec=None)))
def test_to_json_round_trip(text):
    """JSON gives back every text, and holds no invisible character."""
    written = to_json({text: [text]})
    assert json.loads(written) == {text: [text]}
    assert visible(written) == written


def test_to_json_nan_is_null():
    figures = {"a": float("nan"), "b": [float("inf"), -float("inf"), 1.5], "c": (True, None)}
    assert to_json(figures) == '{"a": null, "b": [null, null, 1.5], "c": [true, null]}'


def test_print_text_on_ascii_stdout(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    console.print_text("犬 is a dog")
    assert out.buffer.getvalue() == b"\\u72ac is a dog\n"


def test_wrong_command_line_is_visible():
    for arguments in (["\x1b[2J"], ["--\x1b[2J"], ["plan", "r.yaml", "--\x1b[2J"], ["merge", "x", "\x1b[2Ja=1"]):
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code in (1, 2)
        assert "\x1b[2J" not in outcome.output


# Bars


def lines_of(capsys):
    return [line.rstrip() for line in capsys.readouterr().err.splitlines()]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: clock[0] seconds."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_progress_in_a_log(clock, capsys):
    """A line a minute, and one at the end."""
    for item in console.track(list(range(300)), "con[red]vert"):
        clock[0] = item * 0.5
    assert lines_of(capsys) == [
        "con[red]vert 121/300 0:01:00",
        "con[red]vert 241/300 0:02:00",
        "con[red]vert 300/300 0:02:29",
    ]


def test_progress_of_failed_work(clock, capsys):
    def fail():
        with console.bar() as bar:
            task = bar.add_task("train", total=4000, note="")
            bar.update(task, completed=1500, note="loss 1.250")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert lines_of(capsys) == ["train 1,500/4,000 loss 1.250 0:00:00"]


def test_bar_parses_no_markup(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console.console, "_force_terminal", True)
    monkeypatch.setattr(console.console, "_file", out)
    monkeypatch.setattr(console.console, "_width", 120)
    monkeypatch.setattr(console.console, "_color_system", None)
    with console.bar() as bar:
        bar.add_task("a[/b]\x1b[2J.jsonl", total=2, note="[/x]\x1b[8m")
    assert "a[/b]␛[2J.jsonl" in out.getvalue()
    assert "[/x]␛[8m" in out.getvalue()


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("24GiB", 25_769_803_776),
        ("1.5 gb", 1_500_000_000),
        (" 700mib ", 734_003_200),
        ("400kB", 400_000),
        ("1KiB", 1024),
        ("2TB", 2_000_000_000_000),
    ],
)
def test_parse_size(text, size):
    assert parse_size("--gpu", text) == size


@pytest.mark.parametrize(
    "text", ["", "24", "GB", "0GB", "0.0000000001GB", "-5GB", "24XB", "5 G B", "1e9", "5GB5", "nan GiB", "١GB"]
)
def test_parse_size_refuses(text):
    with pytest.raises(UserError, match="--shard-size: expected a size with its unit, such as 5GB or 24GiB, got"):
        parse_size("--shard-size", text)


def test_show_size():
    assert show_size(25_769_803_776) == "24.00 GiB"
    assert show_size(700 * 2**20) == "700.0 MiB"
    assert show_size(2**30 - 1) == "1,024.0 MiB"


# The one place


def test_nothing_else_prints():
    """print, typer.echo, input's prompt and writing to sys.stdout or sys.stderr are console.py's alone."""
    found = []
    for path in sorted([*(ROOT / "finetune").rglob("*.py"), *(ROOT / "modeling").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                prints = called in (
                    "print",
                    "typer.echo",
                    "typer.secho",
                    "click.echo",
                    "rich.print",
                    "print_exc",
                    "traceback.print_exc",
                    "Panel",
                    "Console",
                )
                writes = re.search(
                    r"(^|\.)(stdout|stderr)\.(write|writelines)$|(^|\.)(console|results)\.(print|log|out)$", called
                )
                if prints or writes:
                    found.append(f"{path.relative_to(ROOT)}: {called}")
    assert [line for line in found if not line.startswith("finetune/console.py: ")] == []
    assert len(found) > 4


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x00\x1b\r\x7f", "␀␛␍␡"),
        ("\u202eabc\u2069", "[U+202E]abc[U+2069]"),
        ("\ud83d", "\ufffd"),
        ("\U0001f469\u200d\U0001f680 é 犬", "\U0001f469\u200d\U0001f680 é 犬"),
        ("\U000e0041", "[U+E0041]"),
    ],
)
def test_visible_writes_invisible_characters_out(text, shown):
    assert visible(text) == shown


@given(st.text(st.characters(codec=None)))
def test_visible_text_has_no_control_characters(text):
    shown = visible({text: [text, 1]})
    ((key, (value, one)),) = shown.items()
    assert key == value == value.encode("utf-8").decode("utf-8")
    assert one == 1
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", value)
