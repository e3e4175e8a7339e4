"""Seconds per useful token of fine-tuning: threefold against transformers' Trainer, PEFT and TRL.

    python -m benchmarks.tuning_speed --case minilm-full      needs transformers, peft and trl

The published shapes of MiniLM (as it is), GPT-2 124M and T5 small (random weights: what they say costs the same). Decisions:
- Both sides learn from the same rows, as many of them an update, for two epochs; what is measured is the second, in which every
  row is seen once: seconds between the ends of two updates, from each side's own log. Starting and saving do not count.
- Useful tokens are those that are not there to fill up. Each side counts its own, since templates differ by a few.
- A peer goes through an update in the micro-batches, in the dtype and with the attention that a search before the measure found fastest
  for it, DPO with and without its reference worked out before; the search is stored. threefold runs as it comes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import quality_tasks
from benchmarks.harness import THREEFOLD, Findings, Measure, Measurement, Result, Row, as_fraction, main, rounds, say, timed, work_folder
from benchmarks.texts import Absent, shared, write_lines

MUST, AIM = 1 / 2, 1 / 4


@dataclass(frozen=True)
class Case:
    """A model, a task and its rows: so many, and of them so many an update."""

    model: str
    task: str
    count: int
    rows: int
    lora: bool = False

    @property
    def peer(self) -> str:
        """Whose work the other side is."""
        library = "TRL" if self.task in ("instruct", "dpo") else "Trainer"
        return f"{library} and PEFT" if self.lora else library


CASES = {
    "minilm-full": Case("minilm", "classify", 1024, 32),
    "minilm-lora": Case("minilm", "classify", 1024, 32, lora=True),
    "gpt2-full": Case("gpt2", "instruct", 96, 32),
    "gpt2-lora": Case("gpt2", "instruct", 96, 32, lora=True),
    "gpt2-dpo": Case("gpt2", "dpo", 24, 8),
    "gpt2-dpo-lora": Case("gpt2", "dpo", 24, 8, lora=True),
    "t5-full": Case("t5", "seq2seq", 128, 32),
    "t5-lora": Case("t5", "seq2seq", 128, 32, lora=True),
}


# -- models and rows ---------------------------------------------------------------------------------------------------


def model_folder(name: str, folder: Path, *, quick: bool = False) -> Path:
    """A directory of that shape with a tokenizer, made once."""
    import torch
    from transformers import AddedToken, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, T5Config, T5ForConditionalGeneration, T5TokenizerFast

    path = folder / name
    if path.exists():
        return path
    torch.manual_seed(0)
    if name == "minilm":
        return quality_tasks.minilm()
    if name == "gpt2":
        for part, file in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
            path.mkdir(exist_ok=True)
            shutil.copy(shared(f"tokenizers/gpt2_bpe/{file}"), path / part)
        GPT2TokenizerFast.from_pretrained(path).save_pretrained(path)
        GPT2LMHeadModel(GPT2Config(**({"n_layer": 1, "n_embd": 64, "n_head": 4} if quick else {}))).save_pretrained(path)
        return path
    path.mkdir()
    shutil.copy(shared("tokenizers/t5_test_spm/sentencepiece.model"), path / "spiece.model")
    T5TokenizerFast.from_pretrained(path, additional_special_tokens=[AddedToken(f"<extra_id_{n}>") for n in range(100)]).save_pretrained(path)
    T5ForConditionalGeneration(T5Config(vocab_size=32128, **({"num_layers": 1, "d_model": 64, "num_heads": 4} if quick else {}),
                                        decoder_start_token_id=0)).save_pretrained(path)
    return path


def texts_of(case: Case, *, peer: bool) -> list[dict[str, Any]]:
    """The rows as that side reads them."""
    if case.task == "classify":
        return quality_tasks.sms_spam(0)[0][:case.count]
    if case.task == "seq2seq":
        return quality_tasks.wikisql(0)[0][:case.count]
    if case.task == "instruct":
        rows = quality_tasks.rasbt(0)[0][:case.count]
        if not peer:
            return rows
        return [{"prompt": "### Question:\n" + "\n".join(filter(None, (r["instruction"], r["input"]))) + "\n\n### Answer:\n",
                 "completion": r["output"]} for r in rows]
    found = quality_tasks.hh_rlhf(0)[0]
    short = [row for row in found if len(json.dumps(row)) < 2400][:case.count]
    if not peer:
        return short
    def said(messages: list[dict[str, str]]) -> str:
        return "".join(f"### {'Question' if m['role'] == 'user' else 'Answer'}:\n{m['content']}\n\n" for m in messages)
    return [{"prompt": said(r["prompt"]) + "### Answer:\n", "chosen": r["chosen"][0]["content"], "rejected": r["rejected"][0]["content"]}
            for r in short]


# -- the two sides -----------------------------------------------------------------------------------------------------


def ours(case: Case, model: Path, folder: Path, number: str) -> tuple[float, float]:
    """(seconds, useful tokens) of the second epoch."""
    rows, out = texts_of(case, peer=False), folder / f"ours-{number}"
    each = case.count // case.rows
    data, val = write_lines(rows, folder / "ours.jsonl"), write_lines(rows[:8], folder / "val.jsonl")
    flags: list[str | Path] = ["--from", model, "--data", data, "--val", val, "--finetune.rows", str(case.rows), "--steps", str(2 * each),
                               "--out", out, "--train.eval_every", str(2 * each), "--train.save_seconds", "1h",
                               *(["--lora", "8"] if case.lora else [])]
    verb = ["align", "--method", case.task] if case.task == "dpo" else ["finetune", "--task", case.task]
    timed([*THREEFOLD, *verb, *flags])
    steps = [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]
    shutil.rmtree(out)
    return steps[2 * each - 1]["seconds"] - steps[each - 1]["seconds"], float(steps[each - 1]["tokens"])


def theirs(case: Case, model: Path, folder: Path, setting: list[str]) -> tuple[float, float]:
    """The same of the peer, set so."""
    out, each = folder / "peer", case.count // case.rows
    data = write_lines(texts_of(case, peer=True), folder / "peer.jsonl")
    timed([sys.executable, "-m", "benchmarks.peer_tuning", "--task", case.task, "--model", model, "--data", data, "--out", out,
           "--rows", str(case.rows), *setting, *(["--lora"] if case.lora else [])])
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    shutil.rmtree(out)
    first, last = steps[each - 1], steps[2 * each - 1]
    return last["seconds"] - first["seconds"], float(last["tokens"] - first["tokens"])


def fastest(case: Case, model: Path, folder: Path, *, quick: bool) -> tuple[list[str], dict[str, float]]:
    """The setting in which the peer needs least, and what each needs: microseconds a useful token.

    The dtype first, then with the faster one halves of micro-batches as long as they gain, then the other attention, and of DPO the
    reference beforehand: what the second epoch, which is measured, then has no part in."""
    tried: dict[str, float] = {}

    def best() -> list[str]:
        return min(tried, key=lambda words: tried[words]).split()

    def attempt(setting: list[str]) -> None:
        seconds, tokens = theirs(case, model, folder, setting)
        tried[" ".join(setting)] = round(1e6 * seconds / tokens, 2)
        say(f"    peer {' '.join(setting)}: {tried[' '.join(setting)]} us a token")

    whole = ["--micro", str(case.rows)]
    for dtype in ([], ["--bf16"]):
        attempt([*whole, *dtype])
    dtype = best()[2:]
    micro = case.rows
    while not quick and micro > 1 and int(best()[1]) == micro:
        micro //= 2
        attempt(["--micro", str(micro), *dtype])
    for more in ("--eager", *(["--precompute"] if case.task == "dpo" else [])):
        attempt([*best(), more])
    return best(), tried


def arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this measure."""
    parser.add_argument("--case", choices=CASES, default=next(iter(CASES)))


