"""Models that are served behind OpenAI's or Anthropic's protocol, used like local ones.

    with remote.open("openai:gpt-4o-mini") as model:
        model.generate(["Name a river."], max_new_tokens=20)

Decisions:
- The official clients speak the protocols (extra `remote`). They are imported when a model is opened, never before.
- A protocol is data: how a request is written and how an answer is read. Whole and streamed answers are read by the same
  code, so that `generate` is what `stream` yields, joined. A prompt is sent as the user's message: these are chat protocols.
- An argument that a protocol lacks is refused by name, unless its value means "off". Anthropic's of 2026-10-21 has no
  `temperature`, `top_p` and `top_k`; `api_version="2023-06-01"` speaks the earlier one, which has them.
- Nothing is sent twice but after status 429: up to `RETRIES` times, as late as the server asks, `LONGEST_WAIT` at most.
- The key is in no message, repr or file: the server's words are quoted without it, and not at all about a wrong key. The
  client's own exception, which holds the request, is not chained. Redirects are not followed: the key goes to one address.
- No telemetry: the client's tracing is off, and so are the headers in which it describes this machine.
- The limit is `max_completion_tokens` at OpenAI's own address, which refuses the older name for some models, and
  `max_tokens` elsewhere, which every other server knows.
"""

from __future__ import annotations

import contextlib
import email.utils
import importlib
import math
import os
import re
import reprlib
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from threefold import console
from threefold.errors import ContentRefused, MissingExtra, RemoteError, TooManyRequests, UsageError, did_you_mean
from threefold.generation.stopping import StopStrings

NEW_TOKENS = 128                        # unless said, as for a local model
TIMEOUT, CONNECT_TIMEOUT = 120.0, 10.0  # seconds without a byte from the server
RETRIES, LONGEST_WAIT = 3, 60.0         # of a request that was answered with 429; seconds before each
LONGEST_QUOTE = 300                     # characters of a server's own words

FinishReason = Literal["stop", "length"]
Message = Mapping[str, str]
Prompts = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]]


