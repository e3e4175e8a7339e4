"""The recipe of a run: every option there is, and what does not go together.

The dataclasses below are the only list of options. Reading, writing, flags, help and the difference are driven by it.
"""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from threefold.config.leaf import INT64, Leaf, leaves_of, option
from threefold.config.words import quote
from threefold.errors import ConfigError

MAX_PROBLEMS = 20  # told at once
TASKS = ("classify", "tag", "instruct", "seq2seq", "embed", "reward", "dpo")  # what is learnt from rows
OF_OBJECTIVES = (("objective.hidden_share", 0.0, ("masked", "replaced")), ("objective.whole_words", False, ("masked", "replaced")),
                 ("objective.next_sentence", False, ("masked",)),
                 ("objective.smoothing", 0.1, ("seq2seq",)), ("finetune.class_weights", False, ("classify",)),
                 ("finetune.outside", "", ("classify",)), ("finetune.kind", "auto", ("classify",)),
                 ("finetune.database", "", ("seq2seq",)),
                 ("finetune.pooling", "auto", ("embed", "classify")), ("finetune.dims", (), ("embed",)), ("finetune.beta", 0.1, ("dpo",)),
                 ("finetune.ipo", False, ("dpo",)), ("finetune.flipped", 0.0, ("dpo",)),
                 ("finetune.template", "", ("instruct", "seq2seq", "reward", "dpo")))
NOT_OF_ROWS = ("data.near_duplicates", "data.skip_problems", "tokenizer.kind_or_path", "tokenizer.vocab_size", "model.family", "model.size",
               "model.grow_vocab", "train.objective", "train.batch_tokens", "train.optimizer")
