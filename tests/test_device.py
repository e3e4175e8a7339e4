"""Device, dtype, threads and what is measured."""

from __future__ import annotations

import json
import platform
import resource
import time

import pytest
import torch

from threefold import device
from threefold.errors import UsageError


def test_the_device_is_the_one_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    chosen = device.pick_device(note=notes.append)
    here = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert chosen.type == here
    assert device.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(device, "_missing", {"cuda": "no driver", "mps": "none", "cpu": ""}.get)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert device.pick_device(note=notes.append) == torch.device("cpu")
    assert notes[-1] == "computing on the CPU: no driver"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cudaa", "", "cpu:", "meta"])
def test_unknown_devices_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown device `{name}`"):
        device.pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_asked_for_and_absent_is_an_error() -> None:
    with pytest.raises(UsageError, match="device `cuda` cannot be used") as caught:
        device.pick_device("cuda")
    assert "threefold doctor" in caught.value.hint


@pytest.mark.parametrize(("full", "half", "dtype"), [(100.0, 300.0, torch.bfloat16), (100.0, 110.0, torch.float32),
                                                     (100.0, 5.0, torch.float32)])
def test_bfloat16_on_a_cpu_only_where_it_is_faster(full: float, half: float, dtype: torch.dtype,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "measure_matmul", lambda name: {"float32": full, "bfloat16": half}[name])
    choice = device.pick_dtype("auto", "cpu")
    assert choice.dtype == dtype
    assert choice.why == f"measured {half:.0f} GFLOP/s in bfloat16, {full:.0f} in float32, on one thread"


def test_a_dtype_by_name() -> None:
    assert device.pick_dtype("float64").dtype == torch.float64
    with pytest.raises(UsageError, match="unknown dtype `bf16`"):
        device.pick_dtype("bf16")


def test_measurements_are_short_and_kept() -> None:
    device._measure_matmul.cache_clear()
    for dtype in ("float32", "bfloat16"):
        speed = device.measure_matmul(dtype, seconds=0.005)
        assert 0.01 < speed < 1e6
        start = time.perf_counter()
        assert device.measure_matmul(dtype, seconds=0.005) == speed
        assert time.perf_counter() - start < 0.005
    assert 0.1 < device.memory_read_speed(16, seconds=0.001) < 1e5


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert device.set_threads(2) == 2 == torch.get_num_threads()
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert device.set_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
        assert device.set_threads() == device.physical_cores() >= 1
    finally:
        torch.set_num_threads(before)


def test_memory_is_counted_in_bytes() -> None:
    assert 2**20 < device.available_memory() < 2**50
    before = device.peak_memory()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert before <= device.peak_memory() < 2**50
    assert device.peak_memory() > 64 * 2**20


def test_R01_a_limit_on_the_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1000, 1000))
    assert device.available_memory() == 0


def test_the_machine_in_a_log() -> None:
    machine = device.Machine.here()
    record = json.loads(json.dumps(machine.as_dict()))
    assert record["pytorch"] == torch.__version__
    assert record["build"] in ("cpu",) or record["build"].startswith(("cuda ", "rocm "))
    assert record["threads"] == torch.get_num_threads()
    assert record["device"] == "cpu" and record["device_name"] and record["memory_gib"] > 0


def test_freed_memory_is_kept_where_the_allocator_is_glibcs() -> None:
    assert device.keep_freed_memory() is (platform.libc_ver()[0] == "glibc")
