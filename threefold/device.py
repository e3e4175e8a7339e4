"""Device, dtype and threads; what this machine has and what it measures.

Decisions:
- torch is imported inside the functions: `import threefold.device` costs nothing.
- bfloat16 is used on a CPU only where a measured product is faster than in float32: without the instructions for it, it
  is slower by an order of magnitude, and no table of processors stays complete.
- One thread for each physical core this process may use (affinity and container quotas counted): two threads on one
  core slow matrix products down.
- Measurements are short and kept for the life of the process. What is chosen from them is for the caller to log.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from threefold.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float64", "float16")
BF16_GAIN = 1.2  # bfloat16 must be faster by this factor, or its coarser numbers are not worth it
_GIB = 2**30
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def pick_device(name: str = "auto", *, note: Callable[[str], None] | None = None) -> torch.device:
    """The device to compute on: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.

    `auto` takes CUDA, then Apple's MPS, then the CPU; `note` is told when an accelerator was passed over and why. A
    device that was asked for by name and is not there is a `UsageError`.
    """
    import torch

    kind, _, index = name.partition(":")
    if name == "auto":
        kind = next((k for k in ("cuda", "mps") if _missing(k) == ""), "cpu")
        if kind == "cpu" and note is not None and torch.version.cuda:
            note(f"computing on the CPU: {_missing('cuda')}")
        return torch.device(kind)
    if kind not in ("cpu", "cuda", "mps") or name.endswith(":") or (index and not index.isdecimal()):
        raise UsageError(f"unknown device `{name}`", hint=did_you_mean(kind, ("auto", "cpu", "cuda", "mps")))
    if why := _missing(kind):
        raise UsageError(f"device `{name}` cannot be used: {why}", hint="leave the device out; see `threefold doctor`")
    if index and kind == "cuda" and int(index) >= torch.cuda.device_count():
        raise UsageError(f"device `{name}` does not exist: there are {torch.cuda.device_count()} CUDA devices, from 0")
    return torch.device(name)


def _missing(kind: str) -> str:
    """Why a kind of device cannot be used, or nothing."""
    import torch

    if kind == "cuda":
        if not torch.version.cuda and not getattr(torch.version, "hip", None):
            return f"PyTorch {torch.__version__} is built without CUDA"
        return "" if torch.cuda.is_available() else "PyTorch finds no CUDA device or no working driver"
    if kind == "mps":
        return "" if torch.backends.mps.is_available() else "PyTorch finds no MPS device"
    return ""


class DtypeChoice(NamedTuple):
    """What is computed in, and why; the reason goes into the log."""

    dtype: torch.dtype
    why: str


def pick_dtype(name: str = "auto", device: torch.device | str = "cpu") -> DtypeChoice:
    """The dtype to compute in. `auto` is bfloat16 where the device is faster with it, else float32."""
    import torch

    if name != "auto":
        if name not in DTYPES:
            raise UsageError(f"unknown dtype `{name}`", hint=did_you_mean(name, ("auto", *DTYPES)))
        return DtypeChoice(getattr(torch, name), "asked for")
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice(torch.bfloat16, "the CUDA device computes in bfloat16")
        return DtypeChoice(torch.float32, "the CUDA device has no bfloat16")
    if kind != "cpu":
        return DtypeChoice(torch.float32, f"float32 is the safe choice on {kind}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one alone: threads that wait for each other measure what else the machine is doing
    try:
        full, half = measure_matmul("float32"), measure_matmul("bfloat16")
    finally:
        torch.set_num_threads(threads)
    words = f"measured {half:.0f} GFLOP/s in bfloat16, {full:.0f} in float32, on one thread"
    return DtypeChoice(torch.bfloat16 if half > BF16_GAIN * full else torch.float32, words)


def measure_matmul(dtype: str = "float32", device: str = "cpu", *, seconds: float = 0.025) -> float:
    """GFLOP/s of a matrix product, measured within `seconds` or a little more and kept for each number of threads."""
    import torch

    return _measure_matmul(dtype, device, torch.get_num_threads(), seconds)


@functools.cache
def _measure_matmul(dtype: str, device: str, threads: int, seconds: float) -> float:
    import torch

    size, best = 128, 0.0
    with torch.inference_mode():
        a = torch.full((size, size), 0.5, dtype=getattr(torch, dtype), device=device)
        _timed(functools.partial(torch.mm, a, a), device)  # the first product of a process sets up threads and kernels
        start = time.perf_counter()
        while (left := seconds - (time.perf_counter() - start)) > 0 or best == 0:
            took = min(_timed(functools.partial(torch.mm, a, a), device) for _ in range(2))
            best = max(best, 2e-9 * size**3 / took)
            if 24 * took < left and size < 8192:  # a larger product still fits: slow dtypes stay cheap
                size *= 2
                a = torch.full((size, size), 0.5, dtype=a.dtype, device=device)
    return best


def _timed(call: Callable[[], object], device: str) -> float:
    import torch

    module = {"cuda": torch.cuda, "mps": torch.mps}.get(device.partition(":")[0])
    if module is not None:
        module.synchronize()
    start = time.perf_counter()
    call()
    if module is not None:
        module.synchronize()
    return max(time.perf_counter() - start, 1e-7)


def memory_read_speed(megabytes: int = 256, *, seconds: float = 0.1) -> float:
    """GB/s at which the CPU reads memory with the current threads (a sum over more than its caches hold)."""
    import torch

    megabytes = max(16, min(megabytes, available_memory() // 8 // 2**20))
    data = torch.ones(megabytes * 2**18, dtype=torch.float32)
    best, start = 0.0, time.perf_counter()
    while best == 0 or time.perf_counter() - start < seconds:
        best = max(best, data.nbytes / _timed(data.sum, "cpu") / 1e9)
    return best


def physical_cores() -> int:
    """Physical cores that this process may use: its affinity and a container's quota counted, hyper-threads not."""
    usable: set[int] | None = None
    if hasattr(os, "sched_getaffinity"):
        usable = os.sched_getaffinity(0)
    logical = len(usable) if usable else os.cpu_count() or 1
    cores = set()
    for cpu in usable or ():
        with contextlib.suppress(OSError):
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
            cores.add((topology / "physical_package_id").read_text() + (topology / "core_id").read_text())
    count = len(cores) or logical
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return max(1, count)


