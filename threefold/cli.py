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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from threefold import __version__, command, console, using, verbs
from threefold.errors import UsageError
from threefold.verbs import (
    AcceptNewData,
    Budget,
    Columns,
    Data,
    DryRun,
    Force,
    Fresh,
    Model,
    OtherColumns,
    Out,
    RecipeFile,
    Replay,
    Run,
    RunOut,
    SaveDtype,
    Seed,
    StealLock,
    Step,
    Steps,
    columns_of,
    is_run,
    say_or_json,
)

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
app.add_typer(verbs.tokenizer_app, name="tokenizer")
app.add_typer(verbs.inspect_app, name="inspect")
app.add_typer(verbs.data_app, name="data")
app.add_typer(verbs.checkpoints_app, name="checkpoints")
app.add_typer(verbs.recipes_app, name="recipes")
app.add_typer(using.prompts_app, name="prompts")
app.command()(using.generate)
app.command()(using.chat)
app.command()(using.export)

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def tour(
    out: Out = Path("runs/tour"),
    budget: Annotated[str, typer.Option(help="time for the whole")] = "3min",
    fresh: Annotated[bool, typer.Option("--fresh", help="start over in a folder that holds an earlier tour")] = False,
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


@app.command(context_settings=EXTRA)
def pretrain(
    context_: typer.Context,
    data: Data = (),  # type: ignore[assignment]
    out: RunOut = None,
    family: Annotated[str | None, typer.Option(help="architecture: qwen3, llama, gpt2, bert, t5, ...")] = None,
    size: Annotated[str | None, typer.Option(help="published name, nano, parameters (25M), or width and layers (192x4)")] = None,
    objective: Annotated[str | None, typer.Option(help="what is learnt: causal, masked, replaced, span, prefix, seq2seq")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="model to continue from")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="bpe, wordpiece, unigram, byte, char, or a MODEL")] = None,
    vocab_size: Annotated[str | None, typer.Option(help="most pieces of a new tokenizer")] = None,
    grow_vocab: Annotated[str | None, typer.Option(help="pieces to add to the vocabulary of --from")] = None,
    context: Annotated[str | None, typer.Option(help="tokens seen at once")] = None,
    batch_tokens: Annotated[str | None, typer.Option(help="tokens of one update")] = None,
    steps: Steps = None,
    tokens: Annotated[str | None, typer.Option(help="stop after so many tokens")] = None,
    budget: Budget = None,
    until: Annotated[str | None, typer.Option(help="converged: stop when validation no longer improves")] = None,
    seed: Seed = None,
    val_fraction: Annotated[str | None, typer.Option(help="share of the characters held out")] = None,
    columns: OtherColumns = None,
    save_dtype: SaveDtype = None,
    recipe: RecipeFile = None,
    replay: Replay = None,
    step: Step = None,
    dry_run: DryRun = False,
    fresh: Fresh = False,
    force: Force = False,
    accept_new_data: AcceptNewData = False,
    steal_lock: StealLock = False,
) -> None:
    """Text -> a foundation model. The same command again resumes. --SECTION.OPTION VALUE reaches every leaf of the
    recipe."""
    from threefold import pretrain as room

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
        "data.columns": None if columns is None else columns_of(columns),
        "train.save_dtype": save_dtype,
    }
    asked = asked_for(context_, recipe, flags)
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
    say_or_json(
        result, f"`{out}/model`: {room.figure(result)} on held-out text; see {out}/report.html"
    )


