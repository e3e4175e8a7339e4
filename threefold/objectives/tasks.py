"""What is learnt from rows, by name: the table behind `finetune --task` and `align --method`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from threefold.config import Recipe
from threefold.errors import ConfigError
from threefold.model.families.family import Family
from threefold.objectives.classify import Classify
from threefold.objectives.embed import Embed
from threefold.objectives.instruct import Instruct
from threefold.objectives.preference import Dpo, Reward
from threefold.objectives.rows import Fit, RowObjective
from threefold.objectives.tag import Tag
from threefold.objectives.translate import Translate
from threefold.text.pretrained import PretrainedTokenizer


@dataclass(frozen=True)
class Task:
    """A row of the table. `heads`: what a family must have one of, the first it has is trained; `make` gives the objective
    for a recipe, a tokenizer, how texts fit, and that head."""

    heads: tuple[str, ...]
    make: Callable[[Recipe, PretrainedTokenizer, Fit, str], RowObjective]
    chats: bool = False  # rows are conversations, through a chat template


TASKS: dict[str, Task] = {
    "classify": Task(("classify",), lambda recipe, words, fit, head: Classify(
        words, fit, weighted=recipe.finetune.class_weights, outside=recipe.finetune.outside, kind=recipe.finetune.kind)),
    "tag": Task(("tag",), lambda recipe, words, fit, head: Tag(words, fit)),
    "instruct": Task(("causal",), lambda recipe, words, fit, head: Instruct(words, fit), chats=True),
    "seq2seq": Task(("seq2seq", "causal"), lambda recipe, words, fit, head: Translate(
        words, fit, task=head, smoothing=recipe.objective.smoothing, database=recipe.finetune.database), chats=True),
    "embed": Task(("encoder", "body"), lambda recipe, words, fit, head: Embed(
        words, fit, pooling=recipe.finetune.pooling, dims=[int(dim) for one in recipe.finetune.dims for dim in one.split(",")])),
    "reward": Task(("classify",), lambda recipe, words, fit, head: Reward(words, fit), chats=True),
    "dpo": Task(("causal",), lambda recipe, words, fit, head: Dpo(
        words, fit, beta=recipe.finetune.beta, ipo=recipe.finetune.ipo, smoothing=recipe.finetune.flipped), chats=True),
}


def head_of(task: str, family: Family) -> str:
    """The head that a task trains in a family; raises ConfigError where it has none for it."""
    def serves(head: str) -> bool:  # a body that reads and writes has no one state to make a vector of
        return head in family.heads and not (head == "body" and family.base.is_encoder_decoder)

    found = next(filter(serves, TASKS[task].heads), None)
    if found is None:
        raise ConfigError(f"`{task}` needs a head for {' or '.join(f'`{head}`' for head in TASKS[task].heads)}, and a `{family.name}` "
                          "model has none", hint="start from a model of another family")
    return found