@dataclass(frozen=True)
class Completion:
    """An answer: its text, why it ended, the tokens that the server counted (None where it did not say), and its own name."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int | None
    new_tokens: int | None
    model: str


# What an answer, or a piece of one, says in the words of neither protocol: text, refusal, reason, prompt_tokens, new_tokens, model.
_Part = dict[str, Any]


def _openai_body(messages: Sequence[Message], limit: int, stop: Sequence[str], sampling: Mapping[str, Any], at_home: bool) -> dict[str, Any]:
    body = {"messages": list(messages), "max_completion_tokens" if at_home else "max_tokens": limit, **sampling}
    return {**body, "stop": list(stop)} if stop else body


def _openai_part(answer: Any) -> _Part:
    """A whole answer or a piece of one: they differ in `message` and `delta` alone."""
    piece, usage = answer.object == "chat.completion.chunk", answer.usage
    part = {"model": answer.model, "prompt_tokens": usage and usage.prompt_tokens, "new_tokens": usage and usage.completion_tokens}
    if piece and not answer.choices:
        return part  # the counts, behind the last piece
    choice = answer.choices[0]
    said = choice.delta if piece else choice.message
    return {**part, "text": said.content, "refusal": said.refusal, "reason": choice.finish_reason}


def _anthropic_body(messages: Sequence[Message], limit: int, stop: Sequence[str], sampling: Mapping[str, Any], at_home: bool) -> dict[str, Any]:
    """What the system says first has a place of its own; what it says later stays where it was said."""
    first = next(i for i, message in enumerate(messages) if message["role"] != "system")
    body = {"messages": list(messages[first:]), "max_tokens": limit, "stop_sequences": list(stop),
            "system": "\n\n".join(message["content"] for message in messages[:first]),
            "extra_body": dict(sampling)}  # the client has no names for sampling any more
    return {name: value for name, value in body.items() if value}


def _anthropic_part(answer: Any) -> _Part:
    """A whole answer or an event of a stream. Thinking is no text."""
    if answer.type == "message":
        text = "".join(block.text for block in answer.content if block.type == "text")
        return {"text": text, "model": answer.model, **_anthropic_end(answer, answer.usage)}
    if answer.type == "message_start":
        return {"model": answer.message.model, "prompt_tokens": _anthropic_end(answer.message, answer.message.usage)["prompt_tokens"]}
    if answer.type == "content_block_start" and answer.content_block.type == "text":
        return {"text": answer.content_block.text}
    if answer.type == "content_block_delta" and answer.delta.type == "text_delta":
        return {"text": answer.delta.text}
    return _anthropic_end(answer.delta, answer.usage) if answer.type == "message_delta" else {}


def _anthropic_end(end: Any, usage: Any) -> _Part:
    details = getattr(end, "stop_details", None)
    counts = [getattr(usage, f"{kind}input_tokens", None) for kind in ("", "cache_creation_", "cache_read_")]
    # The first count leaves out what the server had in its cache, which was a part of the prompt all the same.
    prompt = None if counts[0] is None else sum(count or 0 for count in counts)
    return {"reason": end.stop_reason, "refusal": getattr(details, "explanation", None), "prompt_tokens": prompt,
            "new_tokens": getattr(usage, "output_tokens", None)}


@dataclass(frozen=True)
class _Protocol:
    title: str
    package: str               # of the official client; the owner's domain and variables begin with its name
    client: str                # its class
    takes: frozenset[str]      # arguments of sampling
    body: Callable[[Sequence[Message], int, Sequence[str], Mapping[str, Any], bool], dict[str, Any]]
    part: Callable[[Any], _Part]
    create: Callable[[Any], Callable[..., Any]]
    reasons: Mapping[str, FinishReason]
    streaming: Mapping[str, Any]


PROTOCOLS = {
    "openai": _Protocol(
        "OpenAI's protocol", "openai", "OpenAI", frozenset({"temperature", "top_p", "seed"}),
        _openai_body, _openai_part, lambda client: client.chat.completions.create,
        {"stop": "stop", "length": "length"}, {"stream": True, "stream_options": {"include_usage": True}}),
    "anthropic": _Protocol(
        "Anthropic's protocol", "anthropic", "Anthropic", frozenset(),
        _anthropic_body, _anthropic_part, lambda client: client.messages.create,
        {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "model_context_window_exceeded": "length"}, {"stream": True}),
}
REFUSALS = frozenset({"content_filter", "refusal", "content_policy_violation", "moderation_blocked"})  # reasons of an end, codes of an error
USED_UP = frozenset({"insufficient_quota", "billing_hard_limit_reached"})  # codes of 429 that waiting does not mend
EARLIER, EARLIER_TAKES = "2023-06-01", frozenset({"temperature", "top_p", "top_k"})  # Anthropic's protocol before 2026-10-21

# Arguments of local models, and the values besides None that change nothing.
OFF: dict[str, tuple[Any, ...]] = {
    "temperature": (1,), "top_p": (1,), "top_k": (0,), "min_p": (0,), "repetition_penalty": (1,), "seed": (), "settings": (), "logits": (),
}
ABOUT_THIS_MACHINE = ("Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Async")


def is_remote(name: str) -> bool:
    """Whether a model's name is that of a served model: `openai:...` or `anthropic:...`."""
    return name.partition(":")[0] in PROTOCOLS and ":" in name


