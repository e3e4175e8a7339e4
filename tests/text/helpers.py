"""Texts that tests of tokenizers share, and one small tokenizer of each kind."""

from __future__ import annotations

import functools
import inspect
import json
import textwrap

from threefold.text.tokenizer import KINDS, Tokenizer

KOREAN = """영화가 정말 재미있었어요 배우들 연기도 좋고 음악도 좋았습니다
이 영화는 처음부터 끝까지 지루하지 않고 재미있게 봤어요
스토리는 조금 아쉽지만 영상미가 정말 좋았던 영화입니다
다시 보고 싶은 영화 정말 강추합니다 ㅋㅋㅋ
배우들 연기가 아쉽고 스토리도 별로였어요 시간이 아깝네요"""

ENGLISH = """It was the best of times, it was the worst of times, it was the age of wisdom,
it was the age of foolishness, it was the epoch of belief, it was the epoch of incredulity,
it was the season of Light, it was the season of Darkness, it was the spring of hope.
It's 1859; they've read 12,345 books."""

CODE = inspect.getsource(json) + inspect.getsource(textwrap)

SAMPLES = {
    "english": "Hello world, it's the best of 2024!  Two  spaces.",
    "korean": "영화가 정말 재미있었어요 ㅋㅋㅋ 뷁",
    "emoji": "👩‍👩‍👧 🚀 naïve Ünï 中文 日本 ✅",
    "code": "def f(x):\n\tif x:\n        return x ** 2  # twice\n",
    "white space": "  a\n\n   \t b \n \n  ",
    "nothing": "",
    "space": " ",
    "specials": "<|endoftext|> </s> [CLS] <pad> <unk> <|unk|>",
    "bytes": "<0x41> <0xFF>",
}


def texts() -> list[str]:
    """What the tokenizers below are trained on."""
    return [*KOREAN.split("\n"), *ENGLISH.split("\n"), CODE, KOREAN, ENGLISH]


@functools.cache
def small(kind: str) -> Tokenizer:
    """A tokenizer of a few hundred pieces."""
    return Tokenizer.train(kind, texts(), 700)


EVERY_KIND = list(KINDS)
