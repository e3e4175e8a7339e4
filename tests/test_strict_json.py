"""Foreign JSON costs one pass over its bytes, however it is put together; what it says is tested in tests/attacks."""

from __future__ import annotations

import time

import pytest

from threefold import strict_json
from threefold.errors import ModelError
from threefold.strict_json import parse_json

SECONDS = 20.0  # one pass over 4 MB takes a tenth of a second; looking at bytes twice took hours


@pytest.mark.parametrize("tail", [b"", b"\\"])
@pytest.mark.parametrize("unit", [b'\\"', b"a", b"\\\\", b"{"])
def test_S09_a_string_without_an_end_is_looked_at_once(unit: bytes, tail: bytes) -> None:
    for count in (5_000, 2_000_000):
        data = b'"' + unit * count + tail
        begun = time.monotonic()
        assert [match.span() for match in strict_json._SIGNS.finditer(data)] == [(0, len(data))]
        with pytest.raises(ModelError, match="is not valid JSON") as caught:
            parse_json(data, "config.json")
        assert time.monotonic() - begun < SECONDS and len(str(caught.value)) < 300


def test_signs_inside_strings_do_not_count() -> None:
    value = parse_json(b'{"a{[:": "\\"]}:", "b\\\\": ["\\\\", ":"]}', "x")
    assert value == {"a{[:": '"]}:', "b\\": ["\\", ":"]}
    deep = b"[" * (strict_json.DEPTH_LIMIT + 1)
    assert parse_json(b'["' + deep + b'"]', "x") == [deep.decode()]
    with pytest.raises(ModelError, match="levels deep"):
        parse_json(b'["\\"", ' + deep, "x")
