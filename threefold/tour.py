"""The tour: the whole life of a model on this machine, offline, from text that every machine has.

    read and clean -> tokenizer -> shards -> a decoder, an encoder, an encoder-decoder -> evaluate -> complete, fill, restore
    -> teach: an assistant, a classifier, a finder, a summariser -> report

Decisions:
- It runs the same functions as the commands; what it shows can be repeated with the commands that it names.
- One tokenizer and one set of shards serve the three families: what differs is the objective.
- The budget is for the whole. The decoder gets the largest part, yardsticks and answers a small fixed one.
- A figure alone says little: the decoder is set beside a unigram, a bigram, gzip and xz on the same held-out text.
"""

from __future__ import annotations

import html
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from threefold import console, files
from threefold.config import Recipe
from threefold.errors import UsageError
from threefold.tour_tasks import teach

PROMPTS = ("def __init__(self, ", "The following example shows how to ", "import ")
MASKED = ("import{0}\n", "    def{0}(self):\n        return self.", "This module provides{0} to the", "for i in{0}(10):")
RESTORED = ("def {0}(self, name):", "raise {0}(\"invalid", "with open(filename) as {0}:")
HELD_OUT = 0.02  # about 300 kB: enough for a figure, and it does not eat the budget
VOCABULARY = 8192
LEAST_BUDGET = 15.0  # seconds
CLOSING_SHARE, CLOSING_LEAST = 0.07, 6.0  # of the budget and in seconds, for yardsticks, answers and the report
SHARES = {"decoder": ("causal", 0.5), "encoder": ("masked", 0.13), "seq2seq": ("span", 0.13)}  # of the budget; data included
TAUGHT = 0.16  # of the budget: what the three are then taught


def tour(out: Path, budget: float, *, started: float | None = None, fresh: bool = False) -> dict[str, Any]:
    """Run the tour in `out` within `budget` seconds; returns what it measured. The same call again resumes."""
    if budget < LEAST_BUDGET:
        raise UsageError(f"a tour of {budget:g} s: reading the text alone takes longer", hint=f"give it at least {LEAST_BUDGET:g} s; 3min is usual")
    started = time.monotonic() if started is None else started
    console.say("threefold tour: from the running Python's own documentation and source to three models of it")
    data = _data(out, fresh=fresh)
    results = {}
    closing = max(CLOSING_LEAST, CLOSING_SHARE * budget)
    for name, (objective, share) in SHARES.items():
        seconds = share / (TAUGHT + sum(s for _, s in SHARES.values())) * (budget - closing)
        results[name] = _learn(out / name, data, objective, seconds, started if name == "decoder" else time.monotonic(), fresh=fresh)
    table = yardstick_table(data, results["decoder"])
    console.say("\nbits per byte of the decoder on the held-out text (lower is better):")
    for name, value in sorted(table.items(), key=lambda item: -item[1]):
        console.say(f"  {name:28} {value:6.3f}  {'#' * round(8 * value)}")
    answers = {"decoder": complete(out / "decoder"), "encoder": fill(out / "encoder"), "seq2seq": restore(out / "seq2seq")}
    for name, said in answers.items():
        console.say(f"\nthe {name}:")
        for asked, text in said:
            console.say(f"> {asked}{text}")
    taught = teach(out, TAUGHT / (TAUGHT + sum(s for _, s in SHARES.values())) * (budget - closing), fresh=fresh)
    path = _report(out, table, answers, results, taught)
    activate = Path(sys.prefix) / "bin" / "activate"  # `make` runs the command where a shell does not look
    found = str(activate.parent) in os.environ.get("PATH", "").split(os.pathsep)
    first = f"  . {activate}\n" if activate.exists() and not found else ""
    console.say(f"\n{path} shows it all; {round(time.monotonic() - started)} s in all. Try next:\n{first}"
                f"  threefold generate {out / 'decoder'} \"import os\"\n"
                f"  threefold chat {out / 'assistant'}\n"
                f"  threefold inspect batch {out / 'encoder'}\n"
                f"  threefold evaluate {out / 'decoder'}\n"
                f"  threefold pretrain --data YOUR_TEXT --budget 20min --out runs/mine\n"
                f"  threefold pretrain --from {out / 'decoder'} --data YOUR_DOMAIN_TEXT --budget 10min --out runs/domain")
    return {**results["decoder"], "yardsticks": table, "report": str(path), "seconds": round(time.monotonic() - started, 1),
            "encoder": results["encoder"], "seq2seq": results["seq2seq"],
            "taught": {name: {key: one[key] for key in ("figure", "before", "after", "without")} for name, one in taught.items()}}


