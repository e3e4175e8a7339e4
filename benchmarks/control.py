"""The control of time to loss: the CPU recipe that nanoGPT publishes for tiny Shakespeare, in plain PyTorch.

    python -m benchmarks.control --data FILE --json

The recipe is the one in https://github.com/karpathy/nanoGPT (README, "I only have a macbook", and
config/train_shakespeare_char.py), with its published values; the code is written for this comparison. Decisions:

- What the recipe leaves open and what changes nothing but its speed (threads, the implementation of AdamW) is a flag;
  time_to_loss.py tries them first and gives the control the fastest.
- Writing a checkpoint whenever validation improves is left out, in the control's favour; the weights are saved once, at
  the end.
- The exact loss over the whole held-out tenth is no part of the recipe: another process takes it, off the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.texts import halves, read


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The published recipe; `threads` (0: PyTorch's own choice) and `adamw` are the open ones."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 12
    steps: int = 2000
    warmup: int = 100
    learning_rate: float = 1e-3
    last_learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluate_every: int = 250
    evaluation_batches: int = 20
    dtype: str = "float32"
    seed: int = 1337
    threads: int = 0
    adamw: str = "for-loop"


class Block(nn.Module):
    """Attention and a feed-forward part, each behind a LayerNorm without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        batch, length, width = x_BTD.shape
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm1(x_BTD)).split(width, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))  # type: ignore[no-any-return]


class Control(nn.Module):
    """GPT-2's architecture without biases and dropout; the embedding is the head."""

    def __init__(self, vocabulary: int, s: Settings) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, s.width), nn.Embedding(s.context, s.width)
        self.blocks = nn.ModuleList(Block(s.width, s.heads) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                ends_branch = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * s.layers) if ends_branch else 0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        x_BTD = self.tokens(ids_BT) + self.positions.weight[: ids_BT.shape[1]]
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.tokens.weight)


def rate(step: int, s: Settings) -> float:
    """The learning rate at a step: linear warm-up, then a cosine to the last step."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / (s.warmup + 1)
    progress = min(1.0, (step - s.warmup) / max(1, s.steps - s.warmup))
    return s.last_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * (s.learning_rate - s.last_learning_rate)


def train(text: str, s: Settings, *, evaluate: bool = True) -> tuple[Control, list[str], dict[str, Any]]:
    """The trained model, its characters (of the whole text, as the recipe has it), and what was seen on the way."""
    if s.threads:
        torch.set_num_threads(s.threads)
    torch.manual_seed(s.seed)
    chars = sorted(set(text))
    index = {char: number for number, char in enumerate(chars)}
    ids_train, ids_held_out = (torch.tensor([index[char] for char in part]) for part in halves(text))
    model = Control(len(chars), s)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": s.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=s.learning_rate,
        betas=s.betas,
        fused=s.adamw == "fused",
        foreach=s.adamw == "foreach",
    )

    def batch_loss(ids: Tensor) -> Tensor:
        starts = torch.randint(len(ids) - s.context, (s.batch,)).tolist()
        inputs = torch.stack([ids[i : i + s.context] for i in starts])
        labels = torch.stack([ids[i + 1 : i + 1 + s.context] for i in starts])
        return F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())

    def sampled() -> list[float]:
        with torch.no_grad():
            return [statistics.fmean(batch_loss(ids).item() for _ in range(s.evaluation_batches)) for ids in (ids_train, ids_held_out)]

    evaluations, taken = [], []
    for step in range(s.steps + 1):  # the published loop makes its update at the last step too
        if evaluate and (step % s.evaluate_every == 0):
            evaluations.append([step, *sampled()])
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, s)
        loss = batch_loss(ids_train)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        loss.item()  # the recipe logs every step
        taken.append(time.perf_counter() - start)
    return model, chars, {"evaluations": evaluations, "seconds_per_step": statistics.median(taken[len(taken) // 4 :])}


def save(folder: Path, model: Control, chars: list[str], s: Settings) -> None:
    """Weights, characters and settings, for score.py."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    (folder / "control.json").write_text(json.dumps({"chars": chars, "settings": asdict(s)}), encoding="utf-8")


def load(folder: Path) -> tuple[Control, list[str], Settings]:
    """What `save` wrote."""
    from safetensors.torch import load_file

    stored = json.loads((folder / "control.json").read_text(encoding="utf-8"))
    settings = Settings(**{**stored["settings"], "betas": tuple(stored["settings"]["betas"])})
    model = Control(len(stored["chars"]), settings)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), stored["chars"], settings


def main() -> None:
    """Train, save if asked to, and say what was seen."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.control", description="nanoGPT's published CPU recipe in plain PyTorch")
    parser.add_argument("--data", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--out", type=Path, help="where the weights go")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=Settings.threads, help="0: PyTorch's own choice")
    parser.add_argument("--adamw", choices=("for-loop", "foreach", "fused"), default=Settings.adamw)
    parser.add_argument("--no-evaluations", action="store_true", help="leave out the sampled validations, to time steps alone")
    flags = parser.parse_args()
    settings = Settings(steps=flags.steps, seed=flags.seed, threads=flags.threads, adamw=flags.adamw)
    model, chars, seen = train(read(flags.data), settings, evaluate=not flags.no_evaluations)
    if flags.out:
        save(flags.out, model, chars, settings)
    parameters = sum(p.numel() for p in model.parameters())
    if flags.json:
        print(json.dumps({"parameters": parameters, "settings": asdict(settings), **seen}))
        return
    print(
        f"{parameters:,} parameters, {1000 * seen['seconds_per_step']:.1f} ms a step, {asdict(settings)}",
        file=sys.stderr,
    )
    for step, train_loss, held_out in seen["evaluations"]:
        print(f"step {step}: train {train_loss:.4f}, held out {held_out:.4f} (sampled)")


if __name__ == "__main__":
    main()
