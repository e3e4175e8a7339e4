"""What a user names -> files -> documents."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from threefold.errors import DataError, HubError, MissingExtra, UsageError
from threefold.text.sources import (
    Document,
    Skips,
    Source,
    expand,
    parse_columns,
    parse_source,
    read_documents,
    read_rows,
)


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def texts(spec: str | Path, *args: object) -> list[str]:
    return [document.text for document in read_documents(spec, *args)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spec, source",
    [
        ("a.txt", Source("a.txt")),
        ("a.txt:0.7", Source("a.txt", 0.7)),
        ("hub:name", Source("hub:name")),
        ("hub:a/b:2", Source("hub:a/b", 2.0)),
        ("python:1e-1", Source("python", 0.1)),
        ("a:b.txt", Source("a:b.txt")),
        ("dir/:3", Source("dir/", 3.0)),
    ],
)
def test_a_share_is_a_number_behind_the_last_colon(spec: str, source: Source) -> None:
    assert parse_source(spec) == source


def test_a_file_whose_name_ends_like_a_share_is_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a:7", "x")
    assert parse_source(str(path)) == Source(str(path))


@pytest.mark.parametrize("spec", ["a.txt:0", "a.txt:-1", "", " "])
def test_a_share_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(UsageError):
        parse_source(spec)


def test_columns() -> None:
    assert parse_columns("text=question+answer, label = class") == {"text": "question+answer", "label": "class"}
    assert parse_columns("") == {}
    for wrong in ("text", "=a", "text=", "text=a,text=b"):
        with pytest.raises(UsageError, match="does not name a column"):
            parse_columns(wrong)


def test_a_folder_gives_its_text_in_order_of_paths(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "b")
    write(tmp_path / "a" / "z.md", "z")
    write(tmp_path / "c.jsonl", '{"text": "row 1"}\n{"text": "row 2"}\n')
    write(tmp_path / "picture.png", b"\x89PNG\0")
    write(tmp_path / "package.json", "{}")
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / ".git" / "a.txt", "no")
    write(tmp_path / "empty.txt", "")
    assert texts(tmp_path) == ["z", "b", "row 1", "row 2"]
    found = list(read_documents(tmp_path))
    assert found[0] == Document("z", str(tmp_path / "a" / "z.md"), "a/z.md")
    assert found[3] == Document("row 2", f"{tmp_path / 'c.jsonl'}:2", "c.jsonl:2")
    assert texts(tmp_path / "*.txt") == ["b"]
    assert texts(f"{tmp_path}/**/*.md") == ["z"]


def test_a_document_is_the_text_as_it_stands(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbf a\r\nb \n\n")) == [" a\r\nb \n\n"]


def test_rows_of_text_need_strings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": null}\n{"text": ""}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: `text` should be a string and is null"):
        texts(path)
    skips = Skips()
    assert texts(path, {}, skips) == ["a", "b"]
    assert skips.counts == {"`text` is no string": 1, "empty text": 1}


def test_a_lone_surrogate_passes_as_it_is_and_is_cleaned_later(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.jsonl", '{"text": "a\\ud800b"}\n')) == ["a\ud800b"]


def test_a_table_in_a_txt_file_is_a_table_if_its_column_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "ratings.txt", 'id\tdocument\tlabel\n1\t"재밌다\t1\n')
    assert texts(path, {"text": "document"}) == ['"재밌다']
    assert len(texts(path)) == 1
    assert next(read_rows(path, ("document", "label"))).fields == {"id": "1", "document": '"재밌다', "label": "1"}


def test_one_map_serves_a_mixture(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"review": "mapped"}\n')
    write(tmp_path / "b.jsonl", '{"text": "own"}\n')
    assert texts(tmp_path, {"text": "review"}) == ["mapped", "own"]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b" \n\t\n", "holds no text"),
        (b"a\nb\n\xff\xfec", r"a\.txt:3: not UTF-8: byte 0xff"),
        (b"\x00\x01\x02", "is a binary file"),
        (b"%PDF-1.7\n\x00", "is a PDF"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04\x00", "zip archive"),
        ("Größe".encode("latin-1"), r"a\.txt:1: not UTF-8"),
    ],
)
def test_D06_a_named_file_that_holds_no_text_is_one_clear_error(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        texts(write(tmp_path / "a.txt", content))
    assert caught.value.hint


def test_D06_files_of_a_folder_that_hold_no_text_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "good.txt", "good")
    write(tmp_path / "latin.txt", "Größe".encode("latin-1"))
    write(tmp_path / "binary.txt", b"\0\0")
    write(tmp_path / "empty.txt", b"")
    skips = Skips()
    assert texts(tmp_path, {}, skips) == ["good"]
    assert skips.counts == {"not UTF-8": 1, "binary or in another encoding": 1, "empty file": 1}
    with pytest.raises(DataError):
        texts(tmp_path)


def test_what_is_not_there_is_said_with_a_way_out(tmp_path: Path) -> None:
    write(tmp_path / "corpus.txt", "x")
    with pytest.raises(DataError, match="there is no file or folder") as caught:
        expand(tmp_path / "corpsu.txt")
    assert "corpus.txt" in caught.value.hint
    with pytest.raises(DataError, match="no file matches"):
        expand(f"{tmp_path}/*.csv")
    with pytest.raises(DataError, match="there is no file"):
        expand(tmp_path / "no" / "where.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it is empty"):
        expand(tmp_path / "empty")
    write(tmp_path / "pictures" / "a.png", b"\x89PNG")
    with pytest.raises(DataError, match=r"it holds `\.png`"):
        expand(tmp_path / "pictures")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="not a plain file"):
        texts(tmp_path / "pipe.txt")


def test_python_is_the_standard_library_without_its_tests() -> None:
    paths = expand("python")
    assert paths == sorted(paths) and len(paths) > 300
    assert not any(
        part in ("test", "tests", "idlelib", "site-packages", "__pycache__")
        for path in paths
        for part in path.parts[-4:]
    )
    found = list(read_documents("python"))
    assert [document.text for document in found] == texts("python")
    names = {document.name for document in found}
    assert {"json/decoder.py", "pydoc:for"} <= names
    assert sum(len(document.text) for document in found) > 5_000_000


class _Datasets(types.ModuleType):
    @staticmethod
    def load_dataset(name: str, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        if name == "gone":
            raise FileNotFoundError("no such data set")
        return iter([{"review": "one"}, {"review": "two"}])


def test_a_hub_data_set_streams_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", _Datasets("datasets"))
    assert expand("hub:some/name") == []
    found = list(read_documents("hub:some/name", {"text": "review"}))
    assert [document.text for document in found] == ["one", "two"] and found[1].source == "hub:some/name:2"
    assert [row.fields["review"] for row in read_rows("hub:some/name", ("review",))] == ["one", "two"]
    with pytest.raises(HubError, match="no such data set"):
        texts("hub:gone")
    with pytest.raises(DataError, match="the row has no `text`"):
        texts("hub:some/name")


def test_the_extra_is_named_where_a_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, spec in (
        ("datasets", "hub:name"),
        ("zstandard", write(tmp_path / "a.txt.zst", b"x")),
        ("pyarrow", write(tmp_path / "a.parquet", b"x")),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtra) as caught:
            texts(spec)
        assert 'pip install "threefold[data]"' in caught.value.hint


@pytest.mark.parametrize(
    "name, columns, first",
    [
        ("nsmc/reviews_300k.tsv.gz", {"text": "review"}, "전체관람가는 아닌것 같아요"),
        ("nsmc/ratings_test.txt", {"text": "document"}, "굳 ㅋ"),
        (
            "medquad/medquad.jsonl.gz",
            {"text": "question+answer"},
            "What is (are) Adult Acute Lymphoblastic Leukemia ?\nKey Points",
        ),
        ("books/books.jsonl.gz", {}, "# Title: The Pursuit of God"),
        ("shakespeare/input.txt", {}, "First Citizen:"),
        ("banking77/train.csv", {}, "I am still waiting on my card?"),
    ],
)
def test_published_files_are_read(
    shared_data: Callable[[str], Path], name: str, columns: dict[str, str], first: str
) -> None:
    document = next(read_documents(shared_data(name), columns))
    assert document.text.startswith(first)


def test_links_in_a_folder_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "wiki.txt", "wiki")
    write(tmp_path / "corpus" / "a.txt", "a")
    (tmp_path / "corpus" / "wiki").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "loop").symlink_to(tmp_path / "corpus")
    assert sorted(texts(tmp_path / "corpus")) == ["a", "wiki"]


def test_a_card_beside_the_rows_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", '{"text": "a", "label": "x"}\n')
    write(tmp_path / "README.md", "# a data set\n")
    assert [row.fields["text"] for row in read_rows(tmp_path, ("text", "label"))] == ["a"]
    with pytest.raises(DataError, match="README.md"):
        list(read_rows(tmp_path / "README.md", ("text", "label")))