# -- text to shards ----------------------------------------------------------------------------------------------------


def _data(out: Path, *, fresh: bool) -> Path:
    """One set of shards with one tokenizer, which has what every objective needs."""
    from threefold.data.shards import Shards, is_prepared, prepare
    from threefold.objectives import OBJECTIVES
    from threefold.text.clean import normalise
    from threefold.text.sources import parse_source, read_documents
    from threefold.text.tokenizer import Tokenizer

    folder = out / "data"
    if fresh or not is_prepared(folder):
        with console.progress(None, "reading, cleaning and encoding, documents") as bar:
            texts = (normalise(document.text) for document in read_documents("python"))
            special, roles = OBJECTIVES["span"].special, OBJECTIVES["masked"].roles
            tokenizer = Tokenizer.train("bpe", texts, VOCABULARY, special=special, roles=roles)
            prepare([parse_source("python")], tokenizer, folder, val_fraction=HELD_OUT,
                    progress=lambda documents, characters: bar.update(documents, characters=characters))
    shards = Shards.open(folder, verify=True)
    train, held = shards.count("train"), shards.count("validation")
    console.say(
        f"data: {train.documents:,} documents to learn from ({train.bytes / 1e6:.1f} MB, {train.tokens:,} tokens), "
        f"{held.documents:,} held out ({held.bytes / 1e6:.1f} MB)"
    )
    return folder


def _learn(run: Path, data: Path, objective: str, seconds: float, started: float, *, fresh: bool) -> dict[str, Any]:
    from threefold.pretrain import Request, pretrain

    recipe = Recipe().override({"data.paths": (str(data),), "train.objective": objective, "train.budget": round(seconds, 1)})
    return pretrain(recipe, Request(out=run, fresh=fresh and (run / "log.jsonl").exists(), started=started))


# -- evaluation and answers --------------------------------------------------------------------------------------------


def yardstick_table(data: Path, result: dict[str, Any]) -> dict[str, float]:
    """Bits per byte of the model and of the yardsticks, on the held-out part of the data."""
    from threefold.data.shards import Shards
    from threefold.evaluation.yardsticks import yardsticks
    from threefold.text.tokenizer import Tokenizer

    shards = Shards.open(data)
    return {**yardsticks(shards, Tokenizer.load(shards.tokenizer_dir)), "this model": float(result["bits_per_byte"])}


def complete(run: Path) -> list[tuple[str, str]]:
    """A continuation of each prompt, always with the same seed."""
    from threefold.auto import load
    from threefold.generation.engine import generate

    model, tokenizer = load(run)
    room = int(model.config.max_position_embeddings) // 2
    texts = generate(model, tokenizer, list(PROMPTS), max_new_tokens=min(80, room), temperature=0.7, top_p=0.95, seed=0)
    return list(zip(PROMPTS, texts, strict=True))


def fill(run: Path) -> list[tuple[str, str]]:
    """What the encoder puts in place of the mask in each text: its three best pieces."""
    import torch

    from threefold.text.tokenizer import Tokenizer

    model, tokenizer = _loaded(run), Tokenizer.load(run / "model")
    cls, sep, mask = (tokenizer.token_id(part) for part in ("cls", "sep", "mask"))
    assert cls is not None and sep is not None and mask is not None
    found = []
    for text in MASKED:
        before, after = text.split("{0}")
        ids = [cls, *tokenizer.encode(before), mask, *tokenizer.encode(after), sep]
        with torch.inference_mode():
            best = model(torch.tensor([ids])).logits[0, ids.index(mask)].topk(3).indices.tolist()
        found.append((text.format(" [?]").strip(), "   " + " | ".join(tokenizer.decode([i]).strip() or "(space)" for i in best)))
    return found


