"""Served models: against a local server that speaks both protocols, reached by the official clients.

The server takes every request down, and puts the key that it was sent into every error of its own.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from threefold import remote
from threefold.errors import MissingExtra, ThreefoldError, UsageError
from threefold.generation.stopping import StopStrings

pytest.importorskip("openai")
pytest.importorskip("anthropic")

KEY = "sk-test-51f7c0ffee9a"
ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["The river is called Tiber.", "안녕하세요, 세계! 🌍🌏", "a\n\nb  c\t", "no END here END, END", "ENENEN", "x"]


@dataclass
class Reply:
    """What the server says next, in the words of neither protocol."""

    text: str = "The river is called Tiber."
    end: str = "stop"                 # stop, length, refused, tool; or a word of its own; "" breaks off
    refusal: str = ""
    width: int = 3                    # characters a piece of a stream
    status: int = 200
    code: str = "some_code"
    words: str = "it went wrong"
    headers: dict[str, str] = field(default_factory=dict)
    raw: str | None = None            # sent instead of anything that the protocol has
    cut: int | None = None            # pieces after which the connection is closed
    after: str = ""                   # `error`: an error event stands where the end should; `noise`: no JSON
    counted: bool = True
    wait: float = 0.0                 # seconds before anything is sent
    pause: float = 0.0                # seconds before each piece


ENDS = {
    "openai": {"stop": "stop", "length": "length", "refused": "content_filter", "tool": "tool_calls"},
    "anthropic": {"stop": "end_turn", "length": "max_tokens", "refused": "refusal", "tool": "tool_use"},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append({"path": self.path, "headers": headers, "body": body})
        reply = self.server.replies.pop(0) if self.server.replies else Reply()
        self.server.released.wait(reply.wait)
        paths = {"/v1/chat/completions": "openai", "/v1/messages": "anthropic"}
        try:
            if reply.status != 200:
                self.error(reply, headers["authorization"].removeprefix("Bearer "))
            elif reply.raw is not None:
                self.whole(200, reply.raw.encode(), {"content-type": "text/html", **reply.headers})
            elif body.get("stream"):
                self.stream(getattr(self, f"{paths[self.path]}_events")(reply, body), reply)
            else:
                self.whole(200, json.dumps(getattr(self, paths[self.path])(reply, body)).encode(), {"content-type": "application/json"})
        except (BrokenPipeError, ConnectionResetError):
            self.server.gone.set()
            self.close_connection = True

    def whole(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def error(self, reply: Reply, key: str) -> None:
        words = f"{reply.words} (key {key}, also {key[:12]}*****)"
        content = {"type": "error", "error": {"type": reply.code, "code": reply.code, "message": words}}
        self.whole(reply.status, json.dumps(content).encode() if reply.raw is None else reply.raw.encode(),
                   {"content-type": "application/json", **reply.headers})

    def stream(self, events: list[tuple[str, Any]], reply: Reply) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for i, (name, data) in enumerate(events):
            if i == reply.cut:
                self.close_connection = True
                return
            self.server.released.wait(reply.pause)
            content = data if isinstance(data, str) else json.dumps(data)
            event = f"event: {name}\ndata: {content}\n\n" if name else f"data: {content}\n\n"
            self.wfile.write(f"{len(event.encode()):x}\r\n{event}\r\n".encode())
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    @staticmethod
    def pieces(reply: Reply) -> list[str]:
        return [reply.text[i:i + reply.width] for i in range(0, len(reply.text), reply.width)]

    def openai(self, reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}} if reply.counted else {}
        message = {"role": "assistant", "content": reply.text or None, "refusal": reply.refusal or None}
        return {"id": "c1", "object": "chat.completion", "created": 1, "model": body["model"] + "-2024", **usage,
                "choices": [{"index": 0, "message": message, "finish_reason": ENDS["openai"].get(reply.end, reply.end) or None}]}

    def openai_events(self, reply: Reply, body: dict[str, Any]) -> list[tuple[str, Any]]:
        def chunk(delta: dict[str, Any] | None, end: str | None = None, **more: Any) -> tuple[str, Any]:
            choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": end}]
            return "", {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": body["model"] + "-2024", "choices": choices, **more}

        events = [chunk({"role": "assistant", "content": ""}), *(chunk({"content": piece}) for piece in self.pieces(reply))]
        events += [chunk({"refusal": half}) for half in (reply.refusal[:4], reply.refusal[4:]) if half]
        if reply.after:
            error = {"error": {"message": f"it went wrong with {KEY}", "code": "server_error"}}
            return [*events, ("", error if reply.after == "error" else "{no json")]
        if reply.end:
            events.append(chunk({}, ENDS["openai"].get(reply.end, reply.end)))
        if reply.counted and body["stream_options"]["include_usage"]:
            events.append(chunk(None, usage={"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}))
        return [*events, ("", "[DONE]")] if reply.end else events

    def anthropic(self, reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 5} if reply.counted else {}
        refused = {"stop_details": {"type": "refusal", "category": "cyber", "explanation": reply.refusal}} if reply.refusal else {}
        content = [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": reply.text}]
        return {"id": "m1", "type": "message", "role": "assistant", "model": body["model"] + "-2024", "content": content, "usage": usage,
                "stop_reason": ENDS["anthropic"].get(reply.end, reply.end) or None, "stop_sequence": None, **refused}

    def anthropic_events(self, reply: Reply, body: dict[str, Any]) -> list[tuple[str, Any]]:
        whole = self.anthropic(reply, body)
        usage = {**whole["usage"], "output_tokens": 1} if reply.counted else {}
        events: list[tuple[str, Any]] = [
            ("message_start", {"message": {**whole, "content": [], "usage": usage, "stop_reason": None}}), ("ping", {}),
            ("content_block_start", {"index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}}),
            ("content_block_delta", {"index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}}),
            ("content_block_stop", {"index": 0}),
            ("content_block_start", {"index": 1, "content_block": {"type": "text", "text": ""}}),
            *(("content_block_delta", {"index": 1, "delta": {"type": "text_delta", "text": piece}}) for piece in self.pieces(reply)),
            ("content_block_stop", {"index": 1})]
        if reply.after:
            error = {"error": {"type": "overloaded_error", "message": f"it went wrong with {KEY}"}}
            events.append(("error", error) if reply.after == "error" else ("content_block_delta", "{no json"))
        elif reply.end:
            delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None, "stop_details": whole.get("stop_details")}
            events += [("message_delta", {"delta": delta, "usage": {"output_tokens": 5} if reply.counted else {}}), ("message_stop", {})]
        return [(name, data if isinstance(data, str) else {"type": name, **data}) for name, data in events]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[dict[str, Any]] = []
        self.replies: list[Reply] = []
        self.released, self.gone = threading.Event(), threading.Event()

    @property
    def body(self) -> dict[str, Any]:
        """Of the one request that was sent."""
        assert len(self.seen) == 1
        return dict(self.seen[0]["body"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.released.set()
        found.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits that were asked for, none of which is waited for."""
    found: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", found.append)
    return found


