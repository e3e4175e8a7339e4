"""Rows of every format, compressed or not, and what does not fit."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from threefold.errors import DamagedData, DataError
from threefold.text import lines as lines_module
from threefold.text.rows import Row, read_file_rows
from threefold.text.sources import Skips

ROWS = [{"text": "one", "label": "a"}, {"text": '둘, "zwei"', "label": "b"}, {"text": "three 🚀", "label": ""}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressed: bytes = zstandard.ZstdCompressor().compress(data)
    return compressed


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def fields(path: Path, *required: str, **options: object) -> list[dict[str, object]]:
    return [row.fields for row in read_file_rows(path, required or ("text",), **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_jsonl_reads_the_same_under_every_compression(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.jsonl{suffix}", COMPRESSIONS[suffix](JSONL))
    assert fields(path) == ROWS


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", 'text,label\none,a\n"둘, ""zwei""",b\nthree 🚀,\n'),
        ("a.csv", 'text,label\r\none,a\r\n"둘, ""zwei""",b\r\nthree 🚀,\r\n'),
        ("a.tsv", 'text\tlabel\none\ta\n둘, "zwei"\tb\nthree 🚀\t\n'),
        ("a.json", json.dumps(ROWS)),
        ("a.ndjson", JSONL.decode()),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert fields(write(tmp_path / name, content)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    rows = list(read_file_rows(tmp_path / "a.parquet", ("text",)))
    assert [row.fields for row in rows] == ROWS
    assert rows[1].source == f"{tmp_path / 'a.parquet'}:2"
    with pytest.raises(DamagedData, match=r"not readable as parquet"):
        fields(write(tmp_path / "b.parquet", b"PAR1 and then nothing"))


def test_a_csv_field_may_hold_line_ends_and_the_row_knows_where_it_began(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text\n"two\nlines"\nafter\n')
    assert list(read_file_rows(path, ("text",))) == [
        Row({"text": "two\nlines"}, f"{path}:2"),
        Row({"text": "after"}, f"{path}:4"),
    ]


def test_columns_are_mapped_joined_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"question": "q", "answer": "a", "id": 7}\n')
    assert fields(path, columns={"text": "question+answer"}) == [
        {"question": "q", "answer": "a", "id": 7, "text": "q\na"}
    ]
    assert fields(path, "target", columns={"target": "answer"})[0]["target"] == "a"


def test_a_source_without_the_column_keeps_its_own_name_only_where_that_was_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "own"}\n')
    assert fields(path, columns={"text": "review"}, fallback=True) == [{"text": "own"}]
    with pytest.raises(DataError, match=r"a\.jsonl:1: the row has no `review`; its columns are `text`"):
        fields(path, columns={"text": "review"})


def test_a_file_without_header_is_read_by_number(tmp_path: Path) -> None:
    path = write(tmp_path / "sms.tsv", "ham\tOk lar\nspam\tFree entry\n")
    assert [row["text"] for row in fields(path, "label", "text", columns={"label": "0", "text": "1"})] == [
        "Ok lar",
        "Free entry",
    ]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", '{"text": "ok"}\n{"text": "broken\n', r"a\.jsonl:2: not a row in JSON: .*column"),
        ("a.jsonl", '{"text": "ok"}\n["a"]\n', r"a\.jsonl:2: .*an object, and this is a list"),
        (
            "a.jsonl",
            '{"text": "ok"}\n\n{"review": "x", "stars": 3}\n',
            r"a\.jsonl:3: the row has no `text`; its columns are `review`, `stars`",
        ),
        ("a.jsonl", "[" * 100_000 + "\n", r"a\.jsonl:1: not a row in JSON"),
        ("a.jsonl", '{"text": ' + "9" * 10_000 + "}\n", r"a\.jsonl:1: not a row in JSON"),
        ("a.csv", "text,label\nx,y\nx\n", r"a\.csv:3: 1 fields, expected 2 \(text, label\)"),
        ("a.csv", 'text\n"never closed\n', r"a\.csv:2: not a row in csv"),
        ("a.csv", "text,text\nx,y\n", r"a\.csv:1: the header names `text` twice"),
        ("a.tsv", "id\treview\n1\tx\ty\n", r"a\.tsv:2: 3 fields, expected 2"),
        ("a.csv", "review\nx\n", r"a\.csv:2: the row has no `text`; its columns are `review`"),
        ("a.json", '{"text": "x"}', r"a\.json` holds an object, expected an array"),
        ("a.json", "[1]", r"a\.json:1: a row is an object"),
        ("a.json", '[{"text": "x"}', r"a\.json` is not valid JSON"),
    ],
)
def test_D07_a_row_that_does_not_fit_names_file_and_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        fields(write(tmp_path / name, content))
    assert caught.value.hint or name == "a.json"


