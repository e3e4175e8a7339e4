"""Texts -> tokenizer.json, the same file in every process, for every kind.

Decisions:
- At most 32 MB of text are learnt from (8 MB by Unigram, whose training is slow), in blocks chosen by the hash of
  their content: the same blocks on every machine, from all parts of a corpus, however it is ordered.
- bpe is byte-level and cut into words by GPT-2's rule (or Qwen2's), so it is lossless and GGUF can say it. It is
  learnt over characters and then written in bytes: the bytes of each frequent character are joined first, and no
  piece ends inside a character. That spends the vocabulary on words instead of fragments, which is what makes
  Korean as short as in a character-based vocabulary of the same size.
- unigram (arXiv:1804.10959) and the merges from which WordPiece's pieces are read are learnt by SentencePiece from
  counted words with one thread, because the `tokenizers` library trains these two differently in every process.
- unigram is lossless too, but for `▁` itself, which comes back as a space: rare characters fall back to bytes.
- wordpiece keeps case and accents unless asked: taking accents off would break Korean syllables into letters.
- `vocab_size` is a ceiling with all special tokens counted. Pieces that were seen once are not learnt. Fewer than
  asked is noted.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from threefold.errors import TokenizerError, UsageError, did_you_mean
from threefold.text.clean import normalise
from threefold.text.guard import GPT2_PATTERN, QWEN2_PATTERN, Spec, reported
from threefold.text.tokenizer_json import (
    BYTE_SIGNS,
    SPACE,
    Roles,
    added,
    as_signs,
    bpe_model,
    byte_level,
    char_spec,
    size_of,
    spec_of,
    template,
    wordpiece_spec,
)

KINDS = ("bpe", "wordpiece", "unigram", "byte", "char")
PATTERNS = {"gpt2": GPT2_PATTERN, "qwen2": QWEN2_PATTERN}
END, UNKNOWN, PAD = "<|endoftext|>", "<|unk|>", "<pad>"
SAMPLE = {"bpe": 32_000_000, "wordpiece": 32_000_000, "unigram": 8_000_000}  # bytes
BLOCK = 2**16  # characters of one block of the sample
LONGEST_WORD = 256
REQUIRED = "<>x0123456789ABCDEF" + SPACE  # the characters of the names of byte pieces


@dataclass
class Trained:
    """A tokenizer.json, the parts its tokens play, and what the user should know."""

    spec: Spec
    roles: Roles
    notes: list[str] = field(default_factory=list)


def train(
    kind: str,
    texts: Iterable[str],
    vocab_size: int,
    *,
    special: Sequence[str] = (),
    pattern: str = "gpt2",
    lowercase: bool = False,
) -> Trained:
    """Learn a tokenizer of one of `KINDS` with at most `vocab_size` ids.

    special     further special tokens, put at the end of the vocabulary in this order
    pattern     how bpe cuts words: `gpt2` or `qwen2`
    lowercase   wordpiece only

    Raises `UsageError` for settings that do not hold, `TokenizerError` for text from which nothing can be learnt.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of tokenizer `{kind}`", hint=did_you_mean(kind, KINDS))
    if pattern not in PATTERNS:
        raise UsageError(f"unknown pattern `{pattern}`", hint=did_you_mean(pattern, PATTERNS))
    extra = list(dict.fromkeys(special))
    if short := [token for token in extra if len(token.strip()) < 2]:
        raise UsageError(
            f"`{short[0]}` cannot be a special token: it is shorter than two characters",
            hint="write it in a way that no text does, such as `<|mask|>`",
        )
    if kind == "byte":
        trained = _byte(extra)
    elif kind == "char":
        trained = _char(texts, vocab_size, extra)
    else:
        blocks = sample(texts, SAMPLE[kind])
        if not any(block.strip() for block in blocks):
            raise TokenizerError("there is no text to train a tokenizer on", hint="check the data: every document was empty")
        learn = {
            "bpe": lambda: _bpe(blocks, vocab_size, extra, PATTERNS[pattern]),
            "unigram": lambda: _unigram(blocks, vocab_size, extra),
            "wordpiece": lambda: _wordpiece(blocks, vocab_size, extra, lowercase),
        }
        trained = learn[kind]()
    found = size_of(trained.spec)
    if found > vocab_size:
        raise UsageError(
            f"a {kind} tokenizer has at least {found:,} ids, more than the {vocab_size:,} allowed",
            hint=f"--vocab-size {found} or more",
        )
    if found < vocab_size and kind != "byte":
        trained.notes.append(f"the text yields {found:,} pieces, fewer than the {vocab_size:,} allowed")
    return trained


