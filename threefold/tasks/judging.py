"""Tasks whose model judges or describes: fill-mask, feature-extraction, sentence-similarity, text-classification,
token-classification.

Decisions:
- Probabilities are those of the logits in float32 or wider; scores are plain floats.
- A `prompt` (prompting.py) is filled first, and what is judged is the filled text: an instruction before it, a query's mark, a sentence
  that holds the mask. Its examples come along; what it says about answers has no meaning here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from threefold import auto
from threefold.errors import UsageError, did_you_mean
from threefold.model.norms import wide
from threefold.model.pooling import MODES, Pooling
from threefold.tasks.base import Pipeline


class FillMask(Pipeline):
    """Texts with a mask token -> the likeliest tokens in its place, `score`, `token`, `token_str`, `sequence`; a list of such
    lists for a text with several masks."""

    loader, heads = auto.AutoModelForMaskedLM, ("masked", "pretraining")
    options = ("top_k", "targets", "tokenizer_kwargs", "prompt")

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        mask = self.tokenizer.mask_token_id
        if mask is None:
            raise UsageError("this tokenizer has no mask token", hint="fill-mask needs a masked model and its tokenizer")
        batch = self.prompted(batch, options)
        rows, given = self.encoded(batch, **(options.get("tokenizer_kwargs") or {}))
        for text, ids in zip(batch, rows["input_ids"], strict=True):
            if mask not in ids:
                raise UsageError(f"there is no {self.tokenizer.mask_token} in {text[:60]!r}", hint="put one where a word is wanted")
        with torch.inference_mode():
            out = self.model(**given)
        logits_BTV = (out.logits if out.logits is not None else out.prediction_logits).cpu()
        targets = self._targets(options["targets"]) if options.get("targets") is not None else None
        return [self._filled(ids, logits_TV, mask, targets, options.get("top_k") or 5)
                for ids, logits_TV in zip(rows["input_ids"], logits_BTV, strict=True)]

    def _filled(self, ids: list[int], logits_TV: Tensor, mask: int, targets: list[int] | None, top_k: int) -> Any:
        places = [place for place, token in enumerate(ids) if token == mask]
        probs_MV = logits_TV[places].to(wide(logits_TV.dtype)).softmax(-1)
        if targets is not None:
            probs_MV = probs_MV[:, targets]
        scores_MK, found_MK = probs_MV.topk(min(top_k, probs_MV.shape[1]))
        results: list[list[dict[str, Any]]] = []
        for place, scores, found in zip(places, scores_MK.tolist(), found_MK.tolist(), strict=True):
            results.append([])
            for score, number in zip(scores, found, strict=True):
                token = number if targets is None else targets[number]
                filled = [token if at == place else other for at, other in enumerate(ids)]
                whole = [other for other in filled if other != self.tokenizer.pad_token_id]
                results[-1].append({
                    "score": score, "token": token, "token_str": self.tokenizer.decode([token]),
                    "sequence": self.tokenizer.decode(whole, skip_special_tokens=len(places) == 1)})
        return results[0] if len(places) == 1 else results

    def _targets(self, targets: str | Sequence[str]) -> list[int]:
        """The ids of words, of their first pieces where they are no tokens."""
        vocabulary = self.tokenizer.get_vocab()
        ids: list[int] = []
        for word in [targets] if isinstance(targets, str) else targets:
            pieces = [vocabulary[word]] if word in vocabulary else self.tokenizer.encode(word, add_special_tokens=False)
            ids += pieces[:1]
        if not ids:
            raise UsageError(f"`targets` is {targets!r}, which holds no token", hint="name words of the vocabulary")
        return list(dict.fromkeys(ids))

    def shaped(self, results: list[Any], inputs: Any, options: dict[str, Any]) -> Any:
        return results[0] if len(results) == 1 else results


class FeatureExtraction(Pipeline):
    """Texts -> the last hidden states of each, nested lists (1, T, D), or tensors with `return_tensors=True`."""

    loader, heads = auto.AutoModel, ("body", "encoder")
    options = ("truncation", "tokenize_kwargs", "return_tensors", "prompt")

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        words = dict(options.get("tokenize_kwargs") or {})
        if options.get("truncation") is not None:
            words["truncation"] = options["truncation"]
        _, given = self.encoded(self.prompted(batch, options), **words)
        with torch.inference_mode():
            states_BTD = self.model(**given).last_hidden_state.cpu()
        kept = given["attention_mask"].cpu().ne(0)
        states = [row_TD[keep][None] for row_TD, keep in zip(states_BTD, kept, strict=True)]
        return states if options.get("return_tensors") else [one.tolist() for one in states]


class SentenceSimilarity(Pipeline):
    """`{"source_sentence": ..., "sentences": [...]}` -> the cosine of the source's vector with that of each sentence, a list of
    floats. `pooling` ("mean", "cls", "last") is for a model that does not say how states become one vector; a `prompt` is for the
    source alone: that of a query."""

    loader, heads = auto.AutoModelForTextEncoding, ("encoder", "body")
    options = ("pooling", "prompt")

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        if not hasattr(self.model, "encode"):
            raise UsageError("this model was made, not loaded, and makes no vectors", hint="save it, and load it with AutoModel")
        how = options.get("pooling")
        if how is not None and how not in MODES:
            raise UsageError(f"`pooling` is {how!r}", hint=did_you_mean(str(how), MODES))
        if how is not None:
            self.model.pooling = Pooling(how)
        found = []
        for one in batch:
            sentences = one.get("sentences") if isinstance(one, Mapping) and set(one) == {"source_sentence", "sentences"} else None
            if not isinstance(sentences, list | tuple) or not sentences:
                raise UsageError(f"an input of `sentence-similarity` is {one!r:.60}", hint='{"source_sentence": "...", "sentences": ["...", ...]}')
            source, = self.prompted([one["source_sentence"]], options)
            vectors = self.model.encode([source, *sentences], normalize_embeddings=True)
            found.append([float(cosine) for cosine in vectors[1:] @ vectors[0]])
        return found


class TextClassification(Pipeline):
    """Texts -> `label` and `score` of the likeliest class, or of `top_k` classes (None: of all). A text and a second one are
    `{"text": ..., "text_pair": ...}`. `calibrated=True`: as held-out rows have shown it, scores at the temperature that makes them
    honest, and a text whose best one is below the threshold is of the class that stands for none."""

    loader, heads = auto.AutoModelForSequenceClassification, ("classify",)
    options = ("top_k", "function_to_apply", "truncation", "max_length", "padding", "calibrated", "prompt")

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        batch = self.prompted(batch, options)
        _, given = self.encoded(batch, **{name: options[name] for name in ("truncation", "max_length") if options.get(name) is not None})
        with torch.inference_mode():
            logits_BC = self.model(**given).logits.float().cpu().numpy()
        results, chosen = [], self._chosen() if options.get("calibrated") else {}
        for logits_C in logits_BC / np.float32(chosen.get("temperature", 1.0)):
            scores = self._scores(logits_C, options.get("function_to_apply"))
            order = sorted(range(len(scores)), key=lambda number: -float(scores[number]))
            ordered = [{"label": self.label(number), "score": float(scores[number])} for number in order]
            if "threshold" in chosen and (best := float(scores[order[0]])) < chosen["threshold"]:
                ordered.insert(0, {"label": chosen["outside"], "score": 1.0 - best})
            results.append(ordered[:options["top_k"]] if "top_k" in options else ordered[0])
        return results

    def _chosen(self) -> dict[str, Any]:
        found = self.kept.get("threefold") or {}
        if "temperature" not in found:
            raise UsageError("`calibrated` is asked for, and the model's directory holds no temperature",
                             hint="`threefold finetune --task classify` chooses one on held-out rows")
        return dict(found)

    def _scores(self, logits_C: np.ndarray, function: str | None) -> np.ndarray:
        if function is None:
            problem = self.kept.get("problem_type")
            alone = problem == "multi_label_classification" or len(logits_C) == 1
            function = "none" if problem == "regression" else "sigmoid" if alone else "softmax"
        if function.lower() not in ("none", "sigmoid", "softmax"):
            raise UsageError(f"`function_to_apply` is {function!r}", hint="`sigmoid`, `softmax` or `none`")
        if function.lower() == "sigmoid":
            scores: np.ndarray = 1.0 / (1.0 + np.exp(-logits_C))
            return scores
        return softmax(logits_C) if function.lower() == "softmax" else logits_C

    def shaped_one(self, result: Any, inputs: Any, options: dict[str, Any]) -> Any:
        return [result] if isinstance(inputs, str) and "top_k" not in options else result


class TokenClassification(Pipeline):
    """Texts -> the tokens with a class that is not ignored: `entity`, `score`, `index`, `word`, `start`, `end`; with
    `aggregation_strategy="simple"` neighbours of one class together, as `entity_group`; with `first` a word is of the class of its
    first piece, which is what `threefold finetune --task tag` teaches. With a `prompt`, places are those in the filled text."""

    loader, heads = auto.AutoModelForTokenClassification, ("tag",)
    options = ("aggregation_strategy", "ignore_labels", "prompt")

    def answers(self, batch: list[Any], options: dict[str, Any], first: int) -> list[Any]:
        strategy = (options.get("aggregation_strategy") or "none").lower()
        if strategy not in ("none", "simple", "first"):
            raise UsageError(f"`aggregation_strategy` is {strategy!r}", hint="`none`, `simple` or `first`")
        ignored = ["O"] if options.get("ignore_labels") is None else options["ignore_labels"]
        batch = self.prompted(batch, options)
        rows, given = self.encoded(batch, return_special_tokens_mask=True, return_offsets_mapping=True)
        with torch.inference_mode():
            logits_BTC = self.model(**given).logits.float().cpu().numpy()
        results = []
        for number, text in enumerate(batch):
            row = {name: values[number] for name, values in rows.items()}
            entities = self._entities(text, row, softmax(logits_BTC[number]))
            if strategy == "first":
                entities = self._words(text, entities)
            if strategy != "none":
                entities = self._grouped(entities)
            results.append([one for one in entities if one.get("entity", one.get("entity_group")) not in ignored])
        return results

    def _entities(self, text: str, row: Mapping[str, Any], scores_TC: np.ndarray) -> list[dict[str, Any]]:
        entities = []
        for place, (token, special, (start, end)) in enumerate(
                zip(row["input_ids"], row["special_tokens_mask"], row["offset_mapping"], strict=True)):
            if special:
                continue
            best = int(scores_TC[place].argmax())
            word = text[start:end] if token == self.tokenizer.unk_token_id else self.tokenizer.convert_ids_to_tokens(token)
            entities.append({"entity": self.label(best), "score": float(scores_TC[place, best]), "index": place, "word": word,
                             "start": start, "end": end})
        return entities

    def _words(self, text: str, entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The pieces of each word together, under the class of the first."""
        marked = bool(getattr(self.tokenizer.core.backend.model, "continuing_subword_prefix", None))
        words: list[list[dict[str, Any]]] = []
        for one in entities:
            start, end = one["start"], one["end"]
            goes_on = len(one["word"]) != end - start if marked else start > 0 and " " not in text[start - 1:start + 1]
            if goes_on and words:
                words[-1].append(one)
            else:
                words.append([one])
        return [{**word[0], "word": self._spelled([one["word"] for one in word]), "end": word[-1]["end"]} for word in words]

    def _spelled(self, tokens: list[str]) -> str:
        decoder = self.tokenizer.core.backend.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(tokens))

    def _grouped(self, entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Neighbours of one class together; `B-` begins anew."""
        groups: list[list[dict[str, Any]]] = []
        for one in entities:
            begins = one["entity"].startswith("B-") or not groups
            if begins or _tag(groups[-1][-1]["entity"]) != _tag(one["entity"]):
                groups.append([])
            groups[-1].append(one)
        return [{"entity_group": group[0]["entity"].split("-", 1)[-1],
                 "score": float(np.mean([np.float32(one["score"]) for one in group])),
                 "word": self._spelled([one["word"] for one in group]), "start": group[0]["start"], "end": group[-1]["end"]}
                for group in groups]


def _tag(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in the precision that it comes in."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores: np.ndarray = shifted / shifted.sum(axis=-1, keepdims=True)
    return scores
