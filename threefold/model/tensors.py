"""safetensors files in and out, believed only after they were checked.

Decisions:
- Files that can carry code (pickles, the zip files of torch.save) are known by their first bytes and refused unread.
- A header is believed only after every number in it has been checked against the file: lengths, shapes, offsets
  without gap or overlap and nothing behind the last tensor. Then tensors are views of the mapped file; nothing is read
  twice.
- Writing streams tensor by tensor: no second copy of the model exists at any time.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threefold import files
from threefold.errors import DamagedData, ModelError, UsageError
from threefold.strict_json import parse_json

StrPath = str | os.PathLike[str]

HEADER_LIMIT = 16 * 2**20  # bytes; a header of 100,000 tensors takes about 10 MB
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
CONVERT = "convert it to safetensors where running its code does no harm (a container), for instance with transformers' `save_pretrained`"


def read_safetensors(path: StrPath) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, as views of the mapped file: they must not be written to.

    Raises `ModelError` for other formats, `DamagedData` for a file that contradicts itself. Format: https://github.com/huggingface/safetensors
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(8)
            entries, start = _header(path, file.read, head, size)
            view = memoryview(b"") if size == start else memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as problem:
        raise ModelError(f"cannot read `{path}`: {(problem.strerror or str(problem)).lower()}") from problem
    return {name: _tensor(view, start, entry) for name, entry in entries.items()}


Entry = tuple[torch.dtype, list[int], int, int]


def _header(path: Path, read: Callable[[int], bytes], head: bytes, size: int) -> tuple[dict[str, Entry], int]:
    """The checked entries and the place where data begins."""
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
    if length is None or length > size - 8 or length > HEADER_LIMIT:
        _refuse_code(path, head)
        if length is None:
            raise DamagedData(f"`{path}` has {size} bytes and no header")
        limit = min(size - 8, HEADER_LIMIT)
        raise DamagedData(f"`{path}` announces a header of {length:,} bytes, possible are at most {limit:,}")
    text = read(length)
    if not text.startswith(b"{"):
        _refuse_code(path, head)
        raise DamagedData(f"the header of `{path}` does not begin with an object")
    raw = parse_json(text, f"{path} (header)", error=DamagedData)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedData(f"the metadata of `{path}` holds something that is no text")
    room = size - 8 - length
    entries = {name: _entry(path, name, entry, room) for name, entry in raw.items()}
    place = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: (item[1][2], item[1][3])):
        if begin != place:
            raise DamagedData(
                f"tensor `{name[:100]}` of `{path}` begins at byte {begin}, expected is {place}: tensors overlap or leave a gap"
            )
        place = end
    if place != room:
        raise DamagedData(f"`{path}` has {room:,} bytes of data and its header speaks of {place:,}")
    return entries, 8 + length


def _entry(path: Path, name: str, entry: Any, room: int) -> Entry:
    where = f"tensor `{name[:100]}` of `{path}`"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise DamagedData(f"{where} is not described by `dtype`, `shape` and `data_offsets`")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ModelError(f"{where} has the dtype {str(dtype)[:40]!r}, understood are {', '.join(_DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 16:
        raise DamagedData(f"{where} has a shape or offsets that are no whole numbers >= 0")
    begin, end = offsets
    numbers = math.prod(shape)  # Python's integers do not overflow
    if not begin <= end <= room or numbers * _DTYPES[dtype].itemsize != end - begin:
        raise DamagedData(
            f"{where} has the shape {shape} of {dtype} at bytes {begin} to {end} of {room}, which does not fit"
        )
    return _DTYPES[dtype], shape, begin, end


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)


def _tensor(view: memoryview, start: int, entry: Entry) -> Tensor:
    dtype, shape, begin, end = entry
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    part = view[start + begin:start + end]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        if (start + begin) % dtype.itemsize == 0:
            return torch.frombuffer(part, dtype=dtype).view(shape)
        return torch.frombuffer(bytearray(part), dtype=dtype).view(shape)


def _refuse_code(path: Path, head: bytes) -> None:
    """Raise `ModelError` for the first bytes of formats that can run code or that are not accepted."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        raise ModelError(
            f"`{path}` is a zip file (PyTorch's or NumPy's), which may carry code and is not read", hint=CONVERT
        )
    if len(head) > 1 and head[0] == 0x80 and head[1] <= 5:
        raise ModelError(f"`{path}` is a pickle, which runs code when it is read; it was not read", hint=CONVERT)
    if head.startswith(b"GGUF"):
        raise ModelError(f"`{path}` is a GGUF file, not safetensors")


def write_safetensors(path: StrPath, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write tensors by name, synced, each made contiguous only while it is written; returns the size in bytes."""
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_planned(path, plan, lambda name: tensors[name], metadata)


def write_planned(
    path: StrPath,
    plan: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None,
    write: Callable[[StrPath, files.Content], int] = files.write_file,
) -> int:
    """Write the planned tensors, each asked for from `make` when its turn comes. Larger items first, as alignment
    wants it."""
    order = sorted(plan, key=lambda name: (-plan[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        dtype, shape = plan[name]
        end = place + math.prod(shape) * dtype.itemsize
        if dtype not in _NAMES:
            raise UsageError(f"tensor `{name}` has the dtype {dtype}, which safetensors does not store")
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def content(file: files.Writer) -> None:
        file.needed = 8 + len(text) + place
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            tensor = make(name).detach()
            assert (tensor.dtype, tuple(tensor.shape)) == plan[name], name
            if tensor.numel():
                file.write(tensor.to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data)

    return write(path, content)
