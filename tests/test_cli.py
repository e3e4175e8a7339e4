"""The command line as a user meets it: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from threefold import __version__, cli

VERBS = ("tour", "doctor", "tokenizer", "data", "pretrain", "finetune", "align", "evaluate", "generate", "chat", "export", "prompts", "inspect",
         "report", "checkpoints", "recipes")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err
    return call


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, made through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("".join(f"line {n} of a small text.\n" for n in range(400)), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        cli.main(["pretrain", "--data", str(folder / "text.txt"), "--tokenizer", "char", "--size", "nano", "--context", "32", "--steps", "12",
                  "--train.batch_tokens", "256", "--train.eval_every=6", "--out", str(folder / "run"), "--quiet"])
    assert not stop.value.code
    return folder


def test_help_lists_every_verb_and_no_other(run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run("--help")
    listed = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.startswith("  ") and line[2] != " "]
    assert (code, err, sorted(listed)) == (0, "", sorted(VERBS))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(verb, "--help")
    assert code == 0 and "Usage:" in out and not err


def test_help_answers_without_torch() -> None:
    code = ("import sys, threefold.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_the_module_is_the_program() -> None:
    done = subprocess.run([sys.executable, "-m", "threefold", "--version"], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == f"{__version__}\n"


@pytest.mark.parametrize(("words", "says", "hint"), [
    (("pretrian",), "no such command `pretrian`", "did you mean `pretrain`?"),
    (("pretrain", "--stesp", "5"), "unknown flag `--stesp`", "did you mean `--step`?"),
    (("pretrain", "--data", "x", "--train.learning_rat", "1", "--out", "y"), "unknown option `--train.learning_rat`",
     "did you mean `--train.learning_rate`?"),
    (("pretrain", "--data", "x"), "--out is missing", "for example --out runs/first"),
    (("generate",), "missing argument `MODEL`", "--help"),
    (("tokenizer", "trian"), "no such command `trian`", "did you mean `train`?"),
    (("pretrain", "--data", "x", "--out", "y", "--steps", "many"), "`train.steps`", ""),
])
def test_C01_what_is_not_known_exits_2_and_says_what_was_meant(words: tuple[str, ...], says: str, hint: str,
                                                              run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and says in err and hint in err and "Traceback" not in err


def test_several_paths_follow_one_data_flag(run: Callable[..., tuple[int, str, str]], trained: Path) -> None:
    (trained / "other.txt").write_text("another text\n" * 50)
    code, out, _ = run("pretrain", "--data", trained / "text.txt", trained / "other.txt", "--dry-run")
    assert code == 0 and len(json.loads(out)["files"]) == 2


def test_the_result_is_data_on_stdout_and_talk_on_stderr(run: Callable[..., tuple[int, str, str]], trained: Path) -> None:
    code, out, err = run("evaluate", trained / "run", "--json")
    assert code == 0 and set(json.loads(out)) == {"loss", "bits_per_byte", "perplexity", "tokens", "bytes"}
    code, out, err = run("pretrain", "--data", trained / "text.txt", "--tokenizer", "char", "--size", "nano", "--context", "32", "--steps", "12",
                         "--train.batch_tokens", "256", "--train.eval_every=6", "--out", trained / "run", "--json")
    assert code == 0 and json.loads(out)["step"] == 12 and "finished" in err


def test_generate_prints_new_text_alone_and_the_same_for_a_seed(run: Callable[..., tuple[int, str, str]], trained: Path) -> None:
    first = run("generate", trained / "run", "line 1", "--max-new-tokens", "8", "--seed", "5")
    assert first[0] == 0 and not first[1].startswith("line 1") and len(first[1].rstrip("\n")) <= 8
    assert run("generate", trained / "run", "line 1", "--max-new-tokens", "8", "--seed", "5") == first
    code, out, _ = run("generate", trained / "run", "line 1", "--max-new-tokens", "8", "--seed", "5", "--json")
    assert code == 0 and json.loads(out)["text"] == first[1].removesuffix("\n")


def test_a_prompt_that_does_not_fit_is_told_with_both_numbers(run: Callable[..., tuple[int, str, str]], trained: Path) -> None:
    code, out, err = run("generate", trained / "run", "line 1 of " * 20, "--max-new-tokens", "5")
    assert code == 2 and out == "" and "32" in err and "hint:" in err


def test_checkpoints_are_listed_verified_and_damage_exits_3(run: Callable[..., tuple[int, str, str]], trained: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(trained / "run", copy)
    assert run("checkpoints", "verify", copy)[0] == 0
    code, out, _ = run("checkpoints", "list", copy, "--json")
    assert code == 0 and json.loads(out.splitlines()[0]) | {"bytes": 0} == {"step": 12, "bytes": 0, "state": "verified"}
    file = copy / "checkpoints/step-000012/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, _, err = run("checkpoints", "verify", copy)
    assert code == 3 and "model.safetensors" in err


def test_data_and_tokenizer_verbs(run: Callable[..., tuple[int, str, str]], trained: Path, tmp_path: Path) -> None:
    assert run("tokenizer", "train", "--data", trained / "text.txt", "--kind", "bpe", "--vocab-size", "300", "--out", tmp_path / "tok")[0] == 0
    code, out, _ = run("tokenizer", "show", tmp_path / "tok", "line 7", "--json")
    assert code == 0 and all(set(json.loads(line)) == {"piece", "id"} for line in out.splitlines())
    assert run("data", "prepare", "--data", trained / "text.txt", "--tokenizer", tmp_path / "tok", "--out", tmp_path / "shards")[0] == 0
    assert run("data", "verify", tmp_path / "shards")[0] == 0
    assert json.loads(run("data", "show", tmp_path / "shards")[1])["vocab_size"] <= 300
    assert json.loads(run("data", "show", trained / "text.txt")[1])["text"].startswith("line 0")
    shard = next((tmp_path / "shards").glob("*train*.ids"))
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, err = run("data", "verify", tmp_path / "shards")
    assert code == 3 and shard.name in err
    code, _, _ = run("pretrain", "--data", tmp_path / "shards", "--size", "nano", "--steps", "2", "--out", tmp_path / "never")
    assert code == 3


def test_report_and_recipes(run: Callable[..., tuple[int, str, str]], trained: Path, tmp_path: Path) -> None:
    page = trained / "run" / "report.html"
    page.unlink()
    assert run("report", trained / "run")[0] == 0 and "<script" not in page.read_text(encoding="utf-8")
    assert run("report", tmp_path)[0] == 2
    names = [json.loads(line)["name"] for line in run("recipes", "--json")[1].splitlines()]
    assert "python" in names
    assert run("recipes", "copy", "python", "--out", tmp_path / "mine.toml")[0] == 0
    assert run("recipes", "copy", "python", "--out", tmp_path / "mine.toml")[0] == 2
    code, _, err = run("recipes", "copy", "pyton")
    assert code == 2 and "did you mean `python`?" in err


def test_R04_a_reader_that_goes_away_is_no_error(trained: Path) -> None:
    words = [sys.executable, "-m", "threefold", "data", "show", str(trained / "text.txt")]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(20) == 0 and b"Traceback" not in err and b"Exception" not in err
    child.stderr.close()


def test_ctrl_c_before_training_exits_130(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from threefold import pretrain

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(pretrain, "pretrain", interrupted)
    code, _, err = run("pretrain", "--data", "x", "--out", tmp_path)
    assert code == 130 and "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to allocate 28.00 GiB", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"])
def test_a_full_gpu_is_no_fault_of_ours(
    words: str, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from threefold import pretrain

    def full(*arguments: object) -> None:
        raise RuntimeError(words)
    monkeypatch.setattr(pretrain, "pretrain", full)
    code, _, err = run("pretrain", "--data", "x", "--out", tmp_path)
    assert code == 1 and f"error: not enough memory: {words}" in err and "needs less" in err and "fault of threefold" not in err


def test_our_own_faults_are_told_apart(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from threefold import pretrain

    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("division by zero")
    monkeypatch.setattr(pretrain, "pretrain", broken)
    code, _, err = run("pretrain", "--data", "x", "--out", tmp_path)
    assert code == 1 and "fault of threefold" in err and "Traceback" not in err
    code, _, err = run("pretrain", "--data", "x", "--out", tmp_path, "--debug")
    assert code == 1 and "Traceback" in err
