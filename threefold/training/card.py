"""The model card, RUN/model/README.md: what the model was made from and how it did, in the form the hubs read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from threefold import __version__
from threefold.config import Recipe
from threefold.data.shards import Shards
from threefold.model.base import Model
from threefold.model.config import TransformerConfig
from threefold.training.log import Line


class Head(NamedTuple):
    """What a card says of a model by its head: the hub's word, transformers' class, how it is used here, and what it does."""

    pipeline: str
    loader: str
    use: str
    does: str


FILLS = Head("fill-mask", "AutoModelForMaskedLM", '`threefold.pipeline("fill-mask", ".")`', "it fills hidden places of text in that manner.")
HEADS = {
    "causal": Head("text-generation", "AutoModelForCausalLM", '`threefold generate . "text"`',
                   "it continues text in that manner. It states false things fluently."),
    "masked": FILLS,
    "pretraining": FILLS._replace(loader="AutoModelForPreTraining"),
    "replaced": Head("feature-extraction", "AutoModelForPreTraining", "as a beginning: `threefold finetune --task classify --from .`",
                     "it tells which tokens of a text do not belong there."),
    "seq2seq": Head("text2text-generation", "AutoModelForSeq2SeqLM", '`threefold.pipeline("text2text-generation", ".")`',
                    "it writes what follows a text in that manner. It states false things fluently."),
}


def model_card(recipe: Recipe, shards: Shards, model: Model, evaluation: Line) -> str:
    """Markdown with a YAML head. Figures are those of the last, whole evaluation."""
    train, held, config, head = shards.count("train"), shards.count("validation"), model.config, HEADS[model.task]
    loss, objective = evaluation["val_loss"], recipe.train.objective
    does = "it writes what is missing from text in that manner. It states false things fluently." if objective == "span" else head.does
    of_tokens = f"nats per token (perplexity {math.exp(min(loss, 50.0)):.2f})" if model.task == "causal" else f"under the objective `{objective}`"
    rows: list[tuple[str, Any]] = [
        (
            "Architecture",
            f"`{config.model_type}`, {config.num_hidden_layers} layers, width {config.hidden_size}, "
            f"{model.num_parameters():,} parameters",
        ),
        ("Context", f"{config.max_position_embeddings:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,} tokens"),
        ("Trained on", f"{train.documents:,} documents, {train.tokens:,} tokens, {train.bytes:,} bytes"),
        ("Steps", _steps(evaluation)),
        ("Held out", f"{held.documents:,} documents, {held.tokens:,} tokens"),
        ("Loss", f"{loss:.4f} {of_tokens}"),
    ]
    if evaluation["val_bits_per_byte"] is not None:
        rows.append(("Bits per byte", f"{evaluation['val_bits_per_byte']:.4f}"))
    sources = "\n".join(
        f"- `{source.name}`" + (f", share {source.share:g}" if source.share is not None else "")
        for source in shards.sources
    )
    return _head(head.pipeline, config.model_type, rows) + f"""
## Data

{sources}

## Use

```python
from transformers import {head.loader}, AutoTokenizer
model, tokenizer = {head.loader}.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

or {head.use}.

## Limits

A small model trained on the text above: {does} It repeats the biases of its data, and has not been aligned or tested for any
use. Figures are measured on the held-out part of the same data, not on other text.

Objective `{objective}`, seed {recipe.train.seed}; the whole recipe is in `recipe.toml` of the run.
"""


def task_card(recipe: Recipe, config: TransformerConfig, parameters: int, learnt: int, held: int, evaluation: Line, *,
              pooled: bool = False) -> str:
    """The card of a model that learned from rows; figures are those of the last evaluation. `pooled`: a classifier over pooled states."""
    f = recipe.finetune
    rows: list[tuple[str, Any]] = [
        ("Task", f.task),
        ("From", f"`{recipe.model.from_model}`"),
        ("Architecture", f"`{config.model_type}`, {config.num_hidden_layers} layers, width {config.hidden_size}, {parameters:,} parameters"),
        ("Rows", f"{learnt:,} learnt from, {held:,} held out"),
        ("Steps", _steps(evaluation)),
        ("Loss", f"{evaluation['val_loss']:.4f}"),
        *((name.replace("_", " "), f"{value:.4f}") for name, value in evaluation.get("metrics", {}).items() if isinstance(value, float)),
    ]
    library = "sentence-transformers" if f.task == "embed" or pooled else "transformers"
    said = POOLED if pooled else ""
    return _head(PIPELINES.get(f.task, "text-generation"), f"{f.task}, from `{recipe.model.from_model}`", rows, library) + f"""{said}
Figures are of rows of the same data that were held out, with seed {recipe.train.seed}; other text may give others. The whole recipe is in
`recipe.toml` of the run.
"""


def _steps(evaluation: Line) -> str:
    """How long it trained, and where the weights are from if an earlier evaluation was better."""
    best = f", the weights of step {evaluation['weights_of']:,}" if "weights_of" in evaluation else ""
    return f"{evaluation['step']:,}{best}"


def _head(pipeline: str, title: str, rows: list[tuple[str, Any]], library: str = "transformers") -> str:
    """What the hubs read, the title, and a table of facts."""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: {library}
pipeline_tag: {pipeline}
tags: [threefold]
---

# {title}, trained with threefold {__version__}

| | |
|---|---|
{table}
"""


POOLED = """
The classes are a projection of pooled states, for which transformers has no class: `SentenceTransformer(FOLDER).encode(texts)` gives their
logits, `threefold.pipeline("text-classification", FOLDER)` their names.
"""
PIPELINES = {"classify": "text-classification", "reward": "text-classification", "tag": "token-classification", "seq2seq": "text2text-generation",
             "embed": "sentence-similarity"}
