"""The command line: the table of verbs, and nothing that a Python call could not do too.

Decisions:
- Every verb is a thin function: it reads flags, calls one function of a room, and prints what comes back. Rooms are
  imported inside the verbs, so that `--help` answers at once.
- Flags are names for leaves of the recipe; `--section.option value` reaches every other leaf. An unknown flag is an
  error that says what was meant.
- `--json`, `--quiet` and `--debug` go with every verb, anywhere. `--data A B` is `--data A --data B`.
- Errors are printed in one voice and end with the exit code of their class.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from threefold import __version__, command, console
from threefold.errors import ThreefoldError, UsageError

if TYPE_CHECKING:
    from threefold.config import Recipe

STARTED = time.monotonic() - time.process_time()  # near enough to the start of the process, imports included

app = typer.Typer(
    name="threefold",
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make, understand and use a language model, whole. All verbs take --json, --quiet and --debug.",
)
tokenizer_app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Train a tokenizer, or show what it does."
)
data_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Prepare, show and verify data.")
checkpoints_app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="List, verify and prune the checkpoints of a run."
)
recipes_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, help="List the recipes, or copy one.")
inspect_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Look inside: what a batch trains on.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(inspect_app, name="inspect")
app.add_typer(data_app, name="data")
app.add_typer(checkpoints_app, name="checkpoints")
app.add_typer(recipes_app, name="recipes")

Data = Annotated[
    list[str],
    typer.Option(
        "--data", metavar="PATH...", help="files, folders, globs, `python` or `hub:NAME`; PATH:0.7 gives a share"
    ),
]
Columns = Annotated[str, typer.Option(help="ours=theirs,...: other column names; ours=a+b joins two")]
Out = Annotated[Path, typer.Option(help="where the result goes")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="run directory, Hugging Face directory or hub name")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="run directory")]
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def tour(
    out: Out = Path("runs/tour"),
    budget: Annotated[str, typer.Option(help="time for the whole")] = "3min",
    fresh: bool = False,
) -> None:
    """The whole life of a model on this machine, from text that it already has."""
    from threefold.config import parse_duration
    from threefold.tour import tour as run_tour

    result = run_tour(out, parse_duration(budget), started=STARTED, fresh=fresh)
    if console.is_json():
        console.print_json(result)


@app.command()
def doctor() -> None:
    """Is this machine ready, and how fast is it."""
    from threefold import doctor as room

    found = room.diagnose(self_test=room.self_test)
    if console.is_json():
        console.print_json(found)
    else:
        console.out(room.render(found))


@tokenizer_app.command("train")
def tokenizer_train(
    data: Data,
    out: Out,
    kind: Annotated[str, typer.Option(help="bpe, wordpiece, unigram, byte or char")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="most pieces it may have")] = 8192,
    columns: Columns = "",
) -> None:
    """Train a tokenizer and save it where transformers can read it."""
    from threefold import files
    from threefold.text.sources import parse_source, read_documents
    from threefold.text.tokenizer import Tokenizer

    texts = (d.text for path in data for d in read_documents(parse_source(path).path, _columns(columns)))
    foreign = files.besides(*Tokenizer.FILES)
    files.check_ours(out, foreign)
    trained = Tokenizer.train(kind, texts, vocab_size)
    console.notes(trained.notes)
    with files.published(out, foreign=foreign) as folder:
        trained.save(folder)
    _say_or_json(
        {"kind": kind, "vocab_size": trained.vocab_size, "out": str(out)},
        f"`{out}`: {kind}, {trained.vocab_size:,} pieces",
    )


@tokenizer_app.command("show")
def tokenizer_show(model: Model, text: str) -> None:
    """The pieces and ids of a text."""
    from threefold import hub
    from threefold.text.tokenizer import Tokenizer

    found = Tokenizer.load(hub.resolve(model, needs=("tokenizer",)))
    ids = found.encode(text)
    console.table([{"piece": piece, "id": i} for piece, i in zip(found.tokenize(text), ids, strict=True)])


@data_app.command("prepare")
def data_prepare(
    data: Data,
    tokenizer: Annotated[str, typer.Option(help="a model or tokenizer directory")],
    out: Out,
    columns: Columns = "",
    val_fraction: Annotated[float, typer.Option(help="share of the characters held out")] = 0.1,
) -> None:
    """Text -> shards: read, clean, deduplicate, split, encode."""
    from threefold import hub
    from threefold.data.shards import prepare, summary
    from threefold.text.sources import parse_source
    from threefold.text.tokenizer import Tokenizer

    found = Tokenizer.load(hub.resolve(tokenizer, needs=("tokenizer",)))
    with console.progress(None, "documents") as bar:
        shards = prepare(
            [parse_source(path) for path in data],
            found,
            out,
            val_fraction=val_fraction,
            columns=_columns(columns),
            progress=lambda documents, characters: bar.update(documents, characters=characters),
        )
    console.print_json(summary(shards))


@data_app.command("show")
def data_show(
    folder: Annotated[Path, typer.Argument(metavar="DIR|FILE")],
    columns: Columns = "",
    objective: Annotated[str, typer.Option(help="show the examples that it makes of a shard folder")] = "",
) -> None:
    """What a shard folder or a data file holds."""
    from threefold.data.shards import Shards, is_prepared, summary

    if objective:
        from threefold.inspection import batches

        _show_batch(batches.of_shards(folder, objective))
        return
    if is_prepared(folder):
        console.print_json(summary(Shards.open(folder)))
        return
    from threefold.text.sources import read_documents
    for number, document in enumerate(read_documents(str(folder), _columns(columns))):
        if number == 10:
            console.say("... (the first 10 documents)")
            break
        console.print_json({"source": document.source, "characters": len(document.text), "text": document.text[:500]})


@data_app.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(metavar="DIR")]) -> None:
    """Read every byte of a shard folder and compare its hash; all damage is told at once."""
    from threefold.data.shards import Shards
    from threefold.errors import DamagedData

    if problems := Shards.open(folder).verify():
        raise DamagedData(
            f"`{folder}` is damaged: " + "; ".join(problems), hint="restore the files, or prepare the data again"
        )
    _say_or_json({"damaged": []}, f"`{folder}`: every file is as it was written")


@app.command(context_settings=EXTRA)
def pretrain(
    context_: typer.Context,
    data: Data = (),  # type: ignore[assignment]
    out: Annotated[Path | None, typer.Option(help="run directory")] = None,
    family: Annotated[str | None, typer.Option(help="architecture: qwen3, llama, gpt2, bert, t5, ...")] = None,
    size: Annotated[str | None, typer.Option(help="published name, nano, or parameters (25M)")] = None,
    objective: Annotated[str | None, typer.Option(help="what is learnt: causal, masked, replaced, span, prefix, seq2seq")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="model to continue from")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bpe, wordpiece, unigram, byte, char, or a MODEL")] = None,
    vocab_size: Annotated[str | None, typer.Option(help="most pieces of a new tokenizer")] = None,
    grow_vocab: Annotated[str | None, typer.Option(help="pieces to add to the vocabulary of --from")] = None,
    context: Annotated[str | None, typer.Option(help="tokens seen at once")] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="tokens of one update")] = None,
    steps: Annotated[str | None, typer.Option(help="stop after so many updates")] = None,
    tokens: Annotated[str | None, typer.Option(help="stop after so many tokens")] = None,
    budget: Annotated[str | None, typer.Option(help="stop after so much time: 90s, 3min, 2h")] = None,
    until: Annotated[str | None, typer.Option(help="converged: stop when validation no longer improves")] = None,
    seed: Annotated[str | None, typer.Option(help="names every random stream")] = None,
    val_fraction: Annotated[str | None, typer.Option(help="share of the characters held out")] = None,
    columns: Annotated[str | None, typer.Option(help="ours=theirs,...: other column names; ours=a+b joins two")] = None,
    save_dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    recipe: Annotated[Path | None, typer.Option(help="a TOML recipe; flags overrule it")] = None,
    replay: Annotated[Path | None, typer.Option(help="a log.jsonl whose decisions are repeated")] = None,
    step: Annotated[int | None, typer.Option(help="resume from exactly this checkpoint")] = None,
    dry_run: bool = False,
    fresh: bool = False,
    force: bool = False,
    accept_new_data: bool = False,
    steal_lock: bool = False,
) -> None:
    """Text -> a foundation model. The same command again resumes. --SECTION.OPTION VALUE reaches every leaf of the
    recipe."""
    from threefold import pretrain as room
    from threefold.config import Recipe, load_recipe

    flags = {
        "data.paths": tuple(data) or None,
        "model.family": family,
        "model.size": size,
        "train.objective": objective,
        "model.from": from_,
        "tokenizer.kind_or_path": tokenizer,
        "tokenizer.vocab_size": vocab_size,
        "model.grow_vocab": grow_vocab,
        "model.context": context,
        "train.batch_tokens": batch_tokens,
        "train.steps": steps,
        "train.tokens": tokens,
        "train.budget": budget,
        "train.until": until,
        "train.seed": seed,
        "data.val_fraction": val_fraction,
        "data.columns": None if columns is None else _columns(columns),
        "train.save_dtype": save_dtype,
    }
    overrides = {key: value for key, value in flags.items() if value is not None} | command.leaves(context_)
    asked: Recipe = (load_recipe(recipe, warn=console.warn) if recipe else Recipe()).override(overrides)
    if out is None and dry_run:
        console.print_json(room.dry_run(asked))
        return
    if out is None:
        raise UsageError("no place for the result: --out is missing", hint="for example --out runs/first")
    request = room.Request(
        out=out,
        fresh=fresh,
        force=force,
        accept_new_data=accept_new_data,
        steal_lock=steal_lock,
        replay=replay,
        step=step,
        started=STARTED,
    )
    if dry_run:
        console.print_json(room.dry_run(asked, request))
        return
    result = room.pretrain(asked, request)
    _say_or_json(
        result, f"`{out}/model`: {room.figure(result)} on held-out text; see {out}/report.html"
    )


@app.command()
def evaluate(model: Model, data: Data = (), columns: Columns = "") -> None:  # type: ignore[assignment]
    """Loss, bits per byte and perplexity, on --data or on a run's own held-out part."""
    from threefold.evaluation.loss import evaluate_model

    result = evaluate_model(model, list(data), _columns(columns))
    _say_or_json(result, "\n".join(f"{name:14} {value:,.6g}" for name, value in result.items()))


