"""Is this machine ready, and how fast is it.

Decisions:
- Everything is measured or read here and now; nothing is looked up in a table of machines.
- A finding that a user should act on is a problem with a hint; what is merely good to know is a value.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from threefold import __version__, console, device, files
from threefold.errors import NumericError, ThreefoldError

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "sentencepiece", "typer",
            "rich", "jaxtyping", "tomli_w")
EXTRAS = {"data": ("pyarrow", "zstandard", "datasets"), "remote": ("openai", "anthropic"), "evaluate": ("sacrebleu",),
          "dev": ("pytest", "xdist", "hypothesis", "ruff", "mypy", "transformers")}
_SMALL_DISK = 2 * 10**9
_SLOW_SYNC = 0.2


def diagnose(self_test: Callable[[], str] | None = None, *, folder: str | Path = ".") -> dict[str, Any]:
    """What this machine has and measures, with `problems` [{"problem", "hint"}] to act on.

    `folder` is where runs would be written. `self_test` trains something small for some seconds and returns a line
    about it; what it raises becomes a problem.
    """
    problems: list[dict[str, str]] = []

    def trouble(problem: str, hint: str) -> None:
        problems.append({"problem": problem, "hint": hint})

    packages = {name: _version(name) for name in PACKAGES}
    for name, version in packages.items():
        if version is None:
            trouble(f"the package `{name}` is missing", "pip install -U threefold")
    chosen = device.pick_device()
    machine = device.Machine.here(chosen)
    if machine.build != "cpu" and chosen.type == "cpu":
        trouble(f"PyTorch is built for {machine.build}, and no such device works here",
                f"check the driver; on a machine without one: pip install torch --index-url {CPU_WHEELS}")
    matmul = {name: round(device.measure_matmul(name, chosen.type, seconds=0.3), 1) for name in ("float32", "bfloat16")}
    dtype, why = device.pick_dtype("auto", chosen)
    disk = _disk(Path(folder), trouble)
    report: dict[str, Any] = {
        "threefold": __version__, **machine.as_dict(), "available_gib": round(device.available_memory() / 2**30, 1),
        "matmul_gflops": matmul, "memory_gbs": round(device.memory_read_speed(), 1),
        "dtype": str(dtype).removeprefix("torch."), "dtype_reason": why, "disk": disk, "packages": packages,
        "extras": {extra: [name for name in names if importlib.util.find_spec(name) is None]
                   for extra, names in EXTRAS.items()},
        "hub": {"cache": _hub_cache(), "offline": os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")},
    }
    if self_test is not None:
        report["self_test"] = _run(self_test, trouble)
    report["problems"] = problems
    return report


def render(report: dict[str, Any]) -> str:
    """The report in words: a line for each finding, then the problems with their hints."""
    matmul, disk = report["matmul_gflops"], report["disk"]
    sync = "not writable" if disk["fsync_ms"] is None else f"a synced write takes {disk['fsync_ms']:.1f} ms"
    lines = {
        "threefold": report["threefold"],
        "python": f"{report['python']} on {report['system']}",
        "pytorch": f"{report['pytorch']}, built for {report['build']}",
        "device": f"{report['device']} ({report['device_name']}), {report['cores']} cores, {report['threads']} threads",
        "memory": f"{report['memory_gib']} GiB, {report['available_gib']} free, read at {report['memory_gbs']} GB/s",
        "matmul": ", ".join(f"{speed:,.0f} GFLOP/s in {dtype}" for dtype, speed in matmul.items()),
        "dtype": f"computes in {report['dtype']}",
        "disk": f"{console.size_words(disk['free_bytes'])} free in `{disk['folder']}`, {sync}",
        "packages": ", ".join(f"{name} {version or 'missing'}" for name, version in report["packages"].items()),
        "extras": ", ".join(f"{extra}: " + ("installed" if not missing else f"without {' '.join(missing)}")
                            for extra, missing in report["extras"].items()),
        "hub": f"cache in `{report['hub']['cache']}`" + (", offline" if report["hub"]["offline"] else ""),
    }
    if "self_test" in report:
        test = report["self_test"]
        lines["self-test"] = f"{'passed' if test['ok'] else 'failed'} in {test['seconds']:.1f} s: {test['words']}"
    width = max(map(len, lines))
    text = [f"{name.ljust(width)}  {words}" for name, words in lines.items()]
    for found in report["problems"]:
        text += [f"problem: {found['problem']}", f"hint: {found['hint']}"]
    return "\n".join(text if report["problems"] else [*text, "no problems found"])


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _disk(folder: Path, trouble: Callable[[str, str], None]) -> dict[str, Any]:
    """Free bytes, and the time of one small synced write (the least a checkpoint costs)."""
    free = files.free_bytes(folder)
    if free < _SMALL_DISK:
        trouble(f"only {console.size_words(free)} are free in `{folder.absolute()}`",
                "free some space, or choose another place with --out")
    took = None
    try:
        with contextlib.ExitStack() as stack:
            probe = files.temp_dir_beside(folder.absolute() / "doctor")
            stack.callback(files.remove_tree, probe)
            start = time.perf_counter()
            files.write_file(probe / "probe", b"x" * 4096)
            took = time.perf_counter() - start
    except ThreefoldError as error:
        trouble(str(error), error.hint or "choose another place with --out")
    if took is not None and took > _SLOW_SYNC:
        trouble(f"a synced write takes {1000 * took:.0f} ms in `{folder.absolute()}`", "keep runs on a local disk")
    return {"folder": str(folder.absolute()), "free_bytes": free,
            "fsync_ms": None if took is None else round(1000 * took, 2)}


def _run(self_test: Callable[[], str], trouble: Callable[[str, str], None]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        ok, words = True, self_test()
    except Exception as error:  # whatever it is, the report must say it
        ok, words = False, f"{type(error).__name__}: {error}"
        hint = getattr(error, "hint", "") or "run with --debug and report what it shows"
        trouble(f"the self-test failed: {words}", hint)
    return {"ok": ok, "words": words, "seconds": round(time.perf_counter() - start, 2)}


def self_test() -> str:
    """Train a very small model on a page of text for some seconds, from text to export; returns a line about it."""
    from threefold.config import Recipe
    from threefold.pretrain import Request, pretrain

    text = "".join(
        f"{n} bottles of water on the wall, take one down, {n - 1} bottles of water on the wall.\n"
        for n in range(400, 0, -1)
    )
    with files.scratch() as folder:
        files.write_file(folder / "text.txt", text)
        recipe = Recipe().override(
            {
                "data.paths": (str(folder / "text.txt"),),
                "tokenizer.kind_or_path": "char",
                "model.size": "nano",
                "model.context": 64,
                "train.steps": 60,
                "train.eval_every": 60,
            }
        )
        started = time.monotonic()
        result = pretrain(recipe, Request(out=folder / "run"))
        seconds = time.monotonic() - started
    if not result["loss"] < 2.0:
        raise NumericError(
            f"the self-test ended at a loss of {result['loss']:.3f} after 60 steps, expected less than 2",
            hint="the numbers of this machine or build cannot be trusted: compare with another PyTorch version",
        )
    return f"trained a small model from text to export in {seconds:.1f} s, loss {result['loss']:.3f}"
