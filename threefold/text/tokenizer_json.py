"""tokenizer.json and tokenizer_config.json: their parts, put together and taken apart.

Decisions:
- A tokenizer.json is a plain dictionary as the `tokenizers` library reads it; this file alone knows how it is laid out.
- Which token begins, ends and fills up a text is not in it. tokenizer_config.json says so; where nobody declared
  anything, the names that everybody uses do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from threefold.errors import TokenizerError
from threefold.text.guard import GPT2_PATTERN, Spec, parse_json, read_bytes

Roles = dict[str, str]
PARTS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
SPACE = "▁"


def byte_signs() -> list[str]:
    """For each byte the printable character that GPT-2's byte-level vocabularies write for it."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


BYTE_SIGNS = byte_signs()


def as_signs(data: bytes) -> str:
    """Bytes as a byte-level vocabulary writes them."""
    return "".join([BYTE_SIGNS[byte] for byte in data])


def added(content: str, number: int, *, special: bool = True) -> Spec:
    """An entry of `added_tokens`."""
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def spec_of(
    model: Spec,
    added_tokens: list[Spec],
    *,
    normalizer: Spec | None = None,
    pre_tokenizer: Spec | None = None,
    post_processor: Spec | None = None,
    decoder: Spec | None = None,
) -> Spec:
    """A tokenizer.json from its parts."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added_tokens, key=lambda token: int(token["id"])),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def template(
    first: tuple[str, int] | None, last: tuple[str, int] | None, *, pair: bool = False, second: int = 0
) -> Spec:
    """A post-processor that frames a text as `first text last`, and a second text as well, which has the type `second`;
    with `pair` two texts as BERT does."""

    def token(part: tuple[str, int] | None, kind: int) -> list[Spec]:
        return [{"SpecialToken": {"id": part[0], "type_id": kind}}] if part else []

    def sequence(name: str, kind: int) -> list[Spec]:
        return [{"Sequence": {"id": name, "type_id": kind}}]

    single = [*token(first, 0), *sequence("A", 0), *token(last, 0)]
    second = 1 if pair else second
    double = [*single, *(() if pair else token(first, second)), *sequence("B", second), *token(last, second)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": double,
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in filter(None, (first, last))
        },
    }


def framed(spec: Spec, roles: Mapping[str, str]) -> Spec:
    """The spec with texts framed by the tokens that play `cls` and `sep`, as encoders are given them; itself where it frames
    them already."""
    present = spec.get("post_processor") or {}
    if roles["cls"] in present.get("special_tokens", ()) or present.get("type") in ("RobertaProcessing", "BertProcessing"):
        return spec
    numbers = {token["content"]: int(token["id"]) for token in spec["added_tokens"]}
    first, last = ((roles[part], numbers[roles[part]]) for part in ("cls", "sep"))
    return {**spec, "post_processor": template(first, last, pair=True)}


def byte_level(pattern: str, space_in_front: bool = False) -> tuple[Spec, Spec]:
    """(pre-tokenizer, decoder) of a byte-level vocabulary whose words are cut by `pattern`."""
    words = {"type": "ByteLevel", "add_prefix_space": space_in_front, "trim_offsets": True, "use_regex": pattern == GPT2_PATTERN}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    if pattern == GPT2_PATTERN:
        return words, decoder
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, words]}, decoder


def bpe_model(vocab: Mapping[str, int], merges: list[list[str]], **options: Any) -> Spec:
    """A BPE model; options are the library's own."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": dict(vocab),
        "merges": merges,
    }


def wordpiece_spec(
    vocab: Mapping[str, int],
    special: list[str],
    *,
    lowercase: bool,
    strip_accents: bool | None,
    chinese: bool = True,
    cleanup: bool = False,
) -> Spec:
    """A WordPiece tokenizer with BERT's rules on text (arXiv:1810.04805); `cleanup` takes the spaces in front of
    punctuation out of decoded text."""
    model = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": dict(vocab),
    }
    normal = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": chinese,
        "strip_accents": strip_accents,
        "lowercase": lowercase,
    }
    frame = {"[CLS]", "[SEP]"} <= vocab.keys()
    return spec_of(
        model,
        [added(token, vocab[token]) for token in special],
        normalizer=normal,
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor=template(("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"]), pair=True) if frame else None,
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": cleanup},
    )


def char_spec(vocab: dict[str, int], special: Sequence[str], unknown: str) -> Spec:
    """A character tokenizer: BPE without merges, which leaves characters."""
    return spec_of(
        bpe_model(vocab, [], unk_token=unknown),
        [added(token, vocab[token]) for token in dict.fromkeys(special)],
        decoder={"type": "Fuse"},
    )


def size_of(spec: Spec) -> int:
    """One more than the highest id."""
    vocab = spec["model"]["vocab"]
    highest = len(vocab) - 1 if isinstance(vocab, list) else max(vocab.values(), default=-1)
    return int(max([highest, *(token["id"] for token in spec["added_tokens"])])) + 1


def named_roles(tokens: list[str]) -> Roles:
    """The parts that tokens play by their names alone, for files that come without a tokenizer_config.json."""
    names = {
        "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
        "eos": ("</s>", "<eos>", "<|end_of_text|>"),
        "cls": ("[CLS]",),
        "sep": ("[SEP]",),
        "pad": ("<pad>", "[PAD]", "<|pad|>"),
        "unk": ("<unk>", "[UNK]", "<|unk|>"),
        "mask": ("<mask>", "[MASK]"),
    }
    roles = {part: token for part, known in names.items() for token in known if token in tokens}
    if "<|endoftext|>" in tokens and not roles.keys() & {"bos", "eos", "cls"}:
        roles |= {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}
    return roles


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what special_tokens_map.json and chat_template.jinja beside it add."""
    result: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = parse_json(read_bytes(folder / name), folder / name)
            if not isinstance(found, dict):
                raise TokenizerError(f"`{folder / name}` should hold an object")
            # A description says more than a spelling.
            described = {key for key, value in result.items() if isinstance(value, dict) and value.get("content") == found.get(key)}
            result |= {key: value for key, value in found.items() if key not in described}
    if "chat_template" not in result and (folder / "chat_template.jinja").is_file():
        result["chat_template"] = read_bytes(folder / "chat_template.jinja").decode("utf-8", errors="replace")
    return result


def declared_roles(config: Mapping[str, Any]) -> Roles:
    """The parts that a tokenizer_config.json gives to tokens."""
    roles: Roles = {}
    for part in PARTS:
        value = config.get(f"{part}_token")
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str) and content:
            roles[part] = content
    return roles