PROTOCOLS = ["openai", "anthropic"]
each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)
both_ways = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


def opened(server: Server, protocol: str, **arguments: Any) -> remote.RemoteModel:
    address = f"http://127.0.0.1:{server.server_port}" + ("/v1" if protocol == "openai" else "")
    return remote.open(f"{protocol}:gem-1", **{"base_url": address, "api_key": KEY, **arguments})


def asked(model: remote.RemoteModel, streamed: bool, prompt: Any = "Name a river.", **arguments: Any) -> str:
    return "".join(model.stream(prompt, **arguments)) if streamed else model.generate(prompt, **arguments)[0]


@contextmanager
def refused(kind: type[ThreefoldError], words: str, hint: str = "", secret: str = KEY) -> Iterator[list[ThreefoldError]]:
    """An error of ours whose message, hint, repr and traceback hold the words and not the key."""
    found: list[ThreefoldError] = []
    with pytest.raises(kind) as caught:
        yield found
    error = caught.value
    found.append(error)
    assert type(error) is kind
    assert words in str(error) and hint in error.hint
    assert "\n" not in str(error) and str(error)[0] in "`abcdefghijklmnopqrstuvwxyz"
    seen: BaseException | None = error
    while seen is not None:  # the client's exceptions hold the request, and with it the key
        assert isinstance(seen, ThreefoldError | ImportError)
        seen = seen.__cause__ or seen.__context__
    for text in (str(error), error.hint, repr(error), repr(vars(error)), "".join(traceback.format_exception(error))):
        assert secret not in text and secret[:12] not in text


