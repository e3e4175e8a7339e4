"""Fixtures that every test may use: the shared data where it is at hand, no network but loopback, one thread."""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable
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


CLOSED = Path(__file__).parent / "closed"


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> None:
    """R05: here and in every process that a test starts, the network is closed (closed/sitecustomize.py)."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CLOSED), *filter(None, [os.environ.get("PYTHONPATH")])])
    runpy.run_path(str(CLOSED / "sitecustomize.py"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny models run faster on one thread, workers side by side do not fight over cores, and what a test sets (a run takes all
    threads) does not reach the next, which may fork."""
    import torch

    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
