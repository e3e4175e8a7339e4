"""Answer in a conversation: messages through the model's chat template, and the loss on the answers alone.

Decisions:
- What is learnt is what a model has to write behind the prompt that generation gives it: the ids of a conversation up to
  the answer, with the opening of the answer, are those of the prompt, and what the template puts behind an answer (its
  end of turn) is learnt too. A row in which the two would differ, because a piece spans opening and answer, is refused.
- A base without a template gets a plain one, which needs no token that the vocabulary lacks: turns end with eos. It is
  saved with the tokenizer.
- A template that rewrites what was said before (some take old thoughts out) makes an example of each answer by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from threefold.data.examples import Item, Text
from threefold.data.loader import IGNORED, Batch
from threefold.errors import ConfigError, DataError, ThreefoldError
from threefold.objectives.rows import Judged, RowObjective, text_of
from threefold.objectives.term import Term
from threefold.text.encoded import without_last
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.rows import Row

PLAIN = (
    "{bos}{{% for message in messages %}}{{% if message['role'] == 'assistant' %}}{{{{ '### Answer:\\n' + message['content'] + "
    "{end} + '\\n' }}}}{{% elif message['role'] == 'system' %}}{{{{ message['content'] + '\\n\\n' }}}}{{% else %}}{{{{ "
    "'### Question:\\n' + message['content'] + '\\n' }}}}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ "
    "'### Answer:\\n' }}}}{{% endif %}}")


def plain_template(tokenizer: PretrainedTokenizer) -> str:
    """The template of a model that has none: it begins with bos (or cls) where the tokenizer begins texts with it, and turns
    end with eos (or sep). Raises ConfigError for a tokenizer that ends nothing."""
    first = next(iter(tokenizer.core.opening), None)
    opens = next((name for name in ("bos", "cls") if first is not None and first == tokenizer.core.token_id(name)), None)
    ends = next((name for name in ("eos", "sep") if getattr(tokenizer, f"{name}_token") is not None), None)
    if ends is None:
        raise ConfigError("the model has neither a chat template nor a token that ends a turn (eos)",
                          hint="give a template with --finetune.template FILE")
    return PLAIN.format(bos=f"{{{{ {opens}_token }}}}" if opens else "", end=f"{ends}_token")


class Instruct(RowObjective):
    """One term, `tokens`: its weight is the number of tokens of answers."""

    name, task, packs = "instruct", "causal", True
    fields = ()
    optional = ("messages", "instruction", "input", "output", "tools")
    same = ("messages", "instruction", "input")
    ends = False  # whether a text that is cut ends in eos all the same

    def items(self, rows: Sequence[Row]) -> list[Item]:
        """Conversations as ids, each answer labelled."""
        found = []
        for row in rows:
            messages, tools = messages_of(row), row.fields.get("tools")
            first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
            found += self._conversation(self.fitting(messages, first, row.source, tools), row.source, tools)
        return found

    def fitting(self, messages: list[dict[str, Any]], answer: int, where: str, tools: Any = None) -> list[dict[str, Any]]:
        """The conversation, where texts may be cut with the longest message before an answer so short that the answer has room, all of
        it or half of the context. Raises DataError where that cannot be."""
        shorter = messages
        while self.fit.truncate:
            prompt, whole = (len(self._ids(shorter[:answer + more], where, tools, opened=not more)) for more in (0, 1))
            over = prompt + min(whole - prompt, self.fit.context // 2) - self.fit.context
            if over <= 0:
                self.fit.cut += shorter is not messages and whole <= self.fit.context  # what is longer still is counted where it is cut
                break
            longest = max(range(answer), key=lambda place: len(shorter[place]["content"]), default=None)
            kept = "" if longest is None else without_last(shorter[longest]["content"], over, self.tokenizer).rstrip()
            if longest is None or not kept:
                raise DataError(f"{where}: the prompt is {prompt:,} tokens even with its messages cut, and the model takes {self.fit.context:,}",
                                hint="leave the row out, or take a model with a longer context")
            shorter = [{**message, "content": kept} if place == longest else message for place, message in enumerate(shorter)]
        return shorter

    def _conversation(self, messages: Sequence[Mapping[str, Any]], where: str, tools: Any) -> list[Item]:
        found: list[tuple[np.ndarray, np.ndarray]] = []
        before: list[int] = []
        learnt: list[tuple[int, int]] = []
        apart = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._ids(messages[:place], where, tools, opened=True)
            whole = self._ids(messages[:place + 1], where, tools, opened=False)
            if whole[:len(prompt)] != prompt:
                raise DataError(f"{where}: with the answer in message {place} the ids of the prompt are others than without: a piece spans the "
                                f"opening of the answer and its beginning, {message['content'][:20]!r}, or the template writes the answer elsewhere",
                                hint="take spaces and line breaks from the beginning of answers, or give another template (--finetune.template FILE)")
            if before and prompt[:len(before)] != before:
                apart.append((before, learnt))
                learnt = []
            learnt = [*learnt, (len(prompt), len(whole))]
            before = whole
        found = [_labelled(ids, spans) for ids, spans in [*apart, (before, learnt)]]
        return [Item((Text(*self._cut(ids, labels, where)),), source=where) for ids, labels in found]

    def _ids(self, messages: Sequence[Mapping[str, Any]], where: str, tools: Any, *, opened: bool) -> list[int]:
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(list(messages), tools, add_generation_prompt=opened, return_dict=False)
        except ThreefoldError as error:
            raise DataError(f"{where}: {error}", hint=error.hint) from error
        return ids

    def _cut(self, ids: np.ndarray, labels: np.ndarray, where: str) -> tuple[np.ndarray, None, np.ndarray]:
        self.fit.check(len(ids), where)
        labels = labels[:self.fit.context]
        if not (labels != IGNORED).any():
            raise DataError(f"{where}: the conversation is {len(ids):,} tokens, and its prompt alone fills the {self.fit.context:,} that the model "
                            "takes: nothing of the answer is left", hint="shorten the prompt, or take a model with a longer context")
        kept = ids[:self.fit.context]
        if self.ends and len(ids) > len(kept) and self.tokenizer.eos_id is not None:
            kept = np.append(kept[:-1], self.tokenizer.eos_id)
        return kept, None, labels

    def terms(self, model: nn.Module, batch: Batch, **context: Any) -> list[Term]:
        """Sum of the negative log-likelihoods in nats, in float32 or wider."""
        total, rows = model.loss_rows(batch.input_ids, batch.labels, batch.positions, batch.documents, **context)  # type: ignore[operator]
        return [Term("tokens", total, self.weights(batch)["tokens"], rows=rows)]

    def judge(self, model: Any, batch: Batch, items: Sequence[Item]) -> list[Judged]:
        """Nothing: an answer may be good in many ways, and the loss says how far it is from the one given."""
        return []

    def measure(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Nothing; see `judge`."""
        return {}


