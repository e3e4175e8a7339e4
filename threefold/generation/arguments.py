"""`model.generate(...)` with transformers' argument names and defaults: ids in, ids out.

Decisions:
- Names, defaults and precedence are transformers': an argument given, then the model's generation_config.json, then 20
  new tokens, greedy, and for sampling top_k 50. Greedy ids are the same ids.
- An argument that this engine does not honour is refused by name unless its value means "off"; so is one in
  generation_config.json.
- An encoder-decoder gives what it has written, from its start id on; the ids given are what it reads.
- Padding is taken out of each row before the model sees it, so it makes no difference on which side it stands.
- Without a `seed` the draws are seeded from torch's global generator, so that `torch.manual_seed` works as people
  expect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from threefold import hub
from threefold.errors import UsageError, did_you_mean
from threefold.generation.beams import beam_search, beams_of
from threefold.generation.engine import Decoding, Request, run_step, without_dropout
from threefold.generation.reading import Answering, LanguageModel, reader
from threefold.generation.rules import rules_of
from threefold.generation.sampling import SamplingSettings
from threefold.model import adapters
from threefold.strict_json import read_object

DEFAULT_NEW_TOKENS = 20
HONOURED = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "num_return_sequences",
    "seed",
    "num_beams",
    "early_stopping",
    "length_penalty",
    "decoder_start_token_id",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "renormalize_logits",
)
# Arguments that say nothing here, and the values for which others say "off".
INERT = frozenset(
    {
        "use_cache",
        "transformers_version",
        "_from_model_config",
        "cache_implementation",
        "synced_gpus",
        "disable_compile",
    }
)
OFF: dict[str, tuple[Any, ...]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "penalty_alpha": (0.0,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "return_dict_in_generate": (False,),
    "remove_invalid_values": (False,),
    "max_time": (),
    "stop_strings": (),
    "force_words_ids": (),
    "begin_suppress_tokens": (),
    "exponential_decay_length_penalty": (),
    "sequence_bias": (),
    "guidance_scale": (1.0,),
    "constraints": (),
    "watermarking_config": (),
    "prompt_lookup_num_tokens": (),
    "streamer": (),
    "assistant_model": (),
    "logits_processor": (),
    "stopping_criteria": (),
    "top_h": (),
    "dola_layers": (),
    "token_healing": (False,),
    "low_memory": (False,),
    "num_assistant_tokens": (20, 5, 10),
    "is_assistant": (False,),
    "token_type_ids": (),
}
RULES = ("bad_words_ids", "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id")  # what may not or must be written, however it is chosen
# Of these config.json speaks where a directory has no generation_config.json, as older ones have none.
SETTINGS = tuple(name for name in (*HONOURED, *OFF) if not name.startswith(("output_", "return_")))


def settings_of(folder: Path) -> dict[str, Any]:
    """How the model of a directory is to write: its generation_config.json, or what config.json says where there is none; beside
    an adapter's own words those of its base."""
    own = read_object(folder / "generation_config.json")
    if adapters.is_adapter(folder):
        return {**settings_of(hub.resolve(adapters.described(folder)[0])), **own}
    if own:
        return own
    described = read_object(folder / "config.json")
    return {name: described[name] for name in SETTINGS if described.get(name) is not None}


