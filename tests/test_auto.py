"""The ecosystem's names on the front door."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import threefold
from threefold import hub
from threefold.errors import ModelError, UsageError


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest) -> Path:
    shared_data: Callable[[str], Path] = request.getfixturevalue("shared_data")
    return shared_data("stories260K/hf")


def test_importing_threefold_does_not_import_torch() -> None:
    code = (
        "import sys, threefold; "
        "print(sorted({'torch', 'numpy', 'tokenizers'} & set(sys.modules)), len(dir(threefold)) > 5)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[] True\n"
    )


def test_every_public_name_is_there() -> None:
    for name in threefold.__all__:
        assert getattr(threefold, name) is not None
    assert set(threefold.__all__) == {*threefold._PLACES, "__version__"}
    with pytest.raises(AttributeError, match="no_such"):
        threefold.no_such  # noqa: B018


def test_the_model_is_transformers_model(folder: Path) -> None:
    ours, theirs = (
        threefold.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoModelForCausalLM.from_pretrained(folder),
    )
    assert isinstance(ours, torch.nn.Module) and not ours.training
    assert (ours.device, ours.dtype, ours.num_parameters()) == (theirs.device, theirs.dtype, theirs.num_parameters())
    assert ours.config.hidden_size == theirs.config.hidden_size
    inputs = threefold.AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")
    with torch.no_grad():
        mine, other = (m(**inputs, labels=inputs.input_ids, output_hidden_states=True) for m in (ours, theirs))
    assert torch.allclose(mine.logits, other.logits, atol=1e-5 * float(other.logits.abs().max()))
    assert float(mine.loss) == pytest.approx(float(other.loss), abs=1e-5)
    assert torch.equal(
        ours.generate(**inputs, max_new_tokens=30), theirs.generate(**inputs, max_new_tokens=30, do_sample=False)
    )


def test_the_body_gives_hidden_states(folder: Path) -> None:
    ours, theirs = threefold.AutoModel.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder)
    ids_BT = torch.tensor([[1, 403, 407]])
    with torch.no_grad():
        mine, other = ours(ids_BT).last_hidden_state, theirs(ids_BT).last_hidden_state
    assert torch.allclose(mine, other, atol=1e-5 * float(other.abs().max()))
    assert (
        ours.num_parameters() == theirs.num_parameters()
        and ours.config is ours.model.config
        and ours.dtype == torch.float32
    )


def test_saved_it_opens_everywhere(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = threefold.load(folder)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path)("Once upon", return_tensors="pt")
    expected = model.generate(inputs["input_ids"], max_new_tokens=20)
    assert torch.equal(again.generate(**inputs, max_new_tokens=20, do_sample=False), expected)
    mine, own = threefold.load(tmp_path)
    assert torch.equal(mine.generate(**own("Once upon", return_tensors="pt"), max_new_tokens=20), expected)
    assert mine.generation_config == model.generation_config
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": "torch.bfloat16"}]
)
def test_a_dtype_may_be_asked_for(folder: Path, options: dict[str, object]) -> None:
    assert threefold.AutoModelForCausalLM.from_pretrained(folder, **options).dtype == torch.bfloat16  # type: ignore[arg-type]


@pytest.mark.parametrize("device_map", [None, "cpu", {"": "cpu"}, torch.device("cpu")])
def test_a_device_may_be_asked_for(folder: Path, device_map: object) -> None:
    assert threefold.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float31"}, "`dtype` is 'float31'"),
        ({"device_map": {"a": "cpu", "b": "meta"}}, "spreads"),
        ({"load_in_4bit": True}, "`load_in_4bit` is not a known"),
        ({"use_safetensors": False}, "`use_safetensors=False` cannot be followed: other weights are pickles"),
        ({"attn_implementation": "flash_attention_2"}, "`attn_implementation='flash_attention_2'` cannot be followed"),
        ({"max_memory": {0: "1GB"}}, "one device holds the whole model"),
        ({"offload_folder": "x"}, "nothing is moved to disk"),
        ({"resume_download": False}, "always goes on"),
        ({"local_files_only": True, "force_download": True}, "contradict"),
    ],
)
def test_what_is_not_understood_is_refused(folder: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        threefold.AutoModelForCausalLM.from_pretrained(folder, **options)  # type: ignore[arg-type]


def test_what_is_done_anyway_may_be_asked_for(folder: Path) -> None:
    options = {"use_safetensors": True, "attn_implementation": "sdpa", "low_cpu_mem_usage": True, "max_memory": None,
               "resume_download": True, "local_files_only": True, "token": "hf_unused"}
    assert threefold.AutoModelForCausalLM.from_pretrained(folder, **options).num_parameters() == 260_032  # type: ignore[arg-type]
    assert threefold.AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True).vocab_size == 512
    with pytest.raises(UsageError, match="`use_fast=False` cannot be followed"):
        threefold.AutoTokenizer.from_pretrained(folder, use_fast=False)


def test_words_about_the_hub_reach_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(hub, "resolve", lambda name, **words: seen.append(words) or folder)
    words = {"revision": "v1", "cache_dir": tmp_path, "local_files_only": True, "force_download": False, "token": "t"}
    threefold.AutoModelForCausalLM.from_pretrained("org/name", **words)  # type: ignore[arg-type]
    threefold.AutoModel.from_pretrained("org/name", **words)
    threefold.AutoTokenizer.from_pretrained("org/name", **words)  # type: ignore[arg-type]
    assert seen == [words, words, {**words, "needs": ("tokenizer",)}]
    threefold.load("org/name")
    assert seen[3] == {"needs": ("model", "tokenizer")}


def test_S07_trust_remote_code_is_accepted_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    for path in [target, *target.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    canary = tmp_path / "canary"
    (target / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass M: pass\n")
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((target / name).read_text())
        content["auto_map"] = {key: "evil.M"}
        (target / name).write_text(json.dumps(content))
    model = threefold.AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    threefold.AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    assert not canary.exists() and any("auto_map" in note for note in model.notes)


def test_a_run_and_a_tour_are_models(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "tour" / "decoder" / "model")
    for path in (tmp_path / "tour", tmp_path / "tour" / "decoder", tmp_path / "tour" / "decoder" / "model"):
        assert threefold.load(path)[0].num_parameters() == 260_032
    with pytest.raises(ModelError):
        threefold.load(tmp_path / "nothing")


def test_special_tokens_and_sides_may_be_named(folder: Path) -> None:
    tokenizer = threefold.AutoTokenizer.from_pretrained(folder, pad_token="</s>", padding_side="left")
    assert tokenizer(["a", "a b c d"], padding=True).input_ids[0][0] == 2


def test_a_copy_generates_with_its_own_weights(folder: Path) -> None:
    model = threefold.AutoModelForCausalLM.from_pretrained(folder)
    other = copy.deepcopy(model)
    ids_BT = torch.tensor([[1, 403]])
    before = model.generate(ids_BT, max_new_tokens=5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert torch.equal(model.generate(ids_BT, max_new_tokens=5), before)
