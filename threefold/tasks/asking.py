"""Tasks that ask a model that writes: question-answering, text-to-sql.

Decisions:
- No family here has a span head, so a question is answered in the model's own words, greedily: `answer` is what it writes, `start`
  and `end` are where that stands in the context (first as it is, then in any case of letters), -1 where it does not, and `score` is the
  geometric mean of the probabilities of the answer's tokens. Encoders are refused.
- How a model is asked follows from what it is. A decoder without a chat template goes on with a prompt that has examples. One that has
  a template is asked in a message, and an encoder-decoder reads a source: both as a model that was fine-tuned on such rows
  (`finetune --task seq2seq`) has read them, unless a `prompt` says otherwise.
- The sources are `question: Q context: C` (T5's own, arXiv 1910.10683) and, for SQL, the question and in the next line the schema, which
  `--columns source=question+schema` makes. A text alone is taken for a source and goes as it is.
- With a prompt or without, an answer is the new text without white space around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from threefold import auto
from threefold.errors import UsageError
from threefold.generation.arguments import id_set
from threefold.generation.likelihood import written_log_probs
from threefold.model.language import CausalLM
from threefold.prompting import Prompt, load_prompt
from threefold.tasks.base import prompt_of
from threefold.tasks.writing import Writing, settled


class _Asking(Writing):
    """A pipeline that fills the fields of its inputs into a prompt and takes the answer. `known` are those fields, `fewshot` is the
    prompt of a model that was trained for nothing, `source` what one that was fine-tuned has read."""

    loader, heads = auto._Auto, ("causal", "seq2seq")
    own = ("prompt",)
    standard: ClassVar[dict[str, Any]] = {"max_new_tokens": 128, "do_sample": False}
    known: ClassVar[tuple[str, ...]]
    fewshot: ClassVar[str]
    source: ClassVar[Prompt]

    def asked(self, batch: Sequence[Any], options: dict[str, Any], first: int) -> list[tuple[tuple[int, ...], list[int], str]]:
        """For each input: the ids that the model was given, the new ids up to the end of the answer, and the answer."""
        writes_on = isinstance(self.model, CausalLM) and self.tokenizer.chat_template is None
        form = prompt_of(options) or (load_prompt(self.fewshot) if writes_on else self.source)
        options = settled(form, options)
        prompts = [self._ids(one if isinstance(one, str) else form.fill(one), writes_on) for one in batch]
        if options.get("num_return_sequences", 1) != 1:
            raise UsageError(f"`num_return_sequences` is {options['num_return_sequences']!r}, and `{self.task}` gives one answer",
                             hint="text-generation gives several")
        found = []
        for prompt, (ids,) in zip(prompts, self.write(prompts, options, first, form.stop), strict=True):
            answer = form.answer(self.text(ids, options))
            while len(ids) > 1 and form.answer(self.text(ids[:-1], options)) == answer:  # the end, a stop string, white space
                ids = ids[:-1]
            found.append((prompt, ids, answer))
        return found

    def _ids(self, text: str, writes_on: bool) -> tuple[int, ...]:
        if writes_on:
            return tuple(self.tokenizer.encode_prompt(text))
        if isinstance(self.model, CausalLM):
            message = {"role": "user", "content": text}
            return tuple(self.tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False))
        return tuple(self.tokenizer.encode(text))

    def fields(self, one: Any) -> Any:
        """A text as it is, or the fields of an input, each a text; raises `UsageError` for others."""
        if not isinstance(one, Mapping) or set(one) != set(self.known):
            had = f"the fields {', '.join(f'`{name}`' for name in one) or 'none'}" if isinstance(one, Mapping) else f"{one!r:.60}"
            raise UsageError(f"an input of `{self.task}` is {had}, expected {' and '.join(f'`{name}`' for name in self.known)}",
                             hint=f"{{{', '.join(f'{name!r}: ...' for name in self.known)}}}")
        for name in self.known:
            if not isinstance(one[name], str) or not one[name].strip():
                raise UsageError(f"`{name}` is {one[name]!r:.60}, expected a text that is not empty")
        return one


class QuestionAnswering(_Asking):
    """Questions and contexts -> `score`, `start`, `end`, `answer` for each, generatively (see the head of this file). Called with
    `question=` and `context=` (texts, or lists of them; one context serves all questions), or with `{"question", "context"}`."""

    known, fewshot = ("question", "context"), "question-answering"
    source = Prompt(name="question and context", template="question: {question} context: {context}", temperature=0)

    def __call__(self, inputs: Any = None, *, question: str | Sequence[str] | None = None, context: str | Sequence[str] | None = None,
                 **options: Any) -> Any:
        """One result, or a list of results."""
        if (inputs is None) == (question is None and context is None):
            raise UsageError("a question and its context are given once", hint='question="...", context="...", or a list of {"question", "context"}')
        if inputs is None:
            inputs = _paired(question, context)
        return super().__call__(inputs, **options)

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        batch = [self.fields(one) for one in batch]
        found = []
        for one, (prompt, ids, answer) in zip(batch, self.asked(batch, options, first), strict=True):
            start, end = _place(answer, one["context"])
            ends = id_set(self.model.config.eos_token_id) | id_set(self.tokenizer.eos_id)
            said = [token for token in ids if token not in ends]
            logs = written_log_probs(self.model, [(prompt, said)])[0] if answer and said else []
            found.append({"score": math.exp(sum(logs) / len(logs)) if logs else 0.0, "start": start, "end": end,
                          "answer": answer if start < 0 else one["context"][start:end]})
        return found


class TextToSql(_Asking):
    """Questions and the tables they are about -> `[{"generated_text": query}]`. An input is `{"question", "schema"}`, where the schema
    is a text or `{table: [columns]}`, or the whole source as a text."""

    known, fewshot = ("question", "schema"), "sql"
    source = Prompt(name="question and schema", template="{question}\n{schema}", temperature=0)

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        if prompt_of(options) is not None and any(isinstance(one, str) for one in batch):
            raise UsageError("an input of `text-to-sql` is one text, and a prompt has places for a question and a schema",
                             hint="give {'question': ..., 'schema': ...}, or leave `prompt` out")
        batch = [one if isinstance(one, str) else self.fields(_with_schema(one)) for one in batch]
        return [{"generated_text": answer} for _, _, answer in self.asked(batch, options, first)]

    def shaped_one(self, result: Any, inputs: Any, options: dict[str, Any]) -> Any:
        return [result]


def _paired(question: Any, context: Any) -> Any:
    """The inputs that `question=` and `context=` say."""
    if question is None or context is None:
        raise UsageError(f"`{'question' if question is None else 'context'}` is missing", hint="a question is answered from a context")
    if isinstance(question, str) and isinstance(context, str):
        return {"question": question, "context": context}
    questions = [question] if isinstance(question, str) else list(question)
    contexts = [context] * len(questions) if isinstance(context, str) else list(context)
    if len(questions) != len(contexts):
        raise UsageError(f"there are {len(questions)} questions and {len(contexts)} contexts", hint="give one context each, or one for all")
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]


def _place(answer: str, context: str) -> tuple[int, int]:
    """Where an answer stands in a text, (-1, -1) where it does not."""
    found = re.search(re.escape(answer), context) or re.search(re.escape(answer), context, re.IGNORECASE) if answer else None
    return found.span() if found else (-1, -1)


def _with_schema(one: Any) -> Any:
    """An input whose schema is a text: `table(column, column), table(column)` of a mapping."""
    if not isinstance(one, Mapping) or not isinstance(one.get("schema"), Mapping):
        return one
    tables = [f"{table}({', '.join(map(str, columns))})" for table, columns in one["schema"].items()]
    return {**one, "schema": ", ".join(tables)}
