"""The console: data on stdout, talk on stderr, colour and bars only where they are wanted."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from threefold import console
from threefold.errors import ConfigError, DiskError


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    console.configure()
    yield
    console.configure()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(code: str, **kwargs: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=kwargs.pop("stdout", subprocess.PIPE),  # type: ignore[call-overload,no-any-return]
                            stderr=subprocess.PIPE, **kwargs)


def test_data_goes_to_stdout_and_talk_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    console.out("data")
    console.say("talk")
    console.note("by the way")
    console.warn("look", hint="there")
    assert capsys.readouterr() == ("data\n", "talk\nnote: by the way\nwarning: look\nhint: there\n")


def test_quiet_keeps_warnings_errors_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    console.out("data")
    console.say("talk")
    console.note("by the way")
    console.warn("look")
    console.error(ConfigError("no", hint="yes"))
    with console.progress(3, "steps") as bar:
        bar.update(3)
    assert capsys.readouterr() == ("data\n", "warning: look\nerror: no\nhint: yes\n")


def test_errors_are_in_the_voice_of_the_tool(capsys: pytest.CaptureFixture[str]) -> None:
    console.error(ConfigError("r.toml:14: unknown key `train.learning_rat`",
                              hint="did you mean `train.learning_rate`?"))
    assert capsys.readouterr().err == ("error: r.toml:14: unknown key `train.learning_rat`\n"
                                       "hint: did you mean `train.learning_rate`?\n")
    console.error(ValueError("our own fault"))
    assert capsys.readouterr().err.startswith("error: ValueError: our own fault\nhint: this is a fault of threefold")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(debug=True)
    try:
        raise ConfigError("no")
    except ConfigError as error:
        console.error(error)
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and shown.endswith("error: no\n")


@pytest.mark.parametrize(("environment", "coloured"), [
    ({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_only_on_a_terminal_that_wants_it(environment: dict[str, str], coloured: bool,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.warn("look")
    assert ("\x1b[" in sys.stderr.getvalue()) == coloured  # type: ignore[attr-defined]
    assert not console.has_colour(io.StringIO())


def test_text_from_outside_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = "a\x1b]0;title\x07b\rc\x9bd\te\nf"
    assert console.plain(hostile) == "a\\x1b]0;title\\x07b\\x0dc\\x9bd\te\nf"
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    console.say(hostile)
    console.out(hostile)
    for stream in (sys.stdout, sys.stderr):
        assert "\x1b" not in stream.getvalue() and "\\x1b" in stream.getvalue()  # type: ignore[attr-defined]


def test_data_in_a_pipe_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.out("a\x1bb", end="")
    assert capsys.readouterr().out == "a\x1bb"


def test_json_is_strict_and_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"loss": float("nan"), "rate": np.float32(0.5), "ids": np.arange(3), "path": Path("a/b"),
             "한": ("x\ny", None, True, 2**70)}
    console.print_json(value)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == {"loss": None, "rate": 0.5, "ids": [0, 1, 2], "path": "a/b",
                                "한": ["x\ny", None, True, 2**70]}


def test_tables_align_and_count_wide_characters(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"name": "gpt2", "parameters": 124_439_808, "loss": 3.14159},
            {"name": "한국어", "parameters": 7, "loss": None}]
    console.table(rows, title="models")
    assert capsys.readouterr().out == (
        "models\n"
        "name     parameters   loss\n"
        "gpt2    124,439,808  3.142\n"
        "한국어            7      -\n")
    console.configure(json=True)
    console.table(rows)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    console.configure()
    console.table([])
    assert capsys.readouterr().out == "\n"


def test_tables_on_a_terminal_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    console.table([{"name": "[red]x\x1b", "parameters": 1200, "ok": True}], title="models")
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert all(word in shown for word in ("models", "name", "[red]x\\x1b", "1,200", "yes"))


# ------------------------------------------------------------------------------------------ progress

def test_progress_is_a_line_every_few_seconds_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    bar = console.Progress(2000, "training, step", clock=lambda: now)
    for step in range(0, 2000, 10):
        now += 0.125
        bar.update(step, loss=3.21456, tokens=12300 + step)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5  # in 25 seconds
    assert lines[0] == "training, step 390/2,000, loss 3.215, tokens 12,690, 20 s left"


def test_the_time_left_counts_from_the_first_step_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A run that goes on from step 1,000 has done none of those steps in this process."""
    now = 0.0
    bar = console.Progress(2000, "training, step", clock=lambda: now)
    now = 30.0  # to load the checkpoint
    bar.update(1001)
    assert bar.left() is None
    now = 40.0
    bar.update(1011)
    assert bar.left() == pytest.approx(989.0)
    assert capsys.readouterr().err.splitlines()[-1] == "training, step 1,011/2,000, 16 min 29 s left"