def open(name: str, *, base_url: str | None = None, api_key: str | None = None, api_version: str | None = None,
         timeout: float = TIMEOUT) -> RemoteModel:
    """A served model by its name: `openai:gpt-4o-mini`, `anthropic:claude-...`. Sends nothing yet.

    base_url     another server; else the client's variable (OPENAI_BASE_URL, ANTHROPIC_BASE_URL), else the owner's address
    api_key      else OPENAI_API_KEY or ANTHROPIC_API_KEY; it is kept in memory only
    api_version  of Anthropic's protocol: None is the client's own, "2023-06-01" the earlier one
    timeout      seconds without a byte after which a request is given up

    Raises `UsageError` for a name, key or address that cannot be, and `MissingExtra` without the client.
    """
    word, _, model = name.partition(":")
    if word not in PROTOCOLS or not model.strip():
        raise UsageError(f"`{name}` is not the name of a served model, expected `openai:MODEL` or `anthropic:MODEL`",
                         hint=f"name the model: `{word}:MODEL`" if word in PROTOCOLS else did_you_mean(word, PROTOCOLS))
    variable = f"{word.upper()}_API_KEY"
    key = (os.environ.get(variable, "") if api_key is None else api_key).strip()
    source = f"the variable {variable}" if api_key is None else "`api_key`"
    for wrong, message, hint in (
        (isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf,
         f"`timeout` is {timeout!r}, expected seconds, more than 0", "there is always one"),
        (base_url is not None and not _address(base_url), "`base_url` is no address of a server",
         "it begins with http:// or https:// and names a host: http://localhost:8000/v1"),
        (api_version is not None and (word != "anthropic" or not re.fullmatch(r"20\d\d-\d\d-\d\d", api_version)),
         f"`api_version` is {api_version!r} for `{name}`", f'Anthropic\'s protocol has dates, such as "{EARLIER}"'),
        (not key, f"there is no key for `{name}`",
         f"set the variable {variable}, or give `api_key`; a server of your own that asks for none takes any word"),
        (key and not re.fullmatch(r"[!-~]+", key), f"{source} holds characters that no key has (it is not shown)", "copy it again, in one line"),
    ):
        if wrong:
            raise UsageError(message, hint=hint)
    protocol, headers = PROTOCOLS[word], {}
    if api_version is not None:
        headers["anthropic-version"] = api_version
        if api_version <= EARLIER:  # the key goes as that version has it, too
            protocol, headers["x-api-key"] = replace(protocol, takes=EARLIER_TAKES), key
    try:
        package = importlib.import_module(protocol.package)
    except ImportError:
        raise MissingExtra(f"`{name}`", protocol.package, "remote") from None
    return RemoteModel(model, protocol, package, key, source, base_url, headers, timeout)


