"""The peers of tuning_speed.py: transformers' Trainer, PEFT and TRL on the same rows of a model of the same shape.

    python -m benchmarks.peer_tuning --task instruct --model DIR --data rows.jsonl --rows 32 --micro 8 --epochs 2 --out DIR [--lora]

Decisions, in the peer's favour: rows are encoded before the clock starts, rows of like length stand together, bfloat16 where the
machine multiplies it faster, attention written out or torch's own, AdamW fused, the loss on answers alone; nothing is reported, saved,
shown or evaluated.
`DIR/log.jsonl` gets a line when a step has ended: its number, the seconds since the first began, the tokens so far that are no padding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft import TaskType as Kind
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

KINDS = {"classify": Kind.SEQ_CLS, "instruct": Kind.CAUSAL_LM, "dpo": Kind.CAUSAL_LM, "seq2seq": Kind.SEQ_2_SEQ_LM}


class StepEnds(TrainerCallback):
    """Writes a line when a step has ended."""

    def __init__(self, path: Path) -> None:
        self.path, self.tokens, self.start = path, 0, 0.0

    def counting(self, collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """A collator that counts what is no padding."""
        def counted(features: Any) -> Any:
            batch = collate(features)
            self.tokens += sum(int(value.sum()) for name, value in batch.items() if name.endswith("attention_mask"))
            if batch["input_ids"].shape[:1] != batch.get("labels", batch["input_ids"]).shape[:1] or "decoder_input_ids" in batch:
                self.tokens += int((batch["labels"] != -100).sum())
            return batch
        return counted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts."""
        self.start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer's own hook, after the optimizer's step."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "seconds": time.monotonic() - self.start, "tokens": self.tokens}) + "\n")


def trainer(flags: argparse.Namespace, ends: StepEnds) -> Any:
    """The trainer of a task, ready to run."""
    rows = [json.loads(line) for line in flags.data.read_text(encoding="utf-8").splitlines()]
    words = AutoTokenizer.from_pretrained(flags.model)
    if words.pad_token is None:
        words.pad_token = words.eos_token
    lora = LoraConfig(task_type=KINDS[flags.task], r=8, lora_alpha=16, target_modules="all-linear") if flags.lora else None
    common: dict[str, Any] = {
        "output_dir": str(flags.out), "per_device_train_batch_size": flags.micro, "gradient_accumulation_steps": flags.rows // flags.micro,
        "num_train_epochs": flags.epochs, "report_to": [], "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "use_cpu": True, "bf16": flags.bf16, "dataloader_pin_memory": False, "learning_rate": 1e-4,
        "optim": "adamw_torch_fused", "train_sampling_strategy": "group_by_length"}
    how = {"dtype": torch.float32, "attn_implementation": "eager" if flags.eager else "sdpa"}
    if flags.task in ("instruct", "dpo"):
        return _trl(flags, rows, words, lora, common, how, ends)
    made: Any
    if flags.task == "classify":
        names = sorted({row["label"] for row in rows})
        model = AutoModelForSequenceClassification.from_pretrained(flags.model, num_labels=len(names), **how)
        encoded = words([row["text"] for row in rows], truncation=True, max_length=512)
        data = Dataset.from_dict({**encoded, "labels": [names.index(row["label"]) for row in rows]})
        made = Trainer(model=get_peft_model(model, lora) if lora else model, args=TrainingArguments(**common), train_dataset=data,
                       data_collator=ends.counting(DataCollatorWithPadding(words)), callbacks=[ends])
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(flags.model, **how)
        encoded = words([row["source"] for row in rows], text_target=[row["target"] for row in rows])
        collate = DataCollatorForSeq2Seq(words, model=model)
        made = Seq2SeqTrainer(model=get_peft_model(model, lora) if lora else model, args=Seq2SeqTrainingArguments(**common),
                              train_dataset=Dataset.from_dict(dict(encoded)), data_collator=ends.counting(collate), callbacks=[ends])
    return made


def _trl(flags: argparse.Namespace, rows: list[dict[str, Any]], words: Any, lora: Any, common: dict[str, Any], how: dict[str, Any],
         ends: StepEnds) -> Any:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    common |= {"gradient_checkpointing": False, "max_length": 1024}
    model = AutoModelForCausalLM.from_pretrained(flags.model, **how)
    made: Any
    if flags.task == "dpo":
        settings = DPOConfig(remove_unused_columns=False, precompute_ref_log_probs=flags.precompute, **common)
        made = DPOTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows),
                          processing_class=words, peft_config=lora, callbacks=[ends])
        lengths = [sum(len(value) for value in row.values() if isinstance(value, list)) for row in made.train_dataset]
        made.train_dataset = made.train_dataset.add_column("length", lengths)  # what rows are sorted by: they have no `input_ids`
    else:
        made = SFTTrainer(model=model, args=SFTConfig(completion_only_loss=True, **common), train_dataset=Dataset.from_list(rows),
                          processing_class=words, peft_config=lora, callbacks=[ends])
    made.data_collator = ends.counting(made.data_collator)
    return made


def main() -> None:
    """Train for some epochs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_tuning", description="transformers' Trainer, PEFT and TRL on rows")
    parser.add_argument("--task", choices=sorted(KINDS), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True, help="of an update")
    parser.add_argument("--micro", type=int, required=True, help="rows that go through the model together")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--eager", action="store_true", help="attention written out")
    parser.add_argument("--precompute", action="store_true", help="dpo: what the reference says is worked out once, before the clock")
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    trainer(flags, StepEnds(flags.out / "log.jsonl")).train()


if __name__ == "__main__":
    main()