def generate_ids(
    model: LanguageModel,
    input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    attention_mask: Tensor | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Tensor:
    """The given ids and new ones behind them, int64 (B * num_return_sequences, T + new), filled with `pad_token_id`; of an
    encoder-decoder its start id and new ones, (B * num_return_sequences, 1 + new).

    input_ids       (B, T); None is one row of `bos_token_id`
    attention_mask  (B, T), zero where there is padding, on either side; without it padding is known by `pad_token_id`,
                    unless that also ends a text
    defaults        the content of generation_config.json
    arguments       transformers' (see `HONOURED`), and `seed`

    Raises `UsageError` for unknown arguments and for lengths beyond the model's context, both numbers stated.
    """
    options = merged(arguments, defaults or {}, model)
    ids_BT = _as_ids(input_ids, options.get("bos_token_id"), model.device)
    pad, eos = options.get("pad_token_id"), id_set(options.get("eos_token_id"))
    prompts = _prompts(ids_BT, attention_mask, None if pad in eos else pad)
    openings, rows = written(model, prompts, options, ids_BT.shape[1])
    fill = pad if pad is not None else min(eos, default=0)
    longest = max(map(len, rows))
    new_BN = torch.tensor([row + [fill] * (longest - len(row)) for row in rows], dtype=torch.int64, device=ids_BT.device)
    if isinstance(reader(model), Answering):
        given_BT = torch.tensor(openings, device=ids_BT.device)
    else:
        given_BT = ids_BT.repeat_interleave(len(rows) // len(prompts), 0)
    return torch.cat([given_BT, new_BN.view(len(rows), longest)], dim=1)


def written(
    model: LanguageModel, prompts: Sequence[tuple[int, ...]], options: Mapping[str, Any], given: int = 0, first: int = 0,
    until: Callable[[int, int], bool] | None = None,
) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """What each row's text begins with and the new ids behind it, `num_return_sequences` rows a prompt, without any padding.

    `options` are those that `merged` gives. `given` is the length that `max_length` counts for a prompt, if it is not that
    of the longest; `first` the number of the first prompt among more, by which its draws are named. `until` is asked after
    each token, with the number of its row and the token, whether that row is at its end; beams do not ask.
    """
    side, eos = reader(model), id_set(options.get("eos_token_id"))
    settings, count = _settings(options, sampled=bool(options.get("do_sample", False)))
    longest = max(map(len, prompts))
    width = 1 if isinstance(side, Answering) else given or longest
    new = _new_tokens(options, width, side.room(longest))
    rules, start = rules_of(options, width), options.get("decoder_start_token_id")
    requests = [Request(prompt, new, settings, eos, row, rules, start)
                for row, prompt in enumerate((p for p in prompts for _ in range(count)), first * count)]
    beams = beams_of(options, count)
    if beams.width > 1:
        with without_dropout(model):
            return ([side.opening(request.prompt, start) for request in requests],
                    [ids for request in requests[::count] for ids in beam_search(model, request, beams)])
    decoding = Decoding(model, requests)
    while step := run_step(decoding):
        for number, token in step.items():
            if until is not None and until(number, token):
                decoding.finish(number)
    return decoding.openings, decoding.tokens


def merged(arguments: Mapping[str, Any], defaults: Mapping[str, Any], model: LanguageModel) -> dict[str, Any]:
    """Arguments over generation_config.json over config.json; unknown or unsupported ones are refused by name."""
    problems = [problem for name, value in arguments.items() if (problem := _problem(name, value))]
    given = {name for name, value in arguments.items() if value is not None}
    problems += [
        f"generation_config.json: {problem}"
        for name, value in defaults.items()
        if name not in given and (problem := _problem(name, value))
    ]
    if problems:
        unknown = next(
            (name for name in arguments if name not in OFF and name not in INERT and name not in HONOURED), None
        )
        raise UsageError(
            "; ".join(problems),
            hint=did_you_mean(unknown, HONOURED)
            if unknown
            else "this engine draws, takes the best token or searches with beams",
        )
    config = {"eos_token_id": model.config.eos_token_id, "bos_token_id": model.config.bos_token_id}
    chosen = {**config, **{k: v for k, v in defaults.items() if v is not None}, **{k: arguments[k] for k in given}}
    return {name: value for name, value in chosen.items() if name in HONOURED}


def _problem(name: str, value: Any) -> str | None:
    if name in HONOURED or name in INERT or value is None:
        return (
            None
            if name in HONOURED or name in INERT or name in OFF
            else f"`{name}` is not a known argument of generate"
        )
    if name in OFF:
        return None if value in OFF[name] or value in ([], {}) else f"`{name}` is {value!r}, which is not supported"
    return f"`{name}` is not a known argument of generate"


def id_set(ids: int | Iterable[int] | None) -> frozenset[int]:
    """The ids in `eos_token_id`, which is one, several or none."""
    return frozenset(() if ids is None else (ids,) if isinstance(ids, int) else ids)


def _as_ids(input_ids: Tensor | Sequence[Sequence[int]] | None, bos: int | None, device: torch.device) -> Tensor:
    if input_ids is None:
        if bos is None:
            raise UsageError("`input_ids` is missing", hint="this model has no beginning-of-text token to begin with")
        return torch.tensor([[bos]], device=device)
    ids_BT = torch.as_tensor(input_ids, device=device)
    if ids_BT.ndim != 2 or ids_BT.dtype not in (torch.int64, torch.int32) or ids_BT.shape[0] == 0:
        raise UsageError(
            f"`input_ids` is {ids_BT.dtype} of shape {tuple(ids_BT.shape)}, "
            "expected whole numbers of shape (batch, length)",
            hint='`tokenizer(text, return_tensors="pt")` gives them',
        )
    return ids_BT.to(torch.int64)


def _prompts(ids_BT: Tensor, attention_mask: Tensor | None, pad: int | None) -> list[tuple[int, ...]]:
    """The ids of each row that are no padding."""
    if attention_mask is None:
        if pad is None or not bool((ids_BT == pad).any()):
            return [tuple(row) for row in ids_BT.tolist()]
        attention_mask = ids_BT != pad
    kept_BT = torch.as_tensor(attention_mask, device=ids_BT.device) != 0
    if kept_BT.shape != ids_BT.shape:
        raise UsageError(
            f"`attention_mask` has shape {tuple(kept_BT.shape)}, expected that of `input_ids`, {tuple(ids_BT.shape)}"
        )
    if bool((kept_BT[:, 1:].int() - kept_BT[:, :-1].int()).ne(0).sum(1).gt(2).any()):
        raise UsageError("`attention_mask` has gaps inside a row", hint="padding stands before or after a text")
    return [tuple(row[kept].tolist()) for row, kept in zip(ids_BT, kept_BT, strict=True)]


def _settings(options: Mapping[str, Any], sampled: bool) -> tuple[SamplingSettings, int]:
    count = options.get("num_return_sequences", 1)
    if not isinstance(count, int) or count < 1 or (count > 1 and not sampled and options.get("num_beams", 1) == 1):
        raise UsageError(
            f"`num_return_sequences` is {count!r}",
            hint="1 or more, and more than 1 only with do_sample=True or num_beams: greedy rows are all the same",
        )
    penalty = options.get("repetition_penalty", 1.0)
    if not sampled:
        return SamplingSettings(temperature=0.0, repetition_penalty=penalty), count
    seed = options.get("seed")
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    return SamplingSettings(
        temperature=options.get("temperature", 1.0),
        top_k=options.get("top_k", 50),
        top_p=options.get("top_p", 1.0),
        min_p=options.get("min_p", 0.0),
        repetition_penalty=penalty,
        seed=seed,
    ), count


def _new_tokens(options: Mapping[str, Any], given: int, room: int | None) -> int:
    """How many tokens to add: `max_new_tokens`, or up to `max_length` in all, or 20 as far as the context reaches."""
    new, total = options.get("max_new_tokens"), options.get("max_length")
    for name, value in (("max_new_tokens", new), ("max_length", total)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise UsageError(f"`{name}` is {value!r}, expected a whole number, 0 or more")
    if new is not None:
        return int(new)
    if total is not None:
        if total <= given:
            raise UsageError(
                f"`max_length` {total} leaves no room behind a prompt of {given} tokens",
                hint="`max_new_tokens` counts the new ones alone",
            )
        return int(total) - given
    return DEFAULT_NEW_TOKENS if room is None else max(1, min(DEFAULT_NEW_TOKENS, room))