# ------------------------------------------------------------------------------------------ the laws

@each_protocol
@pytest.mark.parametrize("width", [1, 4, 100])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [(), "END", ["called", "\n\n", "세"]], ids=["none", "one", "three"])
def test_what_is_streamed_is_what_is_generated(server: Server, protocol: str, text: str, width: int, stop: Any) -> None:
    """Also where the server is deaf to stop strings: the end that they make is ours."""
    stops = StopStrings(stop)
    expected = stops.feed(text) + stops.finish()
    with opened(server, protocol) as model:
        server.replies = [Reply(text), Reply(text, width=width)]
        whole = model.complete("go on", stop=stop)[0]
        stream = model.stream("go on", stop=stop)
        assert stream.completion is None
        pieces = list(stream)
    assert whole.text == "".join(pieces) == expected
    assert all(pieces) and stream.completion is not None
    assert (stream.completion.text, stream.completion.finish_reason) == (whole.text, whole.finish_reason)
    first, second = (request["body"] for request in server.seen)
    assert second == {**first, "stream": True, **({"stream_options": {"include_usage": True}} if protocol == "openai" else {})}


@each_protocol
@both_ways
@pytest.mark.parametrize("end", ["stop", "length"])
def test_why_it_ended_and_what_was_counted(server: Server, protocol: str, streamed: bool, end: str) -> None:
    server.replies = [Reply("Tiber", end)]
    with opened(server, protocol) as model:
        if streamed:
            stream = model.stream("a river")
            assert "".join(stream) == "Tiber"
            found = stream.completion
        else:
            found = model.complete("a river")[0]
    assert found == remote.Completion("Tiber", end, 7, 5, "gem-1-2024")  # type: ignore[arg-type]


@each_protocol
@both_ways
def test_a_server_that_does_not_count_is_believed_nothing(server: Server, protocol: str, streamed: bool) -> None:
    server.replies = [Reply("Tiber", counted=False)]
    with opened(server, protocol) as model:
        stream = model.stream("a river") if streamed else None
        found = model.complete("a river")[0] if stream is None else ("".join(stream), stream.completion)[1]
    assert found is not None and (found.prompt_tokens, found.new_tokens) == (None, None)


@each_protocol
def test_prompts_are_answered_in_order(server: Server, protocol: str) -> None:
    server.replies = [Reply("one"), Reply("two"), Reply("three")]
    with opened(server, protocol) as model:
        assert model.generate(["a", [{"role": "user", "content": "b"}], "c"], batch_size=2) == ["one", "two", "three"]
        assert model.generate([]) == []
    assert [request["body"]["messages"] for request in server.seen] == [[{"role": "user", "content": text}] for text in "abc"]


def test_pieces_come_as_they_are_sent_and_can_be_given_up(server: Server) -> None:
    server.replies = [Reply("abcdef" * 2000, pause=0.005)]
    with opened(server, "openai") as model:
        stream = model.stream("go on")
        assert [next(stream), next(stream)] == ["abc", "def"]
        stream.close()
        assert server.gone.wait(10)  # the server saw it
        assert stream.completion is None and list(stream) == []


def test_a_stop_string_that_the_server_did_not_see_ends_the_stream(server: Server) -> None:
    server.replies = [Reply("one END" + " more" * 5000, pause=0.005)]
    with opened(server, "anthropic") as model:
        assert "".join(model.stream("go on", stop="END")) == "one "
        assert server.gone.wait(10)


# ------------------------------------------------------------------------------------------ what is sent

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi."}, {"role": "system", "content": "Now in Latin."}, {"role": "user", "content": "Again."}]


def test_openai_is_sent_what_its_protocol_has(server: Server) -> None:
    with opened(server, "openai") as model:
        model.chat(MESSAGES, max_new_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop=["\n", "END"], top_k=0, min_p=None)
    assert server.body == {"model": "gem-1", "messages": MESSAGES, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3,
                           "stop": ["\n", "END"]}
    assert server.seen[0]["path"] == "/v1/chat/completions"


