"""The one seam for the disk, operation by operation; whole saves are in tests/faults."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.faults.kit import FaultyFiles
from threefold import files
from threefold.errors import DiskError, UsageError


def test_a_file_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    with FaultyFiles() as disk:
        files.write_atomic(path, b"new")
    assert [kind for kind, _ in disk.seen] == ["open", "write", "fsync", "rename", "fsync_dir"]
    for n in range(1, len(disk.seen)):
        with FaultyFiles(n, errno.EIO), pytest.raises(DiskError, match="input/output error"):
            files.write_atomic(path, "newer")
        assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_F08_a_file_whose_folder_cannot_be_synced_is_an_error_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, "old")
    with FaultyFiles(1, errno.EIO, "fsync_dir"), pytest.raises(DiskError, match="sync the folder"):
        files.write_atomic(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_writer_in_pieces(tmp_path: Path) -> None:
    def content(file: files.Writer) -> None:
        file.needed = 10**9
        assert file.write(b"ab") == 2 and file.write(memoryview(bytearray(b"cd"))) == 2 and file.size == 4

    assert files.write_file(tmp_path / "file", content) == 4 and (tmp_path / "file").read_bytes() == b"abcd"
    with FaultyFiles(1, errno.ENOSPC, "write"), pytest.raises(DiskError, match=r"bytes free, 1,000,000,000 needed\)"):
        files.write_file(tmp_path / "file", content)


def test_large_writes_pass_the_seam_in_chunks(tmp_path: Path) -> None:
    sizes = []
    with files.observed(lambda kind, path, *details: sizes.append(details[0]) if kind == "write" else None):
        files.write_file(tmp_path / "file", bytes(20 * 2**20))
    assert sizes == [8 * 2**20, 8 * 2**20, 4 * 2**20]


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    files.append_line(path, "first")
    honest = os.write

    def half(fd: int, data: memoryview) -> int:
        if len(data) > 4:
            return honest(fd, data[:4])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(DiskError, match="no space left"):
        files.append_line(path, "second")
    assert path.read_text() == "first\n"


def test_folders_are_durable_before_they_are_used(tmp_path: Path) -> None:
    with FaultyFiles() as disk:
        assert files.make_dirs(tmp_path / "a" / "b") == tmp_path / "a" / "b"
        files.make_dirs(tmp_path / "a" / "b")
    relative = [(kind, os.path.relpath(path, tmp_path)) for kind, path in disk.seen]
    assert relative == [("mkdir", "a"), ("fsync_dir", "."), ("mkdir", "a/b"), ("fsync_dir", "a")]
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="file"):
        files.make_dirs(tmp_path / "file" / "inside")


def test_a_folder_is_published_as_a_whole(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with files.published(tmp_path / "final") as folder:
            files.write_file(files.make_dirs(folder / "inner") / "x", content)
            assert not (tmp_path / "final").exists() or content == "new"
        assert (tmp_path / "final" / "inner" / "x").read_text() == content
    assert os.listdir(tmp_path) == ["final"]
    with pytest.raises(ZeroDivisionError), files.published(tmp_path / "final"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["final"] and (tmp_path / "final" / "inner" / "x").read_text() == "new"


def test_a_folder_with_foreign_files_is_not_replaced(tmp_path: Path) -> None:
    final, mine = tmp_path / "final", files.besides("x", "y")
    for _ in range(2):  # what we wrote is replaced
        with files.published(final, foreign=mine) as folder:
            files.write_file(folder / "x", "ours")
    (final / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"final` exists and holds `thesis\.tex`, which would be lost") as caught:
        with files.published(final, foreign=mine):
            pytest.fail("refused before anything is done")
    assert caught.value.exit_code == 2 and "--out" in caught.value.hint
    assert sorted(os.listdir(final)) == ["thesis.tex", "x"] and os.listdir(tmp_path) == ["final"]
    for number in range(6):
        (final / str(number)).mkdir()
    with pytest.raises(UsageError, match=r"holds `0`, `1`, `2`, `3`, `4` and 2 more"):
        files.check_ours(final, mine)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        files.check_ours(tmp_path / "file", mine)
    (tmp_path / "empty").mkdir()
    for free in ("empty", "absent"):
        files.check_ours(tmp_path / free, mine)


def test_a_publication_that_fails_is_undone(tmp_path: Path) -> None:
    """At every operation: the folder is the old one, or the new one where the error came after it was durable."""
    n, states = 0, []
    while True:
        n += 1
        run = tmp_path / str(n)
        with files.published(run / "final") as folder:
            files.write_file(folder / "x", "old")
        disk = FaultyFiles(n, errno.EIO)
        failed = False
        try:
            with disk, files.published(run / "final") as folder:
                files.write_file(folder / "x", "new")
        except DiskError:
            failed = True
        assert (run / "final" / "x").read_text() == ("old" if failed else "new")
        states.append(failed)
        if not disk.failed:
            break
    assert n >= 10 and not states[-1] and states.count(False) <= 4, "what can fail unheard is the removal of the old one: a rename and its parts"


def test_leftovers(tmp_path: Path) -> None:
    alive = os.getppid()
    for name in (
        ".tmp-a-999999999",
        ".trash-b-999999999",
        ".trash1-b-999999999",
        f".tmp-mine-{os.getpid()}",
        ".tmp-x\ny-999999999",
    ):
        (tmp_path / name).mkdir()
    kept = [f".tmp-theirs-{alive}", ".tmp-nobody", "tmp-a-999999999", ".lock"]
    for name in kept:
        (tmp_path / name).touch()
    assert len(files.clean_leftovers(tmp_path)) == 5
    assert sorted(os.listdir(tmp_path)) == sorted(kept)
    assert files.clean_leftovers(tmp_path / "none") == []


def test_what_was_to_be_replaced_gets_its_name_back_where_nothing_else_has_it(tmp_path: Path) -> None:
    for name in (".replaced-lost-999999999", ".replaced-there-999999999", "there", ".replaced-theirs-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    assert len(files.clean_leftovers(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == [".replaced-theirs-1", "lost", "there"]
    assert (tmp_path / "lost" / "x").read_text() == ".replaced-lost-999999999" and (tmp_path / "there" / "x").read_text() == "there"


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    folder = files.make_dirs(tmp_path / "folder")
    (folder / "link").symlink_to(tmp_path / "kept")
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    files.remove_tree(folder)
    files.remove_tree(folder)
    assert not folder.exists() and (tmp_path / "kept" / "file").exists()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    assert not files.is_regular(tmp_path / "link") and files.is_regular(tmp_path / "kept" / "file")


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse it and have no more to give; an error of the disk is an error."""
    for code, raises in ((errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)):

        def refuse(fd: int, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files, "_sync", refuse)
        if raises:
            with pytest.raises(DiskError, match="hardware|input/output"):
                files.fsync_dir(tmp_path)
        else:
            files.fsync_dir(tmp_path)


def test_reading_is_reported_too(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot read"):
        files.sha256(tmp_path / "none")
    (tmp_path / "empty").touch()
    assert files.sha256(tmp_path / "empty").startswith("e3b0c442")
    assert files.free_bytes(tmp_path / "not" / "there" / "yet") > 0
