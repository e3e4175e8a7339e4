"""The doctor: what it finds, and that it says what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from threefold import console, device, doctor
from threefold.errors import NumericError


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "measure_matmul", lambda dtype, kind="cpu", seconds=0.1: 100.0)
    monkeypatch.setattr(device, "memory_read_speed", lambda: 20.0)


def test_a_healthy_machine(tmp_path: Path) -> None:
    report = doctor.diagnose(lambda: "loss 5.2 -> 3.1", folder=tmp_path)
    assert report["matmul_gflops"] == {"float32": 100.0, "bfloat16": 100.0}
    assert report["self_test"]["ok"] and report["disk"]["fsync_ms"] > 0
    assert report["packages"]["torch"] and set(report["extras"]) == {"data", "remote", "evaluate", "dev"}
    assert list(tmp_path.iterdir()) == []
    words = doctor.render(report)
    assert "self-test" in words and "loss 5.2 -> 3.1" in words
    assert "\n" not in console.to_json(report)


def test_a_self_test_that_fails_is_a_problem_with_a_hint(tmp_path: Path) -> None:
    def broken() -> str:
        raise NumericError("loss is nan", hint="try float32")

    report = doctor.diagnose(broken, folder=tmp_path)
    assert not report["self_test"]["ok"]
    assert {"problem": "the self-test failed: NumericError: loss is nan", "hint": "try float32"} in report["problems"]
    assert "problem: the self-test failed" in doctor.render(report)


def test_a_cuda_build_without_a_device_names_the_cpu_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "torch_build", lambda: "cuda 12.8")
    monkeypatch.setattr(device, "pick_device", lambda: __import__("torch").device("cpu"))
    report = doctor.diagnose(folder=tmp_path)
    assert any("cuda 12.8" in p["problem"] and doctor.CPU_WHEELS in p["hint"] for p in report["problems"])


def test_R06_what_is_missing_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "absent-package"))
    monkeypatch.setattr(doctor, "EXTRAS", {"data": ("absent_module",), "dev": ("pytest",)})
    report = doctor.diagnose(folder=tmp_path)
    assert report["extras"] == {"data": ["absent_module"], "dev": []}
    assert report["problems"][0] == {"problem": "the package `absent-package` is missing",
                                     "hint": "pip install -U threefold"}
    assert "data: without absent_module, dev: installed" in doctor.render(report)


def test_a_disk_that_is_full_or_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from threefold import files
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)

    def refuse(kind: str, path: str, *details: object) -> None:
        raise OSError(30, "Read-only file system")

    with files.observed(refuse):
        report = doctor.diagnose(folder=tmp_path)
    assert report["disk"]["fsync_ms"] is None
    problems = " ".join(p["problem"] for p in report["problems"])
    assert "only 1.0 kB are free" in problems and "read-only file system" in problems
    assert "not writable" in doctor.render(report)


def test_the_self_test_trains() -> None:
    assert "trained a small model" in doctor.self_test()