def test_D07_rows_that_do_not_fit_are_counted_where_that_was_asked(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", b'{"text": "ok"}\n{broken\n[]\n\n{"other": 1}\n{"text": "\xff"}\n{"text": "end"}\n'
    )
    skips = Skips()
    assert [row["text"] for row in fields(path, on_problem=skips)] == ["ok", "end"]
    assert skips.counts == {"not a row in JSON": 2, "blank line": 1, "the row has no `text`": 1, "not UTF-8": 1}
    assert skips.to_dict()["not a row in JSON"]["examples"] == [f"{path}:2", f"{path}:3"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8: byte 0xff"),
        (b'{"text": "\x00"}\n', "binary file"),
        (b'{"text": "a"}\n' * 1000 + b'{"text": "\x00"}\n', r"a\.jsonl:1001: NUL bytes"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16, expected UTF-8"),
    ],
)
def test_D06_bytes_that_are_no_text_name_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        fields(write(tmp_path / "a.jsonl", content))
    assert caught.value.hint


def test_D06_a_korean_encoding_is_recognised(tmp_path: Path) -> None:
    data = '{"text": "영화가 정말 재미있었어요"}\n'.encode("cp949")
    with pytest.raises(DataError, match=r"a\.jsonl:1: not UTF-8") as caught:
        fields(write(tmp_path / "a.jsonl", data))
    assert "CP949" in caught.value.hint and "iconv" in caught.value.hint


def test_D06_byte_order_mark_crlf_and_blank_lines_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b'{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [row["text"] for row in fields(path)] == ["a", "b"]
    assert fields(write(tmp_path / "b.csv", b"\xef\xbb\xbftext\r\nx\r\n")) == [{"text": "x"}]


def test_D06_a_line_of_ten_megabytes_is_read_and_an_endless_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * 10_000_000}) + '\n{"text": "y"}\n')
    assert [len(str(row["text"])) for row in fields(path)] == [10_000_000, 1]
    monkeypatch.setattr(lines_module, "MAX_LINE", 1000)
    with pytest.raises(DataError, match=r"a\.jsonl:1: a line of more than 1,000 bytes"):
        fields(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_compression_is_damaged_data(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESSIONS[suffix](JSONL * 500)
    for data in (whole[: len(whole) // 2], b"this is not compressed"):
        with pytest.raises(DamagedData, match="cannot be decompressed") as caught:
            fields(write(tmp_path / f"a.jsonl{suffix}", data))
        assert caught.value.exit_code == 3


def test_what_cannot_be_opened_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no file"):
        fields(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        fields(tmp_path / "folder.jsonl")
    with pytest.raises(DataError, match="holds no rows"):
        fields(write(tmp_path / "a.txt", "text"))

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.jsonl", JSONL)
    monkeypatch.setattr(lines_module, "open", refuse, raising=False)
    with pytest.raises(DataError, match="permission denied") as caught:
        fields(path)
    assert "chmod" in caught.value.hint


def test_reading_is_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps({"text": "x" * 1000}) + "\n"
    write(path, row * 10_000)
    tracemalloc.start()
    assert sum(1 for _ in read_file_rows(path, ("text",))) == 10_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
