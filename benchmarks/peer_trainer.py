"""The peer of startup.py: transformers' Trainer with the model that threefold chose, on the same characters.

    python -m benchmarks.peer_trainer --data FILE --config DIR --rows 12 --steps 20 --out DIR

Decisions, all in the peer's favour: no tokenizer is trained or loaded (a table of characters in NumPy), rows are slices
of one tensor, nothing is reported, saved, shown or evaluated, and only the classes that are needed are imported.
`DIR/log.jsonl` gets a line when a step has ended.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of `context` characters, one behind the other."""

    def __init__(self, path: Path, context: int) -> None:
        codes = np.frombuffer(path.read_bytes().decode("utf-8").encode("utf-32-le"), dtype=np.uint32)
        codes = codes[: int(0.9 * len(codes))]
        table = np.zeros(int(codes.max()) + 1, dtype=np.int64)
        used = np.flatnonzero(np.bincount(codes))
        table[used] = np.arange(len(used))
        self.ids = torch.from_numpy(table[codes[: len(codes) // context * context]]).view(-1, context)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


class StepEnds(TrainerCallback):
    """Writes a line when a step has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The trainer's own hook, after the optimizer's step."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step}) + "\n")


def main() -> None:
    """Train for some steps."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_trainer", description="transformers' Trainer on characters")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True, help="a folder with the config.json of the model's shape")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    flags = parser.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(flags.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    settings = TrainingArguments(
        output_dir=str(flags.out),
        per_device_train_batch_size=flags.rows,
        max_steps=flags.steps,
        report_to=[],
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        learning_rate=1e-3,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=Rows(flags.data, config.max_position_embeddings),
        callbacks=[StepEnds(flags.out / "log.jsonl")],
    )
    trainer.train()


if __name__ == "__main__":
    main()
