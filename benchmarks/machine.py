"""What this machine is and what it can do: the controls that stand at the head of every result.

    python -m benchmarks.machine

Decisions:
- Medians of 10 matrix products in float32 and bfloat16 and of 10 reads of 256 MiB, after three that are not counted, so
  that a figure measured elsewhere can be held against them.
- The load of the machine before the run is noted: a figure from a busy machine should look like one.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "peft", "trl")


def facts() -> dict[str, Any]:
    """Processor, cores, threads, memory, system."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def versions() -> dict[str, Any]:
    """Python, threefold (with the commit it is at), and what the peers are made of."""
    from threefold import __version__

    found: dict[str, Any] = {"python": platform.python_version(), "threefold": __version__, "commit": _commit()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def controls(*, quick: bool = False) -> dict[str, Any]:
    """Matrix products in GFLOP/s by dtype and size, memory reads in GB/s."""
    import torch

    sizes = (256,) if quick else (1024, 2048, 4096)
    found: dict[str, Any] = {}
    for name in ("float32", "bfloat16"):
        speeds = {}
        for size in sizes:
            a, b = (torch.randn(size, size).to(getattr(torch, name)) for _ in range(2))
            speeds[str(size)] = round(2e-9 * size**3 / _median_seconds(lambda a=a, b=b: torch.mm(a, b)), 1)  # type: ignore[misc]
        found[f"matmul_{name}_gflops"] = speeds
    data = torch.randn((4 if quick else 64) * 2**20)
    found["memory_read_gbs"] = round(1e-9 * data.nbytes / _median_seconds(data.sum), 1)
    return found


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _median_seconds(call: Callable[[], object], count: int = 10) -> float:
    for _ in range(3):
        call()
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return max(statistics.median(taken), 1e-9)


def _cpu_name() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _commit() -> str | None:
    """The commit of this checkout, with `+` where files differ from it; None outside of one."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", "../threefold") else "")
    return None


def main() -> None:
    """Print the head that the results carry."""
    from benchmarks.table import head

    print(head(facts(), controls(), versions()))


if __name__ == "__main__":
    main()