VOCAB_SIZE = 8192  # of a trained tokenizer, at most, unless said


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read: documents, their columns, and how they are divided."""

    paths: tuple[str, ...] = option(
        (), "files, folders, globs, `python` or `hub:NAME`; `PATH:0.7` gives a share of the mixture")
    columns: dict[str, str] = option({}, "names of the columns, ours = theirs; `a+b` joins two with a newline")
    val_fraction: float = option(0.1, "share of the characters held back for validation", above=0, below=1)
    near_duplicates: bool = option(True, "drop documents that nearly repeat an earlier one")
    skip_problems: bool = option(False, "leave out rows and files that cannot be read, and count them; otherwise they are an error")

    @property
    def on_problem(self) -> Callable[[str, str], None] | None:
        """What is told of a row that cannot be read: None makes it an error. They are counted where the data is prepared."""
        return (lambda reason, where: None) if self.skip_problems else None


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How text becomes ids."""

    kind_or_path: str = option(
        "auto", "bpe, wordpiece, unigram, byte, char, or a model whose tokenizer is taken; auto: that of "
                "`model.from`, or the family's kind")
    vocab_size: int = option(VOCAB_SIZE, "most pieces a trained vocabulary may have", low=2, high=2**21)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What is trained."""

    family: str = option("auto", "a named architecture, such as qwen3, bert or t5; auto: that of the objective")
    size: str = option(
        "auto", "a published name of the family, `nano`, parameters like `25M`, or width and layers like `192x4`; auto: from data and budget")
    context: int = option(0, "most tokens the model sees at once", auto=True, low=2, high=2**24)
    from_model: str = option(
        "", "a model to continue from: run directory, Hugging Face directory or hub name", name="from")
    grow_vocab: int = option(0, "pieces to add to the vocabulary of `model.from`", low=0, high=2**20)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How it is trained, for how long, and what is written meanwhile."""

    objective: str = option("causal", "what is learnt from a row of tokens: causal, masked, replaced, span, prefix, seq2seq")
    steps: int | None = option(None, "stop after so many steps", low=1, high=INT64, safe=True)
    tokens: int | None = option(None, "stop after so many trained tokens", low=1, high=INT64, safe=True)
    budget: float | None = option(
        None, "stop after so much time, counted from the start of the process", above=0, duration=True, safe=True)
    until: str | None = option(None, "stop when validation no longer improves", choices=("converged",), safe=True)
    patience: int = option(
        0, "evaluations without improvement that count as converged; auto: 5, over rows 4", auto=True, low=1, high=10**6, safe=True)
    seed: int = option(0, "names every random stream of the run", low=0, high=INT64)
    batch_tokens: int = option(0, "tokens of one optimizer step", auto=True, low=1, high=2**40)
    micro_batch: int = option(
        0, "rows computed at once; auto halves when memory runs out", auto=True, low=1, high=2**24, safe=True)
    optimizer: str = option("muon", "muon (matrices; AdamW for the rest) or adamw; of rows: finetune.optimizer", choices=("muon", "adamw"))
    learning_rate: float = option(0.0, "highest learning rate", auto=True, above=0, high=100)
    adamw_learning_rate: float = option(
        0.0, "highest learning rate of what muon leaves to AdamW", auto=True, above=0, high=100)
    weight_decay: float = option(0.1, "decoupled weight decay of matrices", low=0, high=100)
    schedule: str = option(
        "wsd", "course of the learning rate after the warm-up", choices=("linear", "cosine", "wsd", "inverse_sqrt"))
    warmup_fraction: float = option(
        0.02, "share of the run in which the learning rate rises, where its steps are known before (else 12 steps)",
        low=0, high=1)
    cooldown_fraction: float = option(
        0.6, "share of the run in which `wsd` lets the learning rate fall, where its end is known before", low=0, high=1)
    clip: float = option(1.0, "largest norm of the gradients; 0: no clipping", low=0, high=1e9)
    dtype: str = option(
        "auto", "what is computed in; weights stay float32", choices=("auto", "float32", "bfloat16", "float64"))
    compile: bool = option(False, "compile the step with torch.compile")
    eval_every: int = option(0, "steps between evaluations", auto=True, low=1, high=INT64, safe=True)
    save_every: int = option(
        0, "steps between checkpoints; auto: by `train.save_seconds`", auto=True, low=1, high=INT64, safe=True)
    save_seconds: float = option(
        60.0, "time between checkpoints where `train.save_every` is auto", above=0, duration=True, safe=True)
    keep: int = option(
        2, "checkpoints kept; at least two, so that a damaged one has a predecessor", low=2, high=10**6, safe=True)
    spike: str = option("log", "what to do about a sudden rise of the loss", choices=("log", "skip", "rollback"))
    nonfinite: str = option(
        "stop", "what to do about a loss or gradients that are not finite", choices=("stop", "skip"))
    on_save_error: str = option(
        "stop", "what to do when a checkpoint cannot be written", choices=("stop", "continue"), safe=True)
    workers: int = option(1, "threads that prepare batches ahead; 0: none", low=0, high=1024, safe=True)
    threads: int = option(0, "threads of one operation on the CPU", auto=True, low=1, high=4096, safe=True)
    save_dtype: str = option(
        "float32", "what the result is stored in", choices=("float32", "bfloat16", "float16"), safe=True)
    log_every: int = option(1, "steps between lines in the log", low=1, high=INT64, safe=True)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What is special to an objective."""

    hidden_share: float = option(0.0, "masked, replaced: of the tokens of a row, how many are to be predicted; auto: 0.3 and 0.15",
                                 auto=True, above=0, below=1)
    whole_words: bool = option(False, "masked, replaced: hide whole words, not pieces")
    next_sentence: bool = option(False, "masked: learn too whether a second text follows the first")
    smoothing: float = option(0.1, "seq2seq: share of the target that all tokens have alike", low=0, below=1)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """What goes with rows of a table: `threefold finetune` and `threefold align`."""

    task: str = option("", "what is learnt from rows: classify, tag, instruct, seq2seq, embed, reward, dpo; empty: pretraining",
                       choices=("", *TASKS))
    val: str = option("", "rows to hold out; empty: a share of the data (data.val_fraction)")
    rows: int = option(0, "rows of one optimizer step", auto=True, low=1, high=2**24)
    epochs: float = option(3.0, "times that the data is gone through, where no other end is given", above=0, high=1e6, safe=True)
    truncate: bool = option(False, "cut texts that are longer than the context, and count them")
    class_weights: bool = option(False, "classify: rare classes count as much as frequent ones")
    kind: str = option("auto", "classify: what a label is: one class, several (a list), or a value; auto: by what the labels are",
                       choices=("auto", "one", "several", "value"))
    outside: str = option("", "classify: the label that stands for none of the classes; it is refused by a threshold")
    database: str = option("", "seq2seq: a SQLite file in which held-out queries are run, to see whether they give the right rows")
    pooling: str = option("auto", "embed, classify: how states become one vector; auto: of a classifier as it was, at first as its family reads",
                         choices=("auto", "mean", "cls", "last"))
    dims: tuple[str, ...] = option((), "embed: lengths that vectors may be cut to (Matryoshka)")
    beta: float = option(0.1, "dpo: how strongly the reference holds", above=0, high=1e6)
    ipo: bool = option(False, "dpo: the square of the difference instead (IPO)")
    flipped: float = option(0.0, "dpo: share of the choices taken to be the wrong way round", low=0, below=0.5)
    optimizer: str = option("adamw", "adamw moves a trained model gently; muon (matrices; AdamW for the rest) teaches a small one more",
                            choices=("adamw", "muon"))
    dropout: float | None = option(None, "share of activations that are dropped while it learns, for few rows; the model's own unless given",
                                   low=0, below=1)
    freeze: int = option(0, "layers from the bottom, with the embeddings, that stay as they are", low=0, high=10**6)
    layer_decay: float = option(1.0, "factor of the learning rate from each layer to the one below", above=0, high=1)
    rates: int = option(1, "learning rates that are tried for a tenth of the steps first, each thrice the one before", low=1, high=9)
    add_tokens: tuple[str, ...] = option((), "further special tokens, such as those of a template; their vectors are learnt")
    template: str = option("", "a file with a chat template for a model that has none, or instead of its own")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Small matrices beside the large ones, which stay as they are (arXiv 2106.09685)."""

    rank: int = option(0, "rank of the added matrices; 0: the model itself is trained", low=0, high=2**16)
    alpha: float = option(0.0, "the added product counts alpha / rank; auto: twice the rank", auto=True, above=0, high=1e6)
    dropout: float = option(0.0, "share of its inputs that are dropped", low=0, below=1)
    base_bits: int = option(0, "bits of a weight of the base meanwhile, 8 or 4; 0: as it is", low=0, high=8)
    targets: tuple[str, ...] = option(("all",), "modules beside which it stands, by their names in transformers; `all`: every linear layer")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run as it was asked for. Raises `ConfigError` with every problem when a value does not hold."""

    data: DataOptions = field(default_factory=DataOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    finetune: FinetuneOptions = field(default_factory=FinetuneOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)

    def __post_init__(self) -> None:
        problems = Problems("the recipe")
        checked(self.flat(), problems)
        problems.raise_if_any()

    def flat(self) -> dict[str, Any]:
        """Every leaf by its dotted key, `{"train.steps": 100, ...}`."""
        return {leaf.key: getattr(getattr(self, leaf.section), leaf.name) for leaf in leaves().values()}

    def override(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with some leaves replaced: `recipe.override({"train.steps": "100"})`. Texts are read as on the command
        line (`1k`, `3min`, `none`, `auto`). Raises `ConfigError` with every problem."""
        problems = Problems("the options")
        for key in values:
            if key not in leaves():
                near = nearest(key)
                problems.add(f"unknown option `--{key[:200]}`", f"did you mean `--{near}`?" if near else "")
        result = checked(self.flat() | dict(values), problems, words=values)
        problems.raise_if_any()
        return build(result)