def sample(texts: Iterable[str], limit: int) -> list[str]:
    """Blocks of the normalised texts, in order, of at most `limit` bytes: all, or those with the lowest hashes."""
    kept: list[tuple[int, int, str, int]] = []
    bound, total, number = 2**64, 0, 0
    for text in texts:
        for block in _blocks(normalise(text)):
            data = block.encode()
            name = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            if name >= bound:  # one with a lower hash was already left out
                continue
            number += 1
            heapq.heappush(kept, (-name, number, block, len(data)))
            total += len(data)
            while total > limit and len(kept) > 1:
                left_out = heapq.heappop(kept)
                bound, total = -left_out[0], total - left_out[3]
    return [block for _, _, block, _ in sorted(kept, key=lambda entry: entry[1])]


def _blocks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > BLOCK:
        end = text.rfind("\n", start + 1, start + BLOCK)
        if end < 0:
            end = text.rfind(" ", start + 1, start + BLOCK)
        end = end if end > start else start + BLOCK
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def char_counts(texts: Iterable[str]) -> npt.NDArray[np.int64]:
    """How often each code point stands in texts, (0x110000,)."""
    counts = np.zeros(0x110000, np.int64)
    waiting: list[str] = []
    size = 0

    def count() -> None:
        codes = np.frombuffer("".join(waiting).encode("utf-32-le"), np.uint32)
        found = np.bincount(codes)
        counts[: len(found)] += found

    for text in texts:
        waiting.append(text)
        size += len(text)
        if size > 2**20:
            count()
            waiting, size = [], 0
    if size:
        count()
    return counts


def _frequent(counts: npt.NDArray[np.int64], coverage: float) -> list[str]:
    """The characters that make up `coverage` of the text, most frequent first, each seen twice at least."""
    order = np.argsort(-counts, kind="stable")
    enough = int(np.searchsorted(np.cumsum(counts[order]), coverage * counts.sum())) + 1
    return [chr(code) for code in order[:enough] if counts[code] > 1]


