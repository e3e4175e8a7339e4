"""Fixtures that every test may use: the shared data where it is at hand, no network but loopback, one thread."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

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


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """R05: a test that reaches for the network fails; loopback and Unix sockets are allowed."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and not str(address[0] if isinstance(address, tuple) else address).startswith(
            ("127.", "::1", "localhost")
        ):
            raise OSError(f"the network is closed in tests: {address!r}")
        connect(self, address)  # type: ignore[arg-type]

    socket.socket.connect = guarded  # type: ignore[assignment,method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models run faster on one thread, and workers side by side do not fight over cores."""
    import torch

    torch.set_num_threads(1)
