"""From text to a model and back: the flow that `threefold pretrain` runs, on a page of text."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from threefold import files, stage
from threefold import pretrain as room
from threefold.config import Recipe, load_recipe
from threefold.config import recipes as shelf
from threefold.errors import CheckpointError, ConfigError, DataError, Interrupted, ThreefoldError, TokenizerError, UsageError
from threefold.evaluation.loss import evaluate_model
from threefold.pretrain import Request, pretrain
from threefold.text.tokenizer import KINDS
from threefold.training import trainer
from threefold.training.log import RunLog

LINES = [f"{n} green bottles hanging on the wall, and if one green bottle should fall there are {n - 1}.\n" for n in range(60, 0, -1)]
BASE = {"tokenizer.kind_or_path": "char", "model.size": "nano", "model.context": 32, "train.batch_tokens": 128, "train.dtype": "float32"}


def recipe(*paths: Path | str, **overrides: Any) -> Recipe:
    return Recipe().override({**BASE, "data.paths": tuple(map(str, paths)), **overrides})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "bottles.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"review": line.strip(), "answer": "yes"}) + "\n" for line in LINES), encoding="utf-8")
    return path


def lines(run: Path) -> list[dict[str, Any]]:
    return RunLog(run / "log.jsonl").lines()


@contextlib.contextmanager
def stopped_after(losses: int) -> Iterator[None]:
    """A run within it breaks off after so many steps, as if an error had come up."""
    seen = 0

    class Stop(Exception): ...

    def stop(bar: Any, trainer: Any, line: dict[str, Any]) -> None:
        nonlocal seen
        seen += "loss" in line
        if seen == losses:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_show", stop)
        with pytest.raises(Stop):
            yield


def decisions(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines(run) if line.get("decision") == kind]


def test_a_run_directory_holds_what_the_contract_says(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = pretrain(recipe(text, **{"train.steps": 6}), Request(out=run))
    for name in ("recipe.toml", "log.jsonl", "report.html", "model/config.json", "model/model.safetensors", "model/tokenizer.json",
                 "model/tokenizer_config.json", "model/generation_config.json", "model/README.md", "data/manifest.json",
                 "checkpoints/step-000006/manifest.json"):
        assert (run / name).is_file(), name
    steps = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6] and all("event" not in line for line in steps)
    last = [line for line in lines(run) if line.get("event") == "evaluation"][-1]
    assert last["whole"] and last["val_loss"] == result["loss"] and last["step"] == 6
    assert load_recipe(run / "recipe.toml").train.steps == 6


def test_transformers_reads_the_result_and_agrees_on_the_loss(text: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run = tmp_path / "run"
    result = pretrain(recipe(text, **{"train.steps": 6}), Request(out=run))
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    whole = "".join(LINES)
    held = whole[int(0.9 * len(whole)):]
    start = tokenizer.bos_token_id
    ids = torch.tensor([start, *tokenizer.encode(held, add_special_tokens=False), tokenizer.eos_token_id])
    context = model.config.max_position_embeddings
    total = 0.0
    for at in range(0, len(ids) - 1, context):
        window, labels = ids[at:at + context][:len(ids) - 1 - at], ids[at + 1:at + 1 + context]
        logits = model(window[None]).logits[0].detach().float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    assert total / (len(ids) - 1) == pytest.approx(result["loss"], abs=1e-4)


def test_the_same_command_again_says_that_it_is_finished(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    asked = recipe(text, **{"train.steps": 4})
    first = pretrain(asked, Request(out=run))
    weights = (run / "model" / "model.safetensors").read_bytes()
    before = (run / "log.jsonl").read_bytes()
    assert pretrain(asked, Request(out=run)) == first
    assert "finished" in capsys.readouterr().err
    assert (run / "model" / "model.safetensors").read_bytes() == weights and (run / "log.jsonl").read_bytes() == before


def test_more_steps_go_on_and_end_like_one_run(text: Path, tmp_path: Path) -> None:
    constant = {"train.schedule": "wsd", "train.cooldown_fraction": 0.0, "train.warmup_fraction": 0.0, "train.eval_every": 100}
    pretrain(recipe(text, **{"train.steps": 4, **constant}), Request(out=tmp_path / "a"))
    pretrain(recipe(text, **{"train.steps": 8, **constant}), Request(out=tmp_path / "a"))
    pretrain(recipe(text, **{"train.steps": 8, **constant}), Request(out=tmp_path / "b"))
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == (tmp_path / "b/model/model.safetensors").read_bytes()


def test_C03_a_changed_recipe_is_shown_and_needs_force(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe(text, **{"train.steps": 3}), Request(out=run))
    with pytest.raises(ConfigError, match=r"train\.weight_decay"):
        pretrain(recipe(text, **{"train.steps": 5, "train.weight_decay": 0.2}), Request(out=run))
    assert pretrain(recipe(text, **{"train.steps": 5, "train.weight_decay": 0.2}), Request(out=run, force=True))["step"] == 5


def test_D04_changed_data_is_refused_until_it_is_accepted(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe(text, **{"train.steps": 3}), Request(out=run))
    text.write_text("".join(LINES[::-1]), encoding="utf-8")
    with pytest.raises(DataError, match="not what"):
        pretrain(recipe(text, **{"train.steps": 5}), Request(out=run))
    assert pretrain(recipe(text, **{"train.steps": 5}), Request(out=run, accept_new_data=True))["step"] == 5


def test_what_was_settled_before_the_first_step_cannot_be_forced(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe(text, **{"train.steps": 3}), Request(out=run))
    before = (run / "recipe.toml").read_bytes()
    for change in ({"model.context": 16}, {"train.dtype": "float64"}, {"tokenizer.vocab_size": 20}, {"train.batch_tokens": 64}):
        with pytest.raises(ConfigError, match=next(iter(change))) as caught:
            pretrain(recipe(text, **{"train.steps": 5, **change}), Request(out=run, force=True))
        assert "--fresh" in caught.value.hint and (run / "recipe.toml").read_bytes() == before


@pytest.mark.parametrize("wrong", [{"model.size": "bogus"}, {"train.objective": "mlm"}, {"model.family": "gpt9"},
                                   {"tokenizer.kind_or_path": "/nonexistent"}])
def test_what_is_refused_leaves_nothing_and_a_dry_run_says_the_same(wrong: dict[str, str], text: Path, tmp_path: Path) -> None:
    said = []
    for attempt in (lambda asked: room.dry_run(asked), lambda asked: pretrain(asked, Request(out=tmp_path / "run"))):
        with pytest.raises(ThreefoldError) as caught:
            attempt(recipe(text, **{"train.steps": 2, **wrong}))
        said.append(str(caught.value))
    assert said[0] == said[1] and not (tmp_path / "run").exists()
    pretrain(recipe(text, **{"train.steps": 2}), Request(out=tmp_path / "run"))


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(fresh: bool, text: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    for name in ("model", "data"):
        (home / name).mkdir(parents=True)
        (home / name / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a run directory"):
        pretrain(recipe(text, **{"train.steps": 2}), Request(out=home, fresh=fresh))
    assert all((home / name / "thesis.txt").read_text() == "years of work" for name in ("model", "data"))


def test_D04_data_that_was_prepared_anew_is_refused_by_the_checkpoint(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe(text, **{"train.steps": 3}), Request(out=run))
    for folder in (run / "data",):
        shutil.rmtree(folder)
    text.write_text("".join(LINES[::-1]), encoding="utf-8")  # the same characters: the tokenizer stays
    with pytest.raises(CheckpointError, match="other data"):
        pretrain(recipe(text, **{"train.steps": 5}), Request(out=run))
    assert pretrain(recipe(text, **{"train.steps": 5}), Request(out=run, accept_new_data=True))["step"] == 5
    shutil.rmtree(run / "data")
    text.write_text("".join(LINES).upper(), encoding="utf-8")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        pretrain(recipe(text, **{"train.steps": 7}), Request(out=run, accept_new_data=True))


def test_a_schedule_that_needs_an_end_is_refused_without_one(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.schedule"):
        pretrain(recipe(text, **{"train.schedule": "cosine"}), Request(out=tmp_path / "run"))


def test_a_log_to_replay_that_is_not_there_is_an_error(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="replay"):
        pretrain(recipe(text, **{"train.steps": 2}), Request(out=tmp_path / "run", replay=tmp_path / "missing.jsonl"))


def test_a_log_without_decisions_is_nothing_to_replay(text: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(UsageError, match="holds no decision"):
        pretrain(recipe(text, **{"train.steps": 2}), Request(out=tmp_path / "run", replay=tmp_path / "log.jsonl"))
    assert not (tmp_path / "run").exists()


def test_a_mixture_logs_the_loss_of_each_source(text: Path, documents: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = recipe(f"{text}:0.7", f"{documents}:0.3", **{"data.columns": {"text": "review"}, "train.steps": 6, "train.batch_tokens": 320,
                                                       "data.near_duplicates": False})
    pretrain(asked, Request(out=run))
    seen: set[str] = set()
    for line in lines(run):
        seen |= set(line.get("sources", {}))
    assert {Path(name).name for name in seen} == {"bottles.txt", "rows.jsonl"}


def test_going_on_with_another_domain_keeps_the_vocabulary_or_grows_it(text: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    pretrain(recipe(text, **{"train.steps": 20, "tokenizer.kind_or_path": "bpe", "tokenizer.vocab_size": 300}), Request(out=base))
    other = tmp_path / "other.txt"
    other.write_text("\n".join(f"hepatocellular carcinoma number {n}" for n in range(300)), encoding="utf-8")
    domain = {"model.size": "auto", "tokenizer.kind_or_path": "auto", "model.from": str(base), "train.steps": 4}
    same = pretrain(recipe(other, **domain), Request(out=tmp_path / "same"))
    grown = pretrain(recipe(other, **{**domain, "model.grow_vocab": 40}), Request(out=tmp_path / "grown"))
    sizes = [json.loads((tmp_path / name / "model/config.json").read_text())["vocab_size"] for name in ("base", "same", "grown")]
    assert sizes[0] == sizes[1] < sizes[2] <= sizes[0] + 40
    assert math.isfinite(same["loss"]) and math.isfinite(grown["loss"])


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_model_that_goes_on_has_the_context_of_its_run(family: str, text: Path, tmp_path: Path) -> None:
    pretrain(recipe(text, **{"train.steps": 2, "model.family": family}), Request(out=tmp_path / "base"))
    asked = recipe(text, **{"train.steps": 2, "model.from": str(tmp_path / "base"), "model.size": "auto", "model.context": 16,
                            "tokenizer.kind_or_path": "auto"})
    result = pretrain(asked, Request(out=tmp_path / "run"))
    assert json.loads((tmp_path / "run/model/config.json").read_text())[
        "n_positions" if family == "gpt2" else "max_position_embeddings"] == 16
    assert evaluate_model(tmp_path / "run")["loss"] == pytest.approx(result["loss"], abs=1e-6)


def test_a_budget_is_kept_and_its_decisions_can_be_replayed(text: Path, tmp_path: Path) -> None:
    asked = recipe(text, **{"train.budget": 3.0, "model.size": "nano"})
    seconds = []
    while not seconds or (seconds[-1] >= 5.0 and len(seconds) < 4):  # another program may take the cores away for a while
        run = tmp_path / f"run-{len(seconds)}"
        pretrain(asked, Request(out=run))
        seconds.append(next(line for line in lines(run) if line.get("event") == "finished")["session_seconds"])
    assert seconds[-1] < 5.0, seconds
    assert decisions(run, "steps") and decisions(run, "plan")
    pretrain(asked, Request(out=tmp_path / "b", replay=run / "log.jsonl"))
    assert (run / "model/model.safetensors").read_bytes() == (tmp_path / "b/model/model.safetensors").read_bytes()


def test_until_converged_ends_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abcdefgh\n" * 300, encoding="utf-8")
    pretrain(recipe(path, **{"train.until": "converged", "train.eval_every": 5, "train.patience": 2, "train.learning_rate": 0.01}),
             Request(out=tmp_path / "run"))
    assert len(decisions(tmp_path / "run", "converged")) == 1
    assert (tmp_path / "run/model/config.json").is_file()


def test_C06_a_dry_run_writes_nothing(text: Path, tmp_path: Path) -> None:
    """Not even an attempt: on a disk that refuses every operation it says the same."""
    def refuse(kind: str, path: str, *details: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", path)

    before = sorted(tmp_path.rglob("*"))
    with files.observed(refuse):
        found = room.dry_run(recipe(text))
    assert found["files"] == {str(text): 1} and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UsageError):
        room.dry_run(recipe(text, **{"model.family": "gpt9"}))


def test_C06_a_dry_run_looks_at_the_data_and_at_the_run_that_is_there(text: Path, documents: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="text"):
        room.dry_run(recipe(documents))
    pretrain(recipe(text, **{"train.steps": 3}), Request(out=tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=r"train\.seed"):
        room.dry_run(recipe(text, **{"train.steps": 3, "train.seed": 1}), Request(out=tmp_path / "run"))
    with pytest.raises(UsageError, match="not a run directory"):
        (tmp_path / "mine/model").mkdir(parents=True)
        room.dry_run(recipe(text), Request(out=tmp_path / "mine"))
    room.dry_run(recipe(text, **{"train.steps": 5}), Request(out=tmp_path / "run"))
    assert [path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp] == []


def test_what_a_model_or_a_tokenizer_settles_is_refused_by_name(text: Path, tmp_path: Path) -> None:
    pretrain(recipe(text, **{"train.steps": 2}), Request(out=tmp_path / "base"))
    base = str(tmp_path / "base")
    domain = {"model.size": "auto", "tokenizer.kind_or_path": "auto", "model.from": base, "train.steps": 2}
    for wrong, words in (({**domain, "model.family": "gpt2"}, r"model\.family"), ({**domain, "tokenizer.vocab_size": 500}, "vocab_size"),
                         ({"tokenizer.kind_or_path": base, "tokenizer.vocab_size": 500}, "vocab_size")):
        with pytest.raises(ConfigError, match=words):
            room.dry_run(recipe(text, **wrong))
    room.dry_run(recipe(text, **{**domain, "model.family": "qwen3"}))


@pytest.mark.parametrize("name", shelf.names())
def test_every_recipe_runs_for_a_few_steps(name: str, text: Path, tmp_path: Path) -> None:
    if name == "domain":
        pretrain(recipe(text, **{"train.steps": 2, "model.size": "nano"}), Request(out=tmp_path / "base"))
    asked = load_recipe(shelf.FOLDER / f"{name}.toml").override({"data.paths": (str(text),), "train.steps": 3, "train.batch_tokens": 128,
                                                                "model.context": 32, "train.dtype": "float32"})
    asked = asked.override({"model.from": str(tmp_path / "base")} if name == "domain" else {"model.size": "nano"})
    assert pretrain(asked, Request(out=tmp_path / "run"))["step"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_trains_a_model_that_can_be_asked(kind: str, documents: Path, tmp_path: Path) -> None:
    """Those without a beginning-of-text token too; samples show how held-out text goes on."""
    run = tmp_path / "run"
    asked = recipe(documents, **{"tokenizer.kind_or_path": kind, "tokenizer.vocab_size": 300, "data.columns": {"text": "review"},
                                 "data.near_duplicates": False, "train.steps": 3})
    assert math.isfinite(pretrain(asked, Request(out=run))["loss"])
    held = "".join(LINES)
    samples = [line["samples"] for line in lines(run) if line.get("event") == "evaluation"]
    assert samples and all(len(sample) == 1 and sample[0].strip()[:6] in held for sample in samples)


def test_D05_prepared_data_has_its_tokenizer(text: Path, tmp_path: Path) -> None:
    """Options that could only be passed over are refused by name, another tokenizer too."""
    pretrain(recipe(text, **{"train.steps": 2}), Request(out=tmp_path / "first"))
    pretrain(recipe(text, **{"train.steps": 2, "tokenizer.kind_or_path": "byte"}), Request(out=tmp_path / "other"))
    shards = tmp_path / "shards"
    shutil.copytree(tmp_path / "first" / "data", shards)
    plain = {"tokenizer.kind_or_path": "auto", "train.steps": 2}
    assert math.isfinite(pretrain(recipe(shards, **plain), Request(out=tmp_path / "prepared"))["loss"])
    for option in ({"tokenizer.kind_or_path": "byte"}, {"data.val_fraction": 0.3}, {"data.columns": {"text": "review"}}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            pretrain(recipe(shards, **{**plain, **option}), Request(out=tmp_path / "refused"))
    for option in ({"model.from": str(tmp_path / "other"), "model.size": "auto"}, {"tokenizer.kind_or_path": str(tmp_path / "other")}):
        with pytest.raises(TokenizerError, match="another tokenizer"):
            pretrain(recipe(shards, **{**plain, **option}), Request(out=tmp_path / "refused"))


def test_what_is_refused_on_the_way_costs_a_fresh_start_nothing(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe(text, **{"train.steps": 3}), Request(out=run))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    wrong = tmp_path / "latin.txt"
    wrong.write_bytes("größer\n".encode("latin-1") * 200)
    with pytest.raises(ThreefoldError):
        pretrain(recipe(wrong, **{"train.steps": 3}), Request(out=run, fresh=True))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before
    assert pretrain(recipe(text, **{"train.steps": 2}), Request(out=run, fresh=True))["step"] == 2
    assert not [path for path in run.iterdir() if path.name.startswith(".t")]


def test_what_a_run_uses_cannot_lie_where_it_writes(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(recipe(text, **{"train.steps": 2}), Request(out=run))
    again = recipe(text, **{"train.steps": 2, "model.from": str(run), "model.size": "auto", "tokenizer.kind_or_path": "auto"})
    for fresh in (False, True):
        with pytest.raises(UsageError, match="written over"):
            pretrain(again, Request(out=run, fresh=fresh))
    assert (run / "model" / "config.json").is_file()


def test_no_data_and_no_documents_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no data"):
        pretrain(recipe(), Request(out=tmp_path / "run"))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(DataError, match=r"empty\.txt"):
        pretrain(recipe(empty), Request(out=tmp_path / "run"))


def test_D06_rows_that_cannot_be_read_are_left_out_where_it_is_asked_for_and_told(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [json.dumps({"text": line}) for line in LINES]
    data.write_text("\n".join([*rows, "{", rows[0], ""]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"rows\.jsonl:{len(rows) + 1}: not a row in JSON"):
        pretrain(recipe(data, **{"train.steps": 1}), Request(out=tmp_path / "run"))
    pretrain(recipe(data, **{"train.steps": 1, "data.skip_problems": True}), Request(out=tmp_path / "run"))
    told = capsys.readouterr().err
    assert f"1 left out of the data: not a row in JSON ({data}:{len(rows) + 1})" in told and "1 left out of the data: exact duplicate" in told


def test_sources_beyond_count_are_refused_before_anything_is_written(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1,000 sources, and a run keeps account of at most 500") as caught:
        pretrain(recipe(text, **{"data.paths": (str(text),) * 1000}), Request(out=tmp_path / "run"))
    assert "'corpus/*.txt'" in caught.value.hint and not (tmp_path / "run").exists()


def test_what_goes_on_after_a_signal_is_said_without_the_flags_that_would_begin_again(
        text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: Any) -> None:
        raise Interrupted(signal.SIGTERM, "SIGTERM at step 1: saved", hint=trainer.GOES_ON)

    monkeypatch.setattr(trainer.Trainer, "fit", stopped)
    for request, hint in ((Request(out=tmp_path / "run"), "the same command goes on from here"),
                          (Request(out=tmp_path / "run", fresh=True), "the same command without --fresh goes on from here")):
        with pytest.raises(Interrupted, match="SIGTERM at step 1: saved") as caught:
            pretrain(recipe(text, **{"train.steps": 2}), request)
        assert caught.value.hint == hint and caught.value.signum == signal.SIGTERM


def test_train_takes_a_recipe_or_its_file(text: Path, tmp_path: Path) -> None:
    import threefold
    from threefold.config import dump

    (tmp_path / "recipe.toml").write_text(dump(recipe(text, **{"train.steps": 2})), encoding="utf-8")
    assert threefold.train(tmp_path / "recipe.toml", tmp_path / "run")["step"] == 2
    assert threefold.train(recipe(text, **{"train.steps": 3}), tmp_path / "run")["step"] == 3
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} bottles", "label": str(n % 2)}) + "\n" for n in range(20)), encoding="utf-8")
    taught = Recipe().override({"data.paths": (str(rows),), "finetune.task": "classify", "model.from": str(tmp_path / "run"), "train.steps": 2})
    with pytest.raises(ConfigError, match="the recipe learns rows") as caught:
        pretrain(taught, Request(out=tmp_path / "other"))
    assert "threefold finetune" in caught.value.hint and not (tmp_path / "other").exists()
    assert "accuracy" in threefold.train(taught, tmp_path / "taught")["metrics"]
