"""Names and paths of models, against a small hub of our own on the loopback interface."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from threefold import console, hub
from threefold.errors import HubError, ModelError, ThreefoldError, UsageError

COMMIT = "1234567890abcdef1234567890abcdef12345678"
FILES = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": bytes(range(256)) * 4000,
         "tokenizer.json": b"{}", "pytorch_model.bin": b"pickled", "modeling.py": b"raise SystemExit",
         "onnx/config.json": b"{}", "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}'}


class FakeHub(ThreadingHTTPServer):
    """Serves one model the way the hub does; may break off, answer with other bytes, or be down."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(FILES)
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.tokens: list[str | None] = []
        self.break_at: int | None = None  # close the connection at this byte of the weights ...
        self.breaks = 0  # ... so many times
        self.corrupt = 0  # answer so many requests for the weights with other bytes
        self.status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        self.server.requests.append(f"{self.command} {self.path.partition('?')[0]}")
        if self.server.status != 200:
            self.reply(self.server.status, b"{}", {})
        elif self.path.startswith(f"/api/models/org/name/tree/{COMMIT}"):
            entries = [self.entry(name, data) for name, data in self.server.files.items()]
            self.reply(200, json.dumps(entries).encode(), {})
        elif self.path.startswith(("/api/models/org/name/revision/main", "/api/models/org/name?")):
            self.reply(200, json.dumps({"id": "org/name", "sha": COMMIT}).encode(), {})
        elif self.path.startswith("/api/models/org/name/revision/"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif self.path.startswith((f"/org/name/resolve/{COMMIT}/", "/org/name/resolve/main/")):
            self.file(self.path.split("/", 5)[5])
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def entry(self, name: str, data: bytes) -> dict[str, object]:
        found: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
        if name.endswith(".safetensors"):
            found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return found

    def file(self, name: str) -> None:
        data = self.server.files[name]
        etag = hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else git_hash(data)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = 0
        if wanted := self.headers.get("Range"):
            self.server.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        end = len(data)
        if name.endswith(".safetensors") and self.command == "GET":
            if self.server.corrupt:
                self.server.corrupt -= 1
                data = bytes(len(data))
            if self.server.break_at is not None and self.server.breaks:
                self.server.breaks -= 1
                end = start + self.server.break_at
        self.reply(206 if wanted else 200, data[start:], headers, cut=end - start)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None and cut < len(body):
            self.close_connection = True


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    found = FakeHub()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WANTED = {name: FILES[name] for name in ("config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json")}


# ------------------------------------------------------------------------------------------ paths

def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("gpt2") == Path("gpt2")
    assert hub.resolve(tmp_path / "gpt2") == tmp_path / "gpt2"
    assert hub.revision_of("gpt2") is None


def test_a_run_stands_for_its_model_and_a_tour_for_its_decoder(tmp_path: Path) -> None:
    run = tmp_path / "tour" / "decoder"
    (run / "model").mkdir(parents=True)
    (run / "recipe.toml").write_text("")
    with pytest.raises(ModelError, match="has no finished model yet"):
        hub.resolve(run)
    (run / "model" / "config.json").write_text("{}")
    assert hub.resolve(run) == hub.resolve(tmp_path / "tour") == hub.resolve(run / "model") == run / "model"


@pytest.mark.parametrize(("name", "hint"), [
    ("runs/tuor", "did you mean `runs/tour`?"), ("./runs/tour/modle", "did you mean `runs/tour/model`?"),
    ("./rusn/tour", "did you mean `runs`?"), ("runs/zzz", "`runs` has no `zzz`"), ("a/b/c", "`.` has no `a`"),
    ("/nowhere/at/all", "`/` has no `nowhere`"), ("runs/", "")])
def test_a_mistyped_path_says_what_is_there(name: str, hint: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name != "runs/":
        (tmp_path / "runs" / "tour" / "model").mkdir(parents=True)
    with pytest.raises(ModelError, match="there is no") as caught:
        hub.resolve(name)
    assert not hint or caught.value.hint == hint


@pytest.mark.parametrize("name", ["a b", "", "x" * 300, "a\x00b", "a--b", "..", "-x", "org/..", "한국어", "@main"])
def test_what_is_no_name_at_all(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name in ("", ".."):
        assert hub.resolve(name or ".").exists()
    else:
        with pytest.raises((UsageError, ModelError)):
            hub.resolve(name)


def test_a_revision_says_nothing_about_a_path_and_that_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.resolve(tmp_path, revision="v1", local_files_only=True) == tmp_path
    assert "is a path here, so the revision `v1` is not looked for" in capsys.readouterr().err
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert hub.resolve(snapshot, revision=COMMIT) == snapshot and capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------ the hub

def test_a_name_is_fetched_once_and_only_its_data(server: FakeHub, cache: Path,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    folder = hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    assert content(folder) == WANTED
    assert hub.revision_of(folder) == COMMIT
    assert f"fetching `org/name` from {server.url}/org/name\n" in capsys.readouterr().err
    asked = len(server.requests)
    assert not any("pytorch_model" in request or "modeling" in request for request in server.requests)
    assert hub.resolve("org/name", cache_dir=cache, endpoint=server.url) == folder
    assert hub.resolve(f"org/name@{COMMIT}", cache_dir=cache, endpoint=server.url) == folder
    assert len(server.requests) == asked
    server.status = 500
    assert hub.resolve("org/name", cache_dir=cache, endpoint=server.url) == folder


@pytest.mark.parametrize("at", [0, 1, 999, 1000, len(FILES["model.safetensors"]) - 1])
def test_C05_an_interrupted_download_goes_on(at: int, server: FakeHub, cache: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what of a file is kept when the connection breaks
    server.break_at, server.breaks = at, 2
    assert content(hub.resolve("org/name", cache_dir=cache, endpoint=server.url)) == WANTED
    assert server.breaks == 0
    assert server.ranges[:1] == ([f"bytes={at // 1000 * 1000}-"] if at >= 1000 else [])


def test_C05_a_download_that_never_ends_is_an_error_and_starts_again_later(server: FakeHub, cache: Path) -> None:
    server.break_at, server.breaks = 0, 100
    with pytest.raises(HubError, match="cannot be fetched") as caught:
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    assert server.url in str(caught.value) and "hf download org/name" in caught.value.hint
    server.breaks = 0
    assert content(hub.resolve("org/name", cache_dir=cache, endpoint=server.url)) == WANTED


def test_C05_other_bytes_than_the_hash_says_are_never_used(server: FakeHub, cache: Path) -> None:
    server.corrupt = 1
    assert content(hub.resolve("org/name", cache_dir=cache, endpoint=server.url)) == WANTED
    server.corrupt = 0
    folder = hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    (folder / "config.json").resolve().write_bytes(b'{"model_type": "evil"}')
    (folder / "model.safetensors").resolve().write_bytes(b"short")
    assert hub.verify(folder, note=False) == ["config.json", "model.safetensors"]
    assert content(hub.resolve("org/name", cache_dir=cache, endpoint=server.url)) == WANTED


def test_C05_a_server_that_always_sends_other_bytes_is_an_error(server: FakeHub, cache: Path) -> None:
    server.corrupt = 100
    with pytest.raises(HubError, match="does not have the hash"):
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    assert not list(cache.rglob("model.safetensors"))


def test_what_was_verified_is_not_read_again_until_it_changes(server: FakeHub, cache: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    read: list[str] = []
    monkeypatch.setattr(hub, "_hash_as", lambda path, name: read.append(name) or name)
    hub.resolve("org/name", cache_dir=cache)
    assert read == []
    blob = (folder / "config.json").resolve()
    blob.write_bytes(blob.read_bytes())
    hub.resolve("org/name", cache_dir=cache)
    assert read == [blob.name]
    (cache / "models--org--name" / hub._NOTED).write_text("{torn")
    read.clear()
    hub.resolve("org/name", cache_dir=cache)
    assert len(read) == len(WANTED)


def test_R05_without_a_network_the_error_names_where_and_what_to_do(cache: Path, server: FakeHub) -> None:
    dead = "http://127.0.0.1:9"
    with pytest.raises(HubError) as caught:
        hub.resolve("org/name", cache_dir=cache, endpoint=dead)
    assert str(caught.value).startswith(f"`org/name` is no path here, and cannot be fetched from {dead}/org/name: ")
    assert caught.value.hint == ("where there is a network, `hf download org/name --local-dir DIR`; "
                                 "then give DIR for the name")
    with pytest.raises(HubError, match="cannot be fetched"):  # a host that is not on this machine: closed in tests
        hub.resolve("org/name", cache_dir=cache)


def test_R05_offline_mode_is_honoured(cache: Path, server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.requests)
    assert hub.resolve("org/name", cache_dir=cache, endpoint=server.url) == folder
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set") as caught:
        hub.resolve("org/other", cache_dir=cache, endpoint=server.url)
    assert "hf download org/other" in caught.value.hint
    assert len(server.requests) == asked


def test_a_name_or_a_revision_that_the_hub_does_not_have(server: FakeHub, cache: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match="has no revision `v9`"):
        hub.resolve("org/name@v9", cache_dir=cache, endpoint=server.url)
    (tmp_path / "my-modle").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubError, match="no path `my-model`, and no model at") as caught:
        hub.resolve("my-model", cache_dir=cache, endpoint=server.url)
    assert caught.value.hint == "did you mean the folder `my-modle`?"


PARTS = {"a.safetensors": b"a" * 100, "b.safetensors": b"b" * 100,
         hub.INDEX: b'{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'}


def fetched_alone(server: FakeHub, cache: Path, *names: str) -> None:
    """Fetch single files, as other programs do."""
    from huggingface_hub import hf_hub_download

    for name in names:
        hf_hub_download("org/name", name, cache_dir=cache, endpoint=server.url)


@pytest.mark.parametrize("there", ["config.json", "model.safetensors", "index", "half", "torn"])
def test_C05_a_part_of_a_model_in_the_cache_is_not_the_model(there: str, server: FakeHub, cache: Path) -> None:
    names = {"index": ["config.json", hub.INDEX], "half": ["config.json", hub.INDEX, "a.safetensors"],
             "torn": ["config.json", hub.INDEX, "a.safetensors"]}.get(there, [there])
    lacks = {"config.json": "model.safetensors", "model.safetensors": "config.json", "index": "a.safetensors",
             "half": "b.safetensors", "torn": "model.safetensors"}[there]
    if hub.INDEX in names:
        del server.files["model.safetensors"]
        server.files |= PARTS | ({hub.INDEX: b"{torn"} if there == "torn" else {})
    fetched_alone(server, cache, *names)
    server.status = 500
    with pytest.raises(HubError, match=rf"cannot be fetched .*its copy there lacks `{lacks}"):
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    asked = len(server.requests)
    with pytest.raises(HubError, match=rf"its copy there lacks `{lacks}.*`local_files_only` is set") as caught:
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url, local_files_only=True)
    assert "once, where there is a network" in caught.value.hint and len(server.requests) == asked
    server.status = 200
    folder = hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    assert content(folder) == {name: data for name, data in server.files.items() if name in {*WANTED, *PARTS}}
    if there != "torn":
        assert hub.missing(folder, ("model", "tokenizer")) == []
        assert hub.resolve("org/name", cache_dir=cache, endpoint=server.url, local_files_only=True) == folder


def test_what_the_hub_itself_does_not_have_is_not_missed(server: FakeHub, cache: Path) -> None:
    """Whether a model without safetensors is of use, its reader says."""
    del server.files["model.safetensors"]
    for _ in range(2):
        folder = hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
        assert hub.missing(folder) == ["model.safetensors"] and hub.missing(folder, ("tokenizer",)) == []


def test_R05_offline_mode_says_what_the_cache_lacks(server: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    fetched_alone(server, cache, "config.json", "tokenizer.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"lacks `model\.safetensors`, and HF_HUB_OFFLINE is set"):
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    assert hub.resolve("org/name", cache_dir=cache, endpoint=server.url, needs=("tokenizer",)).is_dir()


def test_a_tokenizer_is_fetched_without_the_weights_and_the_weights_later(server: FakeHub, cache: Path) -> None:
    folder = hub.resolve("org/name", cache_dir=cache, endpoint=server.url, needs=("tokenizer",))
    assert not (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists()
    asked = len(server.requests)
    assert hub.resolve("org/name", cache_dir=cache, endpoint=server.url, needs=("tokenizer",)) == folder
    assert len(server.requests) == asked
    assert content(hub.resolve("org/name", cache_dir=cache, endpoint=server.url)) == WANTED


def test_local_files_only_never_asks_and_force_always_does(server: FakeHub, cache: Path) -> None:
    with pytest.raises(HubError, match="it is not there, and `local_files_only` is set"):
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url, local_files_only=True)
    assert server.requests == []
    folder = hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    asked = len(server.requests)
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(b"short")
    with pytest.raises(HubError, match=r"its copy of `model\.safetensors` there is damaged"):
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url, local_files_only=True)
    assert blob.read_bytes() == b"short" and len(server.requests) == asked
    assert content(hub.resolve("org/name", cache_dir=cache, endpoint=server.url, force_download=True)) == WANTED
    assert len(server.requests) > asked
    with pytest.raises(UsageError, match="contradict"):
        hub.resolve("org/name", cache_dir=cache, local_files_only=True, force_download=True)


def test_a_token_is_sent(server: FakeHub, cache: Path) -> None:
    for token, sent in (("hf_secret", "Bearer hf_secret"), (False, None)):
        server.tokens.clear()
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url, token=token, force_download=True)
        assert set(server.tokens) == {sent}


def test_F21_a_cache_that_cannot_be_written_is_told_as_such(server: FakeHub, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ThreefoldError) as caught:
        hub.resolve("org/name", cache_dir=blocked / "cache", endpoint=server.url)
    assert "hub's cache" in str(caught.value) or "cannot be fetched" in str(caught.value)


def test_quiet_fetches_without_a_word(server: FakeHub, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    try:
        hub.resolve("org/name", cache_dir=cache, endpoint=server.url)
    finally:
        console.configure()
    assert capsys.readouterr() == ("", "")
