"""Foundation models that cells share: one `threefold pretrain` for each text, set of flags and seed, kept in `.benchmarks/`.

Decisions:
- What several cells start from is trained once: its seconds count in each of them, and the commit that trained it is stored with them.
- A foundation is taken again as long as its folder stands, also by newer code; `rm -r .benchmarks/foundations` forgets them all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import machine
from benchmarks.harness import ROOT, THREEFOLD, timed

KEPT = ROOT / ".benchmarks" / "foundations"


@dataclass(frozen=True)
class Foundation:
    """A run directory without its checkpoints, the seconds that it took and the commit that made it."""

    run: Path
    seconds: float
    commit: str


def foundation(texts: Sequence[Path], flags: Mapping[str, str], seed: int, kept: Path = KEPT) -> Foundation:
    """Train one, or take the one that is there."""
    said = json.dumps([[path.name for path in texts], sorted(flags.items()), seed])
    folder = kept / f"{flags.get('--objective', 'causal')}-{seed}-{hashlib.sha256(said.encode()).hexdigest()[:10]}"
    about = folder / "about.json"
    if not about.exists():
        shutil.rmtree(folder, ignore_errors=True)
        words = [word for pair in flags.items() for word in pair]
        seconds, _ = timed([*THREEFOLD, "pretrain", "--data", *map(str, texts), *words, "--seed", str(seed), "--out", str(folder / "run")])
        shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
        found = Foundation(folder / "run", round(seconds, 1), machine.versions().get("commit") or "")
        about.write_text(json.dumps({**asdict(found), "run": "run", "said": said}, indent=1) + "\n", encoding="utf-8")
    stored = json.loads(about.read_text(encoding="utf-8"))
    return Foundation(folder / "run", stored["seconds"], stored["commit"])
