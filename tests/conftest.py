"""Fixtures that every test may use: the shared data where it is at hand, no network but loopback, one thread."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DATA = Path(os.environ.get("THREEFOLD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("shakespeare/input.txt")` -> the path, or a skip that says what is missing."""
    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"needs shared data: `{name}` is not in `{DATA}` (set THREEFOLD_DATA)")
        return path
    return find


LOOPBACK = ("127.", "::1", "localhost")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """R05: a test that reaches for the network fails, by name or by address; loopback and Unix sockets are allowed."""
    def check(host: object) -> None:
        if host and not str(host).startswith(LOOPBACK):
            raise OSError(f"the network is closed in tests: {host!r}")

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: socket.socket, *arguments: Any) -> Any:
            if self.family != socket.AF_UNIX:
                check(arguments[-1][0])
            return method(self, *arguments)
        return call

    lookup = socket.getaddrinfo

    def look_up(host: Any, *arguments: Any, **keywords: Any) -> Any:
        check(host.decode() if isinstance(host, bytes) else host)
        return lookup(host, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", look_up)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models run faster on one thread, and workers side by side do not fight over cores."""
    import torch

    torch.set_num_threads(1)
