"""The only place that writes to disk.

Decisions:
- Every low-level call (open, write, fsync, rename, ...) passes through `_op`, the one seam at which tests make the disk
  fail, kill the process or record what a power cut would leave behind.
- A file is written beside its target and renamed over it (`write_atomic`); a folder is filled under a temporary name and renamed as a
  whole (`publish_dir`). A rename is atomic within one file system, and durable only after its parent folder is synced: both do that.
- What the operating system refuses becomes a `DiskError` that names the path and, for a full disk, the bytes needed and free.
- A failed fsync is a failed save: the kernel may have dropped the pages, so nothing is retried as if it were clean. A folder that was
  already published is renamed back; a file that was already renamed stays, whole, and is an error.
- A folder is replaced only as far as its maker says what belongs in it: `foreign` names what somebody else put there.
- A new folder is synced into its parent when it is made: a checkpoint is not durable in a folder that is not.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import re
import socket
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from threefold.errors import DiskError, LockedError, UsageError

Content = bytes | bytearray | memoryview | str | Callable[["Writer"], None]
StrPath = str | os.PathLike[str]
Foreign = Callable[[Path], Iterable[str]]  # what in a folder was not put there by us

_CHUNK = 8 * 2**20
_observer: Callable[..., None] | None = None
_crash_at = int(os.environ.get("THREEFOLD_CRASH_AT", "0"))
_count = 0


def _op(kind: str, path: StrPath, *details: Any) -> None:
    """Called before each low-level operation; tests install an observer that may raise, record or kill."""
    global _count
    if _crash_at:
        _count += 1
        if _count == _crash_at:
            os._exit(137)
    if _observer is not None:
        _observer(kind, str(path), *details)


@contextlib.contextmanager
def observed(observer: Callable[..., None]) -> Iterator[None]:
    """Install `observer(kind, path, *details)` for the time of a `with` block (used by the fault tests)."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


