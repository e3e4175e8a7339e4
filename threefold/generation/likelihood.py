"""How likely a text is to a model, token by token: the logarithms of the probabilities that it gives, in nats.

    decoder            p(token | all before it)
    encoder-decoder    p(token | what is read, the tokens of the text before it)
    masked             p(token | all around the text, its tokens before it), the token itself and the ones behind it hidden
    discriminator      p(the token was not replaced | everything)

Decisions:
- A text is scored where it stands: before and text are encoded together, and the text's tokens are those behind what both share, so
  that a word has the ids that it has in running text.
- Hiding the rest of a text too (arXiv 2305.10588) keeps the pseudo-log-likelihood of arXiv 1910.14659 from being high for every word
  of several tokens, each of which gives the others away; and it makes the product over the tokens a probability of the text.
- Of a discriminator (ELECTRA) the probability that a token stands there by right is all there is (arXiv 2205.15223).
- Rows of one call are padded behind and run together, `BATCH` at a time; only the states that are asked for go through the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from threefold.errors import UsageError
from threefold.generation.reading import LanguageModel, reader
from threefold.model.base import Model
from threefold.model.classifiers import Discriminator
from threefold.model.language import CausalLM, MaskedLM, Seq2SeqLM
from threefold.model.norms import wide
from threefold.text.pretrained import PretrainedTokenizer

BATCH = 16  # rows run together

Ids = Sequence[int]
Place = tuple[str, str, str]  # what stands before a text, the text, and what stands behind it


@torch.inference_mode()
def text_log_probs(model: Model, tokenizer: PretrainedTokenizer, places: Sequence[Place]) -> list[list[float]]:
    """The log-probability of each token of each text in its place. A decoder does not see what stands behind; an encoder-decoder
    reads what stands before and writes the text. Raises `UsageError` for a text without tokens, for one that is too long, and for a
    model that has no probabilities of tokens."""
    if isinstance(model, CausalLM):
        return written_log_probs(model, [_behind(tokenizer, before, text) for before, text, _ in places])
    if isinstance(model, Seq2SeqLM):
        writer = tokenizer.target or tokenizer
        rows = [(tokenizer.encode(before), writer.encode(text.strip(), add_special_tokens=False)) for before, text, _ in places]
        for (_, said), (_, text, _) in zip(rows, places, strict=True):
            if not said:
                raise UsageError(f"the text {text[:60]!r} has no token that could be scored", hint="give a text that is not empty")
        return written_log_probs(model, rows)
    if isinstance(model, MaskedLM):
        return _hidden_log_probs(model, tokenizer, places)
    if isinstance(model, Discriminator):
        return _kept_log_probs(model, tokenizer, places)
    raise UsageError(f"a `{model.config.model_type}` model that was loaded for `{model.task}` has no probabilities of tokens",
                     hint="load it with the head that it was pretrained with: AutoModelForPreTraining")


@torch.inference_mode()
def written_log_probs(model: LanguageModel, rows: Sequence[tuple[Ids, Ids]]) -> list[list[float]]:
    """The log-probability of each id of the second part of each row: behind the first part, or for an encoder-decoder, written
    where the first is read."""
    side, found = reader(model), list[list[float]]()
    for before, said in rows:
        side.check(len(before), len(said))
    for batch in (rows[start:start + BATCH] for start in range(0, len(rows), BATCH)):
        if isinstance(model, CausalLM):
            states_BTD = model.hidden(_filled([[*before, *said][:-1] for before, said in batch], 0, model))
            starts = [len(before) - 1 for before, _ in batch]
        else:
            read = [before for before, _ in batch]
            mask_BS = _filled([[1] * len(ids) for ids in read], 0, model)
            written = _filled([[model.start, *said][:-1] for _, said in batch], model.pad, model)
            trace = model.transformer(_filled(read, model.pad, model), attention_mask=mask_BS, decoder_input_ids=written)
            states_BTD, starts = trace.last, [0] * len(batch)
        chosen = [(row, start + n, token) for row, ((_, said), start) in enumerate(zip(batch, starts, strict=True)) for n, token in enumerate(said)]
        found += _by_row(_log_probs(model, states_BTD, chosen), [len(said) for _, said in batch])
    return found


def _hidden_log_probs(model: MaskedLM, tokenizer: PretrainedTokenizer, places: Sequence[Place]) -> list[list[float]]:
    mask = tokenizer.mask_token_id
    if mask is None:
        raise UsageError("this tokenizer has no mask token", hint="a masked model needs its own tokenizer")
    rows: list[tuple[Ids, Ids, int]] = []  # ids with the rest of a text hidden, their types, the place that is asked for
    truth: list[int] = []
    lengths: list[int] = []
    for place in places:
        ids, types, (first, last) = _inside(model, tokenizer, place)
        lengths.append(last - first)
        for at in range(first, last):
            rows.append(([*ids[:at], *[mask] * (last - at), *ids[last:]], types, at))
            truth.append(ids[at])
    values: list[float] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start:start + BATCH]
        states_BTD = model.hidden(_filled([ids for ids, _, _ in batch], 0, model), types=_filled([types for _, types, _ in batch], 0, model),
                                  attention_mask=_filled([[1] * len(ids) for ids, _, _ in batch], 0, model))
        values += _log_probs(model, states_BTD, [(n, at, truth[start + n]) for n, (_, _, at) in enumerate(batch)])
    return _by_row(values, lengths)


def _kept_log_probs(model: Discriminator, tokenizer: PretrainedTokenizer, places: Sequence[Place]) -> list[list[float]]:
    found: list[list[float]] = []
    rows = [_inside(model, tokenizer, place) for place in places]
    for batch in (rows[start:start + BATCH] for start in range(0, len(rows), BATCH)):
        logits_BT = model(_filled([ids for ids, _, _ in batch], 0, model), token_type_ids=_filled([types for _, types, _ in batch], 0, model),
                          attention_mask=_filled([[1] * len(ids) for ids, _, _ in batch], 0, model)).logits
        kept_BT = F.logsigmoid(-logits_BT.to(wide(logits_BT.dtype)))
        found += [kept_BT[n, first:last].tolist() for n, (_, _, (first, last)) in enumerate(batch)]
    return found


def _behind(tokenizer: PretrainedTokenizer, before: str, text: str) -> tuple[list[int], list[int]]:
    """The ids that a prompt shares with the prompt and the text behind it, and those that follow."""
    opening, whole = tokenizer.encode_prompt(before), tokenizer.encode_prompt(before + text)
    shared = next((n for n, (a, b) in enumerate(zip(opening, whole, strict=False)) if a != b), min(len(opening), len(whole)))
    if shared == 0 or shared == len(whole):
        raise UsageError(f"the text {text[:60]!r} has no token behind {before[-60:]!r} that could be scored",
                         hint="give a text that is not empty, and something before it")
    return whole[:shared], whole[shared:]


def _inside(model: Model, tokenizer: PretrainedTokenizer, place: Place) -> tuple[list[int], list[int], tuple[int, int]]:
    """The ids and types of all three texts in a row, and from where to where the middle one stands."""
    before, text, after = place
    row = tokenizer(before + text + after, return_offsets_mapping=True, return_special_tokens_mask=True, return_token_type_ids=True)
    start, end = len(before), len(before) + len(text)
    inside = [n for n, ((a, b), special) in enumerate(zip(row["offset_mapping"], row["special_tokens_mask"], strict=True))
              if not special and a < end and b > start]
    if not inside:
        raise UsageError(f"the text {text[:60]!r} has no token that could be scored", hint="give a text that is not empty")
    length, longest = len(row["input_ids"]), model.config.max_position_embeddings
    if length > longest:
        raise UsageError(f"the text has {length:,} tokens with what stands around it, and the model takes {longest:,}", hint="shorten it")
    return row["input_ids"], row["token_type_ids"], (inside[0], inside[-1] + 1)


def _filled(rows: Sequence[Ids], fill: int, model: Model) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=model.device)


def _log_probs(model: CausalLM | MaskedLM | Seq2SeqLM, states_BTD: Tensor, chosen: Sequence[tuple[int, int, int]]) -> list[float]:
    """The log-probability of (row, place, token) each, from the states under which they are predicted."""
    rows_N, places_N, tokens_N = torch.tensor(chosen, device=states_BTD.device).unbind(1)
    logits_NV = model.lm_head(states_BTD[rows_N, places_N], model.transformer.embed.weight)
    logs_NV = F.log_softmax(logits_NV.to(wide(logits_NV.dtype)), -1)
    values: list[float] = logs_NV.gather(1, tokens_N[:, None])[:, 0].tolist()
    return values


def _by_row(values: Sequence[float], lengths: Sequence[int]) -> list[list[float]]:
    rest = iter(values)
    return [[next(rest) for _ in range(length)] for length in lengths]
