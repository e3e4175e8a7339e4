"""The program in which chat templates are rendered: a process of its own, without rights and with little time.

A template is a program that came with a model. Jinja's immutable sandbox keeps it from Python's internals; the limits
here keep it from everything else that a program can do to a machine.

Decisions:
- Run as a script, never imported by threefold: it knows jinja2 and the standard library alone.
- One line of JSON in, one line of JSON out. It ends when its input ends, that is, with its parent.
- A timer whose default action is death covers each rendering, compiling included; no Python code can catch or delay it.
- Address space and output are bounded, files cannot grow, no descriptor can be opened.
- What jinja offers beyond what chat templates need (`lipsum`, `cycler`, `joiner`) is gone. A namespace or a dictionary
  cannot be given names that begin with an underscore.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.debug  # used when a template fails; cannot be imported any more by then
import jinja2.ext
import jinja2.sandbox
from jinja2.exceptions import SecurityError

MEMORY = 2**30       # bytes of address space
TEMPLATE = 2**18     # characters


class Refused(jinja2.TemplateError):
    """The template itself says no: `raise_exception("roles must alternate")`."""


class TooLong(Exception):
    """The rendered text passes the limit."""


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what an assistant says; it renders as what is inside."""

    tags = {"generation"}  # noqa: RUF012  # jinja declares it so

    def parse(self, parser: Any) -> list[Any]:
        """The statements inside the tag."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, for names that are not private."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may store a name `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            _public(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: Any, value: Any) -> None:
        super().__setitem__(_public(name), value)


def _public(name: Any) -> Any:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}")
    return name


def _dictionary(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise Refused(str(message)[:2000])


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The sandbox with the filters, functions and white-space rules that chat templates are written for."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                          extensions=[Generation, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals = {"range": jinja2.sandbox.safe_range, "dict": _dictionary, "namespace": Namespace,
                       "raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return sandbox


@functools.lru_cache(maxsize=2)
def compiled(sandbox: jinja2.sandbox.ImmutableSandboxedEnvironment, template: str) -> jinja2.Template:
    """A template that is rendered again and again is compiled once."""
    return sandbox.from_string(template)


def render(
    sandbox: jinja2.sandbox.ImmutableSandboxedEnvironment, template: str, variables: dict[str, Any], limit: int
) -> str:
    """The text of a template, at most `limit` characters."""
    if len(template) > TEMPLATE:
        raise TooLong(f"the template has {len(template):,} characters, the limit is {TEMPLATE:,}")
    parts, size = [], 0
    for part in compiled(sandbox, template).generate(variables):
        size += len(part)
        if size > limit:
            raise TooLong(f"the template renders to more than {limit:,} characters")
        parts.append(part)
    return "".join(parts)


def answer(sandbox: jinja2.sandbox.ImmutableSandboxedEnvironment, request: dict[str, Any]) -> dict[str, str]:
    """The reply to one request: {"text"} or {"error", "message"}."""
    try:
        return {"text": render(sandbox, request["template"], request["variables"], request["limit"])}
    except Refused as error:
        return {"error": "refused", "message": str(error)}
    except SecurityError as error:
        return {"error": "security", "message": str(error)[:2000]}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {str(error.message)[:2000]}"}
    except TooLong as error:
        return {"error": "size", "message": str(error)}
    except RecursionError:
        return {"error": "depth", "message": "the template nests or calls itself too deeply"}
    except MemoryError:
        return {"error": "memory", "message": f"the template asks for more than {MEMORY:,} bytes"}
    except Exception as error:  # whatever a template can raise is the template's error, and the parent names it
        return {"error": "template", "message": f"{type(error).__name__}: {str(error)[:2000]}"}


def main() -> None:
    """Answer requests until the input ends."""
    source, target, sandbox = sys.stdin.buffer, sys.stdout.buffer, environment()
    answer(
        sandbox,
        {
            "template": "{% for m in [1] %}{{ m | tojson }}{{ strftime_now('%Y') }}{% endfor %}{{ none.x }}",
            "variables": {},
            "limit": 99,
        },
    )
    for kind, bound in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(OSError, ValueError):  # macOS knows no limit of address space
            resource.setrlimit(kind, (bound, bound))
    target.write(b"ready\n")
    target.flush()
    for line in source:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        reply = answer(sandbox, request)
        data = json.dumps(reply).encode() + b"\n"
        signal.setitimer(signal.ITIMER_REAL, 0)
        target.write(data)
        target.flush()


if __name__ == "__main__":
    main()