def _contradictions(v: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The keys and the words of all values that cannot hold together."""
    task = v["finetune.task"]
    chosen = "finetune.optimizer" if task else "train.optimizer"
    if v[chosen] == "adamw" and v["train.adamw_learning_rate"]:
        yield (("train.adamw_learning_rate", chosen),
               f"`train.adamw_learning_rate` goes with `{chosen}` muon; adamw has `train.learning_rate`")
    for key, usual, objectives in OF_OBJECTIVES:
        if v[key] != usual and (task or v["train.objective"]) not in objectives:
            yield ((key, "finetune.task" if task else "train.objective"),
                   f"`{key}` goes with {' or '.join(f'`{o}`' for o in objectives)}, not `{task or v['train.objective']}`")
    if task and not v["model.from"]:
        yield (("finetune.task", "model.from"), f"the task `{task}` needs a model to start from: `model.from`")
    for key in NOT_OF_ROWS if task else ():
        if v[key] != leaves()[key].default:
            yield ((key, "finetune.task"), f"`{key}` says nothing where rows are learnt (`{task}`): model and tokenizer are those of `model.from`, "
                   "an update has `finetune.rows` rows, and `finetune.optimizer` makes it")
    if not task:
        for key, leaf in leaves().items():
            if key.startswith(("finetune.", "lora.")) and v[key] != leaf.default:
                yield ((key,), f"`{key}` goes with rows: name the task (`finetune.task`)")
    if v["lora.base_bits"] not in (0, 4, 8) or (v["lora.base_bits"] and not v["lora.rank"]):
        yield (("lora.base_bits", "lora.rank"), f"`lora.base_bits` is {v['lora.base_bits']}: 8 or 4 under an adapter (`lora.rank`), else 0")
    for key in ("lora.alpha", "lora.dropout", "lora.targets"):
        if task and not v["lora.rank"] and v[key] != leaves()[key].default:
            yield ((key, "lora.rank"), f"`{key}` goes with an adapter: say its rank (`lora.rank`)")
    if v["finetune.val"] and v["data.val_fraction"] != leaves()["data.val_fraction"].default:
        yield (("data.val_fraction", "finetune.val"), "`data.val_fraction` says how many rows are held out, and `finetune.val` names them: "
               "leave one of them out")
    if v["finetune.freeze"] and v["finetune.add_tokens"]:
        yield (("finetune.freeze", "finetune.add_tokens"), "`finetune.freeze` keeps the embedding as it is, in which the vectors of "
               "`finetune.add_tokens` would be learnt: leave one of them out")
    if not task and v["train.patience"] and not v["train.until"] and any(v[f"train.{end}"] for end in ("steps", "tokens", "budget")):
        yield (("train.patience", "train.until"), "`train.patience` counts towards convergence, which this run does not wait for: add "
               "`train.until` converged")
    if v["lora.rank"] and task == "classify" and v["finetune.pooling"] != "auto":
        yield (("finetune.pooling", "lora.rank"), f"`finetune.pooling` is {v['finetune.pooling']} with an adapter (`lora.rank`), and no other "
               "library would know the head that it goes with: leave one of them out")
    if v["lora.rank"] and v["finetune.freeze"]:
        yield (("finetune.freeze", "lora.rank"), "`finetune.freeze` with an adapter (`lora.rank`): all layers of the model stay as they are")
    if v["finetune.optimizer"] == "muon":
        for key, usual, why in (("lora.rank", 0, "an adapter, whose matrices are too narrow for it"),
                                ("finetune.layer_decay", 1.0, "rates of their own for layers")):
            if v[key] != usual:
                yield ((key, "finetune.optimizer"), f"`finetune.optimizer` is muon beside `{key}` {v[key]}: {why}; adamw takes both")
    if task == "dpo" and v["lora.rank"] and v["finetune.add_tokens"]:
        yield (("finetune.add_tokens", "lora.rank"),
               "`finetune.add_tokens` with `dpo` beside an adapter: what answers are compared with would learn the new tokens too; teach them "
               "with `instruct` before")
    if bad := [dim for one in v["finetune.dims"] for dim in one.split(",") if not (dim.isdecimal() and int(dim) > 0)]:
        yield (("finetune.dims",), f"`finetune.dims` holds {quote(bad[0])}, expected lengths of vectors such as 256,128,64")
    if v["finetune.ipo"] and v["finetune.flipped"]:
        yield (("finetune.ipo", "finetune.flipped"), "`finetune.flipped` belongs to the logistic loss, `finetune.ipo` is another one")
    if 0 < v["train.batch_tokens"] < v["model.context"]:
        yield (("train.batch_tokens", "model.context"),
               f"`train.batch_tokens` {v['train.batch_tokens']:,} is less than a row of {v['model.context']:,} tokens")
    origin = v["model.from"]
    if v["model.grow_vocab"] and not origin:
        yield (("model.grow_vocab", "model.from"),
               "`model.grow_vocab` needs `model.from`: there is no vocabulary to grow")
    if origin and v["model.size"] != "auto":
        yield (("model.size", "model.from"),
               f"`model.size` {quote(v['model.size'])} with `model.from` {quote(origin)}: that model has its size")
    if origin and v["tokenizer.kind_or_path"] != "auto":
        yield (("tokenizer.kind_or_path", "model.from"),
               f"`tokenizer.kind_or_path` {quote(v['tokenizer.kind_or_path'])} with `model.from` {quote(origin)}: "
               "that model has its tokenizer")
    if origin and v["tokenizer.vocab_size"] != VOCAB_SIZE:
        yield (("tokenizer.vocab_size", "model.from"),
               f"`tokenizer.vocab_size` {v['tokenizer.vocab_size']:,} with `model.from` {quote(origin)}: that model has its "
               "vocabulary, and `model.grow_vocab` extends it")


# What people type who know other tools, and what they mean by it. Only ever a hint.
_ALSO = {"train.lr": "train.learning_rate", "train.max_steps": "train.steps", "train.batch_size": "train.batch_tokens",
         "train.max_tokens": "train.tokens", "train.grad_clip": "train.clip", "train.max_grad_norm": "train.clip",
         "train.precision": "train.dtype", "train.warmup": "train.warmup_fraction", "train.time": "train.budget",
         "train.log_interval": "train.log_every", "train.eval_interval": "train.eval_every",
         "train.save_steps": "train.save_every", "model.block_size": "model.context", "model.name": "model.family",
         "model.sequence_length": "model.context", "model.n_ctx": "model.context", "data.path": "data.paths",
         "data.files": "data.paths", "tokenizer.kind": "tokenizer.kind_or_path", "model.from_model": "model.from",
         "tokenizer.path": "tokenizer.kind_or_path", "finetune.batch_size": "finetune.rows", "finetune.label_smoothing": "finetune.flipped",
         "finetune.learning_rate": "train.learning_rate", "finetune.lr": "train.learning_rate", "finetune.num_train_epochs": "finetune.epochs",
         "finetune.max_length": "model.context", "objective.mlm_probability": "objective.hidden_share",
         "objective.label_smoothing": "objective.smoothing", "lora.r": "lora.rank", "lora.lora_alpha": "lora.alpha",
         "lora.lora_dropout": "lora.dropout", "lora.target_modules": "lora.targets"}


@functools.cache
def sections() -> dict[str, type[Any]]:
    """The section dataclasses by name."""
    return {name: kind for name, kind in typing.get_type_hints(Recipe).items() if isinstance(kind, type)}


@functools.cache
def leaves() -> dict[str, Leaf]:
    """Every option by its dotted key, in the order in which they are written."""
    return leaves_of(sections())


def safe_keys() -> frozenset[str]:
    """Options that may change when a run is resumed; the others need `--force`."""
    return frozenset(key for key, leaf in leaves().items() if leaf.safe)


class Problems:
    """Collects what is wrong, and raises it as one `ConfigError`."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.found: list[tuple[str, str]] = []

    def add(self, message: str, hint: str = "") -> None:
        """Note one problem."""
        self.found.append((message, hint))

    def raise_if_any(self) -> None:
        """Raise what was noted: one problem as it is, several as a list."""
        if len(self.found) == 1:
            raise ConfigError(self.found[0][0], hint=self.found[0][1])
        if self.found:
            lines = [f"{message} ({hint})" if hint else message for message, hint in self.found[:MAX_PROBLEMS]]
            if len(self.found) > MAX_PROBLEMS:
                lines.append(f"and {len(self.found) - MAX_PROBLEMS:,} more")
            raise ConfigError("\n  ".join([f"{len(self.found):,} problems in {self.what}:", *lines]))


def checked(values: Mapping[str, Any], problems: Problems, *, origins: Mapping[str, str] = MappingProxyType({}),
            words: Container[str] = ()) -> dict[str, Any]:
    """Read every leaf in its type, note what does not hold, and return what does (defaults for the rest).

    `origins` says where a value stands (`recipe.toml:14: `), `words` which ones come from a command line.
    """
    result, wrong = {}, set()
    for key, leaf in leaves().items():
        value = values.get(key, leaf.default)
        try:
            result[key] = leaf.read(value, words=key in words)
        except (ValueError, OverflowError, ConfigError):
            result[key] = leaf.default
            wrong.add(key)
            problems.add(f"{origins.get(key, '')}`{key}`: expected {leaf.expected()}, got {quote(value)}")
    for keys, message in _contradictions(result):
        if not wrong.intersection(keys):
            problems.add(next((origins[key] for key in keys if key in origins), "") + message)
    return result


def build(values: Mapping[str, Any]) -> Recipe:
    """The recipe of a complete mapping from dotted keys to values."""
    return Recipe(**{name: kind(**{leaf.name: values[key] for key, leaf in leaves().items() if leaf.section == name})
                     for name, kind in sections().items()})


def nearest(key: str) -> str:
    """The option that a mistaken key most likely meant, or an empty text."""
    section, _, last = key[:200].rpartition(".")
    if key in sections():
        return f"[{key}]"
    names = {name: name for name in leaves()} | _ALSO
    if key in _ALSO:
        return _ALSO[key]
    same = {real for name, real in names.items() if name.rpartition(".")[2] == last}
    if len(same) == 1:
        return same.pop()
    near = difflib.get_close_matches(f"{section}.{last}", names, n=1, cutoff=0.7)
    if near:
        return names[near[0]]
    lasts = {name.rpartition(".")[2]: real for name, real in names.items()}
    near = difflib.get_close_matches(last, lasts, n=1, cutoff=0.75)
    return lasts[near[0]] if near else ""