def test_anthropic_is_sent_what_its_protocol_has(server: Server) -> None:
    with opened(server, "anthropic") as model:
        model.chat(MESSAGES, max_new_tokens=9, stop="END", temperature=1.0, top_p=1.0, top_k=0)
    assert server.body == {"model": "gem-1", "messages": MESSAGES[2:], "system": "Be brief.\n\nBe kind.", "max_tokens": 9,
                           "stop_sequences": ["END"]}
    assert server.seen[0]["path"] == "/v1/messages"


@both_ways
def test_anthropics_earlier_protocol_has_sampling(server: Server, streamed: bool) -> None:
    with opened(server, "anthropic", api_version="2023-06-01") as model:
        asked(model, streamed, max_new_tokens=9, temperature=0.0, top_p=0.9, top_k=5)
        with refused(UsageError, "`seed` is 3", "leave it out"):
            model.generate("a", seed=3)
    assert {name: server.body[name] for name in ("temperature", "top_p", "top_k")} == {"temperature": 0.0, "top_p": 0.9, "top_k": 5}
    assert server.seen[0]["headers"]["anthropic-version"] == "2023-06-01"
    assert server.seen[0]["headers"]["x-api-key"] == KEY


@each_protocol
def test_nothing_but_what_was_asked_is_sent(server: Server, protocol: str) -> None:
    with opened(server, protocol) as model:
        model.generate("a")
    from threefold.generation.engine import NEW_TOKENS

    assert server.body == {"model": "gem-1", "messages": [{"role": "user", "content": "a"}], "max_tokens": NEW_TOKENS}


