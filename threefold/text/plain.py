"""Text as text only, in portions: what stands between a user's text and the library's encoder.

Decisions:
- User text never becomes a special token. The library is told not to look for them; and since some models could
  still reach one through its piece in the vocabulary, that piece has another name there, which nobody can guess. It
  only holds the id.
- A long document is cut where no token can reach across: between a letter and the line end behind it, under rules
  of which this is known. The ids are the same, the portions are encoded side by side, and memory stays small.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from typing import Any

from threefold.errors import TokenizerError
from threefold.text.guard import CUTTABLE, Spec

BATCH = 2**22  # characters handed to the library at once
LONG = 2**17  # characters beyond which a document is cut


def plain_spec(spec: Spec) -> Spec:
    """A tokenizer.json with the same ids for text, in which no special token can be matched."""
    model = dict(spec["model"])
    vocab = model["vocab"]
    there = {entry[0] for entry in vocab} if isinstance(vocab, list) else vocab
    special = {token["content"] for token in spec["added_tokens"] if token.get("special")} & set(there) - {
        model.get("unk_token")
    }
    hidden = {content: f" {secrets.token_hex(16)} " for content in special}
    if isinstance(vocab, list):
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {hidden.get(piece, piece): number for piece, number in vocab.items()}
    if model.get("merges") and hidden:
        pairs: list[Any] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not hidden.keys() & {pair[0], pair[1], pair[0] + pair[1]}]
    added = [{**token, "content": hidden.get(token["content"], token["content"])} for token in spec["added_tokens"]]
    return {**spec, "post_processor": None, "model": model, "added_tokens": added}


def can_be_cut(spec: Spec) -> bool:
    """Whether no token holds a letter and the line end behind it, because words are cut by a known rule."""
    pre, normal = spec.get("pre_tokenizer") or {}, (spec.get("normalizer") or {}).get("type", "NFC")
    if any(
        "\n" in token["content"] or token.get("lstrip") or token.get("rstrip")
        for token in spec["added_tokens"]
        if not token.get("special")
    ):
        return False
    if pre.get("type") == "BertPreTokenizer":
        return normal in ("NFC", "BertNormalizer")
    if pre.get("type") == "ByteLevel":
        return normal == "NFC" and bool(pre.get("use_regex", True)) and not pre.get("add_prefix_space")
    if pre.get("type") == "Sequence" and normal == "NFC":
        steps = pre["pretokenizers"]
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        return (
            len(steps) == 2
            and pattern in CUTTABLE
            and steps[0].get("behavior") == "Isolated"
            and steps[1]["type"] == "ByteLevel"
            and not steps[1].get("use_regex", True)
            and not steps[1].get("add_prefix_space")
        )
    return False


def check_text(text: str) -> None:
    """Raise a `TokenizerError` for what no tokenizer can take."""
    if not isinstance(text, str):
        raise TokenizerError(f"a text is a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text has a lone surrogate at character {error.start:,}, which UTF-8 cannot say",
            hint="`threefold.text.clean.normalise` replaces it",
        ) from error


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about `BATCH` characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text) + 16
        if size > BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def cut(text: str) -> Iterator[str]:
    """A long text in parts of about `LONG` characters, each beginning with the line end behind a letter."""
    start = 0
    while len(text) - start > LONG:
        end = start + LONG // 2
        while True:
            end = text.find("\n", end + 1)
            if end < 0 or text[end - 1].isalpha():
                break
        if end < 0:
            break
        yield text[start:end]
        start = end
    yield text[start:]
