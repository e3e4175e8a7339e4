"""What an objective must know of a vocabulary: the ids that play a part, and which ids begin a word or end a sentence.

Decision: word starts and sentence ends are told by the pieces, in tables of one entry an id, and are not stored with the
data: a shard serves every objective without being prepared again, and the tables cost a megabyte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from threefold.errors import TokenizerError
from threefold.text.tokenizer import Tokenizer

ENDS = tuple(".!?…。！？\n")  # of a sentence; quotes and brackets behind them are passed over
CLOSING = "\"'”’)]}»」』 "
SENTINEL = "<extra_id_{}>"


@dataclass(frozen=True)
class Vocabulary:
    """`size` ids; parts that no id plays are None. The tables have one entry for each id."""

    size: int
    cls: int | None
    sep: int | None
    mask: int | None
    pad: int | None
    eos: int | None
    sentinels: npt.NDArray[np.int64]       # the ids of <extra_id_0>, <extra_id_1>, ...
    special: npt.NDArray[np.bool_]         # stands for no text
    starts_word: npt.NDArray[np.bool_]
    ends_sentence: npt.NDArray[np.bool_]
    text: Callable[[int], str]             # of an id, for people

    @staticmethod
    def of(tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of a tokenizer."""
        size = tokenizer.vocab_size
        special = np.zeros(size, dtype=bool)
        special[sorted(tokenizer.special_ids)] = True
        pieces = [tokenizer.piece(i) or "" for i in range(size)]
        texts = [(piece or b"").decode("utf-8", errors="replace") for piece in tokenizer.token_bytes()]
        joined = any(piece.startswith("##") for piece in pieces)
        starts = np.asarray([not piece.startswith("##") if joined else text[:1].isspace() or piece.startswith("▁")
                             for piece, text in zip(pieces, texts, strict=True)], dtype=bool)
        ends = np.asarray([text.rstrip(CLOSING).endswith(ENDS) for text in texts], dtype=bool)
        numbers = {piece: i for i, piece in enumerate(pieces)}
        sentinels: list[int] = []
        while (name := SENTINEL.format(len(sentinels))) in numbers:
            sentinels.append(numbers[name])
        return Vocabulary(
            size, tokenizer.token_id("cls"), tokenizer.token_id("sep"), tokenizer.mask_id, tokenizer.pad_id, tokenizer.eos_id,
            np.asarray(sentinels, dtype=np.int64), special, starts | special, ends & ~special, lambda i: pieces[i] or texts[i])

    def middle(self, text: npt.NDArray[np.int64], most: int) -> int:
        """Where to cut a text in two, neither longer than `most`: the end of the sentence that is nearest to the middle, or
        the middle."""
        half, ends = len(text) // 2, np.flatnonzero(self.ends_sentence[text]) + 1
        ends = ends[(ends <= most) & (len(text) - ends <= most)]
        return int(ends[np.abs(ends - half).argmin()]) if len(ends) else half

    def need(self, objective: str, *parts: str) -> tuple[int, ...]:
        """The ids of some parts; raises TokenizerError that names what the objective lacks."""
        found = {part: getattr(self, part) for part in parts}
        if missing := [part for part, number in found.items() if number is None]:
            raise TokenizerError(
                f"the objective `{objective}` needs a token for {', '.join(f'`{part}`' for part in missing)}, and this "
                "tokenizer has none", hint="leave --tokenizer out: the family's own kind has it")
        return tuple(found.values())
