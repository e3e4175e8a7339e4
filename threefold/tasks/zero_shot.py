"""Classification into labels that a model has never been told of, by any family that was loaded with its head.

    entailment   softmax over the labels of the logit "entailment" for (text, hypothesis): transformers' own
    likelihood   s(label) = mean over its tokens t of  log p(t | the prompt with the text, tokens before t)
                                                     - log p(t | the prompt without it, tokens before t)
                 one label of several: softmax over the labels of s;  each by itself: 1 / (1 + exp(-s))

Decisions:
- A model whose classes name an entailment is asked as transformers asks it. Every other one is asked how likely each label is: a
  decoder behind the prompt, an encoder-decoder as what it writes, a masked model in the label's place, a discriminator whether the
  label stands there by right (generation/likelihood.py).
- The prompt is the text and, in a line of its own, the hypothesis: what stands behind the label there is seen by those that read both
  ways. A `prompt` (prompting.py) stands for both.
- The mean makes long labels no less likely than short ones; taking away what the label is worth without the text (contextual
  calibration, arXiv 2102.09690, there for one token) does the same for rare and frequent ones. `calibrate=False` leaves it out.
- Where each label is judged by itself, s says how much likelier the text has made it: above 0, more than one half. Uncalibrated it is the
  mean probability of a token.
- A text that is too long is an error, as everywhere here; with `truncation=True` its end is cut off, the prompt and the label never.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from threefold import auto
from threefold.errors import UsageError
from threefold.generation.likelihood import Place, text_log_probs
from threefold.model.classifiers import SequenceClassifier
from threefold.model.language import Seq2SeqLM
from threefold.tasks.base import Pipeline, prompt_of
from threefold.tasks.judging import softmax
from threefold.text.encoded import without_last

HYPOTHESIS = "This example is {}."
BASELINE = "what labels are worth without a text"


class ZeroShotClassification(Pipeline):
    """Texts and `candidate_labels` (a list, or words with commas between) -> `sequence`, `labels` and `scores`, the best first.

    hypothesis_template   a sentence with {} in the place of a label
    multi_label           each label is judged by itself; else the scores add up to 1
    prompt, calibrate     for models without an entailment: see the head of this file
    truncation            cut texts that are too long at their end
    """

    loader = auto._Auto
    heads = ("classify", "causal", "seq2seq", "masked", "pretraining", "replaced")
    options = ("candidate_labels", "hypothesis_template", "multi_label", "prompt", "calibrate", "truncation")

    def __call__(self, inputs: Any, candidate_labels: str | Sequence[str] | None = None, **options: Any) -> Any:
        """The result of one text, or a list of results; `options` are the task's arguments."""
        if candidate_labels is not None:
            options["candidate_labels"] = candidate_labels
        return super().__call__(inputs, **options)

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        labels, entails = _labels(options), isinstance(self.model, SequenceClassifier)
        if entails and (options.get("prompt") is not None or options.get("calibrate") is not None):
            raise UsageError("`prompt` and `calibrate` are for models without an entailment, and this one has it",
                             hint="`hypothesis_template` says what it is asked")
        score = self._entailed if entails else self._likely
        results = []
        for text in batch:
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"a text to classify is {text!r}, expected one that is not empty")
            scores = score(text, labels, options)
            order = scores.argsort()[::-1]
            results.append({"sequence": text, "labels": [labels[n] for n in order], "scores": scores[order].tolist()})
        return results

    # -- by entailment -------------------------------------------------------------------------------------------------

    def _entailed(self, text: str, labels: list[str], options: dict[str, Any]) -> np.ndarray:
        entails = next((n for n, name in enumerate(self.model.labels) if name.lower().startswith("entail")), None)
        if entails is None:
            raise UsageError(f"the classes of this model are {', '.join(f'`{name}`' for name in self.model.labels)}, and none is an entailment",
                             hint="take one that was trained on language inference, or any that predicts tokens")
        before, after = _hypothesis(options)
        together = self.tokenizer.pad_token is not None
        cut = {"truncation": "only_first", "max_length": self._longest()} if options.get("truncation") else {}
        logits = []
        for group in [labels] if together else [[label] for label in labels]:
            _, given = self.encoded([{"text": text, "text_pair": before + label + after} for label in group], **cut)
            with torch.inference_mode():
                logits.append(self.model(**given).logits.float().cpu().numpy())
        logits_NC = np.concatenate(logits)
        if options.get("multi_label") or len(labels) == 1:
            return softmax(logits_NC[:, [-1 if entails == 0 else 0, entails]])[:, 1]
        return softmax(logits_NC[:, entails])

    # -- by likelihood -------------------------------------------------------------------------------------------------

    def _likely(self, text: str, labels: list[str], options: dict[str, Any]) -> np.ndarray:
        calibrate = options.get("calibrate") in (None, True)
        scores = self._means(text, labels, options)
        if calibrate:
            if BASELINE not in options:  # one object for all batches of a call
                options[BASELINE] = self._means("", labels, options)
            scores = scores - options[BASELINE]
        if options.get("multi_label") or len(labels) == 1:
            single: np.ndarray = 1 / (1 + np.exp(-scores)) if calibrate else np.exp(scores)
            return single
        return softmax(scores)

    def _means(self, text: str, labels: list[str], options: dict[str, Any]) -> np.ndarray:
        """The mean log-probability of a label's tokens, for each label."""
        if options.get("truncation"):
            text = self._shortened(text, labels, options)
        places = self._places(text, labels, options)
        return np.array([np.mean(logs) for logs in text_log_probs(self.model, self.tokenizer, places)])

    def _places(self, text: str, labels: list[str], options: dict[str, Any]) -> list[Place]:
        prompt = prompt_of(options)
        if prompt is not None:
            opening, gap, after = prompt.fill(text), prompt.gap, ""
        else:
            before, after = _hypothesis(options)
            opening = f"{text}\n{before.rstrip()}"
            gap = before[len(before.rstrip()):]
        # A space belongs to the word behind it, as tokenizers of decoders have it.
        return [(opening, gap + label, after) for label in labels]

    def _shortened(self, text: str, labels: list[str], options: dict[str, Any]) -> str:
        """The beginning of a text, without what the model has no room for."""
        if isinstance(self.model, Seq2SeqLM) and self.model.config.position_embedding_type == "relative":
            return text
        while text:  # once, but where tokens join at the cut
            needed = max(len(self.tokenizer.encode("".join(place))) for place in self._places(text, labels, options))
            over = needed - self._longest()
            if over <= 0:
                break
            text = without_last(text, over, self.tokenizer)
        return text

    def _longest(self) -> int:
        longest: int = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)
        return longest


def _labels(options: dict[str, Any]) -> list[str]:
    found = options.get("candidate_labels")
    labels = [label.strip() for label in found.split(",") if label.strip()] if isinstance(found, str) else list(found or [])
    if not labels or not all(isinstance(label, str) and label.strip() for label in labels):
        raise UsageError(f"`candidate_labels` is {found!r}, expected labels that are not empty",
                         hint="a list of words, or one text with commas between them")
    return labels


def _hypothesis(options: dict[str, Any]) -> tuple[str, str]:
    """What stands before and behind a label in the hypothesis."""
    template = options.get("hypothesis_template") or HYPOTHESIS
    if not isinstance(template, str) or template.count("{}") != 1:
        raise UsageError(f"`hypothesis_template` is {template!r}", hint="a sentence with {} in the place of a label, once")
    before, _, after = template.partition("{}")
    return before, after