def _characters_for(words: Mapping[str, int], coverage: float) -> int:
    """How many characters make up `coverage` of counted words, those of the byte pieces' names among them."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for char in word:
            counts[char] += count
    found = counts.most_common()
    sums = np.cumsum([count for _, count in found])
    chosen = {char for char, _ in found[: int(np.searchsorted(sums, coverage * sums[-1])) + 1]} | set(REQUIRED)
    return len(chosen)


# ------------------------------------------------------------------------------------------ bpe, byte, char


def _finish(vocab: dict[str, int], merges: list[list[str]], extra: Sequence[str], pattern: str) -> Trained:
    for token in extra:
        vocab.setdefault(token, len(vocab))
    pre, decoder = byte_level(pattern) if pattern else byte_level(QWEN2_PATTERN)
    if not pattern:
        pre = pre["pretokenizers"][1]
    return Trained(
        spec_of(
            bpe_model(vocab, merges),
            [added(token, vocab[token]) for token in dict.fromkeys([END, *extra])],
            pre_tokenizer=pre,
            decoder=decoder,
        ),
        {"bos": END, "eos": END, "pad": END},
    )


def _byte(extra: Sequence[str]) -> Trained:
    return _finish({**{sign: byte for byte, sign in enumerate(BYTE_SIGNS)}, END: 256}, [], extra, "")


def _bpe(blocks: Sequence[str], vocab_size: int, extra: Sequence[str], pattern: str) -> Trained:
    # RoBERTa's positions begin behind the id that pads, so that one comes early.
    vocab = {token: n for n, token in enumerate([END, *(token for token in extra if token == PAD), *BYTE_SIGNS])}
    room = vocab_size - len(set(extra) | vocab.keys())
    merges: list[list[str]] = []
    # A character that is left to its bytes costs an id more each time it is used; one that is joined costs its place in
    # the vocabulary. The smaller the vocabulary, the more frequent a character must be to be worth its place.
    counts = char_counts(blocks)
    for char in _frequent(counts, 1 - 16 / max(vocab_size, 17)):
        signs = as_signs(char.encode())
        steps = [[signs[:i], signs[i]] for i in range(1, len(signs)) if signs[: i + 1] not in vocab]
        if len(merges) + len(steps) > room // 2:
            break
        for pair in steps:
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
    # One-byte characters are always known; others only where all of their bytes were joined.
    alphabet = [chr(code) for code in range(128)] + [
        char for char in _frequent(counts, 1.0) if ord(char) > 127 and as_signs(char.encode()) in vocab
    ]
    for pair in _character_merges(blocks, alphabet, room - len(merges), pattern):
        left, right = (as_signs(part.encode()) for part in pair)
        if left + right not in extra and left in vocab and right in vocab:  # text must not become a special token
            vocab.setdefault(left + right, len(vocab))
            merges.append([left, right])
    return _finish(vocab, merges, extra, pattern)


def _character_merges(blocks: Sequence[str], alphabet: Sequence[str], count: int, pattern: str) -> list[list[str]]:
    if count <= 0:
        return []
    learner = tokenizers.Tokenizer(models.BPE())
    # Where a character outside the alphabet stands, a word is cut, so that its neighbours do not become one: it is
    # marked by one that no clean text holds.
    gap = "\x00"
    outside = re.compile("[^" + "".join(map(re.escape, alphabet)) + "]")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), pre_tokenizers.Split(gap, "removed")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + count,
        min_frequency=2,
        initial_alphabet=list(alphabet),
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    with reported("the text", "learn bpe from"):
        learner.train_from_iterator((outside.sub(gap, block) for block in blocks), trainer)
    merges: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    return merges


def _char(texts: Iterable[str], vocab_size: int, extra: Sequence[str]) -> Trained:
    counts = char_counts(map(normalise, texts))
    if not counts.any():
        raise TokenizerError(
            "there is no text to train a tokenizer on", hint="check the data: every document was empty"
        )
    room = vocab_size - 2 - len(set(extra))
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    chosen = sorted(int(code) for code in order[: max(room, 0)])
    vocab = {token: i for i, token in enumerate([END, UNKNOWN, *map(chr, chosen)])}
    for token in extra:
        vocab.setdefault(token, len(vocab))
    trained = Trained(
        char_spec(vocab, [END, UNKNOWN, *extra], UNKNOWN), {"bos": END, "eos": END, "pad": END, "unk": UNKNOWN}
    )
    if len(chosen) < len(order):
        trained.notes.append(f"{len(order) - len(chosen):,} rare characters of {len(order):,} have no id of their own")
    return trained


# ------------------------------------------------------------------------------------------ wordpiece, unigram


def _learn_pieces(words: Counter[str], vocab_size: int, model_type: str, **options: Any) -> list[tuple[str, float]]:
    """(piece, score) as SentencePiece learns them from counted words, the best first."""
    import sentencepiece

    lines = (f"{word}\t{count}" for word, count in sorted(words.items(), key=lambda item: (-item[1], item[0])))
    result = io.BytesIO()
    with reported("the text", f"learn {model_type} from"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=result,
            input_format="tsv",
            vocab_size=max(vocab_size, 8),
            model_type=model_type,
            num_threads=1,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_by_unicode_script=False,
            split_by_number=False,
            max_sentence_length=2**20,
            minloglevel=4,
            **options,
        )
        learnt = sentencepiece.SentencePieceProcessor(model_proto=result.getvalue())
    return [
        (learnt.id_to_piece(i), learnt.get_score(i))
        for i in range(learnt.get_piece_size())
        if not (learnt.is_control(i) or learnt.is_unknown(i) or learnt.is_unused(i))
    ]


def _wordpiece(blocks: Sequence[str], vocab_size: int, extra: Sequence[str], lowercase: bool) -> Trained:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    room = vocab_size - len(dict.fromkeys([*special, *extra]))
    rules = tokenizers.Tokenizer.from_str(
        json.dumps(wordpiece_spec({"[UNK]": 0}, [], lowercase=lowercase, strip_accents=False))
    )
    spaced: Counter[str] = Counter()
    for block in blocks:
        spaced.update(block.split())
    words: Counter[str] = Counter()
    for text, count in spaced.items():
        for word, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text)):
            if len(word) <= LONGEST_WORD and SPACE not in word and word.strip():
                words[word] += count
    forms: Counter[str] = Counter()
    for word, count in words.items():
        forms[word[0]] += count
        for char in word[1:]:
            forms["##" + char] += count
    seen = sum(forms.values())
    chosen: list[str] = []
    covered = 0
    for form, count in sorted(forms.items(), key=lambda item: (-item[1], item[0])):
        if covered > (1 - 2 / max(vocab_size, 3)) * seen or 2 * len(chosen) > room:
            break
        chosen.append(form)
        covered += count
    pieces = dict.fromkeys(sorted(chosen))
    if room > len(pieces):
        for piece, _ in _learn_pieces(words, vocab_size + 64, "bpe", character_coverage=0.9999):
            form = piece[1:] if piece.startswith(SPACE) else "##" + piece
            if (
                len(pieces) < room
                and piece != SPACE
                and len(piece.removeprefix(SPACE)) > 1
                and form not in special
                and form not in extra
            ):
                pieces.setdefault(form)
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, *pieces, *extra]))}
    return Trained(
        wordpiece_spec(vocab, list(dict.fromkeys([*special, *extra])), lowercase=lowercase, strip_accents=False),
        {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    )


_WORD = re.compile(f"{SPACE}?[^{SPACE}\n\t]+|{SPACE}+(?![^{SPACE}\n\t])|{SPACE}+(?={SPACE})|\n+|\t+")
_WHITE = [
    SPACE * 2,
    SPACE * 3,
    SPACE * 4,
    SPACE * 7,
    SPACE * 8,
    SPACE * 11,
    SPACE * 12,
    SPACE * 16,
    "\n",
    "\n\n",
    "\t",
    "\t\t",
]


def _unigram(blocks: Sequence[str], vocab_size: int, extra: Sequence[str]) -> Trained:
    special = ["<pad>", "</s>", "<unk>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    counted: Counter[str] = Counter()
    for block in blocks:
        counted.update(_WORD.findall(SPACE + block.replace(" ", SPACE)))
    total = counted.total()
    white: list[list[Any]] = [[piece, math.log(counted[piece] / total)] for piece in _WHITE if counted[piece] > 1]
    base = len(dict.fromkeys([*special, *byte_pieces, *extra]))
    white = white[: max(0, (vocab_size - base) // 4)]
    words = Counter(
        {
            word: count
            for word, count in counted.items()
            if len(word) <= LONGEST_WORD and not word.isspace() and word.strip(SPACE)
        }
    )
    room = vocab_size - base - len(white)
    learnt: list[tuple[str, float]] = []
    if room > 0 and words:
        coverage = max(0.98, 1 - 8 / max(vocab_size, 16))  # below 0.98 SentencePiece does not go
        needed = _characters_for(words, coverage)
        if needed > room:
            raise UsageError(f"a unigram vocabulary of {vocab_size:,} has no room for the {needed:,} characters that make up "
                             f"{coverage:.1%} of this text, beside {base + len(white):,} special, byte and space pieces",
                             hint=f"--vocab-size {vocab_size - room + needed + needed // 4} or more, or the kind `bpe`")
        # Three ids are SentencePiece's own. The characters of the byte pieces' names are always pieces, see below.
        learnt = _learn_pieces(
            words,
            room + 3,
            "unigram",
            character_coverage=coverage,
            seed_sentencepiece_size=100_000,
            num_sub_iterations=1,
            add_dummy_prefix=False,
            required_chars=REQUIRED,
        )
    taken = {*special, *byte_pieces, *extra, *(piece for piece, _ in white)}
    scored: list[list[Any]] = [[piece, score] for piece, score in learnt if piece not in taken][: max(room, 0)] + white
    scored.sort(key=lambda entry: (-entry[1], entry[0]))
    # A byte piece is the last resort: its score is below any path of characters, so the text `<0x41>` is not a byte.
    lowest = min((entry[1] for entry in scored), default=0.0) - 200.0
    vocab = [[token, 0.0] for token in special] + [[piece, lowest] for piece in byte_pieces] + scored
    vocab += [[token, 0.0] for token in extra if token not in special]
    number = {entry[0]: i for i, entry in enumerate(vocab)}
    normal = [{"type": "Prepend", "prepend": SPACE}, {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    steps = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    spec = spec_of(
        {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": True},
        [added(token, number[token]) for token in dict.fromkeys([*special, *extra])],
        normalizer={"type": "Sequence", "normalizers": normal},
        post_processor=template(None, ("</s>", 1)),
        decoder={"type": "Sequence", "decoders": steps},
    )
    return Trained(spec, {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"})