def messages_of(row: Row) -> list[dict[str, Any]]:
    """The conversation of a row: its messages with all that they hold, for the template to write, or an instruction, perhaps an
    input, and the output."""
    fields = row.fields
    if fields.get("messages") is not None:
        messages = fields["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
            raise DataError(f"{row.source}: `messages` should be a list of {{\"role\", \"content\"}}", hint="mend the row")
    elif "instruction" in fields and "output" in fields:
        more = fields.get("input")
        asked = text_of(row, "instruction")
        if isinstance(more, str) and more.strip():
            asked = f"{asked}\n\n{more}"
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": fields["output"]}]
    else:
        seen = ", ".join(f"`{name}`" for name in list(fields)[:20])
        raise DataError(f"{row.source}: the row has neither `messages` nor `instruction` and `output`; its columns are {seen}",
                        hint="name the columns: --columns instruction=THEIRS,output=THEIRS")
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise DataError(f"{row.source}: the conversation has no answer: no message of the role `assistant`", hint="mend the row or leave it out")
    messages = [{**m, "content": ""} if m.get("content") is None and m["role"] == "assistant" and m.get("tool_calls") else m for m in messages]
    for message in messages:
        empty = message["role"] == "assistant" and not message.get("tool_calls") and not str(message.get("content")).strip()
        if not isinstance(message.get("content"), str) or empty:
            raise DataError(f"{row.source}: a message of `{message['role']}` has the content {str(message.get('content'))[:60]!r}, and "
                            "every message is a text, and an answer is not empty", hint="mend the row or leave it out")
    spoken = [m["role"] for m in messages if m["role"] != "system"]
    if twice := next((a for a, b in itertools.pairwise(spoken) if a == b != "tool"), None):
        raise DataError(f"{row.source}: two messages of `{twice}` follow each other",
                        hint="join them, or mend the row: question and answer take turns")
    if any(m["role"] == "system" for m in messages[1:]):
        raise DataError(f"{row.source}: a message of `system` stands behind others", hint="it comes first, where there is one")
    return [{name: value for name, value in m.items() if value is not None} for m in messages]


def _labelled(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and, under the token before each token of a span, that token."""
    row = np.asarray(ids, dtype=np.int64)
    labels = np.full(len(row), IGNORED, dtype=np.int64)
    for start, stop in spans:
        labels[max(start, 1) - 1:stop - 1] = row[max(start, 1):stop]
    return row, labels
