"""Messages -> the text and the ids that a chat model was trained on, by the template in its own directory.

Decisions:
- The template is a foreign program. It runs in a child process with limits (template_child.py) that is kept between
  calls; it can fail, but it cannot reach this process, the disk or the network, nor run on.
- What people write can never become a special token. Wherever a message holds the spelling of one, or an end that could
  be completed to one, an invisible mark is put inside before rendering and taken out afterwards; the special tokens of
  the template itself bear no mark. Messages without such spellings take the plain path, which equals transformers'.
- Roles become part of special tokens in some templates (`<|user|>`), so a role is one of a known set.
- Nothing is mended: a template that refuses its messages is a `UsageError` with the template's own words.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from threefold.errors import ThreefoldError, TokenizerError, UsageError, did_you_mean

ROLES = (
    "system",
    "user",
    "assistant",
    "tool",
    "developer",
    "function",
    "ipython",
    "environment",
    "observation",
    "model",
    "document",
    "documents",
    "context",
)
SECONDS = 2.0             # for one rendering
START_SECONDS = 60.0      # for the child to be ready, on a machine under load
OUTPUT = 4_000_000        # characters of rendered text
INHERITED = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")  # what day it is, and where a Python finds itself
MARKS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))  # noncharacters: no text is meant to hold them

Message = Mapping[str, Any]


class SpecialEncoder(Protocol):
    """What turns text into ids; with `specials` the spellings of special tokens become those tokens."""

    def __call__(self, text: str, *, specials: bool) -> list[int]: ...


def render(
    template: str,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    seconds: float = SECONDS,
    **variables: Any,
) -> str:
    """The text that `template` makes of `messages`, as transformers' `apply_chat_template(tokenize=False)`.

    `special_tokens` are the names a template knows (`{"bos_token": "<s>"}`). With `continue_final_message` the text ends where the
    last message does, so that it can be gone on with. Raises `UsageError` where the messages do not fit the template,
    `TokenizerError` where the template is broken, not allowed, or exceeds its limits.
    """
    if continue_final_message and add_generation_prompt:
        raise UsageError("`add_generation_prompt` and `continue_final_message` contradict each other",
                         hint="a new message is opened, or the last one goes on")
    spoken, mark = _checked(messages), ""
    if continue_final_message:
        spoken[-1]["content"], mark = _open(spoken)
    values = {**(special_tokens or {}), "messages": spoken, "tools": tools, "documents": documents,
              "add_generation_prompt": add_generation_prompt, **variables}
    text = _ask(template, values, seconds)
    return _up_to(text, mark, str(messages[-1].get("content"))) if continue_final_message else text


def _open(messages: Sequence[Message]) -> tuple[str, str]:
    """The content of the last message with a mark at its end, and the mark: a character that stands nowhere else."""
    content, there = messages[-1].get("content"), json.dumps(messages, ensure_ascii=False, default=str)
    mark = next((m for m in reversed(MARKS) if m not in there), None)
    if not isinstance(content, str) or mark is None:
        raise UsageError(f"the last message cannot be continued: its content is {str(content)[:40]!r}", hint="a text can be")
    return f"{content}{mark} ", mark  # the space is what a template that trims takes away


def _up_to(text: str, mark: str, last: str) -> str:
    """A rendered conversation up to the end of its last message."""
    at = text.rfind(mark)
    if at < 0 or last.strip() not in text:
        raise UsageError("the chat template changes the last message, so it cannot be continued", hint="end the chat with a message of the user")
    return text[:at] if text.startswith(f"{mark} ", at) else text[:at].rstrip()


def turn_ends(ids_of: Callable[[Sequence[Message]], list[int]], special: Container[int]) -> frozenset[int]:
    """The first special id behind an answer, whatever the answer is; empty where none stands there or the template refuses."""
    one, other = ([{"role": "user", "content": "a"}, {"role": "assistant", "content": said}] for said in ("yes", "no"))
    try:
        a, b = ids_of(one)[::-1], ids_of(other)[::-1]
    except ThreefoldError:
        return frozenset()
    alike = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    return frozenset([i for i in a[:alike][::-1] if i in special][:1])


def encode(
    template: str, messages: Sequence[Message], encoder: SpecialEncoder, specials: Iterable[str], **options: Any
) -> list[int]:
    """The ids of `render(template, messages, **options)`, in which no message can spell a special token.

    `specials` are the spellings of all special tokens of the tokenizer behind `encoder`.
    """
    known = sorted(set(specials), key=len, reverse=True)
    foreign = {
        "messages": _checked(messages),
        "tools": options.pop("tools", None),
        "documents": options.pop("documents", None),
    }
    in_use = json.dumps(foreign, ensure_ascii=False, default=str)
    mark = next((m for m in MARKS if m not in in_use and _escape(m) not in in_use), None)
    if mark is None:
        raise UsageError(
            "the messages hold all 32 noncharacters U+FDD0 to U+FDEF", hint="remove them: they stand for nothing"
        )
    marked = _marked(foreign, known, mark)
    text = render(template, marked["messages"], tools=marked["tools"], documents=marked["documents"], **options)
    text = text.replace(_escape(mark), mark)  # a template may write its tools as ASCII
    if mark not in text:
        return encoder(text, specials=True)
    pattern = re.compile("(" + "|".join(map(re.escape, known)) + f")(?!{mark})")
    ids: list[int] = []
    for number, part in enumerate(pattern.split(text)):
        if part := part.replace(mark, ""):
            ids += encoder(part, specials=number % 2 == 1)
    return ids


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not all(isinstance(m, Mapping) for m in messages):
        raise UsageError("chat messages are expected as a list of `{\"role\": ..., \"content\": ...}`")
    for number, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise UsageError(
                f"message {number} has the role {message.get('role')!r}",
                hint=did_you_mean(str(message.get("role")), ROLES),
            )
    return [dict(message) for message in messages]


# ---- spellings of special tokens in messages -------------------------------------------------------------------------


def _marked(value: Any, specials: Sequence[str], mark: str) -> Any:
    """`value` with every string in it marked where it spells a special token, or a part of one at its border."""
    if isinstance(value, str):
        return _mark_text(value, specials, mark)
    if isinstance(value, Mapping):
        return {_marked(key, specials, mark): _marked(item, specials, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(item, specials, mark) for item in value]
    return value


def _mark_text(text: str, specials: Sequence[str], mark: str) -> str:
    inside = {at + 1 for special in specials for at in _occurrences(text, special)}
    # A template may put two strings side by side: an end that begins a special token, a beginning that ends one.
    beginnings, ends = _parts(tuple(specials))
    inside |= {len(text) - n + 1 for n, parts in beginnings.items() if n <= len(text) and text[len(text) - n:] in parts}
    inside |= {n - 1 for n, parts in ends.items() if n <= len(text) and text[:n] in parts}
    if not inside:
        return text
    cuts = [0, *sorted(inside), len(text)]
    return mark.join(text[a:b] for a, b in itertools.pairwise(cuts))


@functools.lru_cache(maxsize=16)
def _parts(specials: tuple[str, ...]) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
    """The beginnings and the ends of special tokens by their length, as far as they may stand at a border of a text; single
    characters say nothing."""
    beginnings: dict[int, set[str]] = {}
    ends: dict[int, set[str]] = {}
    for special in specials:
        for n in range(max(1, min(2, len(special) - 1)), len(special)):
            beginnings.setdefault(n, set()).add(special[:n])
            ends.setdefault(n, set()).add(special[-n:])
    return beginnings, ends


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


def _occurrences(text: str, word: str) -> Iterator[int]:
    at = text.find(word)
    while at >= 0:
        yield at
        at = text.find(word, at + 1)


# ---- the child -------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_child: subprocess.Popen[bytes] | None = None
_owner = 0


def _ask(template: str, variables: Mapping[str, Any], seconds: float) -> str:
    try:
        line = (
            json.dumps({"template": template, "variables": variables, "limit": OUTPUT, "seconds": seconds}).encode()
            + b"\n"
        )
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"chat messages must be plain data (strings, numbers, lists, dictionaries): {error}"
        ) from error
    with _lock:
        reply = _exchange(line, seconds)
    if reply is None:
        raise TokenizerError(
            f"the chat template was stopped: more than {seconds:g} s, or more memory than a template may use",
            hint="a template renders in milliseconds; do not use this one",
        )
    if "text" in reply:
        return str(reply["text"])
    kind, message = reply["error"], reply["message"]
    if kind == "refused":
        raise UsageError(f"the chat template refuses these messages: {message}")
    raise TokenizerError(f"the chat template fails ({kind}): {message}",
                         hint="it tries what a template may not do: do not use it" if kind == "security" else "")


def _exchange(line: bytes, seconds: float) -> dict[str, str] | None:
    """One question to the child, started where needed; None where it did not survive it."""
    global _child, _owner
    if _child is None or _owner != os.getpid() or _child.poll() is not None:
        _child, _owner = _start(), os.getpid()
    assert _child.stdin is not None and _child.stdout is not None
    try:
        _child.stdin.write(line)
        _child.stdin.flush()
        if select.select([_child.stdout], [], [], seconds + 5)[0] and (reply := _child.stdout.readline()).endswith(
            b"\n"
        ):
            return dict(json.loads(reply))
    except OSError:  # it died while being written to
        pass
    except BaseException:  # an interrupt between question and answer: the next question must not get this answer
        _stop()
        raise
    _stop()
    return None


def _start() -> subprocess.Popen[bytes]:
    program = Path(__file__).with_name("template_child.py")
    process = subprocess.Popen(
        [sys.executable, "-P", str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
        env={"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1",
             **{name: os.environ[name] for name in INHERITED if name in os.environ}},
    )
    atexit.register(_stop)
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], START_SECONDS)[0] or process.stdout.readline() != b"ready\n":
        process.kill()
        process.wait()
        raise TokenizerError("the process that renders chat templates does not start",
                             hint=f"try it by hand: {sys.executable} -P {program}")
    return process


def _stop() -> None:
    """End the child, if this process started one."""
    global _child
    child, _child = _child, None
    if child is None or _owner != os.getpid():
        return
    with contextlib.suppress(OSError):
        child.send_signal(signal.SIGKILL)
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    child.wait()
