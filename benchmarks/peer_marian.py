"""The peer of translation.py: transformers' own Marian, from random weights, on the same pairs for a given time.

    python -m benchmarks.peer_marian --model DIR --data train.jsonl --test test.jsonl --seconds 600 --rate 1e-3 --rows 64 --out DIR

Decisions, in the peer's favour: pairs are encoded and the speed of a step is measured before the clock starts, so that its rate falls to
nothing just when the time is over; rows of like length stand together; bfloat16 where that is asked for; label smoothing 0.1;
dropout 0.1, since there are few pairs. Translations are written greedily and by four beams to `DIR/said.json`, outside of the time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    MarianMTModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

TRIED = 52  # steps that are timed: rows of like length stand together in fifties of batches, the longest first


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.start, self.ends = 0.0, list[float]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts: rows are encoded."""
        self.start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer's own hook."""
        self.ends.append(time.monotonic())


def trained(flags: argparse.Namespace, words: Any, steps: int, clock: Clock) -> MarianMTModel:
    """A model that has made so many steps."""
    torch.manual_seed(flags.seed)
    model = MarianMTModel(AutoConfig.from_pretrained(flags.model, dropout=0.1))
    rows = [json.loads(line) for line in flags.data.read_text(encoding="utf-8").splitlines()]
    encoded = words([row["source"] for row in rows], text_target=[row["target"] for row in rows], truncation=True, max_length=128)
    settings = Seq2SeqTrainingArguments(
        output_dir=str(flags.out), per_device_train_batch_size=flags.rows, max_steps=steps, learning_rate=flags.rate,
        warmup_steps=min(200, steps // 10), lr_scheduler_type="linear", label_smoothing_factor=0.1, weight_decay=0.01, bf16=flags.bf16,
        optim="adamw_torch_fused", seed=flags.seed, train_sampling_strategy="group_by_length", report_to=[], save_strategy="no",
        eval_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False)
    Seq2SeqTrainer(model=model, args=settings, train_dataset=Dataset.from_dict(dict(encoded)), callbacks=[clock],
                   data_collator=DataCollatorForSeq2Seq(words, model=model)).train()
    return model


@torch.inference_mode()
def said(model: MarianMTModel, words: Any, sources: list[str], beams: int) -> list[str]:
    """The translation of each text."""
    model.eval()
    order = sorted(range(len(sources)), key=lambda n: len(sources[n]))
    found = [""] * len(sources)
    for first in range(0, len(order), 64):
        part = order[first:first + 64]
        given = words([sources[n] for n in part], padding=True, truncation=True, max_length=128, return_tensors="pt")
        given.pop("token_type_ids", None)
        out = model.generate(**given, max_new_tokens=96, num_beams=beams, do_sample=False)  # type: ignore[misc]
        for n, text in zip(part, words.batch_decode(out, skip_special_tokens=True), strict=True):
            found[n] = text.strip()
    return found


def main() -> None:
    """Train for the time, and translate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_marian", description="transformers' Marian on pairs")
    for name in ("model", "data", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    words, trial, clock = AutoTokenizer.from_pretrained(flags.model), Clock(), Clock()
    trained(flags, words, TRIED, trial)
    each = (trial.ends[-1] - trial.ends[1]) / (TRIED - 2)
    steps = max(1, round(flags.seconds / each))
    model = trained(flags, words, steps, clock)
    seconds = clock.ends[-1] - clock.start
    sources = [json.loads(line)["source"] for line in flags.test.read_text(encoding="utf-8").splitlines()]
    found = {"seconds": seconds, "steps": steps, "parameters": model.num_parameters(), "greedy": said(model, words, sources, 1),
             "beams": said(model, words, sources, 4)}
    (flags.out / "said.json").write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
