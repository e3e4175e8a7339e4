"""A served model in a pipeline and on the command line: called like a local one, with the same shapes of results."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.test_remote import KEY, PROTOCOLS, Reply, Server, opened, server
from threefold import cli
from threefold.errors import UsageError
from threefold.tasks import pipeline

__all__ = ["server"]  # the fixture
ANSWER = "The river is called Tiber."
CHAT = [{"role": "user", "content": "Name a river."}]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pipeline_over_a_served_model_has_the_shapes_of_a_local_one(server: Server, protocol: str) -> None:
    generator = pipeline("text-generation", model=opened(server, protocol), max_new_tokens=20)
    assert generator("Name a river. ") == [{"generated_text": "Name a river. " + ANSWER}]
    assert generator("Name a river.", return_full_text=False) == [{"generated_text": ANSWER}]
    assert generator(["a", "b"]) == [[{"generated_text": "a" + ANSWER}], [{"generated_text": "b" + ANSWER}]]
    assert generator(CHAT) == [{"generated_text": [*CHAT, {"role": "assistant", "content": ANSWER}]}]
    assert generator([CHAT, CHAT], return_full_text=False) == [[{"generated_text": ANSWER}]] * 2
    assert [request["body"]["messages"][-1]["content"] for request in server.seen][:4] == ["Name a river. ", "Name a river.", "a", "b"]


def test_what_a_server_does_not_give_is_refused_by_name(server: Server) -> None:
    model = opened(server, "openai")
    for task in ("fill-mask", "feature-extraction", "translation"):
        with pytest.raises(UsageError, match=task):
            pipeline(task, model=model)
    with pytest.raises(UsageError, match="no_repeat_ngram_size"):
        pipeline("text-generation", model=model)("a", no_repeat_ngram_size=2)
    assert server.seen == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_generate_prints_what_a_served_model_says(
    server: Server, protocol: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"http://127.0.0.1:{server.server_port}" + ("/v1" if protocol == "openai" else "")
    monkeypatch.setenv(f"{protocol.upper()}_BASE_URL", address)
    monkeypatch.setenv(f"{protocol.upper()}_API_KEY", KEY)
    server.replies = [Reply(), Reply()]

    def ran(*arguments: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["generate", f"{protocol}:gem-1", "Name a river.", *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert ran() == ANSWER + "\n"
    assert json.loads(ran("--json", "--max-new-tokens", "9")) == {"prompt": "Name a river.", "text": ANSWER}
    assert "temperature" not in server.seen[0]["body"], "a default of ours is not sent"
