"""Files -> bytes -> lines -> text in UTF-8, decompressed on the way.

Decisions:
- Everything is a stream, and a line has an upper bound: a file without line ends cannot fill the memory.
- Bytes are UTF-8, strictly. A byte order mark at the beginning is dropped; other encodings are refused with a guess
  at what they are, because text that was decoded wrongly looks like text and spoils a model silently.
- What the operating system or a decompressor refuses becomes a `DataError` that names the file and a way out.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from threefold.errors import DamagedData, DataError, MissingExtra

MAX_LINE = 2**28  # bytes in one line
SNIFFED = 2**13  # bytes looked at to tell text from binary
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed by its suffix. Raises `DataError` for what is missing or no plain file."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise DataError(f"`{path}` is a folder, expected a file")
        if not stat.S_ISREG(mode):
            raise DataError(
                f"`{path}` is not a plain file", hint="data is read more than once: save it to a file first"
            )
        suffix = path.suffix.lower()
        if suffix == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if suffix == ".bz2":
            return cast(BinaryIO, bz2.open(path, "rb"))
        if suffix == ".xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        if suffix == ".zst":
            return _open_zstd(path)
        return open(path, "rb")
    except OSError as error:
        raise unreadable(path, error) from error


def _open_zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra(f"reading `{path}`", "zstandard", "data") from error
    return io.BufferedReader(_Zstd(open(path, "rb"), zstandard.ZstdDecompressor, zstandard.ZstdError), 2**20)


class _Zstd(io.RawIOBase):
    """The content of a zstd file, frame after frame; a file that ends inside a frame is an error."""

    def __init__(self, file: BinaryIO, decompressor: Callable[[], Any], error: type[Exception]) -> None:
        self._file, self._decompressor, self._error = file, decompressor, error
        self._frame: Any = None
        self._rest = self._out = b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; the number of bytes."""
        while not self._out:
            # A block of 128 KiB can be said in four bytes: little is read at a time, so that little comes out.
            data = self._rest or self._file.read(1024)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            try:
                self._frame = self._frame or self._decompressor().decompressobj()
                self._out = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from error
            self._rest = b""
            if self._frame.eof:
                self._frame, self._rest = None, self._frame.unused_data
        size = min(len(buffer), len(self._out))
        buffer[:size], self._out = self._out[:size], self._out[size:]
        return size

    def close(self) -> None:
        """Close the file too."""
        self._file.close()
        super().close()


def unreadable(path: Path, error: BaseException) -> DataError:
    """The error for a file that the operating system or the decompressor refused."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"there is no file `{path}`", hint="check the path")
    if isinstance(error, PermissionError):
        return DataError(f"cannot read `{path}`: permission denied", hint=f"`chmod +r {path}`, or run as its owner")
    if isinstance(error, OSError) and error.errno is not None:
        return DataError(f"cannot read `{path}`: {(error.strerror or str(error)).lower()}")
    return DamagedData(
        f"`{path}` cannot be decompressed: {str(error).lower() or type(error).__name__}",
        hint="the file is cut off, damaged or not what its suffix says: fetch it again",
    )


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes with their line end) of each line; the byte order mark is gone."""
    with open_bytes(path) as file:
        number = 0
        while True:
            try:
                line = file.readline(MAX_LINE + 1)
            except DECODING_ERRORS as error:
                raise unreadable(path, error) from error
            if not line:
                break
            number += 1
            if number == 1:
                refuse_binary(path, line[:SNIFFED])
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > MAX_LINE:
                raise DataError(
                    f"{path}:{number}: a line of more than {MAX_LINE:,} bytes",
                    hint="put each document on a line of its own",
                )
            yield number, line
    if not number:
        raise DataError(f"`{path}` is empty", hint="give a file that holds text")


DECODING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)

_MAGIC = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive or an office document",
    b"\x1f\x8b": "gzip data without the suffix `.gz`",
    b"BZh": "bzip2 data without the suffix `.bz2`",
    b"\x28\xb5\x2f\xfd": "zstd data without the suffix `.zst`",
    b"PAR1": "parquet without the suffix `.parquet`",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"SQLite format 3": "an SQLite database",
}


def refuse_binary(path: Path, start: bytes) -> None:
    """Raise a `DataError` if a file that begins with `start` holds no text in UTF-8."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"`{path}` is encoded in UTF-16, expected UTF-8", hint=f"`iconv -f UTF-16 -t UTF-8 {path} > NEW`"
        )
    if b"\0" in start:
        what = next((words for magic, words in _MAGIC.items() if start.startswith(magic)), "a binary file")
        raise DataError(f"`{path}` is {what}, expected text in UTF-8", hint="extract its text first, or leave it out")


def decoded(data: bytes, where: str, first_line: int | None = None) -> str:
    """The text of UTF-8 bytes; raises a `DataError` that names the place and guesses the encoding.

    `where` is `path:line`, or, with `first_line`, a path to which the line of the wrong byte is added.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        path = where
        if first_line is not None:
            where = f"{where}:{first_line + data.count(10, 0, error.start)}"
        else:
            path = where.rpartition(":")[0]
        raise DataError(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x}, {error.reason}",
            hint=_encoding_hint(data[max(0, error.start - 1000) : error.start + 3000], path),
        ) from error


def _encoding_hint(data: bytes, path: str) -> str:
    for encoding, signs in (("cp949", "[가-힣]"), ("shift_jis", "[ぁ-ヿ]"), ("gb18030", "[一-鿿]")):
        text = data.decode(encoding, errors="ignore")
        high = sum(byte >= 128 for byte in data)
        if len(re.findall(signs, text)) * 2 > 0.8 * high and text.encode(encoding, errors="ignore").count(
            b"?"
        ) <= data.count(b"?"):
            return f"it looks like {encoding.upper()}: `iconv -f {encoding.upper()} -t UTF-8 {path} > NEW`"
    return f"if it is Western European text: `iconv -f CP1252 -t UTF-8 {path} > NEW`"