def _address(url: str) -> str:
    """Scheme, host and port of an address, without names, passwords and paths; empty where it has no host."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.scheme in ("http", "https") and parts.hostname else ""
    return ""


class RemoteModel(contextlib.AbstractContextManager["RemoteModel"]):
    """A served model; `open` makes it. The methods take the arguments of the local functions of the same names, and raise
    `UsageError` for what cannot be sent, and `ContentRefused`, `TooManyRequests` or `RemoteError` for what comes back."""

    def __init__(self, name: str, protocol: _Protocol, package: Any, key: str, source: str, base_url: str | None,
                 headers: Mapping[str, str], timeout: float) -> None:
        self.name, self.address = name, _address(base_url or "") or "its server"
        self._protocol, self._source, self._timeout = protocol, source, timeout
        self._clean: Callable[[str], str] = lambda words: _quotable(words, key)
        limits = package.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT))
        quiet = {f"X-Stainless-{what}": package.omit for what in ABOUT_THIS_MACHINE}
        more = {"open_telemetry": {"traces": False, "propagation": False}} if protocol.package == "anthropic" else {}
        self._client = self._try(lambda: getattr(package, protocol.client)(
            api_key=key, base_url=base_url, timeout=limits, max_retries=0, default_headers={**quiet, **headers},
            http_client=package.DefaultHttpxClient(timeout=limits, follow_redirects=False), **more))
        self.close = weakref.finalize(self, self._client.close)  # the connections, when called or when the model is gone
        self.address = _address(str(self._client.base_url))
        self._at_home = f".{urlsplit(self.address).hostname}".endswith(f".{protocol.package}.com")

    def __repr__(self) -> str:
        return f"RemoteModel({self.name!r}, {self._protocol.title} at {self.address})"

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompts: Prompts, **arguments: Any) -> list[str]:
        """The texts that answer the prompts, in order. See `complete` for the arguments."""
        return [completion.text for completion in self.complete(prompts, **arguments)]

    def chat(self, messages: Sequence[Message], **arguments: Any) -> Completion:
        """The answer to one conversation. See `complete` for the arguments."""
        return self.complete([messages], **arguments)[0]

    def complete(self, prompts: Prompts, **arguments: Any) -> list[Completion]:
        """The answer to each prompt, one request after the other.

        prompts         a text or several, the messages ({"role", "content"}) of one conversation or of several
        max_new_tokens  at most so many, 128 unless said; tokens of thinking are counted too
        temperature, top_p, seed, top_k   as far as the protocol has them; the server's own unless said. A seed makes
                        the same answer likely, and does not promise it
        stop            texts that end an answer and are not part of it
        """
        answers = self._answers(prompts, arguments, streamed=False)
        for answer in answers:
            "".join(answer)
        return [answer.completion for answer in answers if answer.completion is not None]

    def stream(self, prompt: str | Sequence[Message], **arguments: Any) -> RemoteStream:
        """The answer as it comes, never a part of a stop string; sent when the first piece is asked for. Arguments as `complete`."""
        answers = self._answers(prompt, arguments, streamed=True)
        if len(answers) != 1:
            raise UsageError(f"a stream answers one prompt, and {len(answers)} are given", hint="`generate` takes several")
        return answers[0]

    def _answers(self, prompts: Prompts, arguments: Mapping[str, Any], streamed: bool) -> list[RemoteStream]:
        limit = NEW_TOKENS if arguments.get("max_new_tokens") is None else arguments["max_new_tokens"]
        sampling, stop = _checked(arguments, self._protocol), StopStrings(arguments.get("stop") or ()).stops
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise UsageError(f"`max_new_tokens` is {limit!r}, expected a whole number, 1 or more")
        more = {"model": self.name, **(self._protocol.streaming if streamed else {})}
        return [RemoteStream(self, {**self._protocol.body(messages, limit, stop, sampling, self._at_home), **more}, stop, streamed)
                for messages in _conversations(prompts)]

    def _send(self, body: Mapping[str, Any]) -> Any:
        """The client's answer; waits and sends again after 429, and after nothing else."""
        for retry in range(RETRIES + 1):
            try:
                return self._try(lambda: self._protocol.create(self._client)(**body))
            except TooManyRequests as refused:
                if refused.wait is None or retry == RETRIES:
                    raise
                wait = refused.wait or 2.0**retry
            console.note(f"{self.address} has too many requests: again in {wait:.0f} s ({retry + 1} of {RETRIES})")
            time.sleep(wait)

    def _try(self, action: Callable[[], Any], received: int | None = None) -> Any:
        """What a call of the client gives. Its exception is explained outside of its handler, so that it is not chained."""
        try:
            return action()
        except Exception as error:  # the clients let through those of their transport and of JSON
            problem = self._explained(error, received)
        raise problem

    def _explained(self, error: Exception, received: int | None) -> RemoteError:
        """The client's exception in our words. `received` is the characters of a stream that had come."""
        said, code = _said(error)
        where, words, name = f"`{self.name}` at {self.address}", self._clean(said), type(error).__name__
        status, quote = getattr(error, "status_code", None) or 0, f": {words}" if words else ""
        so_far = "" if received is None else f" after {received} characters"
        if code in REFUSALS:
            return ContentRefused(f"{where} refused the content{quote}", hint="put it in other words")
        if status == 429:
            asked = _asked(error)
            busy = TooManyRequests(f"{self.address} has too many requests" + (f" and asks to wait {asked:.0f} s" if asked else "") + quote,
                                   hint="look at the account's plan and balance" if code in USED_UP else "wait, or send fewer requests")
            busy.wait = None if code in USED_UP or asked > LONGEST_WAIT else asked
            return busy
        for applies, message, hint in (
            # A server's words about a wrong key often hold parts of it.
            (status == 401, f"{self.address} does not accept the key", f"check {self._source}: whole, not revoked, for this server"),
            (status == 403, f"{where} is not open to this key{quote}", "check what the key's project may use"),
            (status == 404, f"{self.address} knows no model `{self.name}`{quote}", "check the name, and the path of `base_url` (OpenAI's is /v1)"),
            (status >= 500, f"{where} failed with status {status}{quote}", "nothing was repeated; try again later"),
            (status >= 400, f"{where} did not take the request (status {status}){quote}", ""),
            (status >= 300, f"{self.address} answers with a redirect, which is not followed", "give the new address as `base_url`"),
            ("Timeout" in name, f"{where} sent nothing for {self._timeout:g} s{so_far}", "give a longer `timeout`, or try again later"),
            (received is not None, f"{where} broke off the answer{so_far}{quote}", "try again; what came is not the whole"),
            (name == "APIConnectionError", f"{self.address} cannot be reached{quote}", "check the connection, `base_url`, and that the server runs"),
        ):
            if applies:
                return RemoteError(message, hint=hint)
        return RemoteError(f"{where} gave no answer of {self._protocol.title} ({name}){quote}", hint="see whether `base_url` is right")