@app.command()
def generate(
    model: Model,
    prompt: str,
    max_new_tokens: Annotated[int | None, typer.Option(help="most new tokens; what the context has room for, up to 128, unless given")] = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Annotated[list[str], typer.Option(help="end before this text; may be repeated")] = (),  # type: ignore[assignment]
) -> None:
    """Continue a prompt; prints the new text alone, as it comes."""
    from threefold.auto import load
    from threefold.device import pick_device
    from threefold.generation.engine import stream
    from threefold.generation.sampling import SamplingSettings

    found, tokenizer = load(model)
    console.notes(found.notes)
    found.to(pick_device(note=console.note))
    settings = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    pieces = stream(found, tokenizer, prompt, settings, max_new_tokens=max_new_tokens, stop=tuple(stop))
    if console.is_json():
        console.print_json({"prompt": prompt, "text": "".join(pieces)})
        return
    for piece in pieces:
        console.out(piece, end="")
    console.out("")


@inspect_app.command("batch")
def inspect_batch(
    model: Model,
    data: Annotated[Path | None, typer.Option(help="a shard folder; a run has its own")] = None,
    objective: Annotated[str, typer.Option(help="causal, masked, replaced, span, prefix or seq2seq")] = "causal",
    context: Annotated[int | None, typer.Option(help="tokens of a row")] = None,
    step: Annotated[int, typer.Option(help="of a run: the step whose batch is shown")] = 0,
    rows: int = 4,
) -> None:
    """What a batch trains on: what is read, what is learnt, who attends to whom."""
    from threefold.inspection import batches

    if data is None:
        _is_run(Path(model))
        _show_batch(batches.of_run(Path(model), step=step, rows=rows))
    else:
        _show_batch(batches.of_model(model, data, objective, context=context, rows=rows))