@each_protocol
def test_the_key_is_sent_and_nothing_about_this_machine(server: Server, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{protocol.upper()}_API_KEY", f"{KEY}\n")
    with opened(server, protocol, api_key=None) as model:
        model.generate("a")
        assert KEY not in repr(model) and "gem-1" in repr(model) and "127.0.0.1" in repr(model)
    headers = server.seen[0]["headers"]
    assert headers["authorization"] == f"Bearer {KEY}"
    about_the_request = {"x-stainless-retry-count", "x-stainless-read-timeout", "x-stainless-timeout"}
    assert {name for name in headers if "stainless" in name or "trace" in name} <= about_the_request


def test_the_limit_is_named_as_the_address_wants_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, name in (("https://api.openai.com/v1", "max_completion_tokens"), ("https://eu.api.openai.com/v1", "max_completion_tokens"),
                          ("https://notopenai.com/v1", "max_tokens"), ("https://openai.com.example.org/v1", "max_tokens")):
        with opened(server, "openai", base_url=address) as model:
            sent: list[Any] = []
            monkeypatch.setattr(model, "_send", lambda body, sent=sent: sent.append(body))
            with pytest.raises(remote.RemoteError):
                model.generate("a")
            assert name in sent[0]


def test_owners_addresses_are_the_default(server: Server) -> None:
    with remote.open("openai:m", api_key=KEY) as openai, remote.open("anthropic:m", api_key=KEY) as anthropic:
        assert (openai.address, anthropic.address) == ("https://api.openai.com", "https://api.anthropic.com")


# ------------------------------------------------------------------------------------------ what is refused before it is sent

@pytest.mark.parametrize(("protocol", "arguments", "words", "hint"), [
    ("openai", {"top_k": 40}, "`top_k` is 40, and OpenAI's protocol has no `top_k`", "leave it out"),
    ("openai", {"min_p": 0.1}, "`min_p` is 0.1", "leave it out"),
    ("openai", {"repetition_penalty": 1.2}, "`repetition_penalty` is 1.2", "leave it out"),
    ("openai", {"settings": object()}, "`settings` is <object", "leave it out"),
    ("openai", {"logits": [0.0]}, "`logits` is [0.0]", "leave it out"),
    ("anthropic", {"logits": True}, "`logits` is True", "leave it out"),
    ("anthropic", {"seed": 0}, "`seed` is 0, and Anthropic's protocol has no `seed`", "leave it out"),
    ("anthropic", {"temperature": 0.0}, "`temperature` is 0.0", 'api_version="2023-06-01"'),
    ("anthropic", {"top_p": 0.9}, "`top_p` is 0.9", 'api_version="2023-06-01"'),
    ("anthropic", {"top_k": 40}, "`top_k` is 40", 'api_version="2023-06-01"'),
    ("openai", {"temprature": 1}, "`temprature` is not a known argument", "did you mean `temperature`?"),
    ("openai", {"temperature": "hot"}, "`temperature` is 'hot', expected a number", ""),
    ("openai", {"temperature": float("nan")}, "`temperature` is nan", ""),
    ("openai", {"temperature": True}, "`temperature` is True", ""),
    ("openai", {"max_new_tokens": 0}, "`max_new_tokens` is 0, expected a whole number, 1 or more", ""),
    ("openai", {"max_new_tokens": 2.5}, "`max_new_tokens` is 2.5", ""),
    ("openai", {"stop": ["a", ""]}, "a stop string is empty", ""),
])
def test_arguments_that_are_refused(server: Server, protocol: str, arguments: dict[str, Any], words: str, hint: str) -> None:
    with opened(server, protocol) as model:
        for ask in (model.generate, model.stream):
            with refused(UsageError, words, hint):
                ask("a", **arguments)
    assert server.seen == []


@pytest.mark.parametrize(("prompts", "words"), [
    ("", "the content of a message is ''"), ([""], "the content of a message is ''"), (3, "the prompts are 3"), ([3], "the prompts are [3]"),
    (None, "the prompts are None"), ([[3]], "a message is 3"), ([{"role": "user"}], "a message is {'role': 'user'}"),
    ([{"role": "robot", "content": "a"}], "a message is {"), ([{"role": "user", "content": [{"type": "text"}]}], "the content of a message is [{"),
    ([{"role": "user", "content": "a", "name": "b"}], "a message is {"), ([[]], "there is nothing to answer in 0 messages"),
    ([{"role": "system", "content": "a"}], "there is nothing to answer in 1 messages"),
])
def test_prompts_that_are_refused(server: Server, prompts: Any, words: str) -> None:
    with opened(server, "anthropic") as model:
        with refused(UsageError, words):
            model.generate(prompts)
        with refused(UsageError, "a stream answers one prompt, and 2 are given", "`generate`"):
            model.stream(["a", "b"])
    assert server.seen == []


@pytest.mark.parametrize(("name", "arguments", "words", "hint"), [
    ("opnai:m", {}, "`opnai:m` is not the name of a served model", "did you mean `openai`?"),
    ("gpt2", {}, "`gpt2` is not the name of a served model", "known: `anthropic`, `openai`"),
    ("openai:", {}, "`openai:` is not the name of a served model", "name the model: `openai:MODEL`"),
    ("openai:m", {"api_key": None}, "there is no key for `openai:m`", "set the variable OPENAI_API_KEY"),
    ("anthropic:m", {"api_key": "  "}, "there is no key for `anthropic:m`", "set the variable ANTHROPIC_API_KEY"),
    ("openai:m", {"api_key": f"{KEY}\n{KEY}"}, "`api_key` holds characters that no key has", "copy it again"),
    ("openai:m", {"api_key": f"“{KEY}”"}, "`api_key` holds characters that no key has", "copy it again"),
    ("openai:m", {"base_url": "localhost:8000"}, "`base_url` is no address of a server", "http://"),
    ("openai:m", {"base_url": "http://[::1"}, "`base_url` is no address of a server", "http://"),
    ("openai:m", {"base_url": f"http://{KEY}@:99999999/v1"}, "`base_url` is no address of a server", ""),
    ("openai:m", {"timeout": None}, "`timeout` is None", "there is always one"),
    ("openai:m", {"timeout": float("inf")}, "`timeout` is inf", "there is always one"),
    ("openai:m", {"timeout": 0}, "`timeout` is 0", ""),
    ("openai:m", {"api_version": "2023-06-01"}, "`api_version` is '2023-06-01' for `openai:m`", ""),
    ("anthropic:m", {"api_version": "latest"}, "`api_version` is 'latest'", ""),
])
def test_names_keys_and_addresses_that_are_refused(server: Server, name: str, arguments: dict[str, Any], words: str, hint: str) -> None:
    with refused(UsageError, words, hint):
        remote.open(name, **{"api_key": KEY, **arguments})


def test_names_of_served_models() -> None:
    assert remote.is_remote("openai:gpt-4o-mini") and remote.is_remote("anthropic:claude-x")
    assert not any(map(remote.is_remote, ("gpt2", "openai", "openai-community/gpt2", "./openai:x", "C:\\models", "")))


# ------------------------------------------------------------------------------------------ failures of the server

STATUSES: list[tuple[int, type[ThreefoldError], str, str]] = [
    (400, remote.RemoteError, "did not take the request (status 400): it went wrong", ""),
    (401, remote.RemoteError, "does not accept the key", "check `api_key`"),
    (403, remote.RemoteError, "`gem-1` at http://127.0.0.1", "check what the key's project may use"),
    (404, remote.RemoteError, "knows no model `gem-1`: it went wrong", "/v1"),
    (413, remote.RemoteError, "did not take the request (status 413)", ""),
    (422, remote.RemoteError, "did not take the request (status 422)", ""),
    (500, remote.RemoteError, "failed with status 500: it went wrong", "try again later"),
    (503, remote.RemoteError, "failed with status 503", "try again later"),
    (529, remote.RemoteError, "failed with status 529", "try again later"),
]


@each_protocol
@both_ways
@pytest.mark.parametrize(("status", "kind", "words", "hint"), STATUSES, ids=[str(row[0]) for row in STATUSES])
def test_an_error_of_the_server_is_explained_and_nothing_is_repeated(
    server: Server, protocol: str, streamed: bool, status: int, kind: type[ThreefoldError], words: str, hint: str, waits: list[float],
) -> None:
    server.replies = [Reply(status=status)]
    with opened(server, protocol) as model, refused(kind, words, hint):
        asked(model, streamed)
    assert len(server.seen) == 1 and waits == []


@each_protocol
def test_a_wrong_key_is_named_by_where_it_came_from(server: Server, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{protocol.upper()}_API_KEY", KEY)
    server.replies = [Reply(status=401)]
    with opened(server, protocol, api_key=None) as model, refused(remote.RemoteError, "does not accept the key", f"{protocol.upper()}_API_KEY"):
        model.generate("a")


@each_protocol
def test_a_key_of_any_form_is_taken_out_of_the_servers_words(server: Server, protocol: str) -> None:
    secret = "Zb81.kf+zz/09=abcdefgh"
    server.replies = [Reply(status=400, words=f"got {secret}, {secret}")]
    with opened(server, protocol, api_key=secret) as model:
        with pytest.raises(remote.RemoteError, match=r"got \*\*\*, \*\*\*") as caught:
            model.generate("a")
    assert secret not in str(caught.value)


@each_protocol
def test_a_servers_words_are_one_line_of_bounded_length(server: Server, protocol: str) -> None:
    server.replies = [Reply(status=400, words="long\n\x1b[31m" * 1000), Reply(status=500, raw="<html>" + "x" * 9999)]
    with opened(server, protocol) as model:
        with refused(remote.RemoteError, "long [31mlong") as found:
            model.generate("a")
        assert len(str(found[0])) < remote.LONGEST_QUOTE + 100
        with refused(remote.RemoteError, "failed with status 500") as found:
            model.generate("a")
        assert "html" not in str(found[0])


@each_protocol
@both_ways
def test_too_many_requests_are_sent_again_as_late_as_asked(
    server: Server, protocol: str, streamed: bool, waits: list[float], capsys: pytest.CaptureFixture[str],
) -> None:
    later = formatdate(time.time() + 30, usegmt=True)
    server.replies = [Reply(status=429, headers={"retry-after": "7"}), Reply(status=429, headers={"retry-after": later}), Reply(status=429)]
    with opened(server, protocol) as model:
        assert asked(model, streamed) == Reply().text
    assert waits[0] == 7 and 25 < waits[1] <= 30 and waits[2] == 4
    assert len({json.dumps(request["body"]) for request in server.seen}) == 1 and len(server.seen) == 4
    assert "has too many requests: again in 7 s (1 of 3)" in capsys.readouterr().err


@each_protocol
def test_the_waits_are_bounded(server: Server, protocol: str, waits: list[float]) -> None:
    server.replies = [Reply(status=429)] * 99
    with opened(server, protocol) as model, refused(remote.TooManyRequests, "has too many requests: it went wrong", "wait"):
        model.generate("a")
    assert waits == [1, 2, 4] and len(server.seen) == 1 + remote.RETRIES


@each_protocol
@pytest.mark.parametrize("value", ["61", "86400", "inf"])
def test_a_wait_that_is_too_long_is_not_begun(server: Server, protocol: str, value: str, waits: list[float]) -> None:
    server.replies = [Reply(status=429, headers={"retry-after": value})]
    with opened(server, protocol) as model, refused(remote.TooManyRequests, f"asks to wait {value} s"):
        model.generate("a")
    assert waits == [] and len(server.seen) == 1


@pytest.mark.parametrize(("value", "expected"), [("-5", 1), ("nan", 1), ("soon", 1), ("Mon, 99:99", 1), ("0", 1), ("0.25", 0.25)])
def test_an_odd_retry_after(server: Server, value: str, expected: float, waits: list[float]) -> None:
    server.replies = [Reply(status=429, headers={"retry-after": value})]
    with opened(server, "openai") as model:
        model.generate("a")
    assert waits == [expected]


def test_an_account_that_is_used_up_is_not_waited_for(server: Server, waits: list[float]) -> None:
    server.replies = [Reply(status=429, code="insufficient_quota", headers={"retry-after": "1"})]
    with opened(server, "openai") as model, refused(remote.TooManyRequests, "it went wrong", "plan and balance"):
        model.generate("a")
    assert waits == []


@each_protocol
@both_ways
def test_a_server_that_is_silent(server: Server, protocol: str, streamed: bool) -> None:
    server.replies = [Reply(wait=30)]
    with opened(server, protocol, timeout=0.2) as model, refused(remote.RemoteError, "sent nothing for 0.2 s", "longer `timeout`"):
        asked(model, streamed)
    assert len(server.seen) == 1


@each_protocol
def test_a_stream_that_falls_silent(server: Server, protocol: str) -> None:
    server.replies = [Reply(pause=30)]
    with opened(server, protocol, timeout=0.2) as model, refused(remote.RemoteError, "sent nothing for 0.2 s after 0 characters"):
        asked(model, True)


@each_protocol
@both_ways
def test_no_server_at_all(server: Server, protocol: str, streamed: bool) -> None:
    with Server() as closed:
        address = f"http://127.0.0.1:{closed.server_port}"
    with opened(server, protocol, base_url=address) as model, refused(remote.RemoteError, f"{address} cannot be reached", "base_url"):
        asked(model, streamed)


@each_protocol
@pytest.mark.parametrize("reply", [Reply(cut=9), Reply(end=""), Reply(after="error"), Reply(after="noise")], ids=["cut", "ends", "error", "noise"])
def test_a_stream_that_breaks_off_is_no_answer(server: Server, protocol: str, reply: Reply) -> None:
    server.replies = [reply]
    got: list[str] = []
    with opened(server, protocol) as model:
        stream = model.stream("a")
        with refused(remote.RemoteError, "broke off the answer after ", "not the whole"):
            for piece in stream:
                got.append(piece)  # one by one: what came before the end is given out
        assert stream.completion is None
    assert Reply().text.startswith("".join(got)) and got
    assert len(server.seen) == 1


@each_protocol
@both_ways
def test_refused_content(server: Server, protocol: str, streamed: bool) -> None:
    for reply in (Reply("Well", "refused"), Reply("Well", "refused", refusal=f"I cannot. {KEY}"), Reply("", "refused", refusal="I cannot.")):
        server.replies = [reply]
        words = f"refused the content after {len(reply.text)} characters{': I cannot.' if reply.refusal else ''}"
        with opened(server, protocol) as model, refused(remote.ContentRefused, words, "other words"):
            asked(model, streamed)
    server.replies = [Reply(status=400, code="content_policy_violation")]
    with opened(server, protocol) as model, refused(remote.ContentRefused, "refused the content: it went wrong", "other words"):
        asked(model, streamed)


def test_openais_refusal_with_an_ordinary_end(server: Server) -> None:
    server.replies = [Reply("", "stop", refusal="I cannot."), Reply("", "stop", refusal="I cannot.")]
    with opened(server, "openai") as model:
        for streamed in (False, True):
            with refused(remote.ContentRefused, "refused the content after 0 characters: I cannot."):
                asked(model, streamed)


@each_protocol
@both_ways
def test_an_end_that_is_not_understood(server: Server, protocol: str, streamed: bool) -> None:
    server.replies = [Reply(end="tool")]
    with opened(server, protocol) as model, refused(remote.RemoteError, f"for the reason `{ENDS[protocol]['tool']}`", "expected one of `"):
        asked(model, streamed)


@each_protocol
@both_ways
def test_tokens_that_went_into_thinking_alone(server: Server, protocol: str, streamed: bool) -> None:
    server.replies = [Reply("", "length"), Reply("", "stop")]
    with opened(server, protocol) as model:
        with refused(remote.RemoteError, "used up 5 new tokens before it began a text", "larger `max_new_tokens`"):
            asked(model, streamed)
        assert asked(model, streamed) == ""  # an empty answer is an answer


@each_protocol
@both_ways
@pytest.mark.parametrize("raw", [
    "<html>hello</html>", '{"hello": 1}', "[]", "3", '{"choices": [], "object": "chat.completion", "type": "message"}',
    '{"object": "chat.completion", "choices": [{"message": {"content": ["a"]}, "finish_reason": "stop"}], "type": "message", "stop_reason": '
    '"end_turn", "content": [{"type": "text", "text": 3}]}',
    '{"object": "chat.completion", "choices": [{"message": {"content": "a"}, "finish_reason": ["b"]}], "type": "message", "stop_reason": ["b"],'
    ' "content": [{"type": "text", "text": "a"}]}',
], ids=["page", "other", "list", "number", "empty", "types", "reasons"])
def test_an_answer_of_another_protocol(server: Server, protocol: str, streamed: bool, raw: str) -> None:
    for kind in ("text/html", "application/json"):
        server.replies = [Reply(raw=raw, headers={"content-type": kind})]
        with opened(server, protocol) as model:
            with refused(remote.RemoteError, "answer") as found:
                asked(model, streamed)
        assert any(words in str(found[0]) for words in ("gave no answer of", "broke off the answer", "which is not understood"))


@each_protocol
def test_a_redirect_is_not_followed(server: Server, protocol: str) -> None:
    """It would take prompt and key to another address."""
    with Server() as other:
        elsewhere = {"location": f"http://127.0.0.1:{other.server_port}/v1/messages"}
        server.replies = [Reply(status=status, headers=elsewhere) for status in (302, 307, 308)]
        for _ in range(3):
            with opened(server, protocol) as model, refused(remote.RemoteError, "answers with a redirect", "`base_url`"):
                model.generate("a")
    assert len(server.seen) == 3


def test_a_model_that_was_closed(server: Server) -> None:
    model = opened(server, "openai")
    model.generate("a")
    model.close()
    model.close()
    with refused(remote.RemoteError, "closed"):
        model.generate("a")


@each_protocol
def test_the_clients_logs_do_not_hold_the_key(server: Server, protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        with opened(server, protocol) as model:
            model.generate("a")
    assert KEY not in caplog.text and KEY[:12] not in caplog.text


# ------------------------------------------------------------------------------------------ without the clients

@each_protocol
def test_without_the_client_it_says_how_to_install(server: Server, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, protocol, None)
    with refused(MissingExtra, f"`{protocol}:m` needs the package `{protocol}`", 'pip install "threefold[remote]"'):
        remote.open(f"{protocol}:m", api_key=KEY)


def test_importing_it_needs_no_client_and_opens_no_connection() -> None:
    code = ("import socket, sys\n"
            "def no(*a, **k): raise AssertionError('reached out')\n"
            "socket.socket.connect = socket.getaddrinfo = no\n"
            "for name in ('openai', 'anthropic', 'httpx', 'httpx2', 'pydantic'): sys.modules[name] = None\n"
            "import threefold.remote as remote\n"
            "assert remote.is_remote('openai:m') and 'torch' not in sys.modules\n"
            "try: remote.open('openai:m', api_key='x')\n"
            "except Exception as error: print(type(error).__name__, error.hint)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.strip() == 'MissingExtra pip install "threefold[remote]"', done.stderr
