"""Verbs on parts: tokenizers, data, batches, checkpoints and recipes; and what all verbs share.

Decision: a verb is a thin function, and the rooms are imported inside it, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from threefold import console
from threefold.errors import ThreefoldError, UsageError

tokenizer_app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Train a tokenizer, or show what it does."
)
data_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Prepare, show and verify data.")
checkpoints_app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="List, verify and prune the checkpoints of a run."
)
recipes_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, help="List the recipes, or copy one.")
inspect_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Look inside: what a batch trains on.")

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

# Flags of every verb that trains.
RunOut = Annotated[Path | None, typer.Option(help="run directory")]
Steps = Annotated[str | None, typer.Option(help="stop after so many updates")]
Budget = Annotated[str | None, typer.Option(help="stop after so much time: 90s, 3min, 2h")]
Seed = Annotated[str | None, typer.Option(help="names every random stream")]
OtherColumns = Annotated[str | None, typer.Option(help="ours=theirs,...: other column names; ours=a+b joins two")]
RecipeFile = Annotated[Path | None, typer.Option(help="a TOML recipe; flags overrule it")]
Replay = Annotated[Path | None, typer.Option(help="a log.jsonl whose decisions are repeated")]
Step = Annotated[int | None, typer.Option(help="resume from exactly this checkpoint")]
SaveDtype = Annotated[str | None, typer.Option(help="of the weights that are left: float32, bfloat16 or float16")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check everything, print every leaf of the recipe, write nothing")]
Fresh = Annotated[bool, typer.Option("--fresh", help="start over: the run that is there is replaced once the new one has begun")]
Force = Annotated[bool, typer.Option("--force", help="go on with a recipe that has changed since the run began")]
AcceptNewData = Annotated[bool, typer.Option("--accept-new-data", help="go on with data that has changed since the run began")]
StealLock = Annotated[bool, typer.Option("--steal-lock", help="take the run from a process that holds it, which must be dead")]


def is_run(run: Path) -> None:
    """Raise UsageError for a folder that is no run directory."""
    if not (run / "log.jsonl").exists():
        raise UsageError(f"`{run}` is no run directory: it has no log.jsonl")


def columns_of(text: str) -> dict[str, str]:
    """`ours=theirs,...` as a dictionary."""
    from threefold.text.sources import parse_columns

    return parse_columns(text) if text else {}


def _show_batch(found: dict[str, Any]) -> None:
    from threefold.inspection import batches

    console.print_json(found) if console.is_json() else console.out(batches.render(found))


def say_or_json(data: Mapping[str, Any], words: str) -> None:
    """The data with `--json`, else the words."""
    console.print_json(data) if console.is_json() else console.out(words)


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

    texts = (d.text for path in data for d in read_documents(parse_source(path).path, columns_of(columns)))
    foreign = files.besides(*Tokenizer.FILES)
    files.check_ours(out, foreign)
    trained = Tokenizer.train(kind, texts, vocab_size)
    console.notes(trained.notes)
    with files.published(out, foreign=foreign) as folder:
        trained.save(folder)
    say_or_json(
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
    skip_problems: Annotated[bool, typer.Option("--skip-problems", help="leave out rows and files that cannot be read, and count them")] = False,
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
            columns=columns_of(columns),
            skip_problems=skip_problems,
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
    for number, document in enumerate(read_documents(str(folder), columns_of(columns))):
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
    say_or_json({"damaged": []}, f"`{folder}`: every file is as it was written")


@inspect_app.command("batch")
def inspect_batch(
    model: Model,
    data: Annotated[Path | None, typer.Option(help="a shard folder, or rows for --task; a run has its own")] = None,
    task: Annotated[str, typer.Option(help="what is learnt from rows: classify, tag, instruct, seq2seq, embed, reward, dpo")] = "",
    objective: Annotated[str, typer.Option(help="causal, masked, replaced, span, prefix or seq2seq")] = "causal",
    context: Annotated[int | None, typer.Option(help="tokens of a row")] = None,
    columns: OtherColumns = None,
    step: Annotated[int, typer.Option(help="of a run: the step whose batch is shown")] = 0,
    rows: Annotated[int, typer.Option(help="rows that are shown")] = 4,
) -> None:
    """What a batch trains on: what is read, what is learnt, who attends to whom."""
    from threefold.inspection import batches

    if task and data is not None:
        from threefold.config import Recipe
        from threefold.task_rows import batch_in_words

        asked = Recipe().override({"finetune.task": task, "model.from": model, "data.paths": (str(data),), "model.context": context or 0,
                                   "data.columns": columns_of(columns or "")})
        _show_batch(batch_in_words(asked, step=step, shown=rows))
    elif data is None:
        is_run(Path(model))
        from threefold.config import load_recipe
        from threefold.task_rows import batch_in_words

        recipe = load_recipe(Path(model) / "recipe.toml")
        of = batch_in_words(recipe, step=step, shown=rows) if recipe.finetune.task else batches.of_run(Path(model), step=step, rows=rows)
        _show_batch(of)
    else:
        _show_batch(batches.of_model(model, data, objective, context=context, rows=rows))


@checkpoints_app.command("list")
def checkpoints_list(run: Run) -> None:
    """The checkpoints of a run, newest first, with what is wrong with those that cannot be used."""
    from threefold.training import checkpoint

    is_run(run)
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
    say_or_json({"verified": checkpoint.steps(run)}, f"verified: {', '.join(map(str, checkpoint.steps(run)))}")


@checkpoints_app.command("prune")
def checkpoints_prune(run: Run, keep: Annotated[int, typer.Option(help="checkpoints to keep, at least 2")] = 2) -> None:
    """Remove old checkpoints, but not the best one of a run that may still go back to it."""
    from threefold import files
    from threefold.training import checkpoint
    from threefold.training.keeper import best_steps

    is_run(run)
    with files.lock(run):
        removed = checkpoint.prune(run, keep, spare=best_steps(run), warn=console.warn)
    say_or_json({"removed": removed}, f"removed {len(removed)}")


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
    say_or_json({"recipe": str(path)}, str(path))