def restore(run: Path) -> list[tuple[str, str]]:
    """What the encoder-decoder writes for the stretch that is missing in each text."""
    import torch

    from threefold.model.cache import Cache
    from threefold.model.stack import Trace
    from threefold.objectives.vocabulary import SENTINEL
    from threefold.text.tokenizer import Tokenizer

    model, tokenizer = _loaded(run), Tokenizer.load(run / "model")
    first, second = (tokenizer.encode(SENTINEL.format(n), special=True)[0] for n in (0, 1))
    found = []
    for text in RESTORED:
        before, after = text.split("{0}")
        read = torch.tensor([[*tokenizer.encode(before), first, *tokenizer.encode(after), tokenizer.eos_id or 0]])
        cache, said = Cache(), [int(model.start)]
        encoded: Trace | None = None
        with torch.inference_mode():
            while len(said) < 14 and (len(said) == 1 or said[-1] not in (second, tokenizer.eos_id)):
                out = model(read, decoder_input_ids=torch.tensor([said[-1:]]), past_key_values=cache, encoder_outputs=encoded)
                encoded = encoded or Trace(out.encoder_last_hidden_state)
                said.append(int(out.logits[0, -1].argmax()))
        found.append((text.format("[?]"), "   " + tokenizer.decode([i for i in said[1:] if i not in (first, second)]).strip()))
    return found


def _loaded(run: Path) -> Any:
    from threefold.model.weights import load_model

    return load_model(run / "model")


# -- report ------------------------------------------------------------------------------------------------------------


def _report(out: Path, table: dict[str, float], answers: dict[str, list[tuple[str, str]]], results: dict[str, dict[str, Any]],
            taught: dict[str, dict[str, Any]]) -> Path:
    """DIR/report.html, the report of the whole: that of the decoder's run, with yardsticks and the answers of all three."""
    from threefold.training import report

    worst = max(table.values())
    bars = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="n">{value:.3f}</td><td style="width:55%"><div style="height:12px;border-radius:3px;'
        f'background:var(--{"a" if name == "this model" else "line"});width:{100 * value / worst:.1f}%"></div></td></tr>'
        for name, value in sorted(table.items(), key=lambda item: -item[1])
    )
    extra = [
        f'<h2>Beside honest yardsticks</h2><p class="k">bits per byte on the same held-out text; lower is better</p><table>{bars}</table>',
        f"<h2>The decoder goes on</h2>{_shown(answers['decoder'])}",
        f"<h2>The encoder fills masks</h2><p class=\"k\">held-out loss {results['encoder']['loss']:.3f} nats for each hidden token; the three best "
        f"pieces for [?]</p>{_shown(answers['encoder'])}",
        f"<h2>The encoder-decoder restores what is missing</h2><p class=\"k\">held-out loss {results['seq2seq']['loss']:.3f} nats for each token"
        f"</p>{_shown(answers['seq2seq'])}",
        *(f"<h2>{html.escape(one['title'])}</h2><p class=\"k\">{one['figure'].replace('_', ' ')} on modules that were held out: "
          f"{one['before']:.3f} before, {one['after']:.3f} after a few seconds of fine-tuning, {one['without']:.3f} without a model"
          f"</p>{_shown([(f'{asked}   ', said) for asked, said in one['said']])}" for one in taught.values()),
    ]
    run = out / "decoder"
    report.write_report(run, title="Three models of Python's own text", extra=extra)
    files.write_atomic(out / "report.html", (run / "report.html").read_bytes())
    return out / "report.html"


def _shown(said: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<pre><b>{html.escape(asked)}</b>{html.escape(text)}</pre>" for asked, text in said)
