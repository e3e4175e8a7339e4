"""Words of the command line: flags that go everywhere, leaves of the recipe, and errors in one voice.

Decisions:
- `--json`, `--quiet` and `--debug` are taken from wherever they stand; a list flag takes all words up to the next flag.
- What the parser does not know is a leaf of the recipe (`--train.steps 100`) or an error that says what was meant.
- No traceback for a user's error; the exit code is that of the error's class.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from threefold import console
from threefold.device import is_out_of_memory
from threefold.errors import Interrupted, MemoryLimitError, ThreefoldError, UsageError, did_you_mean
from threefold.files import disk_error

LISTS = ("--data",)
SPIN_ROUNDS = "30000"
INTERRUPTED = Interrupted(2, "interrupted", hint="the same command begins again")
WrongUsage: Any = typer.BadParameter.__base__  # the parser's own class for all that was put wrongly


def calm_threads() -> None:
    """Let a thread that waits for another spin briefly and then sleep; it has to be said before torch is loaded.

    By itself GNU's OpenMP spins for 300,000 rounds at every join. Beside a busy program, where a thread may have lost its
    core, that makes a step fifty times longer; a tenth of it costs nothing on a quiet machine (docs/log.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)


def guarded(app: typer.Typer, argv: list[str]) -> int:
    """Run the verb and return the exit code; every error is printed in the voice of the tool."""
    try:
        code = app(argv, standalone_mode=False)  # the parser turns an exit into its code
        if code == 130:
            console.error(INTERRUPTED)
        return code if isinstance(code, int) else 0
    except WrongUsage as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            console.out(error.format_message())
        else:
            console.error(UsageError(_lower(error.format_message()), hint=_usage_hint(error)))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        console.error(INTERRUPTED)
        return 130
    except ThreefoldError as error:
        console.error(error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.filename is None or console.is_debug():
            console.error(error)
        else:
            console.error(disk_error(error, error.filename, "use"))
        return 1
    except Exception as error:
        full = isinstance(error, MemoryError) or ("torch" in sys.modules and is_out_of_memory(error))
        words, hint = f"not enough memory{f': {error}' if str(error) else ''}", "a smaller model, context or batch needs less"
        console.error(MemoryLimitError(words, hint=hint) if full else error)
        return 1


def _usage_hint(error: Any) -> str:
    if hasattr(error, "option_name"):
        known = [name for p in error.ctx.command.params for name in p.opts] if error.ctx else []
        return did_you_mean(error.option_name, known) if known else ""
    if error.ctx is not None and "No such command" in error.format_message():
        word = error.format_message().split("'")[1]
        return did_you_mean(word, error.ctx.command.list_commands(error.ctx))
    return f"see `{error.ctx.command_path} --help`" if error.ctx is not None else ""


def _lower(text: str) -> str:
    text = text.partition(" Did you mean")[0]
    return (text[:1].lower() + text[1:]).rstrip(".").replace("'", "`")


def common(argv: list[str]) -> tuple[list[str], dict[str, bool]]:
    """Take --json, --quiet and --debug from wherever they stand, and spread `--data A B`."""
    flags = {"json": False, "quiet": False, "debug": False}
    rest: list[str] = []
    last = ""
    for place, word in enumerate(argv):
        if word == "--":
            rest += argv[place:]
            break
        if word.startswith("--") and word[2:] in flags:
            flags[word[2:]] = True
        elif last in LISTS and rest[-1] != last and not word.startswith("-"):
            rest += [last, word]
        else:
            rest.append(word)
            last = word if word.startswith("-") else last
    return rest, flags


def leaves(context: typer.Context) -> dict[str, str]:
    """`--section.option value` and `--section.option=value` among what typer did not know."""
    found: dict[str, str] = {}
    words = list(context.args)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"unexpected argument `{word}`", hint="data is given with --data")
        name, equals, value = word[2:].partition("=")
        if "." not in name:
            known = [option for p in context.command.params for option in p.opts if option.startswith("--")]
            raise UsageError(
                f"unknown flag `--{name}`", hint=did_you_mean(f"--{name}", [*known, "--json", "--quiet", "--debug"])
            )
        if not equals and not words:
            raise UsageError(f"`--{name}` needs a value")
        found[name] = value if equals else words.pop(0)
    return found