def run(options: argparse.Namespace) -> Findings:
    """The search for the peer's setting, then both in turns."""
    if missing := [name for name in ("transformers", "peft", "trl") if importlib.util.find_spec(name) is None]:
        raise Absent(f"the peers need {', '.join(missing)}: make .venv/.installed-bench")
    name, measurements = options.case, list[Measurement]()
    case = replace(CASES[name], count=2 * CASES[name].rows) if options.quick else CASES[name]
    with work_folder() as folder:
        model = model_folder(case.model, folder, quick=options.quick)
        best, tried = fastest(case, model, folder, quick=options.quick)
        for repetition, side in rounds(options.repeats, ["threefold", "peer"]):
            seconds, tokens = ours(case, model, folder, name) if side == "threefold" else theirs(case, model, folder, best)
            measurements.append({"side": side, "repetition": repetition, "seconds": seconds, "tokens": tokens,
                                 "microseconds": 1e6 * seconds / tokens})
            say(f"  {name} {repetition + 1}/{options.repeats} {side}: {1e6 * seconds / tokens:.1f} us a token, {tokens:,.0f} tokens")
    settings = {"case": name, "peer": case.peer, "setting": best, "tried": tried, "rows": case.count, "update": case.rows}
    return Findings(name=f"tuning_speed-{name}", settings=settings, measurements=measurements)


def rows_of(result: Result) -> list[Row]:
    """The line of a case."""
    mine, peer = (result.spread("microseconds", side=side) for side in ("threefold", "peer"))
    ratio = mine.median / peer.median
    return [Row(measure=f"fine-tuning, time a useful token: {result.settings['case']}",
                peer=f"{result.settings['peer']}: {peer.words('us', digits=1)}", threefold=mine.words("us", digits=1),
                compared=as_fraction(ratio), value=ratio, must=MUST, aim=AIM, limits=("1/2", "1/4"))]


MEASURE = Measure(name="tuning_speed", summary="fine-tuning, against transformers' Trainer, PEFT and TRL", repeats=3, run=run,
                  rows=rows_of, arguments=arguments)

if __name__ == "__main__":
    sys.exit(main(MEASURE))
