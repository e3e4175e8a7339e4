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
from tests.model.published import PUBLISHED
from tests.parity.theirs import ROWS, close, inputs, their_model
from threefold import device, hub
from threefold.auto import AUTO_MODELS, AutoModelForPreTraining, load
from threefold.errors import ModelError, UsageError
from threefold.generation.engine import complete, generate
from threefold.model.families import FAMILIES


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
    assert ours.num_parameters() == theirs.num_parameters() and ours.dtype == torch.float32


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
        ({"device_map": "cude"}, "unknown device `cude`"),
        ({"device_map": "cuda:x"}, "unknown device `cuda:x`"),
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


# ------------------------------------------------------------------------------------------ heads

NAMES = {
    "causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "seq2seq": "AutoModelForSeq2SeqLM",
    "pretraining": "AutoModelForPreTraining", "replaced": "AutoModelForPreTraining", "body": "AutoModel", "encoder": "AutoModelForTextEncoding",
    "classify": "AutoModelForSequenceClassification", "tag": "AutoModelForTokenClassification",
}
FIRST = {row.family: row for row in reversed(ROWS.values())}
CELLS = [(family, task) for family in FAMILIES for task in FAMILIES[family].heads]


@pytest.mark.parametrize(("family", "task"), CELLS)
def test_every_head_loads_and_saves_under_its_own_name(family: str, task: str, tmp_path: Path) -> None:
    """Their model of the task -> our class of the name -> saved -> their class again, with the same outputs."""
    row = FIRST[family]
    if task not in row.tasks:
        pytest.skip("transformers has no class to compare with")
    theirs = their_model(row, task)
    theirs.save_pretrained(tmp_path / "theirs")
    auto = getattr(threefold, NAMES[task])
    ours = auto.from_pretrained(tmp_path / "theirs", trust_remote_code=True)
    assert ours.task == task and not ours.notes and not ours.training and hasattr(ours, "generate") == (task in ("causal", "seq2seq"))
    given = inputs(row, task, labels=False)
    with torch.no_grad():
        expected, found = theirs(**given)[0], ours(**given)[0]
    close(found, expected, 2e-6)
    ours.save_pretrained(tmp_path / "ours")
    own, again = load_own(tmp_path / "ours"), type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(own) is type(ours)
    for one, other in ((theirs, again), (ours, own)):  # the same weights, bit for bit
        before, after = one.state_dict(), other.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():  # sums may differ in their last bit with where weights lie in memory: seen in products of one column
        close(again(**given)[0], expected, 1e-6)
        close(own(**given)[0], found, 1e-6)


def load_own(folder: Path) -> torch.nn.Module:
    """What `load` makes of a folder, without its tokenizer."""
    from threefold.auto import _Auto

    return _Auto.from_pretrained(folder)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_a_family_lacks_is_refused_with_those_that_it_has(family: str, tmp_path: Path) -> None:
    row = FIRST[family]
    their_model(row, row.tasks[0]).save_pretrained(tmp_path)
    for auto in AUTO_MODELS:
        has = set(auto.tasks) & set(FAMILIES[family].heads)
        if has:
            assert auto.from_pretrained(tmp_path).task in has
            continue
        with pytest.raises(UsageError, match=f"a `{family}` model has no head for {auto.__name__}") as caught:
            auto.from_pretrained(tmp_path)
        assert caught.value.hint.startswith("it has AutoModel, ") and auto.__name__ not in caught.value.hint


def test_pretraining_takes_the_heads_that_a_family_was_pretrained_with(tmp_path: Path) -> None:
    found = {}
    for family, row in FIRST.items():
        their_model(row, row.tasks[0]).save_pretrained(tmp_path / family)
        found[family] = AutoModelForPreTraining.from_pretrained(tmp_path / family).task
    assert found == {"bert": "pretraining", "electra": "replaced", "roberta": "masked", "t5": "seq2seq", "transformer": "seq2seq",
                     **dict.fromkeys(["gpt1", "gpt2", "gpt3", "llama", "qwen3", "phi3", "palm", "biogpt"], "causal")}


@pytest.mark.parametrize("name", ["AutoModelForSequenceClassification", "AutoModelForTokenClassification"])
def test_a_number_of_labels_may_be_asked_for(tmp_path: Path, name: str) -> None:
    row = FIRST["bert"]
    their_model(row, "masked").save_pretrained(tmp_path / "body")
    model = getattr(threefold, name).from_pretrained(tmp_path / "body", num_labels=5)
    ids = torch.tensor([[2, 5, 6, 3]])
    assert model(ids).logits.shape[-1] == 5 and any("the head is new and not trained" in note for note in model.notes)
    model.save_pretrained(tmp_path / "saved")
    again = getattr(threefold, name).from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_labels_come_from_config_json_and_go_back(tmp_path: Path) -> None:
    theirs = their_model(FIRST["bert"], "tag", id2label={0: "O", 1: "B-PER", 2: "I-PER"})
    theirs.save_pretrained(tmp_path / "a")
    ours = threefold.AutoModelForTokenClassification.from_pretrained(tmp_path / "a")
    assert ours.labels == ("O", "B-PER", "I-PER")
    ours.save_pretrained(tmp_path / "b")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "b").id2label == {0: "O", 1: "B-PER", 2: "I-PER"}


