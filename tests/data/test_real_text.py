"""The whole way with real tokenizers: text -> shards -> batches, the same bytes in every process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from threefold.data.loader import Loader
from threefold.data.shards import prepare
from threefold.data.windows import validation_windows
from threefold.text.sources import Source
from threefold.text.tokenizer import KINDS, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"The {i}th letter said: 방금 본 영화는 {i % 7} times better — naïve! " * (1 + i % 3) for i in range(60)]


def test_shakespeare_is_divided_and_counted_as_it_should_be(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    path = shared_data("shakespeare/input.txt")
    text = path.read_text()
    place = int((1 - 0.1) * len(text))
    tokenizer = Tokenizer.train("char", [text], 1000)
    shards = prepare([Source(str(path))], tokenizer, tmp_path / "data")
    for split, wanted in (("train", text[:place]), ("validation", text[place:])):
        documents = list(shards.documents(split))
        assert len(documents) == 1 and tokenizer.decode(documents[0].tolist()) == wanted
        assert documents[0][0] == tokenizer.bos_id and documents[0][-1] == tokenizer.eos_id
        assert shards.count(split).bytes == len(wanted.encode())
    batches = list(validation_windows(shards, 64, token_bytes=tokenizer.token_bytes()))
    assert sum(batch.bytes for batch in batches) == len(text) - place
    assert sum(int((batch.labels != -100).sum()) for batch in batches) == len(text) - place + 1      # and the end
    loader = Loader(shards, 64, 12, 0)
    assert loader.batch(0).documents is None and loader.samples == -(-(place + 1) // 64)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_as_text(tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.train(kind, TEXTS, 600)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    shards = prepare([Source(str(path))], tokenizer, tmp_path / "data", near_duplicates=False)
    loaded = Tokenizer.load(shards.tokenizer_dir)
    kept = [loaded.decode(ids.tolist()) for split in ("train", "validation") for ids in shards.documents(split)]
    if kind in ("bpe", "byte", "char"):             # the others do not promise every white space
        assert sorted(kept) == sorted(TEXTS)
    assert len(kept) == len(TEXTS) and shards.tokenizer_fingerprint == loaded.fingerprint


PROGRAM = """
import json, sys
from pathlib import Path
from threefold.data.shards import prepare
from threefold.text.sources import Source
from threefold.text.tokenizer import KINDS, Tokenizer

corpus, out = sys.argv[1:]
texts = [json.loads(line)["text"] for line in Path(corpus).read_text().splitlines()]
for kind in KINDS:
    prepare([Source(corpus)], Tokenizer.train(kind, texts, 600), Path(out, kind), near_duplicates=False)
"""


def test_D09_two_processes_write_the_same_bytes_for_every_kind(tmp_path: Path) -> None:
    corpus = tmp_path / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    running = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(corpus), str(tmp_path / seed)], cwd=ROOT,
                                env={**os.environ, "PYTHONHASHSEED": seed}) for seed in ("1", "2")]
    assert [process.wait() for process in running] == [0, 0]
    first, second = ({str(path.relative_to(tmp_path / seed)): hashlib.sha256(path.read_bytes()).hexdigest()
                      for path in sorted((tmp_path / seed).rglob("*")) if path.is_file()} for seed in ("1", "2"))
    assert first == second and len(first) > 5 * len(KINDS)