@app.command()
def report(run: Run) -> None:
    """Make RUN/report.html again, from the log and the files alone."""
    from threefold.training.report import write_report

    _is_run(run)
    path = write_report(run)
    _say_or_json({"report": str(path)}, str(path))


@recipes_app.callback()
def recipes(context_: typer.Context) -> None:
    """The recipes that come with threefold."""
    if context_.invoked_subcommand is None:
        from threefold.config import recipes as room
        console.table([{"name": name, "what": what} for name, what in room.listed()])


@recipes_app.command("copy")
def recipes_copy(name: str, out: Annotated[Path | None, typer.Option(help="file to write (NAME.toml)")] = None) -> None:
    """Copy a recipe to a file of one's own."""
    from threefold.config import recipes as room

    path = room.copy(name, out or Path(f"{name}.toml"))
    _say_or_json({"recipe": str(path)}, str(path))


@checkpoints_app.command("list")
def checkpoints_list(run: Run) -> None:
    """The checkpoints of a run, newest first, with what is wrong with those that cannot be used."""
    from threefold.training import checkpoint

    _is_run(run)
    rows = []
    for step in checkpoint.steps(run):
        path = checkpoint.folder(run, step)
        try:
            checkpoint.verify(path)
            state = "verified"
        except ThreefoldError as error:
            state = str(error)
        rows.append(
            {"step": step, "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()), "state": state}
        )
    console.table(rows, ("step", "bytes", "state"))


@checkpoints_app.command("verify")
def checkpoints_verify(run: Run) -> None:
    """Read every byte of every checkpoint; exits 3 if one is damaged."""
    from threefold.errors import CheckpointError
    from threefold.training import checkpoint

    problems = []
    for step in checkpoint.steps(run):
        try:
            checkpoint.verify(checkpoint.folder(run, step))
        except CheckpointError as error:
            problems.append(str(error))
    if problems or not checkpoint.steps(run):
        raise CheckpointError(
            "; ".join(problems) or f"`{run}` has no checkpoint",
            hint="a resume takes the newest checkpoint that verifies",
        )
    _say_or_json({"verified": checkpoint.steps(run)}, f"verified: {', '.join(map(str, checkpoint.steps(run)))}")


@checkpoints_app.command("prune")
def checkpoints_prune(run: Run, keep: Annotated[int, typer.Option(help="checkpoints to keep, at least 2")] = 2) -> None:
    """Remove old checkpoints, but not the best one of a run that may still go back to it."""
    from threefold import files
    from threefold.training import checkpoint
    from threefold.training.keeper import best_steps

    _is_run(run)
    with files.lock(run):
        removed = checkpoint.prune(run, keep, spare=best_steps(run), warn=console.warn)
    _say_or_json({"removed": removed}, f"removed {len(removed)}")


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit with its code."""
    command.calm_threads()
    argv, flags = command.common(list(sys.argv[1:] if arguments is None else arguments))
    console.configure(**flags)
    if argv[:1] == ["--version"]:
        console.out(__version__)
        sys.exit(0)
    sys.exit(command.guarded(app, argv))


def _is_run(run: Path) -> None:
    if not (run / "log.jsonl").exists():
        raise UsageError(f"`{run}` is no run directory: it has no log.jsonl")


def _columns(text: str) -> dict[str, str]:
    from threefold.text.sources import parse_columns

    return parse_columns(text) if text else {}


def _show_batch(found: dict[str, Any]) -> None:
    from threefold.inspection import batches

    console.print_json(found) if console.is_json() else console.out(batches.render(found))


def _say_or_json(data: Mapping[str, Any], words: str) -> None:
    console.print_json(data) if console.is_json() else console.out(words)
