"""Verbs that use a model as it is: generate, chat, export, prompts.

Decisions:
- A verb is a thin function, and the rooms are imported inside it, so that `--help` answers at once.
- What neither a flag nor a prompt says is drawn at temperature 0.8 from the likeliest 95 %. A served model has its own defaults, and
  none of ours is sent to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from threefold import console
from threefold.errors import UsageError
from threefold.verbs import Model, say_or_json

prompts_app = typer.Typer(rich_markup_mode=None, invoke_without_command=True, help="List the prompts, show one, or copy it.")

DRAWN = {"temperature": 0.8, "top_p": 0.95, "seed": 0}

MaxNewTokens = Annotated[int | None, typer.Option(help="most new tokens; what the context has room for, up to 128, unless given")]
AnswerTokens = Annotated[int | None, typer.Option(help="most tokens of an answer; what the context has room for, up to 512, unless given")]
Temperature = Annotated[float | None, typer.Option(help="0.8 unless given; 0 takes the most likely token")]
TopK = Annotated[int | None, typer.Option(help="draw from so many of the likeliest tokens; 0 from all")]
TopP = Annotated[float | None, typer.Option(help="draw from the likeliest tokens that hold so much of the probability; 0.95 unless given")]
MinP = Annotated[float | None, typer.Option(help="leave out tokens that are less than so many times as likely as the likeliest")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="above 1: what has been said becomes less likely")]
DrawnSeed = Annotated[int | None, typer.Option(help="of what is drawn; 0 unless given: the same again")]
Stop = Annotated[list[str], typer.Option(help="end before this text; may be repeated")]
With = Annotated[list[str], typer.Option("--with", metavar="PLACE=VALUE", help="the value of another place of the prompt; may be repeated")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="a name in the list, or a .toml file")]


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="TEXT", help="what is gone on with, or what goes into the prompt")],
    template: Annotated[str | None, typer.Option("--prompt", metavar="NAME", help="fill TEXT into this prompt (see `threefold prompts`)")] = None,
    values: With = (),  # type: ignore[assignment]
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: DrawnSeed = None,
    stop: Stop = (),  # type: ignore[assignment]
) -> None:
    """Continue a text; prints the new text alone, as it comes. MODEL may be served: openai:NAME or anthropic:NAME."""
    from threefold import remote
    from threefold.prompting import load_prompt, stripped

    given = _given(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
                   max_new_tokens=max_new_tokens)
    stops, text, form, drawn = list(stop), prompt, None, dict(DRAWN)
    if template is not None:
        form = load_prompt(template).given(**_values(values))
        text, stops = form.fill(prompt), [*stops, *form.stop]
        if form.new_tokens is not None:
            given.setdefault("max_new_tokens", form.new_tokens)
        if form.temperature is not None:
            drawn["temperature"] = form.temperature
    elif values:
        raise UsageError("`--with` is for the places of a prompt, and there is no `--prompt`", hint="threefold prompts lists them")
    if stops:
        given["stop"] = tuple(stops)
    pieces: Iterable[str]
    if remote.is_remote(model):
        pieces = remote.open(model).stream(text, **given)
    else:
        from threefold.generation.engine import stream

        found, tokenizer = _loaded(model)
        pieces = stream(found, tokenizer, text, **{**drawn, **given})
    if form is not None:
        pieces = stripped(pieces)
    if console.is_json():
        console.print_json({"prompt": text, "text": "".join(pieces)})
        return
    for piece in pieces:
        console.out(piece, end="")
    console.out("")


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="what the model is told before everything")] = None,
    history: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="keep the conversation here; gone on with if it exists")] = None,
    max_new_tokens: AnswerTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: DrawnSeed = None,
    stop: Stop = (),  # type: ignore[assignment]
) -> None:
    """Talk to a model in the terminal. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves. Where stdin is no terminal,
    each of its lines is a turn. MODEL may be served: openai:NAME or anthropic:NAME."""
    from threefold import remote
    from threefold.chat.conversation import Conversation
    from threefold.chat.loop import Loop, typed
    from threefold.chat.speakers import LocalSpeaker, ServedSpeaker, Speaker

    conversation = Conversation.resume(history, system) if history is not None else Conversation(system)
    given = _given(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
                   max_new_tokens=max_new_tokens)
    if stop:
        given["stop"] = tuple(stop)
    speaker: Speaker
    if remote.is_remote(model):
        speaker = ServedSpeaker(remote.open(model), **given)
    else:
        found, tokenizer = _loaded(model)
        speaker = LocalSpeaker(found, tokenizer, **{**DRAWN, **given})
    if conversation.turns:
        console.note(f"going on with {conversation.turns_in_words} in `{history}`; /reset begins anew")
    interactive = console.is_terminal(sys.stdin)
    if interactive:
        console.say(f"`{model}` answers. /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    Loop(speaker, conversation, interactive=interactive).run(typed() if interactive else iter(sys.stdin))


def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder to write")],
    to: Annotated[str, typer.Option(help="hf: a directory that transformers opens, adapters merged")] = "hf",
    dtype: Annotated[str | None, typer.Option(help="of the weights: float32, bfloat16, float16; as they are stored unless given")] = None,
) -> None:
    """Write a model as a directory of its own, an adapter merged into its base."""
    from threefold.exchange import export as write

    found = write(model, out, to=to, dtype=dtype)
    merged = ", the adapter merged into its base" if found["merged"] else ""
    say_or_json(found, f"`{out}`: {found['family']}, {found['parameters']:,} parameters in {found['dtype']}{merged}")


@prompts_app.callback()
def prompts(context_: typer.Context) -> None:
    """Prompts for models that were trained for nothing in particular."""
    if context_.invoked_subcommand is None:
        from threefold import prompting

        found = [prompting.load_prompt(name) for name in prompting.names()]
        console.table([{"name": one.name, "language": one.language, "task": one.task, "what": one.what} for one in found])


@prompts_app.command("show")
def prompts_show(
    name: Name,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="fill in this text, and not the sample")] = None,
    values: With = (),  # type: ignore[assignment]
) -> None:
    """What a model is given: the prompt filled with its own sample, or with a text."""
    from dataclasses import asdict

    from threefold.prompting import load_prompt

    form = load_prompt(name).given(**_values(values))
    filled = form.shown() if text is None else form.fill(text)
    say_or_json({**asdict(form), "filled": filled}, filled)


@prompts_app.command("copy")
def prompts_copy(name: Name, out: Annotated[Path | None, typer.Option(help="file to write (NAME.toml)")] = None) -> None:
    """Copy a prompt to a file of one's own."""
    from threefold import prompting

    path = prompting.copy(name, out or Path(f"{Path(name).stem}.toml"))
    say_or_json({"prompt": str(path)}, str(path))


def _given(**flags: Any) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _values(words: Sequence[str]) -> dict[str, str]:
    """`place=value` each as a dictionary."""
    for word in words:
        if "=" not in word:
            raise UsageError(f"`--with {word}` names no value", hint="--with PLACE=VALUE")
    return dict(word.split("=", 1) for word in words)


def _loaded(model: str) -> tuple[Any, Any]:
    """A model on the best device, its notes told, and its tokenizer."""
    from threefold.auto import load
    from threefold.device import pick_device

    found, tokenizer = load(model)
    console.notes(found.notes)
    found.to(pick_device(note=console.note))
    return found, tokenizer