@pytest.mark.parametrize("device_map", ["cuda", "mps", "cuda:1", 0, {"": "mps"}, torch.device("mps")])
def test_a_device_that_is_not_there_gives_the_cpu_and_a_note(folder: Path, device_map: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_missing", {"cuda": "no driver", "mps": "no such chip", "cpu": ""}.get)
    model = threefold.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    assert model.device.type == "cpu" and any(note.startswith("computing on the CPU: device `") for note in model.notes)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_a_device_that_is_left_to_choose_is_chosen(folder: Path, device_map: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_missing", {"cuda": "no driver", "mps": "no such chip", "cpu": ""}.get)
    assert threefold.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map).device.type == "cpu"


def test_an_encoder_decoder_generates_as_in_transformers(tmp_path: Path) -> None:
    theirs = their_model(FIRST["t5"], "seq2seq", num_decoder_layers=2)
    theirs.generation_config.max_new_tokens = 9
    theirs.save_pretrained(tmp_path)
    ours = threefold.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
    mask = ids.ne(0).long()
    assert ours.generation_config["decoder_start_token_id"] == 0
    assert torch.equal(ours.generate(ids, attention_mask=mask), theirs.generate(ids, attention_mask=mask, do_sample=False))


def test_load_gives_what_a_directory_was_saved_for(folder: Path) -> None:
    assert load(folder)[0].task == "causal"


@pytest.mark.filterwarnings("ignore")
def test_without_a_generation_config_config_json_says_how_to_write(tmp_path: Path) -> None:
    PUBLISHED["opus-mt"].write(tmp_path)
    ours, theirs = (kind.from_pretrained(tmp_path) for kind in (threefold.AutoModelForSeq2SeqLM, transformers.MarianMTModel))
    assert ours.generation_config["num_beams"] == 6 and ours.generation_config["bad_words_ids"]
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 0]])
    for options in ({}, {"renormalize_logits": True, "num_return_sequences": 3}, {"num_beams": 1}):
        given = {"max_length": 12, **options}
        assert torch.equal(ours.generate(ids, **given), theirs.generate(ids, attention_mask=torch.ones_like(ids), **given))
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    again = threefold.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.generation_config == {"max_new_tokens": 3}, "what the newer file leaves out is not said"


def test_what_may_not_be_written_is_not_written_by_any_command(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    model, words = load(tmp_path / "model")
    first = generate(model, words, "Once upon a time", temperature=0.0, max_new_tokens=8)
    barred = sorted(set(words.encode(first[0], add_special_tokens=False)))
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({**model.generation_config, "suppress_tokens": barred}))
    model, words = load(tmp_path / "model")
    (done,) = complete(model, words, "Once upon a time", temperature=0.0, max_new_tokens=8)
    assert done.ids and not set(done.ids) & set(barred)


@pytest.mark.parametrize("problem, classes, labels", [
    ("regression", 3, torch.tensor([[0.5, 1.0, -2.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])), ("regression", 1, torch.tensor([0.5, -1.0, 2.0])),
    ("multi_label_classification", 1, torch.tensor([[1.0], [0.0], [1.0]])),
    ("multi_label_classification", 3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])),
    ("single_label_classification", 3, torch.tensor([0, 2, 1])),
])
def test_the_loss_of_a_classifier_is_that_of_its_problem_type(problem: str, classes: int, labels: torch.Tensor, tmp_path: Path) -> None:
    theirs = their_model(ROWS["bert"], "classify", num_labels=classes, problem_type=problem)
    theirs.save_pretrained(tmp_path)
    ours = threefold.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    given = inputs(ROWS["bert"], "classify", labels=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(**given, labels=labels).loss, theirs(**given, labels=labels).loss, rtol=1e-5, atol=1e-6)


def test_an_argument_that_no_tokenizer_knows_is_refused(folder: Path) -> None:
    words = threefold.AutoTokenizer.from_pretrained(folder)
    with pytest.raises(UsageError, match="`is_split_into_words` is not a known argument of a tokenizer"):
        words("a b", is_split_into_words=True)
    with pytest.raises(UsageError, match="`paddin` is not a known argument") as caught:
        words("a b", paddin=True)
    assert "padding" in str(caught.value.hint)