class RemoteStream(Iterator[str]):
    """The pieces of one answer, to go through once. `completion` is the whole: None until the last piece was given."""

    def __init__(self, model: RemoteModel, body: Mapping[str, Any], stop: Sequence[str], streamed: bool) -> None:
        self.completion: Completion | None = None
        self._model, self._stops, self._text = model, StopStrings(stop), ""
        self._last: _Part = {}  # the last word on each thing but text
        self._pieces = self._run(body, streamed)
        self.close = self._pieces.close  # to give up the rest of the answer

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, body: Mapping[str, Any], streamed: bool) -> Generator[str]:
        model = self._model
        answer = model._send(body)
        with contextlib.closing(answer) if streamed else contextlib.nullcontext():
            parts = map(model._protocol.part, answer if streamed else [answer])
            for text in iter(lambda: model._try(lambda: self._read(parts), len(self._text) if streamed else None), None):
                if text:
                    yield text
                if self._stops.stopped:
                    break
        if text := self._finish():
            yield text

    def _read(self, parts: Iterator[_Part]) -> str | None:
        """The text that may be shown with the next part; None where there is none."""
        if (part := next(parts, None)) is None:
            return None
        refusal = self._last.get("refusal", "") + (part.get("refusal") or "")
        self._last |= {name: str(value) if name == "reason" else value for name, value in part.items() if value is not None} | {"refusal": refusal}
        text = self._stops.feed(part.get("text") or "")
        self._text += text
        return text

    def _finish(self) -> str:
        """What was held back; sets `completion`, or raises what is wrong with the answer."""
        where, reason, refusal = f"`{self._model.name}` at {self._model.address}", self._last.get("reason"), self._last.get("refusal")
        reasons = self._model._protocol.reasons
        if self._stops.stopped:  # the server should have seen it first
            reason, reasons = "stop", {"stop": "stop"}
        elif refusal or reason in REFUSALS:
            quote = f": {self._model._clean(refusal)}" if refusal else ""
            raise ContentRefused(f"{where} refused the content after {len(self._text)} characters{quote}", hint="put it in other words")
        elif reason is None:
            raise RemoteError(f"{where} broke off the answer after {len(self._text)} characters", hint="try again; what came is not the whole")
        elif reason not in reasons:
            raise RemoteError(f"{where} ended its answer for the reason `{self._model._clean(reason)}`, which is not understood",
                              hint=f"expected one of {', '.join(f'`{known}`' for known in reasons)}")
        tail = self._stops.finish()
        self._text += tail
        if reasons[reason] == "length" and not self._text:
            raise RemoteError(f"{where} used up {self._last.get('new_tokens', 'all its')} new tokens before it began a text",
                              hint="give a larger `max_new_tokens`: what it thinks before it answers is counted too")
        self.completion = Completion(self._text, reasons[reason], self._last.get("prompt_tokens"), self._last.get("new_tokens"),
                                     self._last.get("model") or self._model.name)
        return tail


