"""A model in the form that others take: `threefold export RUN --to hf --out FOLDER`.

Decisions:
- What lies in RUN/model is such a directory already. Exporting adds what a run does not do by itself: the weights of an adapter
  are added to those of its base, all may be rounded to another dtype, and the folder stands alone.
- A card comes with it, and says where the model is from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from threefold import auto, files
from threefold.errors import UsageError, did_you_mean
from threefold.hub import resolve
from threefold.model import adapters, pooling, weights
from threefold.text.tokenizer import Tokenizer

FORMATS = ("hf",)
FILES = files.besides(*weights.FILES, *Tokenizer.FILES, *pooling.FILES, "README.md")


def export(model: str, out: Path, *, to: str = "hf", dtype: str | None = None) -> dict[str, Any]:
    """Write a model as a directory of its own, adapters merged; returns what was written as plain data.

    model   run directory, Hugging Face directory or hub name
    to      `hf`: a directory that transformers (sentence-transformers, of an embedder and of a classifier over pooled states) opens
    dtype   of the weights; None: as they are stored

    Raises UsageError for another format and for a place that holds other things.
    """
    if to not in FORMATS:
        raise UsageError(f"there is no format `{to}`", hint=did_you_mean(to, FORMATS))
    source = resolve(model)
    if out.exists() and out.resolve() in (source.resolve(), *source.resolve().parents):
        raise UsageError(f"`{out}` holds `{source}`, which is exported", hint="choose another place with --out")
    files.check_ours(out, FILES)
    found, words = auto.load(model)
    merged = any(side.use for side in adapters.sides(found))
    if merged:
        adapters.merge(found)
    with files.published(out, foreign=FILES) as folder:
        found.save_pretrained(folder, dtype=dtype)
        words.save_pretrained(folder)
        card = source / "README.md"
        said = card.read_text(encoding="utf-8") if card.is_file() else f"A `{found.config.model_type}` model, exported from `{model}`.\n"
        files.write_file(folder / "README.md", said)
    return {"model": str(out), "family": found.config.model_type, "task": found.task, "parameters": found.num_parameters(),
            "dtype": dtype or str(found.dtype).removeprefix("torch."), "merged": merged}
