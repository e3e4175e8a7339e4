"""Chat: a conversation line by line, kept after every turn, gone on with, cut to the context, stopped, served."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import run
from tests.test_remote import KEY, PROTOCOLS, Reply, Server, server
from tests.test_tasks import bert, gpt2
from threefold import console, files, pipeline
from threefold.auto import load
from threefold.chat.conversation import Conversation, Message
from threefold.chat.loop import COMMANDS, Loop
from threefold.chat.speakers import LocalSpeaker, Told
from threefold.errors import DataError, RemoteError, UsageError
from threefold.objectives.instruct import messages_of
from threefold.text.rows import Row

__all__ = ["bert", "gpt2", "run", "server"]
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ["Why did the hen cross?", "And the cock?", "두 번째 줄", "The dog?"]
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _as_a_program_begins() -> None:
    """What an earlier command line has set is forgotten."""
    console.configure()


@pytest.fixture
def say(run: Say, gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """A function: lines and flags -> exit code, stdout, stderr of `threefold chat` with six tokens an answer."""
    def call(lines: Sequence[str], *flags: Any, model: Any = gpt2) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", model, *([] if "--max-new-tokens" in flags or ":" in str(model) else ["--max-new-tokens", 6]), *flags)
    return call


def turns(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def kept(path: Path) -> list[list[Message]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


# -- a conversation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_answer_is_what_the_model_writes_behind_all_that_was_said(system: str | None, say: Say, gpt2: Path, tmp_path: Path) -> None:
    """Greedily: turn for turn the answer of the text-generation pipeline."""
    code, out, err = say(QUESTIONS, "--temperature", 0, "--json", "--history", tmp_path / "h.jsonl", *(["--system", system] if system else []))
    ours, chat = pipeline("text-generation", gpt2, do_sample=False, max_new_tokens=6), [{"role": "system", "content": system}] if system else []
    for number, (question, told) in enumerate(zip(QUESTIONS, turns(out), strict=True), 1):
        chat.append({"role": "user", "content": question})
        answer = ours(chat, return_full_text=False)[0]["generated_text"]
        chat.append({"role": "assistant", "content": answer})
        assert (told["turn"], told["question"], told["answer"], told["left_out"]) == (number, question, answer, 0)
        assert told["new_tokens"] == 6 or told["finish_reason"] == "stop"
    assert code == 0 and kept(tmp_path / "h.jsonl") == [chat] and "note" not in err
    plain = say(QUESTIONS, "--temperature", 0, *(["--system", system] if system else []))[1]
    assert plain == "".join(told["answer"] + "\n" for told in turns(out))


def test_flags_are_those_of_generate_and_draws_follow_the_seed(say: Say) -> None:
    hot = ["--temperature", 3]
    first = say(QUESTIONS, *hot, "--seed", 5)
    assert first[0] == 0 and first == say(QUESTIONS, *hot, "--seed", 5) and first != say(QUESTIONS, *hot, "--seed", 6)
    greedy = say(QUESTIONS, "--temperature", 0)[1]
    assert say(QUESTIONS, *hot, "--top-k", 1)[1] == say(QUESTIONS, *hot, "--min-p", 1)[1] == greedy != first[1]
    assert say(QUESTIONS, *hot, "--top-p", 1e-9)[1] == greedy
    assert say(QUESTIONS, "--temperature", 0, "--repetition-penalty", 5)[1] != greedy
    asked = turns(say(QUESTIONS, "--temperature", 0, "--max-new-tokens", 3, "--json")[1])
    assert {one["new_tokens"] for one in asked if one["finish_reason"] == "length"} == {3}
    again = say([QUESTIONS[0], "/undo", QUESTIONS[0]], *hot, "--seed", 5)[1].splitlines()
    assert again[0] != again[1], "a question that is asked again is answered anew"
    stop = greedy[2:4]
    assert say(QUESTIONS[:1], "--temperature", 0, "--stop", stop)[1].rstrip("\n") == greedy.partition(stop)[0]


def test_a_conversation_in_parts_is_the_conversation(say: Say, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    out = say(QUESTIONS, "--history", whole, "--system", "Be brief.")[1]
    said = say(QUESTIONS[:1], "--history", parts, "--system", "Be brief.")[1]
    code, more, err = say(QUESTIONS[1:3], "--history", parts)
    assert code == 0 and "going on with 1 turn in" in err
    assert said + more + say(QUESTIONS[3:], "--history", parts)[1] == out
    assert parts.read_bytes() == whole.read_bytes()
    say(["one more"], "--history", parts, "--system", "Be long.")
    assert kept(parts)[0][0] == {"role": "system", "content": "Be long."} and kept(parts)[0][1:-2] == kept(whole)[0][1:]


def test_what_was_said_can_be_learnt_from(say: Say, tmp_path: Path) -> None:
    say([*QUESTIONS[:2], "/reset", QUESTIONS[2]], "--history", tmp_path / "h.jsonl")
    rows = [messages_of(Row(json.loads(line), "h")) for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert [[m["content"] for m in row if m["role"] == "user"] for row in rows] == [QUESTIONS[:2], QUESTIONS[2:3]]


# -- commands ----------------------------------------------------------------------------------------------------------


def test_commands_do_what_help_says(say: Say, tmp_path: Path) -> None:
    path, other = tmp_path / "h.jsonl", tmp_path / "new" / "o.jsonl"
    greedy = ["--temperature", 0]
    first, second = say(QUESTIONS[:2], *greedy)[1].splitlines()
    code, out, err = say(["/help", QUESTIONS[0], "", "  ", QUESTIONS[1], "/undo", "/undo", "/undo", QUESTIONS[0], "/quit", QUESTIONS[1]], *greedy,
                         "--history", path)
    assert code == 0 and out.splitlines() == [first, second, first]
    assert all(f"/{name}" in err for name in COMMANDS) and "left: 0 turns" in err and "nothing to take back" in err
    assert [m["content"] for m in kept(path)[0]] == [QUESTIONS[0], first]

    before = path.read_bytes()
    code, out, err = say(["/system Be brief.", "/system", QUESTIONS[0], f"/save {other}", QUESTIONS[1], "/save", "//system is a word"], *greedy,
                         "--history", path)
    assert code == 0 and "system: Be brief." in err and f"kept in `{other}`" in err
    questions = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], "/system is a word"]
    assert [m["content"] for m in kept(other)[0] if m["role"] != "assistant"] == ["Be brief.", *questions]
    assert json.loads(path.read_text())["messages"][1:3] == json.loads(before)["messages"], "the first file ends where the other begins"
    assert len(kept(path)[0]) == 5

    code, out, _ = say(["/reset", QUESTIONS[0]], *greedy, "--history", path)
    assert len(kept(path)) == 2 and kept(path)[1][0]["role"] == "system", "a new line, with the same system text"
    say(["/undo"], "--history", path)
    assert len(kept(path)) == 1
    with_system = say([QUESTIONS[0]], *greedy, "--system", "Be brief.")[1]
    assert out == with_system != f"{first}\n", "nothing of the old conversation is shown to the model"


@pytest.mark.parametrize(("lines", "flags", "says", "hint"), [
    (["/quti"], [], "no command `/quti`", "did you mean `quit`?"), (["/save"], [], "no file is named", "/save FILE"),
    (["/save {taken}"], [], "exists", "--history"), (["a"], ["--max-new-tokens", 0], "`max_new_tokens` is 0", ""),
    (["a"], ["--temperature", -1], "`temperature` is -1", ""), (["x " * 600], [], "the model's context is 512", "shorten"),
])
def test_errors_end_a_conversation_that_nobody_sits_at(lines: list[str], flags: list[Any], says: str, hint: str, say: Say, tmp_path: Path) -> None:
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine\n")
    code, out, err = say([line.format(taken=taken) for line in lines], *flags)
    assert (code, out) == (2, "") and says in err and hint in err
    assert taken.read_text() == "mine\n"


def test_a_model_that_cannot_talk_is_refused(say: Say, gpt2: Path, bert: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gpt2, tmp_path / "plain"))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    code, out, err = say(["a"], "--history", tmp_path / "h.jsonl", model=folder)
    assert (code, out) == (2, "") and "no chat template" in err and "finetune --task instruct" in err and "threefold generate" in err
    code, out, err = say(["a"], model=bert("masked"))
    assert (code, out) == (2, "") and "writes no text" in err
    assert not (tmp_path / "h.jsonl").exists()


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lines", "says"), [
    (["no json"], "h.jsonl:1` is not valid JSON"), (['{"text": "a"}'], "h.jsonl:1: the line is no conversation"),
    (['{"messages": []}'], "no `messages`"), (['{"messages": [{"role": "user", "content": "a"}]}'], "the roles are user, expected"),
    (['{"messages": [{"role": "bot", "content": "a"}]}'], "message 0 is"), (['{"messages": [{"role": "user", "content": 3}]}'], "message 0 is"),
    (['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "{"], "h.jsonl:2"),
    (['{"messages": [{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}]}'], "the roles are assistant, user"),
    (['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "system", "content": "c"}]}'], "in turn"),
])
def test_a_file_that_holds_something_else_is_an_error_and_stays(lines: list[str], says: str, say: Say, tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text("\n".join(lines) + "\n")
    code, out, err = say(["a"], "--history", path)
    assert (code, out) == (DataError.exit_code, "") and says in err.replace("\\", "")
    assert path.read_text() == "\n".join(lines) + "\n"


def test_a_disk_that_fails_leaves_the_turn_before(tmp_path: Path) -> None:
    """Whichever operation of a write fails, the file holds the conversation before or behind the turn, whole."""
    path, count = tmp_path / "h.jsonl", 0
    conversation = Conversation.resume(path)
    conversation.add("a", "b")
    before = path.read_bytes()

    def counting(kind: str, path: str, *details: Any) -> None:
        nonlocal count
        count += 1

    with files.observed(counting):
        conversation.add("c", "d")
    after = path.read_bytes()
    assert count > 3
    for fails in range(1, count + 1):
        path.write_bytes(before)
        trial, seen = Conversation.resume(path), 0

        def failing(kind: str, path: str, *details: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == fails:  # noqa: B023
                raise OSError(28, "No space left on device")

        with files.observed(failing), pytest.raises(Exception, match="cannot"):
            trial.add("c", "d")
        assert path.read_bytes() in (before, after)
        trial.write()  # the turn is not lost to the one who goes on
        assert path.read_bytes() == after and not [p for p in tmp_path.iterdir() if p != path]


# -- what fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [[], ["--system", "Be brief."]])
def test_the_oldest_turns_are_left_out_of_a_full_context_with_one_note(system: list[str], say: Say, gpt2: Path, tmp_path: Path) -> None:
    """As few as need be; the system text stays, the file holds all, and the answer is that of a conversation without them."""
    tokenizer, ours = load(gpt2)[1], pipeline("text-generation", gpt2, do_sample=False, max_new_tokens=6)
    lines = [f"{n} hens crossed the road, and the cock crossed it after them. Why did they cross number {n}? " * (2 + n % 3) for n in range(9)]
    code, out, err = say(lines, "--temperature", 0, "--json", "--history", tmp_path / "h.jsonl", *system)
    (chat,), told = kept(tmp_path / "h.jsonl"), turns(out)
    assert code == 0 and err.count("note:") == 1 and "longer than the model's context" in err
    first = len(system) // 2
    assert len(chat) == first + 18 and told[-1]["left_out"] > told[0]["left_out"] == 0

    def length(messages: list[Message]) -> int:
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    for number, one in enumerate(told):
        def shown(left_out: int) -> list[Message]:
            return [*chat[:first], *chat[first + 2 * left_out:first + 2 * number + 1]]  # noqa: B023

        assert one["prompt_tokens"] == length(shown(one["left_out"])) <= 512 - 6
        assert one["left_out"] == 0 or length(shown(one["left_out"] - 1)) > 512 - 6
        assert one["answer"] == ours(shown(one["left_out"]), return_full_text=False)[0]["generated_text"]


def test_without_a_limit_an_answer_has_a_quarter_of_a_small_context(gpt2: Path) -> None:
    model, tokenizer = load(gpt2)
    speaker = LocalSpeaker(model, tokenizer, temperature=0.0)
    talk: list[Message] = []
    for number in range(6):
        talk = [*talk, {"role": "user", "content": "the hen crossed the road " * 12}]
        told = speaker.answer(talk, number).told
        assert told.prompt_tokens is not None and 512 - told.prompt_tokens >= 128
        talk = [*talk, {"role": "assistant", "content": "so she did"}]
    assert told.left_out > 0
    with pytest.raises(UsageError, match="the model's context is 512"):
        speaker.answer([{"role": "user", "content": "hen " * 600}], 0)


# -- Ctrl-C, and what else happens -------------------------------------------------------------------------------------


class Scripted:
    """Says what it is told to, a piece at a time; an exception among the pieces is raised."""

    def __init__(self, *answers: Sequence[str | BaseException], reason: str = "stop") -> None:
        self.answers, self.heard, self.reason = list(answers), list[list[Message]](), reason

    def answer(self, messages: Sequence[Message], number: int) -> Any:
        self.heard.append(list(messages))
        pieces, reason = self.answers.pop(0), self.reason

        class Said:
            told = Told(finish_reason=reason, new_tokens=12)

            def __iter__(self) -> Generator[str]:
                for piece in pieces:
                    if isinstance(piece, BaseException):
                        raise piece
                    yield piece
        return Said()


STOP = KeyboardInterrupt()


def test_ctrl_c_stops_an_answer_and_not_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    for interactive in (True, False):
        loop = Loop(Scripted(["one ", "two", STOP, "three"], ["four"], [STOP]), Conversation(), interactive=interactive)
        loop.run(iter(["a", "b", "c"]))
        assert capsys.readouterr().out == "one two\nfour\n\n"
        assert [m["content"] for m in loop.conversation.messages] == ["a", "one two", "b", "four"], "a question without a word is not kept"


def test_ctrl_c_twice_ends_what_nobody_sits_at(capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Sequence[str | BaseException]] = [["one", STOP], ["two", STOP], ["three"]]
    loop = Loop(Scripted(*answers), Conversation(), interactive=True)
    loop.run(iter("abc"))
    assert loop.conversation.turns == 3
    loop = Loop(Scripted(*answers), Conversation(), interactive=False)
    with pytest.raises(KeyboardInterrupt):
        loop.run(iter("abc"))
    assert loop.conversation.turns == 2


def test_an_error_does_not_throw_a_person_out(capsys: pytest.CaptureFixture[str]) -> None:
    answers: list[Sequence[str | BaseException]] = [["one", RemoteError("broken off", hint="again")], ["two"], ["  "]]
    loop = Loop(Scripted(*answers), Conversation(), interactive=True)
    loop.run(iter(["a", "/nothing", "b", "c"]))
    shown = capsys.readouterr()
    assert "error: broken off" in shown.err and "no command `/nothing`" in shown.err and "before the first word" in shown.err
    assert [m["content"] for m in loop.conversation.messages] == ["b", "two"]
    with pytest.raises(RemoteError):
        Loop(Scripted(*answers), Conversation(), interactive=False).run(iter(["a", "b"]))


def test_an_answer_that_is_cut_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    for reason, told in (("length", True), ("stop", False)):
        loop = Loop(Scripted(["one two"], reason=reason), Conversation(), interactive=True)
        loop.run(iter("a"))
        assert ("stopped at its longest, 12 tokens: --max-new-tokens" in capsys.readouterr().err) == told
        assert loop.conversation.messages[-1]["content"] == "one two"


def test_a_stopped_turn_is_told_as_such(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "is_json", lambda: True)
    Loop(Scripted(["one", STOP], ["two"]), Conversation(), interactive=False).run(iter(["a", "b"]))
    assert [(one["answer"], one["finish_reason"]) for one in turns(capsys.readouterr().out)] == [("one", "interrupted"), ("two", "stop")]


def test_at_a_terminal(gpt2: Path, tmp_path: Path) -> None:
    """The real program on a real terminal: an answer, Ctrl-C in the middle of one and at the prompt, Ctrl-D."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "threefold", "chat", str(gpt2), "--history", str(tmp_path / "h.jsonl"), "--max-new-tokens", "300", "--seed", "1"]
    child = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True,
                             preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    seen, path = b"", tmp_path / "h.jsonl"

    def until(condition: Callable[[], bool], seconds: float = 120) -> bool:
        nonlocal seen
        ends = time.monotonic() + seconds
        while not condition() and time.monotonic() < ends:
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 65536)
        return condition()

    def press(keys: bytes, shows: bytes) -> None:
        """Type until it shows, as a person does: a key that comes before the terminal is ready for it is lost."""
        nonlocal seen
        seen = b""
        for _ in range(30):
            os.write(ours, keys)
            if until(lambda: shows in seen, 3):
                return
        raise AssertionError(seen)

    try:
        assert until(lambda: b"Ctrl-D leaves." in seen), seen
        press(b"Why did the hen cross?\n", b"cross?")
        length = len(seen) + 30
        assert until(lambda: len(seen) > length), seen
        os.write(ours, b"\x03")  # in the middle of an answer
        assert until(path.exists), seen
        press(b"/help\n", b"/quit ")
        press(b"\x03", b"/quit or Ctrl-D leaves")  # at the prompt
        press(b"/help\n", b"/quit ")
        for _ in range(30):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                os.write(ours, b"\x04")
                child.wait(2)
                break
        assert child.returncode == 0, seen
    finally:
        child.kill()
        child.wait()
        os.close(ours)
    assert b"Traceback" not in seen and [m["role"] for m in kept(path)[0]] == ["user", "assistant"]


