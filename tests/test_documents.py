"""Every command that README and the guides show is one that the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from threefold import command
from threefold.cli import app
from threefold.config import Recipe
from threefold.prompting import load_prompt, names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = re.compile(r"^    (?:[^|#\n]*\| *)?threefold +(\S.*)$", re.MULTILINE)  # in a block, perhaps behind a pipe
FLAGS = {"task": "finetune.task", "from_": "model.from", "objective": "train.objective", "family": "model.family", "lora": "lora.rank",
         "steps": "train.steps", "budget": "train.budget", "grow_vocab": "model.grow_vocab", "val": "finetune.val"}  # those that leaves go with
OWN_PROMPTS = ("mood.toml", "weather.toml")  # those that docs/guides/prompts.md makes


def commands() -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for shown in SHOWN.finditer(text):
            words = shlex.split(shown[1], comments=True)
            found.append(pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}"))
    return found


def test_commands_are_found() -> None:
    assert len(commands()) > 30
    assert {param.values[0][0] for param in commands()} >= {"pretrain", "finetune", "align", "evaluate", "generate", "chat", "export", "prompts"}


@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_documents_is_understood(words: list[str]) -> None:
    argv, _ = command.common(words)
    verb: Any = typer.main.get_command(app)
    context = verb.make_context("threefold", list(argv), resilient_parsing=False)
    while hasattr(verb, "commands"):
        rest = [*context._protected_args, *context.args]
        if not rest:  # `threefold prompts` alone
            return
        name, verb, rest = verb.resolve_command(context, rest)
        context = verb.make_context(name, rest, parent=context)
    said = {leaf: context.params[name] for name, leaf in FLAGS.items() if context.params.get(name)}
    Recipe().override({**said, **command.leaves(context)})
    template = context.params.get("template")
    assert template is None or template in OWN_PROMPTS or load_prompt(template)
    if context.info_name in ("show", "copy") and words[0] == "prompts":
        assert context.params["name"] in names() or context.params["name"] in OWN_PROMPTS


def test_links_between_the_documents_lead_somewhere() -> None:
    broken = [f"{page.relative_to(ROOT)}: {target}" for page in [*PAGES, *ROOT.glob("*.md")] for target in
              re.findall(r"\]\(([^)#:\s]+)\)", page.read_text(encoding="utf-8")) if not (page.parent / target).exists()]
    assert not broken
