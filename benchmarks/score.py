"""The loss of a trained character model over the whole held-out tenth, off the clock.

    python -m benchmarks.score threefold RUN/model --data FILE
    python -m benchmarks.score control DIR --data FILE

Decisions:
- Windows do not overlap and have the model's own context (`max_position_embeddings`; 64 for the control). Every
  character of the last tenth but the first is predicted once, the shorter last window included. Nats a character.
- threefold's model is read by transformers, weights and tokenizer, as any user of transformers would.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.texts import halves, read

BATCH_TOKENS = 16_384

Logits = Callable[[Tensor], Tensor]  # ids (B, T) -> logits (B, T, V)


@torch.inference_mode()
def whole_loss(logits: Logits, ids: Tensor, context: int) -> float:
    """Mean loss in nats of ids[1:], each given what precedes it in its window of at most `context` inputs."""
    inputs, labels = ids[:-1], ids[1:]
    whole, at_once = len(inputs) // context * context, max(1, BATCH_TOKENS // context) * context
    pieces = [(start, min(start + at_once, whole)) for start in range(0, whole, at_once)]
    if whole < len(inputs):
        pieces.append((whole, len(inputs)))
    total = 0.0
    for start, stop in pieces:
        logits_BTV = logits(inputs[start:stop].view(-1, min(context, stop - start)))
        total += F.cross_entropy(logits_BTV.float().flatten(0, 1), labels[start:stop], reduction="sum").item()
    return total / len(labels)


def score_control(folder: Path, held_out: str) -> dict[str, Any]:
    """The control's loss, in windows of its 64."""
    from benchmarks import control

    model, chars, settings = control.load(folder)
    index = {char: number for number, char in enumerate(chars)}
    ids = torch.tensor([index[char] for char in held_out])
    return {
        "loss": whole_loss(model, ids, settings.context),
        "context": settings.context,
        "unknown": 0,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def score_threefold(folder: Path, held_out: str) -> dict[str, Any]:
    """The loss of `RUN/model` as transformers reads it, in windows of its own context."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) != len(held_out):
        raise SystemExit(f"error: {len(held_out):,} characters became {len(ids):,} ids; the tokenizer is not one of characters")
    unknown = 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())
    context = int(model.config.max_position_embeddings)
    return {
        "loss": whole_loss(lambda x: model(input_ids=x, use_cache=False).logits, ids, context),
        "context": context,
        "unknown": unknown,
        "parameters": model.num_parameters(),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.score", description="loss over the whole held-out tenth")
    parser.add_argument("kind", choices=("threefold", "control"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    flags = parser.parse_args()
    held_out = halves(read(flags.data))[1]
    found = (score_threefold if flags.kind == "threefold" else score_control)(flags.model, held_out)
    print(json.dumps({**found, "characters": len(held_out)}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
