"""How verbs end: each says what Ctrl-C leaves, every error is one message, figures are JSON for every reader."""

import errno
import json
import os

import pytest
import typer
from typer.testing import CliRunner

from finetune import exit_codes as outcome
from finetune.cli import app


@pytest.mark.parametrize(
    ("verb", "arguments", "patched", "left"),
    [
        ("check", ["r.yaml"], "finetune.cli._load", "nothing is written"),
        ("plan", ["r.yaml"], "finetune.recipe.load.load_recipe", "nothing is written"),
        ("prepare", ["r.yaml"], "finetune.cli._load", "what is prepared is kept, and the same command goes on"),
        ("inspect", ["r.yaml"], "finetune.cli._load", "what is prepared is kept, and the same command goes on"),
        ("run", ["r.yaml"], "finetune.cli._load", "the same command goes on from the last checkpoint"),
        ("train", ["r.yaml"], "finetune.cli._load", "the same command goes on from the last checkpoint"),
        ("evaluate", ["r.yaml"], "finetune.cli._load", "the same command evaluates anew"),
        ("merge", ["run"], "finetune.export.merge_command.merge_folder", "the same command goes on"),
        ("chat", ["m"], "finetune.serving.chat.load_assistant", "the conversation is not saved"),
        ("chat", ["m", "q"], "finetune.serving.chat.load_assistant", "nothing is written"),
        ("generate", ["m", "in", "out"], "finetune.serving.generate_command.count_prompts",
         "what is answered is kept beside out, and the same command goes on"),
    ],
)  # fmt: skip
def test_ctrl_c(monkeypatch, verb, arguments, patched, left):
    def interrupt(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(patched, interrupt)
    ended = CliRunner().invoke(app, [verb, *arguments])
    assert (ended.exit_code, ended.stdout, ended.stderr) == (130, "", f"interrupted; {left}\n")


def ended(capsys, error):
    def work():
        raise error

    with pytest.raises(typer.Exit) as raised:
        outcome.guarded(work)
    return raised.value.exit_code, capsys.readouterr().err


@pytest.mark.parametrize(
    "number", [errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.ENOENT]
)
def test_path_error_is_one_line(capsys, number):
    error = OSError(number, os.strerror(number), "a\x1b[2J/[bold]b")
    assert ended(capsys, error) == (1, f"a␛[2J/[bold]b: {os.strerror(number)}\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM])
def test_disk_error_is_one_line(capsys, number):
    said = f"f: {os.strerror(number)}; what is complete is kept, and the same command goes on\n"
    assert ended(capsys, OSError(number, os.strerror(number), "f")) == (1, said)


def test_traceback_is_visible(capsys):
    status, said = ended(capsys, KeyError("a\x1b]0;b\x07\u202e[/x]"))
    assert (status, said.startswith("Traceback (most recent call last)")) == (1, True)
    assert "KeyError: 'a\\x1b]0;b\\x07\\u202e[/x]'" in said
    status, said = ended(capsys, RuntimeError("a\x1b]0;b\x07\u202e[/x]"))
    assert "RuntimeError: a␛]0;b␇[U+202E][/x]" in said


def test_finish_prints_strict_json(capsys):
    with pytest.raises(typer.Exit) as raised:
        outcome.finish({"loss": float("nan"), "place": "\ud800\x1b\u202e", "ok": 1.5}, as_json=True, status=4)
    assert raised.value.exit_code == 4
    out = capsys.readouterr().out
    assert json.loads(out, parse_constant=pytest.fail) == {"loss": None, "place": "\ud800\x1b\u202e", "ok": 1.5}
    assert out.isascii()


@pytest.mark.parametrize("verb", ["plan", "generate"])
def test_help_names_status(verb):
    shown = " ".join(CliRunner().invoke(app, [verb, "--help"]).output.split())
    assert f"Ends with status {outcome.DOES_NOT_FIT if verb == 'plan' else outcome.NOT_ALL_ANSWERED}" in shown