def _conversations(prompts: Any) -> list[tuple[Message, ...]]:
    """The messages of each prompt. A list of messages is one conversation."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts, Sequence) and all(isinstance(item, Mapping) for item in prompts)):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or not all(isinstance(item, Sequence) for item in prompts):
        raise UsageError(f"the prompts are {reprlib.repr(prompts)}", hint="give a text, messages, or a list of them")
    found = [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in prompts]
    for messages in found:
        for message in messages:
            if not isinstance(message, Mapping) or set(message) != {"role", "content"} or message["role"] not in ("system", "user", "assistant"):
                raise UsageError(f"a message is {reprlib.repr(message)}", hint="it has `content` and a `role`: system, user or assistant")
            if not isinstance(message["content"], str) or not message["content"]:
                raise UsageError(f"the content of a message is {reprlib.repr(message['content'])}, expected a text that is not empty",
                                 hint="these protocols have no beginning-of-text token that could stand for an empty prompt")
        if all(message["role"] == "system" for message in messages):
            raise UsageError(f"there is nothing to answer in {len(messages)} messages", hint="give one of the user")
    return [tuple(dict(message) for message in messages) for messages in found]


def _checked(arguments: Mapping[str, Any], protocol: _Protocol) -> dict[str, Any]:
    """The arguments of sampling that are sent; what the protocol lacks is refused by name. The server knows the ranges."""
    for name, value in arguments.items():
        if name not in OFF and name not in ("max_new_tokens", "stop", "batch_size"):
            raise UsageError(f"`{name}` is not a known argument", hint=did_you_mean(name, [*protocol.takes, "max_new_tokens", "stop"]))
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
        if value is None or name not in OFF:
            continue
        if name in protocol.takes and not is_number:
            raise UsageError(f"`{name}` is {reprlib.repr(value)}, expected a number")
        if name not in protocol.takes and not (is_number and value in OFF[name]):
            earlier = name in EARLIER_TAKES and protocol.package == "anthropic"
            raise UsageError(f"`{name}` is {reprlib.repr(value)}, and {protocol.title} has no `{name}`",
                             hint=f'where it is still taken: remote.open(..., api_version="{EARLIER}")' if earlier else "leave it out")
    return {name: value for name, value in arguments.items() if name in protocol.takes and value is not None and (name != "top_k" or value)}


def _said(error: Exception) -> tuple[str, str]:
    """(the server's or the transport's own words, the error's code) of a client's exception."""
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, Mapping) else None
    if isinstance(inner, Mapping):
        return str(inner.get("message") or ""), str(inner.get("code") or inner.get("type") or "")
    # Of an answer with a status only such words are quoted, and no page that was made for browsers.
    return (inner if isinstance(inner, str) else "" if hasattr(error, "status_code") else str(error.__cause__ or error)), ""


def _quotable(words: str, key: str) -> str:
    """Foreign words in one line of bounded length, without the key or anything that looks like a part of one."""
    words = re.sub(r"\b(?:sk|pk)-\S+", "***", " ".join(words.replace(key, "***").split()))
    words = "".join(filter(str.isprintable, words))
    return words if len(words) <= LONGEST_QUOTE else f"{words[:LONGEST_QUOTE]}..."


def _asked(error: Exception) -> float:
    """Seconds that a server asks to wait, by number or date; 0 where it does not say."""
    header = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "0")
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time() if ":" in header else float(header))
    except ValueError:
        return 0.0
