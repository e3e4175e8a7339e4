"""text-generation by a model that is served elsewhere: the same call and the same results as for a local one.

Decision: what a protocol does not have (logits, hidden states, forced tokens) is refused by name; so is every task but
text-generation, because a server gives text and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from threefold.errors import UsageError
from threefold.prompting import load_prompt
from threefold.remote import RemoteModel
from threefold.tasks.writing import filled, is_chat


class ServedGeneration:
    """Texts or chats -> `[{"generated_text": ...}]` each, as `TextGeneration` has it. Arguments that are not the shape of the
    result go to the model (`RemoteModel.complete`). A `prompt` is filled and sent with its stop strings and its length; how an
    answer is drawn is left to the server."""

    task = "text-generation"

    def __init__(self, model: RemoteModel, defaults: Mapping[str, Any]) -> None:
        self.model, self.defaults = model, dict(defaults)

    def __call__(self, inputs: Any, **arguments: Any) -> Any:
        """The records of one text or chat, or of each of several."""
        options = {**self.defaults, **arguments}
        form = options.pop("prompt", None)
        full = options.pop("return_full_text", None)
        if options.pop("do_sample", None) is False:
            options["temperature"] = 0
        several = not isinstance(inputs, str | Mapping) and not is_chat(inputs)
        asked = list(inputs) if several else [inputs]
        if form is not None:
            prompt = load_prompt(form)
            asked = [filled(prompt, one) for one in asked]
            options = {"stop": prompt.stop, "max_new_tokens": prompt.new_tokens, **options}
        answers = [answer.text if form is None else answer.text.strip() for answer in self.model.complete(asked, **options)]
        records = [self._records(one, text, form is None or is_chat(one) if full is None else full)
                   for one, text in zip(asked, answers, strict=True)]
        return records if several else records[0]

    @staticmethod
    def _records(one: Any, text: str, full: bool) -> list[dict[str, Any]]:
        if not full:
            return [{"generated_text": text}]
        whole = one + text if isinstance(one, str) else [*one, {"role": "assistant", "content": text}]
        return [{"generated_text": whole}]


def served(task: str, model: RemoteModel, defaults: Mapping[str, Any]) -> ServedGeneration:
    """The pipeline of a served model; raises `UsageError` for a task that needs more than text."""
    if task != ServedGeneration.task:
        raise UsageError(f"`{task}` cannot be done by `{model.name}`: a served model gives text, no logits and no states",
                         hint="text-generation with a prompt, or a local model")
    return ServedGeneration(model, defaults)
