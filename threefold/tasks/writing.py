"""Tasks whose model writes: text-generation, and what encoder-decoders do.

Decisions:
- What neither the call nor generation_config.json says is transformers' own for its pipelines: 256 new tokens, and for
  text-generation drawn at temperature 0.7; version 4's four beams for the tasks of encoder-decoders.
- `task_specific_params` of config.json are followed for the latter alone: version 5 has dropped them, and GPT-2's would allow
  a text of 50 tokens with its prompt.
- A chat that ends with the assistant's message goes on with that message, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from threefold import auto
from threefold.errors import UsageError
from threefold.generation.arguments import merged, written
from threefold.tasks.base import Pipeline

SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class _Writing(Pipeline):
    """A pipeline whose model writes; what is no argument of its own goes to `generate`."""

    options = ()  # see `_check`
    own: ClassVar[tuple[str, ...]]
    standard: ClassVar[dict[str, Any]]  # where neither the call nor generation_config.json says otherwise

    def _check(self, options: Mapping[str, Any]) -> None:
        merged({name: value for name, value in options.items() if name not in (*self.own, "batch_size", "num_workers")}, {}, self.model)

    def write(self, prompts: list[tuple[int, ...]], options: dict[str, Any], first: int) -> list[list[list[int]]]:
        """The new ids that follow each prompt, `num_return_sequences` times."""
        specific = {name: value for name, value in self.specific().items() if name != "prefix"}
        found = {**(getattr(self.model, "generation_config", None) or {}), **specific}
        arguments = {name: value for name, value in options.items() if name not in self.own}
        told = {name for name, value in {**found, **arguments}.items() if value is not None}
        standard = {**self.standard, "pad_token_id": self.tokenizer.pad_token_id}
        added = {name: value for name, value in standard.items()
                 if value is not None and name not in told and not (name == "max_new_tokens" and "max_length" in told)}
        if not {**added, **found, **arguments}.get("do_sample"):
            added = {name: value for name, value in added.items() if name not in SAMPLING}
        chosen = merged({**added, **arguments}, found, self.model)
        _, rows = written(self.model, prompts, chosen, first=first)
        count = len(rows) // len(prompts)
        return [rows[start:start + count] for start in range(0, len(rows), count)]

    def specific(self) -> dict[str, Any]:
        """Settings that config.json has for this task alone."""
        return {}

    def prefix(self) -> str:
        """What is put before every text."""
        return str(self.specific().get("prefix") or self.kept.get("prefix") or "")

    def text(self, ids: Sequence[int], options: Mapping[str, Any]) -> str:
        """The text of new ids, without special tokens."""
        skip = options.get("skip_special_tokens")
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True if skip is None else skip,
                                          clean_up_tokenization_spaces=options.get("clean_up_tokenization_spaces"))
        return text


class TextGeneration(_Writing):
    """Texts or chats -> `[{"generated_text": ...}]` each: the whole text, or with `return_full_text=False` the new one; of a
    chat the messages with the answer behind them, or the answer."""

    loader, heads = auto.AutoModelForCausalLM, ("causal",)
    own = ("return_full_text", "return_text", "return_tensors", "clean_up_tokenization_spaces", "prefix", "truncation",
           "continue_final_message", "skip_special_tokens", "add_special_tokens", "tools", "documents")
    standard: ClassVar[dict[str, Any]] = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}

    def is_several(self, inputs: Any) -> bool:
        return super().is_several(inputs) and not _is_chat(inputs)

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        prompts = [self._prompt(one, options) for one in batch]
        full, tensors = options.get("return_full_text"), options.get("return_tensors")
        if full is not None and tensors:
            raise UsageError("`return_full_text` and `return_tensors` contradict each other", hint="give one of them")
        results = []
        for one, prompt, rows in zip(batch, prompts, self.write(prompts, options, first), strict=True):
            records: list[dict[str, Any]] = []
            for ids in rows:
                if tensors:
                    records.append({"generated_token_ids": [*prompt, *ids]})
                    continue
                text = self.text(ids, options)
                records.append({"generated_text": text if full is False else self._whole(one, text, options)})
            results.append(records)
        return results

    def _prompt(self, one: Any, options: Mapping[str, Any]) -> tuple[int, ...]:
        cut = {} if options.get("truncation") is None else {"truncation": options["truncation"]}
        if not _is_chat(one):
            if options.get("add_special_tokens") is not None:
                cut["add_special_tokens"] = options["add_special_tokens"]
            prefix = options.get("prefix")
            ids = self.tokenizer.encode((self.prefix() if prefix is None else prefix) + one, **cut)
            bos = self.tokenizer.bos_id if self.model.config.bos_token_id is None else self.model.config.bos_token_id
            return tuple(ids) or (() if bos is None else (bos,))
        given: dict[str, Any] = {"tools": options.get("tools"), "documents": options.get("documents")}
        if _continues(one, options):
            return tuple(self._open_ended(one, given))
        return tuple(self.tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False, **given))

    def _open_ended(self, chat: Sequence[Mapping[str, Any]], given: dict[str, Any]) -> list[int]:
        """The ids of a chat up to the end of its last message, which goes on."""
        specials = {self.tokenizer.core.piece(number) for number in self.tokenizer.core.special_ids}
        for message in chat:
            if found := next((s for s in specials if s and s in str(message["content"])), None):
                raise UsageError(f"a message spells the special token {found!r}, so the last one cannot be continued",
                                 hint="end the chat with a message of the user")
        text: str = self.tokenizer.apply_chat_template(chat, tokenize=False, **given)
        last = str(chat[-1]["content"])
        at = text.rfind(last.strip())
        if at < 0:
            raise UsageError("the chat template changes the last message, so it cannot be continued",
                             hint="end the chat with a message of the user")
        kept = last.lstrip() if text[at:at + len(last.lstrip())] == last.lstrip() else last.strip()
        ids: list[int] = self.tokenizer.encode(text[:at + len(kept)], add_special_tokens=False)
        return ids

    def _whole(self, one: Any, text: str, options: Mapping[str, Any]) -> Any:
        if not _is_chat(one):
            return one + text
        if _continues(one, options):
            return [*one[:-1], {"role": one[-1]["role"], "content": one[-1]["content"] + text}]
        return [*one, {"role": "assistant", "content": text}]


class Text2Text(_Writing):
    """Texts -> what an encoder-decoder makes of them: `[{"generated_text": ...}]`, one for each text, and a list of those
    for each where several are asked for."""

    loader, heads = auto.AutoModelForSeq2SeqLM, ("seq2seq",)
    own = ("return_tensors", "return_text", "clean_up_tokenization_spaces", "truncation", "skip_special_tokens", "src_lang", "tgt_lang")
    standard: ClassVar[dict[str, Any]] = {"max_new_tokens": 256, "num_beams": 4}
    name = "generated"

    def specific(self) -> dict[str, Any]:
        return dict((self.kept.get("task_specific_params") or {}).get(self.task) or {})

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        cut = {} if options.get("truncation") is None else {"truncation": options["truncation"]}
        prompts = [tuple(self.tokenizer.encode(self.prefix() + one, **cut)) for one in batch]
        decoding = {"clean_up_tokenization_spaces": False, **options}
        key = f"{self.name}_{'token_ids' if options.get('return_tensors') else 'text'}"
        return [[{key: ids if options.get("return_tensors") else self.text(ids, decoding)} for ids in rows]
                for rows in self.write(prompts, options, first)]

    def shaped(self, results: list[Any], inputs: Any, options: dict[str, Any]) -> Any:
        return [rows[0] for rows in results] if all(len(rows) == 1 for rows in results) else results


class Summarization(Text2Text):
    """As `Text2Text`, with `summary_text`."""

    name = "summary"


class Translation(Text2Text):
    """As `Text2Text`, with `translation_text`. Languages are named by the task and the model, not by the call."""

    name = "translation"


def _is_chat(inputs: Any) -> bool:
    return (isinstance(inputs, list | tuple) and len(inputs) > 0
            and all(isinstance(one, Mapping) and "role" in one and "content" in one for one in inputs))


def _continues(chat: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> bool:
    """Whether the last message of a chat goes on, instead of a new one."""
    asked = options.get("continue_final_message")
    return bool(chat[-1]["role"] == "assistant" if asked is None else asked)