def rows_verb(flag: str, tasks: str) -> Callable[..., None]:
    """The verb that learns from rows; `flag` names what is learnt."""
    def verb(
        context_: typer.Context,
        data: Data = (),  # type: ignore[assignment]
        out: RunOut = None,
        from_: Annotated[str | None, typer.Option("--from", help="model to start from")] = None,
        task: str | None = typer.Option(None, flag, help=tasks),
        val: Annotated[str | None, typer.Option(help="rows to hold out; a share of the data unless given")] = None,
        add_tokens: Annotated[list[str], typer.Option(help="a further special token, as of a template; may be repeated")] = (),  # type: ignore[assignment]
        lora: Annotated[str | None, typer.Option(help="learn matrices of this rank beside the model's own")] = None,
        steps: Steps = None,
        budget: Budget = None,
        truncate: Annotated[bool, typer.Option("--truncate", help="cut texts that are longer than the context, and count them")] = False,
        pooling: Annotated[str | None, typer.Option(help="embed, classify: how states become one vector: mean, cls or last")] = None,
        save_dtype: SaveDtype = None,
        seed: Seed = None,
        columns: OtherColumns = None,
        recipe: RecipeFile = None,
        replay: Replay = None,
        step: Step = None,
        dry_run: DryRun = False,
        fresh: Fresh = False,
        force: Force = False,
        accept_new_data: AcceptNewData = False,
        steal_lock: StealLock = False,
    ) -> None:
        from threefold import finetune as room
        from threefold.stage import Request, figure

        flags = {"finetune.task": task, "finetune.val": val, "lora.rank": lora, "finetune.add_tokens": tuple(add_tokens) or None,
                 "train.steps": steps, "train.budget": budget, "finetune.pooling": pooling, "train.save_dtype": save_dtype,
                 "finetune.truncate": truncate or None, "train.seed": seed, "model.from": from_, "data.paths": tuple(data) or None,
                 "data.columns": None if columns is None else columns_of(columns)}
        asked = asked_for(context_, recipe, flags)
        if out is None and not dry_run:
            raise UsageError("no place for the result: --out is missing", hint="for example --out runs/task")
        request = None if out is None else Request(
            out=out, fresh=fresh, force=force, accept_new_data=accept_new_data, steal_lock=steal_lock, replay=replay, step=step, started=STARTED)
        if dry_run or request is None:
            console.print_json(room.dry_run(asked, request))
            return
        result = room.finetune(asked, request)
        say_or_json(result, f"`{out}/model`: {figure(result)} on held-out rows; see {out}/report.html")
    return verb


app.command("finetune", context_settings=EXTRA, help="""A model and rows -> a model of a task. The same command again resumes.
--SECTION.OPTION VALUE reaches every leaf of the recipe.""")(
    rows_verb("--task", "what is learnt from rows: classify, tag, instruct, seq2seq, embed"))
app.command("align", context_settings=EXTRA, help="A model and preferences -> a reward model, or a model that answers as is preferred.")(
    rows_verb("--method", "reward or dpo"))


def asked_for(context_: typer.Context, recipe: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe of a file, or an empty one, with what flags say; None is not said."""
    from threefold.config import Recipe, load_recipe

    said = {key: value for key, value in flags.items() if value is not None} | command.leaves(context_)
    return (load_recipe(recipe, warn=console.warn) if recipe else Recipe()).override(said)


@app.command()
def evaluate(
    model: Model,
    data: Data = (),  # type: ignore[assignment]
    columns: Columns = "",
    task: Annotated[str, typer.Option(help="judge rows of this task, or `text`; what the run was taught, or its head is for, unless given")] = "",
    database: Annotated[str, typer.Option(help="a SQLite file in which the queries that a model writes are run")] = "",
) -> None:
    """Loss and perplexity of text, on --data or on a run's own held-out part: a decoder's with bits per byte, any other's by the
    objective of its run. Of a model of a task its figures on rows."""
    from threefold.scoring import of_text, score, task_of

    result: dict[str, Any]
    if data and (task := task or task_of(model, list(data))) != "text":
        result = score(model, list(data), columns_of(columns), task=task, database=database)
    else:
        result = of_text(model, list(data), columns_of(columns))
    words = {name: f"{value:,.6g}" if isinstance(value, int | float) else str(value) for name, value in result.items()}
    say_or_json(result, "\n".join(f"{name:14} {value}" for name, value in words.items()))


@app.command()
def report(run: Run) -> None:
    """Make RUN/report.html again, from the log and the files alone."""
    from threefold.training.report import write_report

    is_run(run)
    path = write_report(run)
    say_or_json({"report": str(path)}, str(path))


def main(arguments: list[str] | None = None) -> None:
    """Run the program and exit with its code."""
    command.calm_threads()
    argv, flags = command.common(list(sys.argv[1:] if arguments is None else arguments))
    console.configure(**flags)
    if argv[:1] == ["--version"]:
        console.out(__version__)
        sys.exit(0)
    sys.exit(command.guarded(app, argv))
