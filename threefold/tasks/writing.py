"""Tasks whose model writes: text-generation, and what encoder-decoders do.

Decisions:
- What neither the call nor generation_config.json says is transformers' own for its pipelines: 256 new tokens, and for
  text-generation drawn at temperature 0.7; version 4's four beams for the tasks of encoder-decoders.
- `task_specific_params` of config.json are followed for the latter alone: version 5 has dropped them, and GPT-2's would allow
  a text of 50 tokens with its prompt.
- A chat that ends with the assistant's message goes on with that message, as in transformers.
- With a `prompt` (prompting.py) a text is filled into it, of a chat the last message of the user; the result is the answer alone,
  up to a stop string, and the prompt stands for the prefix that config.json may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from threefold import auto
from threefold.errors import UsageError, did_you_mean
from threefold.generation.arguments import merged, written
from threefold.generation.likelihood import written_log_probs
from threefold.generation.pieces import TextPieces
from threefold.prompting import Prompt
from threefold.tasks.base import Pipeline, prompt_of
from threefold.text.sentences import sentences

SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class Writing(Pipeline):
    """A pipeline whose model writes; what is no argument of its own goes to `generate`."""

    options = ()  # see `_check`
    own: ClassVar[tuple[str, ...]]
    standard: ClassVar[dict[str, Any]]  # where neither the call nor generation_config.json says otherwise

    def _check(self, options: Mapping[str, Any]) -> None:
        merged({name: value for name, value in options.items() if name not in (*self.own, "batch_size", "num_workers")}, {}, self.model)
        prompt_of(options)

    def write(self, prompts: list[tuple[int, ...]], options: dict[str, Any], first: int, stop: Sequence[str] = ()) -> list[list[list[int]]]:
        """The new ids that follow each prompt, `num_return_sequences` times; those of a drawn or greedy text end with a stop
        string."""
        specific = {name: value for name, value in self.specific().items() if name != "prefix"}
        found = {**self.model.generation_config, **specific}
        arguments = {name: value for name, value in options.items() if name not in self.own}
        told = {name for name, value in {**found, **arguments}.items() if value is not None}
        standard = {**self.standard, "pad_token_id": self.tokenizer.pad_token_id}
        added = {name: value for name, value in standard.items()
                 if value is not None and name not in told and not (name == "max_new_tokens" and "max_length" in told)}
        if not {**added, **found, **arguments}.get("do_sample"):
            added = {name: value for name, value in added.items() if name not in SAMPLING}
        chosen = merged({**added, **arguments}, found, self.model)
        _, rows = written(self.model, prompts, chosen, first=first, until=self._until(stop))
        count = len(rows) // len(prompts)
        return [rows[start:start + count] for start in range(0, len(rows), count)]

    def _until(self, stop: Sequence[str]) -> Callable[[int, int], bool] | None:
        """Whether the text of a row has a stop string with one more token."""
        texts: dict[int, TextPieces] = {}

        def ends(row: int, token: int) -> bool:
            text = texts.setdefault(row, TextPieces(self.tokenizer, (), stop))
            text.feed(token)
            return text.stopped
        return ends if stop else None

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


class TextGeneration(Writing):
    """Texts or chats -> `[{"generated_text": ...}]` each: the whole text, or with `return_full_text=False` the new one; of a
    chat the messages with the answer behind them, or the answer."""

    loader, heads = auto.AutoModelForCausalLM, ("causal",)
    own = ("prompt", "return_full_text", "return_text", "return_tensors", "clean_up_tokenization_spaces", "prefix", "truncation",
           "continue_final_message", "skip_special_tokens", "add_special_tokens", "tools", "documents")
    standard: ClassVar[dict[str, Any]] = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}

    def is_several(self, inputs: Any) -> bool:
        return super().is_several(inputs) and not is_chat(inputs)

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        form = prompt_of(options)
        full, tensors = options.get("return_full_text"), options.get("return_tensors")
        if full is not None and tensors:
            raise UsageError("`return_full_text` and `return_tensors` contradict each other", hint="give one of them")
        if form is not None:
            options = {"prefix": "", **settled(form, options)}
        batch = [filled(form, one) for one in batch]
        prompts = [self._prompt(one, options) for one in batch]
        results = []
        for one, prompt, rows in zip(batch, prompts, self.write(prompts, options, first, form.stop if form else ()), strict=True):
            records: list[dict[str, Any]] = []
            alone = full is False or (full is None and form is not None and isinstance(one, str))
            for ids in rows:
                if tensors:
                    records.append({"generated_token_ids": [*prompt, *ids]})
                    continue
                text = self.text(ids, options)
                if form is not None:
                    text = form.answer(text) if alone or is_chat(one) else form.cut(text)
                records.append({"generated_text": text if alone else self._whole(one, text, options)})
            results.append(records)
        return results

    def _prompt(self, one: Any, options: Mapping[str, Any]) -> tuple[int, ...]:
        cut = {} if options.get("truncation") is None else {"truncation": options["truncation"]}
        if not is_chat(one):
            if options.get("add_special_tokens") is not None:
                cut["add_special_tokens"] = options["add_special_tokens"]
            prefix = options.get("prefix")
            ids = self.tokenizer.encode((self.prefix() if prefix is None else prefix) + one, **cut)
            bos = self.tokenizer.bos_id if self.model.config.bos_token_id is None else self.model.config.bos_token_id
            return tuple(ids) or (() if bos is None else (bos,))
        given: dict[str, Any] = {"tools": options.get("tools"), "documents": options.get("documents")}
        goes_on = _continues(one, options)
        return tuple(self.tokenizer.apply_chat_template(one, add_generation_prompt=not goes_on, continue_final_message=goes_on, return_dict=False,
                                                        **cut, **given))

    def _whole(self, one: Any, text: str, options: Mapping[str, Any]) -> Any:
        if not is_chat(one):
            return one + text
        if _continues(one, options):
            return [*one[:-1], {"role": one[-1]["role"], "content": one[-1]["content"] + text}]
        return [*one, {"role": "assistant", "content": text}]


class Text2Text(Writing):
    """Texts -> what an encoder-decoder makes of them: `[{"generated_text": ...}]`, one for each text, and a list of those
    for each where several are asked for."""

    loader, heads = auto.AutoModelForSeq2SeqLM, ("seq2seq",)
    own: ClassVar[tuple[str, ...]] = ("prompt", "return_tensors", "return_text", "clean_up_tokenization_spaces", "truncation",
                                      "skip_special_tokens", "src_lang", "tgt_lang")
    standard: ClassVar[dict[str, Any]] = {"max_new_tokens": 256, "num_beams": 4}
    name = "generated"

    def specific(self) -> dict[str, Any]:
        return dict((self.kept.get("task_specific_params") or {}).get(self.task) or {})

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        cut = {} if options.get("truncation") is None else {"truncation": options["truncation"]}
        form, tensors = prompt_of(options), options.get("return_tensors")
        if form is not None:
            options = settled(form, options)
        before = self._language(options) + (self.prefix() if form is None else "")
        texts = [before + filled(form, one) for one in batch]
        prompts = [tuple(self.tokenizer.encode(text, **cut)) for text in texts]
        decoding = {"clean_up_tokenization_spaces": False, **options}

        def said(ids: list[int]) -> str:
            return self.text(ids, decoding) if form is None else form.answer(self.text(ids, decoding))

        key = f"{self.name}_{'token_ids' if tensors else 'text'}"
        return [[{key: ids if tensors else said(ids)} for ids in rows]
                for rows in self.write(prompts, options, first, form.stop if form else ())]

    def _language(self, options: Mapping[str, Any]) -> str:
        """What names the language that is asked for (`tgt_lang`), where a model writes several and its vocabulary has their names; others
        write the one that they learnt."""
        asked = options.get("tgt_lang")
        known = [] if asked is None else [t[2:-2] for t in self.tokenizer.get_vocab() if t.startswith(">>") and t.endswith("<<")]
        if not known:
            return ""
        if asked not in known:
            raise UsageError(f"`tgt_lang` is {asked!r}, and the model has no name for it", hint=did_you_mean(str(asked), known))
        return f">>{asked}<< "

    def shaped(self, results: list[Any], inputs: Any, options: dict[str, Any]) -> Any:
        return [rows[0] for rows in results] if all(len(rows) == 1 for rows in results) else results


class Summarization(Text2Text):
    """As `Text2Text`, with `summary_text`. With `sentences=2` it is made of two sentences of the text itself, in their order: those that
    the model finds likeliest as its summary, by the mean log-probability of their tokens. Nothing in it is made up."""

    own = (*Text2Text.own, "sentences")
    name = "summary"

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        if (count := options.get("sentences")) is None:
            return super().answers(batch, options, first)
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"`sentences` is {count!r}, expected how many sentences of the text make the summary", hint="sentences=1")
        if told := [name for name, value in options.items() if value is not None and name not in ("sentences", "truncation")]:
            raise UsageError(f"`sentences` and {', '.join(f'`{name}`' for name in told)}: sentences are chosen, and nothing is written",
                             hint="leave one of them out")
        cut = {} if options.get("truncation") is None else {"truncation": options["truncation"]}
        return [[{"summary_text": " ".join(self._likeliest(filled(None, text), count, cut))}] for text in batch]

    def _likeliest(self, text: str, count: int, cut: Mapping[str, Any]) -> list[str]:
        found = sentences(text)
        if len(found) <= count:
            return found
        read, writer = self.tokenizer.encode(self.prefix() + text, **cut), self.tokenizer.target or self.tokenizer
        longest = self.model.config.max_position_embeddings - 1 if cut else None
        logs = written_log_probs(self.model, [(read, writer.encode(one, add_special_tokens=False)[:longest]) for one in found])
        best = sorted(range(len(found)), key=lambda n: -sum(logs[n]) / max(1, len(logs[n])))[:count]
        return [found[n] for n in sorted(best)]


class Translation(Text2Text):
    """As `Text2Text`, with `translation_text`."""

    name = "translation"


def settled(prompt: Prompt, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a call, with what the prompt says about its answers where the call says nothing."""
    found = dict(options)
    if prompt.new_tokens is not None and options.get("max_new_tokens") is None and options.get("max_length") is None:
        found["max_new_tokens"] = prompt.new_tokens
    if prompt.temperature is not None and all(options.get(name) is None for name in ("do_sample", "temperature", "num_beams")):
        found |= {"do_sample": True, "temperature": prompt.temperature, "num_beams": 1} if prompt.temperature else {"do_sample": False}
    return found


def filled(prompt: Prompt | None, one: Any) -> Any:
    """A text, or of a chat the last message of the user, filled into the prompt."""
    if prompt is None:
        if isinstance(one, Mapping):
            raise UsageError(f"an input has the fields {', '.join(f'`{name}`' for name in one)}, and no prompt says where they go",
                             hint="give `prompt`, or a text")
        return one
    if not is_chat(one):
        return prompt.fill(one)
    last = max((place for place, message in enumerate(one) if message["role"] == "user"), default=None)
    if last is None:
        raise UsageError("the chat has no message of the user that could be filled into the prompt", hint="give one, or a text")
    return [*one[:last], {**one[last], "content": prompt.fill(one[last]["content"])}, *one[last + 1:]]


def is_chat(inputs: Any) -> bool:
    """Whether it is the messages of one conversation."""
    return (isinstance(inputs, list | tuple) and len(inputs) > 0
            and all(isinstance(one, Mapping) and "role" in one and "content" in one for one in inputs))


def _continues(chat: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> bool:
    """Whether the last message of a chat goes on, instead of a new one."""
    asked = options.get("continue_final_message")
    return bool(chat[-1]["role"] == "assistant" if asked is None else asked)