def test_progress_without_a_known_end(capsys: pytest.CaptureFixture[str]) -> None:
    bar = console.Progress(None, "documents")
    bar.advance()
    bar.advance(2)
    assert bar.line() == "documents 3"
    assert bar.left() is None


def test_a_bar_moves_on_a_terminal_and_is_gone_afterwards() -> None:
    code = ("from threefold import console\n"
            "with console.progress(10, 'training') as bar:\n"
            "    bar.update(5, loss=1.5)\n"
            "console.out('done')\n")
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=slave,
                               env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(master)
    assert process.communicate()[0] == b"done\n" and process.returncode == 0
    assert b"training" in shown and b"5/10, loss 1.5" in shown and b"\x1b[2K" in shown


@pytest.mark.parametrize(("seconds", "words"), [
    (0.42, "0.4 s"), (12.4, "12 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7805, "2 h 10 min")])
def test_times_in_words(seconds: float, words: str) -> None:
    assert console.clock_words(seconds) == words


@pytest.mark.parametrize(("count", "words"), [
    (0, "0 B"), (512, "512 B"), (1_234, "1.2 kB"), (123_456_789, "123 MB"), (5e12, "5.0 TB")])
def test_sizes_in_words(count: float, words: str) -> None:
    assert console.size_words(count) == words


# ------------------------------------------------------------------------------------------ R04: nobody reads

def test_R04_a_command_whose_reader_goes_away_ends_quietly() -> None:
    code = ("from threefold import console\n"
            "for i in range(10**6): console.out('x' * 1000)\n")
    process = run(code)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"x" * 1000 + b"\n"
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 0


def test_R04_a_training_run_goes_on_without_its_reader() -> None:
    code = ("import sys\nfrom threefold import console\n"
            "for i in range(1000): console.print_json({'step': i}, required=False); console.say('talk')\n"
            "sys.exit(7)\n")
    process = run(code)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    assert process.wait(10) == 7


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which Linux has")
def test_a_full_disk_behind_stdout_is_an_error() -> None:
    code = ("from threefold import console, errors\n"
            "try:\n    console.out('x')\n"
            "except errors.DiskError as error:\n    console.error(error)\n    raise SystemExit(error.exit_code)\n")
    with open("/dev/full", "wb") as full:
        process = run(code, stdout=full)
    assert process.communicate()[1] == b"error: cannot write to standard output: no space left on device\n"
    assert process.returncode == DiskError.exit_code


def test_a_terminal_that_knows_no_unicode_is_no_reason_to_fail() -> None:
    process = run("from threefold import console; console.configure(); console.out('한 \\udc80'); console.say('한')",
                  env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    out, err = process.communicate()
    assert process.returncode == 0 and out == b"\\ud55c \\udc80\n" and err == b"\\ud55c\n"


def test_rich_is_not_imported_for_plain_talk() -> None:
    code = ("import sys\nfrom threefold import console, config\n"
            "console.out('x'); console.warn('y'); console.table([{'a': 1}])\n"
            "config.parse_recipe(config.dump(config.Recipe()))\n"
            "assert not {'rich', 'torch', 'numpy'} & set(sys.modules), 'imported too much'\n")
    process = run(code)
    assert process.communicate()[1] == b"warning: y\n" and process.returncode == 0
