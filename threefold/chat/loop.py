"""The loop: a line is a question or a command, an answer comes as it is made, and every turn is kept.

Decisions:
- A line that begins with `/` is a command, `//` begins a line that does not; an empty line says nothing. Where stdin is no terminal, each
  line is one turn all the same, so that a conversation can be a file.
- Answers are stdout's, all talk is stderr's. With --json a turn is one object, when it is over.
- Ctrl-C stops an answer, and what was said of it is kept. At a terminal nothing else ends the program but /quit and Ctrl-D; elsewhere a
  second Ctrl-C without an answer in between does, and so does an error.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from threefold import console
from threefold.chat.conversation import Conversation
from threefold.chat.speakers import Answer, Speaker
from threefold.errors import ThreefoldError, UsageError, did_you_mean

COMMANDS = {
    "help": "this list",
    "reset": "begin a new conversation; the system text stays",
    "system": "/system TEXT sets what the model is told before everything; alone, it shows that",
    "undo": "take the last question and its answer back",
    "save": "/save FILE keeps the conversation there from now on; alone, it writes the file of --history",
    "quit": "leave, as Ctrl-D does",
}
QUIT = "quit"


class Loop:
    """A conversation between lines and a speaker. `interactive`: a person is at a terminal, whom an error must not throw out."""

    def __init__(self, speaker: Speaker, conversation: Conversation, *, interactive: bool) -> None:
        self._speaker, self.conversation, self._interactive = speaker, conversation, interactive
        self._asked = conversation.turns  # questions so far, those taken back too
        self._interrupted = 0             # answers in a row that were stopped
        self._told_left_out = False

    def run(self, lines: Iterator[str]) -> None:
        """Answer lines until there are none, or one says `/quit`. Raises the first error where nobody sits at a terminal."""
        for line in lines:
            text = line.strip()
            try:
                if text.startswith("/") and not text.startswith("//"):
                    if self._command(text[1:]) == QUIT:
                        return
                elif text:
                    self._turn(text.removeprefix("/") if text.startswith("//") else text)
            except ThreefoldError as error:
                if not self._interactive:
                    raise
                console.error(error)
            except KeyboardInterrupt:  # beside an answer: while a file is written, or a template rendered
                if not self._interactive:
                    raise

    # -- a question ----------------------------------------------------------------------------------------------------

    def _turn(self, question: str) -> None:
        self._asked += 1
        answer = self._speaker.answer(self.conversation.asking(question), self._asked)
        self._tell_left_out(answer.told.left_out)
        said, stopped = self._hear(answer)
        if stopped:
            answer.told.finish_reason = "interrupted"
        if not said.strip():
            console.note("stopped before the first word: the question is not kept" if stopped
                         else "the model ended its answer before the first word: the question is not kept")
        else:
            self.conversation.add(question, said)
            if answer.told.finish_reason == "length" and not console.is_json():
                console.note(f"the answer was stopped at its longest, {answer.told.new_tokens or 0:,} tokens: --max-new-tokens allows more")
        if console.is_json():
            told = answer.told
            console.print_json({"turn": self._asked, "question": question, "answer": said, "finish_reason": told.finish_reason,
                                "prompt_tokens": told.prompt_tokens, "new_tokens": told.new_tokens, "left_out": told.left_out})
        self._interrupted = self._interrupted + 1 if stopped else 0
        if self._interrupted > 1 and not self._interactive:
            raise KeyboardInterrupt

    def _hear(self, answer: Answer) -> tuple[str, bool]:
        """What was said, shown as it came, and whether it was stopped."""
        said, stopped = "", False
        with contextlib.closing(answer.__iter__()) as pieces:
            try:
                for piece in pieces:
                    said += piece
                    if not console.is_json():
                        console.out(piece, end="")
            except KeyboardInterrupt:
                stopped = True
        if not console.is_json():
            console.out("")
        return said, stopped

    def _tell_left_out(self, count: int) -> None:
        if count and not self._told_left_out:
            console.note(f"the conversation is longer than the model's context: it is shown the last turns alone, now without the first {count}")
            self._told_left_out = True

    # -- commands ------------------------------------------------------------------------------------------------------

    def _command(self, words: str) -> str:
        name, _, rest = words.partition(" ")
        if name not in COMMANDS:
            raise UsageError(f"no command `/{name}`", hint=f"{did_you_mean(name, COMMANDS)}; a question that begins with a slash begins with two")
        action: Callable[[str], None] | None = getattr(self, f"_{name}", None)
        if action is not None:
            action(rest.strip())
        return name

    def _help(self, rest: str) -> None:
        for name, what in COMMANDS.items():
            console.say(f"/{name:8} {what}")

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        self._told_left_out = False
        console.say("a new conversation")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = rest
            self.conversation.write()
        console.say(f"system: {self.conversation.system}" if self.conversation.system else "there is no system text")

    def _undo(self, rest: str) -> None:
        console.say(f"taken back; left: {self.conversation.turns_in_words}" if self.conversation.undo() else "there is nothing to take back")

    def _save(self, rest: str) -> None:
        path = Path(rest).expanduser() if rest else self.conversation.path
        if path is None:
            raise UsageError("no file is named", hint="/save FILE, or start with --history FILE")
        self.conversation.keep_in(path)
        console.say(f"kept in `{path}`")


def typed(prompt: str = "> ") -> Iterator[str]:
    """Lines that a person types, until Ctrl-D; a Ctrl-C throws a line away."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the keys of a line editor, where there is one

    while True:
        try:
            line = input(prompt if console.is_terminal(sys.stdout) else "")
        except KeyboardInterrupt:
            console.say("\n/quit or Ctrl-D leaves, /help says more")
            continue
        except EOFError:
            console.say("")
            return
        yield line
