"""The report: made from files alone, whole for any log, and inert whatever text is in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from threefold.training import report
from threefold.training.log import RunLog

EVIL = '</pre><script>alert(1)</script><img src=x onerror=alert(1)><a href="javascript:1">&amp;\u202e\ud800'


class Tags(HTMLParser):
    """Every tag with its attributes, and whether they close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def a_run(run: Path, *, steps: int = 30) -> Path:
    log = RunLog(run / "log.jsonl")
    log.append({"event": "start", "step": 0, "family": "qwen3", "parameters": 1234, "threads": 2, "torch": "2"})
    log.append({"event": "decision", "step": 0, "decision": "plan", "why": EVIL})
    for step in range(1, steps + 1):
        log.append(
            {"step": step, "loss": 5 - step / 10, "tokens": 64 * step, "seconds": 0.1 * step, "tokens_per_second": 640}
        )
        if step % 10 == 0:
            log.append(
                {
                    "event": "evaluation",
                    "step": step,
                    "whole": step == steps,
                    "val_loss": 5 - step / 10,
                    "val_bits_per_byte": 2.0,
                    "val_tokens": 100,
                    "samples": [EVIL],
                }
            )
    (run / "recipe.toml").write_text(f"# {EVIL}\n", encoding="utf-8", errors="replace")
    (run / "data").mkdir()
    (run / "data" / "manifest.json").write_text('{"report": {"kept": 12, "dropped_why": "<b>", "more": {"x": [1]}}}')
    return run


def checked(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == []
    for tag, attributes in tags.seen:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "img", "a"), tag
        assert not any(name.startswith("on") or name in ("src", "href", "srcset") for name in attributes)
    (policy,) = [
        a["content"] for tag, a in tags.seen if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None and policy.startswith("default-src 'none'") and "script" not in policy
    assert "url(" not in text and "@import" not in text
    return text


def test_a_whole_run(tmp_path: Path) -> None:
    text = checked(report.write_report(a_run(tmp_path)))
    assert text.count("<svg") == 2 and "3.000" not in text.partition("<h2>")[0] and "<b>2.000</b>" in text
    for words in (
        "Learning",
        "Evaluation on what was held out",
        "Samples while it learned",
        "Decisions",
        "Data:",
        "Recipe",
        "1,234",
    ):
        assert words in text
    assert "&lt;script&gt;" in text and "<td>dropped why</td><td>&lt;b&gt;</td>" in text
    assert report.write_report(tmp_path).read_text(encoding="utf-8") == text, "the same files, the same page"


@pytest.mark.parametrize("size", [0, 1, 40, 200, 900, 2000])
def test_F18_a_torn_log(tmp_path: Path, size: int) -> None:
    run = a_run(tmp_path)
    (run / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes()[:size])
    checked(report.write_report(run))


def test_nothing_at_all(tmp_path: Path) -> None:
    assert "<h1>Run " in checked(report.write_report(tmp_path))
    assert "<h1>&lt;i&gt;</h1>" in checked(report.write_report(tmp_path, title="<i>", extra=["<h2>More</h2>"]))


def test_numbers_that_are_none(tmp_path: Path) -> None:
    """Bits per byte that were not measured, a loss that was not a number, a manifest that is damaged."""
    log = RunLog(a_run(tmp_path).joinpath("log.jsonl"))
    log.append({"step": 31, "loss": float("nan"), "tokens": 1, "seconds": 4000.0})
    log.append(
        {
            "event": "evaluation",
            "step": 31,
            "whole": True,
            "val_loss": float("inf"),
            "val_bits_per_byte": None,
            "val_tokens": 100,
        }
    )
    (tmp_path / "data" / "manifest.json").write_bytes(b"{\xff")
    text = checked(report.write_report(tmp_path))
    assert "bits per byte, held out" not in text and "<td class=\"n\">–</td>" in text and "<b>inf</b>" in text and "1 h 6 min" in text
    assert not re.search(r'points="[^"]*nan', text)


def test_long_curves_are_thinned() -> None:
    points = [(float(x), 1.0 if x != 5000 else 1e9) for x in range(10_000)]
    thin = report.thin(points)
    assert 390 <= len(thin) <= 410 and max(value for _, value in thin) == 1.0
    assert report.thin(points[:10]) == points[:10]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.3, 2.3), (0.0, 123456.0), (-1e-6, 1e-6), (3.1, 3.1000001)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = report._ticks(low, high)
    assert len(ticks) <= 8 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_flat_and_single_points() -> None:
    assert report.chart([("a", "a", [(1.0, 2.0)])], unit="x") == ""
    assert "<svg" in report.chart([("a", "a", [(1.0, 2.0), (2.0, 2.0)])], unit="x")
