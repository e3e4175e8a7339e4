"""From process start to the end of the first training step: `threefold pretrain` against transformers' Trainer.

    python -m benchmarks.startup          needs accelerate, which Trainer needs

Tiny Shakespeare as characters, 0.8M parameters, 12 rows of 64, no compiling. Decisions:
- The peer's model is built from the config.json that threefold wrote, so the shape is the same; its settings are in
  peer_trainer.py.
- Both sides append a line to a log when a step has ended, and a watcher outside sees it: one clock, one way of looking.
- Both are stopped after that line. What a run does at its end is not measured here.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import (
    ENVIRONMENT,
    ROOT,
    THREEFOLD,
    BenchmarkError,
    Findings,
    Measure,
    Result,
    Row,
    as_fraction,
    main,
    rounds,
    say,
    timed,
    work_folder,
)
from benchmarks.texts import Absent, text_file

SIZE, CONTEXT, ROWS, STEPS = "800k", 64, 12, 200
MUST, AIM = "1/2", "1/4"
LOOK_EVERY = 0.002  # seconds
PATIENCE = 300.0


def run(options: argparse.Namespace) -> Findings:
    """Both in turns, after a whole short run of threefold that gives the shape and a first run of the peer."""
    if importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("transformers") is None:
        raise Absent("the peer needs transformers and accelerate: pip install -c constraints.txt transformers accelerate")
    with work_folder() as folder:
        data = text_file("shakespeare", folder, quick=options.quick)
        shape = folder / "shape"
        ours: list[str | Path] = [
            *THREEFOLD,
            "pretrain",
            "--data",
            data,
            "--tokenizer",
            "char",
            "--size",
            SIZE,
            "--context",
            str(CONTEXT),
            "--batch-tokens",
            str(CONTEXT * ROWS),
        ]
        timed([*ours, "--steps", "2", "--out", shape])
        config = json.loads((shape / "model" / "config.json").read_text(encoding="utf-8"))
        peer: list[str | Path] = [
            sys.executable,
            "-m",
            "benchmarks.peer_trainer",
            "--data",
            data,
            "--config",
            shape / "model",
            "--rows",
            str(ROWS),
            "--steps",
            str(STEPS),
        ]
        sides = {"transformers": peer, "threefold": [*ours, "--steps", str(STEPS)]}
        to_first_step(peer, folder / "warm")
        measurements = []
        for repetition, side in rounds(options.repeats, list(sides)):
            seconds = to_first_step(sides[side], folder / f"{side}-{repetition}")
            measurements.append({"side": side, "repetition": repetition, "seconds": seconds})
            say(f"  {repetition + 1}/{options.repeats} {side}: {seconds:.2f} s")
    return Findings(
        name="startup",
        settings={"shape": config, "rows": ROWS, "context": CONTEXT, "peer": "see peer_trainer.py"},
        measurements=measurements,
    )


def to_first_step(command: Sequence[str | Path], out: Path) -> float:
    """Seconds from before the process starts until its log has the line of a step; the process is stopped then."""
    log, talk = out / "log.jsonl", out.with_suffix(".err")
    with open(talk, "wb") as stderr:
        start = time.monotonic()
        process = subprocess.Popen(
            [*map(str, command), "--out", str(out)],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            while not has_step(log):
                if process.poll() is not None or time.monotonic() - start > PATIENCE:
                    words = talk.read_text(encoding="utf-8", errors="replace")[-4000:]
                    raise BenchmarkError(f"`{' '.join(map(str, command))}` came to no first step:\n{words}")
                time.sleep(LOOK_EVERY)
            return time.monotonic() - start
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            shutil.rmtree(out, ignore_errors=True)


def has_step(log: Path) -> bool:
    """Whether a whole line of the log tells of a step (and not of an event)."""
    try:
        lines = log.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return False
    return any(b'"step"' in line and b'"event"' not in line for line in lines)


def rows(result: Result) -> list[Row]:
    """One line."""
    ours, peer = result.spread("seconds", side="threefold"), result.spread("seconds", side="transformers")
    ratio = ours.median / peer.median
    return [
        Row(
            measure="process start to the first training step, 0.8M parameters",
            peer=f"transformers Trainer: {peer.words('s')}",
            threefold=ours.words("s"),
            compared=as_fraction(ratio),
            value=ratio,
            must=0.5,
            aim=0.25,
            limits=(MUST, AIM),
        )
    ]


MEASURE = Measure(
    name="startup",
    summary="process start to the first training step, against transformers' Trainer",
    repeats=5,
    run=run,
    rows=rows,
)

if __name__ == "__main__":
    sys.exit(main(MEASURE))