_HINTS = {
    errno.ENOSPC: "free some space or choose another place with --out",
    errno.EDQUOT: "the disk quota is used up: remove files or choose another place with --out",
    errno.EFBIG: "the file-size limit of this process is too small (see `ulimit -f`)",
    errno.EACCES: "check the permissions of the folder, or choose another place with --out",
    errno.EPERM: "check the permissions of the folder, or choose another place with --out",
    errno.EROFS: "the file system is read-only: choose another place with --out",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n`",
    errno.ENAMETOOLONG: "choose a shorter name: most file systems take at most 255 bytes for each part of a path",
    errno.EXDEV: "the folder spans two file systems: use one without mount points or symbolic links inside",
    errno.EIO: "the disk reports a hardware error: check it, and choose another place with --out",
}


def disk_error(error: OSError, path: StrPath, doing: str, needed: int | None = None) -> DiskError:
    """The `DiskError` that tells a user what the operating system refused, where, and what to do."""
    words = error.strerror or str(error)
    numbers = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(DiskError):
            numbers = f" ({free_bytes(path):,} bytes free" + (f", {needed:,} needed)" if needed is not None else ")")
    return DiskError(f"cannot {doing} `{path}`: {words.lower()}{numbers}", hint=_HINTS.get(error.errno or 0, ""))


@contextlib.contextmanager
def _reported(path: StrPath, doing: str, needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, doing, needed) from error


@contextlib.contextmanager
def _opened(path: StrPath, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


class Writer:
    """A file being written, in chunks that each pass the seam. Handed to writers: `write_atomic(path, lambda f:
    f.write(...))`. Who knows beforehand how many bytes will come says so in `needed`, for the error on a full disk."""

    def __init__(self, fd: int, path: Path, needed: int | None = None) -> None:
        self._fd, self._path, self.size, self.needed = fd, path, 0, needed

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of `data`; returns its length in bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            part = view[start:start + _CHUNK]
            while part:
                _op("write", self._path, len(part), part)
                part = part[os.write(self._fd, part):]
        self.size += len(view)
        return len(view)


def write_file(path: StrPath, content: Content, *, sync: bool = True) -> int:
    """Write a file in place, synced; returns its size. For files in a temporary folder that is published as a whole."""
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    writer = Writer(-1, path, None if callable(content) else len(content))
    try:
        _op("open", path, "new")
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as writer._fd:
            if callable(content):
                content(writer)
            else:
                writer.write(content)
            if sync:
                _op("fsync", path)
                _sync(writer._fd)
    except OSError as error:
        raise disk_error(error, path, "write", writer.needed) from error
    return writer.size


def write_atomic(path: StrPath, content: Content) -> int:
    """Write a file so that every reader, at every instant, sees the old content or the new one; returns its size.
    Where it raises, either stands: if the folder alone could not be synced, the new one, which may not outlive a power cut."""
    path = Path(path)
    temporary = _beside(path, "tmp")
    try:
        size = write_file(temporary, content)
        _rename(temporary, path)
        fsync_dir(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return size


def append_line(path: StrPath, line: str, *, sync: bool = False) -> None:
    """Append one line in one write, whole or not at all; with `sync` it and all before it are on disk when the call
    returns."""
    path = Path(path)
    data = line.encode() + b"\n"
    with _reported(path, "append to", len(data)):
        _op("open", path, "append")
        with _opened(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
            size = os.fstat(fd).st_size
            try:
                Writer(fd, path).write(data)
            except OSError:  # a full disk may have taken a part of it
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, size)
                raise
    if sync:
        sync_file(path)


def sync_file(path: StrPath) -> None:
    """Make what was written to a file durable, and its name in its folder."""
    with _reported(path, "sync"):
        _op("fsync", path)
        with _opened(path, os.O_RDONLY) as fd:
            _sync(fd)
    fsync_dir(Path(path).parent)


def truncate_file(path: StrPath, size: int) -> None:
    """Cut a file to `size` bytes, synced (used to drop the torn end of a log)."""
    with _reported(path, "truncate"):
        _op("truncate", path, size)
        with _opened(path, os.O_WRONLY) as fd:
            os.ftruncate(fd, size)
            _op("fsync", path)
            _sync(fd)


def make_dirs(path: StrPath) -> Path:
    """Make a folder and its parents, each durable; returns it as a `Path`. An existing folder is fine."""
    path = Path(path)
    with _reported(path, "make the folder"):
        missing, folder = [], path
        while not folder.is_dir() and folder != folder.parent:
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            _op("mkdir", folder)
            folder.mkdir(exist_ok=True)
            fsync_dir(folder.parent)
    return path


def temp_dir_beside(final: StrPath) -> Path:
    """Make an empty `.tmp-NAME-PID` folder beside what will be `final`, so that the rename cannot cross disks."""
    final = Path(final)
    make_dirs(final.parent)
    temporary = _beside(final, "tmp")
    if os.path.lexists(temporary):
        remove_tree(temporary)
    with _reported(temporary, "make the folder"):
        _op("mkdir", temporary)
        temporary.mkdir()
    return temporary


def publish_dir(temporary: StrPath, final: StrPath) -> None:
    """Give a finished temporary folder its name. An existing folder of that name is moved aside first, then removed; it gets its
    name back where the new one cannot be made durable, and by the next start (`clean_leftovers`) where the process died between."""
    temporary, final = Path(temporary), Path(final)
    for folder, _, _ in os.walk(temporary, topdown=False):
        fsync_dir(folder)
    aside = move_to_trash(final, "replaced") if os.path.lexists(final) else None
    try:
        _rename(temporary, final)
        fsync_dir(final.parent)
    except BaseException:
        with contextlib.suppress(DiskError):
            if not temporary.exists():
                _rename(final, temporary)
            if aside is not None:
                _rename(aside, final)
        raise
    if aside is not None:
        with contextlib.suppress(DiskError):  # it no longer counts; the next start removes it
            remove_tree(move_to_trash(aside))


@contextlib.contextmanager
def published(final: StrPath, *, foreign: Foreign | None = None) -> Iterator[Path]:
    """`with published(final) as folder:` fill `folder`; it appears as `final` if the block ends well, else it is
    removed. With `foreign`, only where `check_ours(final, foreign)` lets a folder of that name be replaced."""
    clean_leftovers(Path(final).parent, of=final)
    if foreign is not None:
        check_ours(final, foreign)
    temporary = temp_dir_beside(final)
    try:
        yield temporary
        publish_dir(temporary, final)
    except BaseException:
        with contextlib.suppress(DiskError, OSError):
            remove_tree(temporary)
        raise


def besides(*names: str) -> Foreign:
    """What a folder holds besides files of these names: a `foreign` for `published`."""
    return lambda folder: sorted(set(os.listdir(folder)) - {*names})


def check_ours(final: StrPath, foreign: Foreign) -> None:
    """Raise `UsageError` where `final` is no folder, or one in which `foreign` finds what would be lost with it."""
    with _reported(final, "use"):
        is_folder, found = os.path.isdir(final), list(foreign(Path(final))) if os.path.isdir(final) else []
    if found or (not is_folder and os.path.lexists(final)):
        named = ", ".join(f"`{name}`" for name in found[:5]) + f" and {len(found) - 5:,} more" * (len(found) > 5)
        what = f"holds {named}, which would be lost" if found else "is not a folder"
        raise UsageError(f"`{final}` exists and {what}", hint="choose another place with --out, or move it away first")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder that is gone after the `with` block."""
    path = Path(tempfile.mkdtemp(prefix="threefold-"))
    try:
        yield path
    finally:
        remove_tree(path)


def move_to_trash(path: StrPath, kind: str = "trash") -> Path:
    """Rename a folder to `.trash-NAME-PID` in one step, so that it stops counting before any of its files is gone."""
    trash = next(t for n in itertools.count() if not os.path.lexists(t := _beside(Path(path), f"{kind}{n or ''}")))
    _rename(Path(path), trash)
    return trash


def move(source: StrPath, target: StrPath) -> None:
    """Rename within a file system, durably; the target must not exist."""
    _rename(Path(source), Path(target))
    for path in (source, target):
        fsync_dir(Path(path).parent)


def remove_tree(path: StrPath) -> None:
    """Remove a file or a folder with all that is in it; symbolic links are removed, not followed."""
    path = Path(path)
    with _reported(path, "remove"):
        if path.is_symlink() or not path.is_dir():
            _op("unlink", path)
            path.unlink(missing_ok=True)
            return
        for entry in sorted(os.scandir(path), key=lambda e: e.name):
            remove_tree(entry.path)
        _op("rmdir", path)
        path.rmdir()


_LEFTOVER = re.compile(r"^\.(?:tmp|trash\d*|replaced\d*)-(.+)-(\d+)$", re.DOTALL)


def clean_leftovers(folder: StrPath, *, of: StrPath | None = None) -> list[str]:
    """Remove `.tmp-*` and `.trash-*` entries whose process is gone, and give a `.replaced-*` one its name back if nothing has it; returns
    their names. Call it under the lock. With `of`, only what was made beside that one path, in a folder where others may be at work.
    What cannot be removed is left: it takes up space and nothing else."""
    removed, name = list[str](), None if of is None else _short(Path(of))
    with _reported(folder, "list"):
        for entry in sorted(os.scandir(folder), key=lambda e: e.name) if Path(folder).is_dir() else []:
            match = _LEFTOVER.match(entry.name)
            if not match or (name is not None and match[1] != name):
                continue
            if int(match[2]) == os.getpid() or not _alive(int(match[2])):
                with contextlib.suppress(DiskError):
                    final = Path(folder, match[1]) if of is None else Path(of)
                    if entry.name.startswith(".replaced") and not os.path.lexists(final):
                        move(entry.path, final)
                    else:
                        remove_tree(entry.path)
                    removed.append(entry.name)
    return removed


def fsync_dir(path: StrPath) -> None:
    """Make the entries of a folder durable (renames and new files are lost in a power cut without it)."""
    with _reported(path, "sync the folder"):
        _op("fsync_dir", path)
        with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
            try:
                _sync(fd)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems sync no folders
                    raise


def sha256(path: StrPath) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with _reported(path, "read"), open(path, "rb", buffering=0) as file:
        buffer = bytearray(2**20)
        while n := file.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
    return digest.hexdigest()


def free_bytes(path: StrPath) -> int:
    """Bytes that this user can still write on the file system of `path` (or of its nearest existing parent)."""
    path = Path(path).absolute()
    with _reported(path, "ask for the free space of"):
        while not path.exists():
            path = path.parent
        status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def is_regular(path: StrPath) -> bool:
    """Whether `path` is a plain file and not a link, a folder or a device."""
    with contextlib.suppress(OSError):
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


@contextlib.contextmanager
def lock(folder: StrPath, *, steal: bool = False) -> Iterator[None]:
    """Hold `folder/.lock` for this process; a second holder gets a `LockedError` that names the first.

    The lock itself is `flock`, which the kernel frees when the process dies, however it dies. The pid and host in the
    file are words for people, but for one case: `flock` may not reach across machines, so a lock that names another
    host is refused unless `steal`.
    """
    path = make_dirs(folder) / ".lock"
    with _reported(path, "lock"):
        _op("open", path, "lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with _reported(path, "lock"):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                pid, host = _holder(fd) or ("?", "?")
                raise LockedError(f"`{folder}` is in use: lock held by pid {pid} on host {host}",
                                  hint="wait for it to end, or stop it; the lock goes with its process") from error
            pid, host = _holder(fd) or ("", socket.gethostname())
            if host != socket.gethostname() and not steal:
                raise LockedError(f"`{folder}` is in use: lock held by pid {pid} on host {host}, another machine",
                                  hint="if that process is gone for certain, take the lock over with --steal-lock")
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _holder(fd: int) -> tuple[str, str] | None:
    words = os.pread(fd, 300, 0).decode(errors="replace").split()
    return (words[0], words[1]) if len(words) == 2 else None


def _beside(path: Path, kind: str) -> Path:
    """A hidden name in the same folder that says what it is and whose; names are limited in bytes, not characters."""
    return path.with_name(f".{kind}-{_short(path)}-{os.getpid()}")


def _short(path: Path) -> str:
    return os.fsencode(path.name)[:200].decode(errors="ignore")


def _sync(fd: int) -> None:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's own cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def _rename(source: Path, target: Path) -> None:
    with _reported(target, "rename to"):
        _op("rename", source, str(target))
        os.rename(source, target)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True