def set_threads(count: int = 0) -> int:
    """Use `count` threads for an operation (0: OMP_NUM_THREADS where set, else the physical cores); returns them."""
    import torch

    if count <= 0:
        given = os.environ.get("OMP_NUM_THREADS", "")
        count = int(given) if given.isdigit() and int(given) > 0 else physical_cores()
    torch.set_num_threads(count)
    return torch.get_num_threads()


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what is freed instead of giving it back to the system; False where it is another one.

    A training step asks for the same large buffers as the step before. Given back and mapped anew, every page of them is
    faulted in and zeroed again, which takes a tenth of the step of a small model, or more.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: the most this process has held, on the CPU (resident) or on a CUDA device (allocated by torch)."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that can still be taken: free and reclaimable, within the container's and the process's limits."""
    if str(device).startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limits.append(soft - used)
    return max(0, min(limits))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a log must say about where it was made, so that its times and its last digits can be understood."""

    python: str
    system: str
    pytorch: str
    build: str  # cpu, cuda 12.8, rocm 6.2
    device: str  # cpu, cuda, mps
    device_name: str
    cpu: str
    cores: int  # physical, usable
    threads: int  # of one operation
    memory_gib: float  # of the machine

    @classmethod
    def here(cls, device: torch.device | str = "cpu") -> Machine:
        """This machine, with the device and the number of threads in use now."""
        import torch

        return cls(python=platform.python_version(), system=f"{platform.system()} {platform.machine()}",
                   pytorch=torch.__version__, build=torch_build(), device=torch.device(device).type, device_name=name_of(device),
                   cpu=cpu_name(), cores=physical_cores(), threads=torch.get_num_threads(),
                   memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB, 1))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the log."""
        return asdict(self)


def name_of(device: torch.device | str) -> str:
    """The name that a GPU or the processor gives itself; `mps` for Apple's."""
    import torch

    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else cpu_name() if kind == "cpu" else kind


def torch_build() -> str:
    """Which PyTorch this is: `cpu`, `cuda 12.8` or `rocm 6.2`."""
    import torch

    hip = getattr(torch.version, "hip", None)
    return f"rocm {hip}" if hip else f"cuda {torch.version.cuda}" if torch.version.cuda else "cpu"


@functools.cache
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in any of the ways in which torch says it."""
    import torch

    words = str(error)
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "allocate memory" in words
        or "out of memory" in words
        or "_ALLOC_FAILED" in words  # cuBLAS, whose handle found no room
    )
