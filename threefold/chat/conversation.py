"""What was said, and the file that it is kept in.

Decisions:
- A file holds conversations, one a line, as rows of `instruct`: {"messages": [{"role", "content"}, ...]}. So what was said to a model can
  be learnt from by the next. The last line is the conversation that is gone on with; the others stay as they are.
- A file is written as a whole, beside itself and renamed, after every turn: a reader and a power cut see one turn or the next.
- A file that holds anything else is an error with its line, and is not touched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from threefold import files
from threefold.errors import DataError, UsageError
from threefold.strict_json import parse_json

MAX_BYTES = 64 * 2**20
ROLES = ("system", "user", "assistant")

Message = dict[str, str]


class Conversation:
    """Messages so far: perhaps a system text, then questions and answers in turn. `path` is where they are kept, if anywhere."""

    def __init__(self, system: str | None = None) -> None:
        self.path: Path | None = None
        self.messages: list[Message] = []
        self._earlier: list[str] = []  # lines of the file before this conversation
        if system:
            self.system = system

    @classmethod
    def resume(cls, path: Path, system: str | None = None) -> Conversation:
        """The conversation in a file, or a new one that will be kept there. `system`, where given, replaces its system text. Raises
        `DataError` for a file that holds anything else."""
        conversation = cls(system)
        conversation.path = path
        if not path.exists():
            if path.parent.exists() and not path.parent.is_dir():
                raise UsageError(f"`{path}` cannot be written: `{path.parent}` is no folder")
            return conversation
        if not files.is_regular(path) or path.stat().st_size > MAX_BYTES:
            raise DataError(f"`{path}` is no file of conversations of at most {MAX_BYTES:,} bytes", hint="give another file")
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        found = [_messages(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
        if found:
            conversation._earlier = [line.decode() for line in lines[:-1]]
            conversation.messages = found[-1]
            if system:
                conversation.system = system
        return conversation

    @property
    def turns(self) -> int:
        """The number of answers so far."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def turns_in_words(self) -> str:
        """`1 turn`, `7 turns`."""
        return f"{self.turns} turn{'' if self.turns == 1 else 's'}"

    @property
    def system(self) -> str:
        """The system text, or an empty one."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        said = self.messages[1:] if self.system else self.messages
        self.messages = [*([{"role": "system", "content": text}] if text else []), *said]

    def asking(self, question: str) -> list[Message]:
        """The messages with one more question, which is not kept yet."""
        return [*self.messages, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        """Keep a turn, and write it."""
        self.messages = [*self.asking(question), {"role": "assistant", "content": answer}]
        self.write()

    def undo(self) -> bool:
        """Take the last question and its answer back; False where there is none."""
        last = max((n for n, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is None:
            return False
        self.messages = self.messages[:last]
        self.write()
        return True

    def reset(self) -> None:
        """Begin anew with the same system text; what was said stays in the file, a line before."""
        if self.turns:
            self._earlier.append(_line(self.messages))
        self.messages = self.messages[:1] if self.system else []

    def keep_in(self, path: Path) -> None:
        """Write it to another file, and there from now on. Raises `UsageError` for one that exists."""
        if path != self.path:
            if path.exists():
                raise UsageError(f"`{path}` exists", hint="name a new file; to go on with an old one, start with --history")
            files.make_dirs(path.parent)
            self.path, self._earlier = path, []
        self.write()

    def write(self) -> None:
        """Write the file, if there is one: the conversations before, and this one as far as it has an answer."""
        if self.path is None:
            return
        lines = [*self._earlier, *([_line(self.messages)] if self.turns else [])]
        files.make_dirs(self.path.parent)
        files.write_atomic(self.path, "".join(f"{line}\n" for line in lines))


def _line(messages: list[Message]) -> str:
    return json.dumps({"messages": messages}, ensure_ascii=False)


def _messages(line: bytes, where: str) -> list[Message]:
    """The messages of a line of a file; raises `DataError`."""
    row: Any = parse_json(line, where, error=DataError)
    messages = row.get("messages") if isinstance(row, dict) else None
    hint = 'a line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: the line is no conversation: it has no `messages`", hint=hint)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: message {number} is {str(message)[:80]}, expected a `role` of {', '.join(ROLES)} and a `content`", hint=hint)
    spoken = [message["role"] for message in messages if message["role"] != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken or "system" in [m["role"] for m in messages[1:]]:
        raise DataError(f"{where}: the roles are {', '.join(m['role'] for m in messages[:12])}, expected questions and answers in turn, "
                        "perhaps behind one system text", hint=hint)
    return [{"role": message["role"], "content": message["content"]} for message in messages]
