"""What transformers' tokenizer classes take for granted, written out: names of special tokens, sides, inputs.

Decisions:
- A directory as published says little more than a class, or only the type of its model. Which tokens play which part,
  and on which side a batch is filled up, is then known to transformers alone, so it is written down here.
- It goes into the configuration as soon as a directory is read, and is saved with it. What is saved opens by its
  tokenizer.json, and no class has to be known again.
- What a directory declares counts more; a token that it declares as null is none.
- Tokens that a directory adds to its vocabulary keep the ids that it gives them. One that is named but has no id gets
  the next free one, as in transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from threefold.errors import TokenizerError
from threefold.text.guard import Spec, parse_json, read_bytes
from threefold.text.tokenizer_json import PARTS, size_of

BERT, ROBERTA, GPT2, GPT1 = "BertTokenizer", "RobertaTokenizer", "GPT2Tokenizer", "OpenAIGPTTokenizer"
BIOGPT, T5, LLAMA, MARIAN = "BioGptTokenizer", "T5Tokenizer", "LlamaTokenizer", "MarianTokenizer"

_END = "<|endoftext|>"
_FOR_GRANTED: dict[str, dict[str, Any]] = {
    BERT: {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    },
    ROBERTA: {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
    GPT2: {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    GPT1: {"unk_token": "<unk>"},
    BIOGPT: {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
    },
    T5: {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100},
    LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"},
    MARIAN: {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": 512},
}
_SAME = {"ElectraTokenizer": BERT, "MT5Tokenizer": T5}  # other names of a class
_OF_MODEL = {
    "bert": BERT,
    "electra": BERT,
    "roberta": ROBERTA,
    "gpt2": GPT2,
    "gpt_neo": GPT2,
    "openai-gpt": GPT1,
    "biogpt": BIOGPT,
    "t5": T5,
    "mt5": T5,
    "llama": LLAMA,
    "marian": MARIAN,
}


def class_of(folder: Path, config: Mapping[str, Any]) -> str:
    """The class that a directory's tokenizer_config.json or config.json means; empty where they say nothing."""
    model: Any = {}
    if not config.get("tokenizer_class") and (folder / "config.json").is_file():
        model = parse_json(read_bytes(folder / "config.json"), folder / "config.json")
    if not isinstance(model, dict):
        raise TokenizerError(f"`{folder / 'config.json'}` should hold an object")
    named = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    name = named.removesuffix("Fast") if named != "PreTrainedTokenizerFast" else named
    return _SAME.get(name, name) or _OF_MODEL.get(str(model.get("model_type")), "")


def written_out(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """A directory's tokenizer_config.json with all that its class takes for granted."""
    name = class_of(folder, config)
    if name not in _FOR_GRANTED:
        return dict(config)
    full = {**_FOR_GRANTED[name], **config, "tokenizer_class": name}
    if name == T5 and not (full.get("additional_special_tokens") or full.get("extra_special_tokens")):
        full["additional_special_tokens"] = sentinels(full)
    return full


def inputs(name: Any) -> list[str]:
    """What a class gives a model unasked."""
    known = _FOR_GRANTED.get(_SAME.get(short := str(name).removesuffix("Fast"), short), {})
    return list(known.get("model_input_names", ("input_ids", "attention_mask")))


def sentinels(config: Mapping[str, Any]) -> list[str]:
    """`<extra_id_0>`, `<extra_id_1>`, ... of T5, as many as the configuration says."""
    count = config.get("extra_ids", 100)
    if not isinstance(count, int) or not 0 <= count <= 10_000:
        raise TokenizerError(f"`extra_ids` is {count!r}", hint="expected a number of sentinels, 100 as a rule")
    return [f"<extra_id_{i}>" for i in range(count)]


def with_tokens(spec: Spec, config: Mapping[str, Any], folder: Path) -> Spec:
    """The spec with the tokens that a directory adds to its vocabulary or names in it, as it describes them."""
    vocab = spec["model"]["vocab"]
    numbers = {entry[0]: i for i, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    tokens = {token["content"]: token for token in spec["added_tokens"]}
    numbers |= {content: token["id"] for content, token in tokens.items()}
    free = size_of(spec)
    raw = config.get("tokenizer_class") in (BIOGPT, MARIAN)  # they look for added tokens in the text as it is
    for described, number, special in _declared(config, folder):
        flags = described if isinstance(described, Mapping) else {}
        content = str(flags.get("content", "") if flags else described)
        if content not in numbers:
            if number not in (None, free):
                raise TokenizerError(
                    f"`{folder}`: the added token `{content[:60]}` has the id {number!r}; {free:,} is the next one free",
                    hint="tokenizer_config.json and added_tokens.json are the place to look",
                )
            numbers[content] = free
            free += 1
        if content in tokens and not flags:
            continue
        tokens[content] = {
            "id": numbers[content],
            "content": content,
            **{name: bool(flags.get(name, False)) for name in ("single_word", "lstrip", "rstrip")},
            "normalized": not raw and bool(flags.get("normalized", not special)),
            "special": special or bool(flags.get("special", False)),
        }
    return {**spec, "added_tokens": sorted(tokens.values(), key=lambda token: int(token["id"]))}


def _declared(config: Mapping[str, Any], folder: Path) -> Iterator[tuple[Any, Any, bool]]:
    """(token or its description, id or None, whether it is special) of every token that a directory declares."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [config.get(f"{part}_token") for part in PARTS]
    named += list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    named = [token for token in named if token]
    spellings = {token.get("content") if isinstance(token, Mapping) else token for token in named}
    given = config.get("added_tokens_decoder") or {}
    if isinstance(given, Mapping):
        for number in sorted(given, key=lambda written: int(written) if str(written).isdigit() else -1):
            token = given[number]
            special = isinstance(token, Mapping) and (bool(token.get("special")) or token.get("content") in spellings)
            yield token, int(number) if str(number).isdigit() else number, special
    path = folder / "added_tokens.json"
    found = parse_json(read_bytes(path), path) if path.is_file() and not given else {}
    if isinstance(found, dict) and all(isinstance(number, int) for number in found.values()):
        for content, number in sorted(found.items(), key=lambda item: int(item[1])):
            yield content, number, content in spellings
    yield from ((token, None, True) for token in named)