# -- served ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_served_model_hears_the_whole_conversation(protocol: str, server: Server, say: Say, monkeypatch: pytest.MonkeyPatch,
                                                     tmp_path: Path) -> None:
    monkeypatch.setenv(f"{protocol.upper()}_BASE_URL", f"http://127.0.0.1:{server.server_port}" + ("/v1" if protocol == "openai" else ""))
    monkeypatch.setenv(f"{protocol.upper()}_API_KEY", KEY)
    server.replies = [Reply(text="Tiber."), Reply(text="안녕하세요! 🌍", end="length")]
    path = tmp_path / "h.jsonl"
    code, out, _ = say(["Name a river.", "Hello"], "--system", "Be brief.", "--history", path, "--json", model=f"{protocol}:gem-1")
    assert code == 0 and [one["answer"] for one in turns(out)] == ["Tiber.", "안녕하세요! 🌍"]
    assert [one["finish_reason"] for one in turns(out)] == ["stop", "length"] and turns(out)[0]["new_tokens"] == 5
    body = server.seen[1]["body"]
    assert [m["content"] for m in body["messages"]][-3:] == ["Name a river.", "Tiber.", "Hello"]
    assert "Be brief." in (body.get("system"), body["messages"][0]["content"]) and "temperature" not in body and body["stream"]
    assert [m["content"] for m in kept(path)[0]] == ["Be brief.", "Name a river.", "Tiber.", "Hello", "안녕하세요! 🌍"]
    server.replies = [Reply(status=500)]
    code, out, err = say(["More"], "--history", path, model=f"{protocol}:gem-1")
    assert code == 1 and "status 500" in err and len(kept(path)[0]) == 5
