"""Pipelines: what transformers' own make of the same files, and the example that the whole package is measured by."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import threefold
from tests.parity.theirs import their_model
from tests.test_auto import FIRST
from threefold import device, pipeline
from threefold.errors import UsageError
from threefold.model.grow import resized
from threefold.model.weights import load_model, save_model
from threefold.prompting import Prompt
from threefold.text.grow_tokenizer import with_special
from threefold.text.pretrained import PretrainedTokenizer
from threefold.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = """The hen crossed the road, and the cock crossed it after her. "Why did you cross?" asked the farmer's dog.
To get to the other side, said the hen; the cock said nothing. Numbers: 1, 22 and 333! A naïve café on the Straße."""
SCORE = 2e-6
PHI3_CHAT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
LLAMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}")


def byte_bpe(specials: list[str]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return made


def wordpiece() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator([TEXT], trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return made


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator([TEXT], trainers.UnigramTrainer(
        vocab_size=110, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return made


def written_out(folder: Path, family: str, task: str, tokenizer: tokenizers.Tokenizer, names: dict[str, str], **changes: Any) -> Path:
    """A random model and a tokenizer in one folder, as transformers writes them."""
    size = tokenizer.get_vocab_size()
    their_model(FIRST[family], task, vocab_size=size, **changes).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


BERT_NAMES = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
              "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
T5_NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function: task and changes of the configuration -> a folder."""
    def make(task: str, **changes: Any) -> Path:
        return written_out(tmp_path_factory.mktemp(task), "bert", task, wordpiece(), BERT_NAMES, **changes)
    return make


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = written_out(tmp_path_factory.mktemp("gpt2"), "gpt2", "causal", byte_bpe(["<|endoftext|>", "<|user|>", "<|bot|>"]),
                         {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
                         bos_token_id=0, eos_token_id=0, n_positions=512)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["chat_template"] = ("{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }} {{ m['content'] }}\n"
                                  "{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_out(tmp_path_factory.mktemp("t5"), "t5", "seq2seq", unigram(), T5_NAMES, num_decoder_layers=2, eos_token_id=1,
                       pad_token_id=0)


def alike(ours: Any, theirs: Any) -> None:
    """Equal, floats up to rounding; theirs may be NumPy's."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            alike(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert isinstance(ours, list) and len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            alike(a, b)
    elif isinstance(theirs, str | int) or theirs is None:
        assert ours == theirs
    else:
        assert isinstance(ours, float) and ours == pytest.approx(float(theirs), abs=SCORE, rel=SCORE)


# ------------------------------------------------------------------------------------------ the example

EXAMPLE = """from LIBRARY import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained(PATH, device_map="cpu", torch_dtype="auto", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(PATH)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer, return_full_text=False, max_new_tokens=500, do_sample=False)
output = generator([{"role": "user", "content": "Create a funny joke about chickens."}])
print(output[0]["generated_text"])
"""


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_the_example_of_the_mission_gives_transformers_own_tokens(family: str, tmp_path: Path) -> None:
    """The same lines but for the first, on a folder with the real layout: transformers' output, to the letter."""
    if family == "phi3":
        specials = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
        chat, names = PHI3_CHAT, {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
        ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 3}
    else:
        specials = ["<|begin|>", "<|eot|>", "<|start|>", "<|end|>"]
        chat, names = LLAMA_CHAT, {"bos_token": "<|begin|>", "eos_token": "<|eot|>"}
        ids = {"bos_token_id": 0, "eos_token_id": 1}
    folder = written_out(tmp_path / "theirs", family, "causal", byte_bpe(specials), names, **ids)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**described, "chat_template": chat}))
    own = shutil.copytree(folder, tmp_path / "ours")
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"modeling_{family}.Model"}  # code that is not there, and not asked for
    (own / "config.json").write_text(json.dumps(config))
    if family == "phi3":
        from threefold.model.tensors import read_safetensors

        stored = read_safetensors(own / "model.safetensors")
        assert {"model.layers.0.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight"} <= set(stored)

    said = {}
    for library, path in (("threefold", own), ("transformers", folder)):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(EXAMPLE.replace("LIBRARY", library), {"PATH": str(path)})
        said[library] = out.getvalue()
    assert said["threefold"] == said["transformers"]
    assert len(said["threefold"]) > 100 and len(set(said["threefold"])) > 10


def test_gpt2s_tokenizer_parts_words_as_published(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    source = shared_data("tokenizers/gpt2_bpe")
    shutil.copy(source / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(source / "vocab.bpe", tmp_path / "merges.txt")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    tokenizer = threefold.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("Hello, world!") == ["Hello", ",", "Ġworld", "!"]
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]


# ------------------------------------------------------------------------------------------ writing

CHAT = [{"role": "user", "content": "Why did the hen cross?"}]
LONGER = [*CHAT, {"role": "assistant", "content": "To get to the road. "}, {"role": "user", "content": "And the cock?"}]
PREFILLED = [*CHAT, {"role": "assistant", "content": "To get "}]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ("The hen", {}),
        (["The hen", "A cock said nothing and"], {}),
        (["The hen"], {"return_full_text": False}),
        ("", {}),
        ("The hen", {"prefix": "Why? "}),
        ("The hen", {"return_tensors": True}),
        ("The hen", {"max_new_tokens": None, "max_length": 20}),
        ("The hen", {"num_beams": 3, "num_return_sequences": 2}),
        ("The hen", {"repetition_penalty": 1.3, "return_full_text": False}),
        (CHAT, {}),
        (CHAT, {"return_full_text": False}),
        ([CHAT, LONGER], {}),
        ([CHAT, LONGER], {"return_full_text": False}),
        (PREFILLED, {}),
        (PREFILLED, {"return_full_text": False}),
        (LONGER, {"continue_final_message": True}),
    ],
)
def test_text_generation_equals_transformers(gpt2: Path, inputs: Any, options: dict[str, Any]) -> None:
    given = {**GREEDY, **options}
    ours, theirs = pipeline("text-generation", str(gpt2), device=-1), transformers.pipeline("text-generation", str(gpt2), device=-1)
    expected = theirs(inputs, **given)
    assert ours(inputs, **given) == expected
    once = pipeline("text-generation", model=threefold.AutoModelForCausalLM.from_pretrained(gpt2), **given)
    assert once(inputs) == expected and once(inputs, batch_size=2) == expected  # a loaded model; its tokenizer is found
    assert ours(tuple(inputs) if isinstance(inputs, list) else inputs, **given) == expected


def test_defaults_are_transformers(gpt2: Path, tmp_path: Path) -> None:
    """256 new tokens drawn at temperature 0.7, unless the model or the call says otherwise."""
    ours = pipeline("text-generation", gpt2)
    drawn = ours("The hen", seed=3, eos_token_id=None)
    assert drawn == ours("The hen", seed=3, eos_token_id=None, temperature=0.7, do_sample=True, max_new_tokens=256)
    assert drawn != ours("The hen", seed=3, eos_token_id=None, temperature=1.5)
    own = shutil.copytree(gpt2, tmp_path / "own")
    (own / "generation_config.json").write_text(json.dumps({"max_new_tokens": 5, "do_sample": False}))
    assert pipeline("text-generation", own)("The hen") == ours("The hen", do_sample=False, max_new_tokens=5)
    config = json.loads((own / "config.json").read_text())
    config["task_specific_params"] = {"text-generation": {"do_sample": True, "max_length": 5}}  # as GPT-2 has them
    (own / "config.json").write_text(json.dumps(config))
    (own / "generation_config.json").unlink()
    assert pipeline("text-generation", own)("The hen", do_sample=False) == transformers.pipeline(
        "text-generation", str(own), device=-1)("The hen", do_sample=False)
    texts = ["The hen", "A cock", "The hen"]
    several = {"num_return_sequences": 2, "max_new_tokens": 6, "seed": 5}
    drawn = ours(texts, **several)
    assert drawn == ours(texts, batch_size=2, **several) and drawn[0] != drawn[2]
    assert [len(rows) for rows in drawn] == [2, 2, 2]


@pytest.mark.parametrize(
    ("task", "name"),
    [("text2text-generation", "generated"), ("summarization", "summary"), ("translation", "translation"), ("translation_en_to_de", "translation")],
)
def test_encoder_decoders_write_in_version_4s_shapes(t5: Path, task: str, name: str) -> None:
    """Version 5 has no such pipelines: their texts are those of its `generate`."""
    theirs, tokenizer = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5), transformers.AutoTokenizer.from_pretrained(t5)

    def expected(text: str, **options: Any) -> list[str]:
        rows = theirs.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, max_new_tokens=12, **options)
        return [str(tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for row in rows]

    ours, texts = pipeline(task, t5, max_new_tokens=12), ["The hen", "A cock crossed the road"]
    assert ours(texts[0]) == [{f"{name}_text": expected(texts[0], num_beams=4)[0]}]
    assert ours(texts, num_beams=1) == [{f"{name}_text": expected(text, num_beams=1)[0]} for text in texts]
    assert ours(texts, num_beams=1, batch_size=2) == ours(texts, num_beams=1)
    assert ours(texts, num_return_sequences=2) == [
        [{f"{name}_text": one} for one in expected(text, num_beams=4, num_return_sequences=2)] for text in texts]
    found = ours(texts[0], return_tensors=True, num_beams=1)[0][f"{name}_token_ids"]
    assert found == theirs.generate(**tokenizer(texts[0], return_tensors="pt"), do_sample=False, max_new_tokens=12)[0].tolist()[1:]
    assert pipeline(task, threefold.AutoModelForSeq2SeqLM.from_pretrained(t5), max_new_tokens=12)(texts[0], src_lang="en") == ours(texts[0])


def test_a_summary_may_be_made_of_sentences_of_the_text(t5: Path) -> None:
    """Those that transformers finds likeliest too, in the order of the text."""
    theirs, tokenizer = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5).eval(), transformers.AutoTokenizer.from_pretrained(t5)
    parts = ["The hen is red.", "A cat runs home!", "Does the dog sleep in the house?", "Two cats sleep."]
    text = " ".join(parts)
    read, likely = tokenizer(text, return_tensors="pt").input_ids, list[float]()
    for part in parts:
        labels = tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            likely.append(-float(theirs(input_ids=read, labels=labels).loss))
    best = sorted(range(4), key=lambda n: -likely[n])
    summary = pipeline("summarization", t5)
    assert summary(text, sentences=1) == [{"summary_text": parts[best[0]]}]
    assert summary([text], sentences=2)[0]["summary_text"] == " ".join(parts[n] for n in sorted(best[:2]))
    assert summary(text, sentences=9)[0]["summary_text"] == text
    for options, words in (({"sentences": 0}, "`sentences` is 0"), ({"sentences": 1, "num_beams": 2}, "`sentences` and `num_beams`")):
        with pytest.raises(UsageError, match=words):
            summary(text, **options)


def test_the_language_is_named_where_the_vocabulary_has_names(t5: Path, tmp_path: Path) -> None:
    model, plain = load_model(t5), PretrainedTokenizer.load(t5)
    core = Tokenizer(with_special(plain.core.spec, (">>fr<<", ">>de<<")), plain.core.roles, config=plain.core.config)
    words = PretrainedTokenizer(core, plain.config)
    save_model(resized(model, vocab_size=max(len(words), model.config.vocab_size), context=64), tmp_path)
    words.save_pretrained(tmp_path)
    ours = pipeline("translation", tmp_path, max_new_tokens=6, num_beams=1)
    assert ours("The hen", tgt_lang="fr") == ours(">>fr<< The hen") and words.encode(">>fr<< The hen")[0] == words.convert_tokens_to_ids(">>fr<<")
    with pytest.raises(UsageError, match="`tgt_lang` is 'it', and the model has no name for it"):
        ours("The hen", tgt_lang="it")
    assert ours("The hen", src_lang="en") == ours("The hen")


def test_settings_of_a_task_are_followed_where_config_json_has_them(t5: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(t5, tmp_path / "t5")
    config = json.loads((folder / "config.json").read_text())
    config["task_specific_params"] = {
        "translation_en_to_de": {"prefix": "the road: ", "num_beams": 2, "max_length": 9, "early_stopping": True},
        "summarization": {"prefix": "short: ", "num_beams": 3, "max_length": 12, "min_length": 5, "no_repeat_ngram_size": 3, "length_penalty": 2.0}}
    (folder / "config.json").write_text(json.dumps(config))
    plain, text = pipeline("text2text-generation", t5), "The hen crossed"
    assert pipeline("translation_en_to_de", folder)(text) == [{"translation_text": plain(
        "the road: " + text, num_beams=2, max_length=9, early_stopping=True)[0]["generated_text"]}]
    assert pipeline("summarization", folder)(text) == [{"summary_text": plain(
        "short: " + text, num_beams=3, max_length=12, min_length=5, no_repeat_ngram_size=3, length_penalty=2.0)[0]["generated_text"]}]
    assert pipeline("translation_en_to_fr", folder, max_new_tokens=9)(text) == [
        {"translation_text": plain(text, max_new_tokens=9)[0]["generated_text"]}]
    again = threefold.AutoModelForSeq2SeqLM.from_pretrained(folder)
    again.save_pretrained(tmp_path / "saved")  # what is kept for pipelines goes back
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["task_specific_params"] == config["task_specific_params"]


# ------------------------------------------------------------------------------------------ judging


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ("The [MASK] crossed the road.", {}),
        (["The [MASK] crossed.", "Why did the hen [MASK] the road?"], {"top_k": 3}),
        (["The [MASK] crossed."], {}),
        ("The [MASK] crossed the [MASK].", {"top_k": 2}),
        ("The [MASK] crossed.", {"targets": ["hen", "the", "road"]}),
        ("The [MASK] crossed.", {"targets": "hen", "top_k": 4}),
    ],
)
@pytest.mark.parametrize("task", ["masked", "pretraining"])
def test_fill_mask_equals_transformers(bert: Callable[..., Path], inputs: Any, options: dict[str, Any], task: str) -> None:
    folder = bert("masked")
    if task == "pretraining":  # a loaded model of another class that has the head
        both = bert("pretraining")
        found = pipeline("fill-mask", threefold.AutoModelForPreTraining.from_pretrained(both))(inputs, **options)
        alike(found, transformers.pipeline("fill-mask", str(both), device=-1)(inputs, **options))
        return
    alike(pipeline("fill-mask", folder)(inputs, **options), transformers.pipeline("fill-mask", str(folder), device=-1)(inputs, **options))
    if isinstance(inputs, list) and len(inputs) > 1:
        alike(pipeline("fill-mask", folder)(inputs, batch_size=2, **options), pipeline("fill-mask", folder)(inputs, **options))


def test_features_equal_transformers(bert: Callable[..., Path]) -> None:
    folder = bert("body")
    ours, theirs = pipeline("feature-extraction", folder), transformers.pipeline("feature-extraction", str(folder), device=-1)
    texts = ["The hen crossed.", "Why?"]
    for inputs in (texts[0], texts):
        for a, b in zip(*(torch.tensor(x[0] if inputs is texts else x) for x in (ours(inputs), theirs(inputs))), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert ours(texts[0], return_tensors=True).shape == theirs(texts[0], return_tensors=True).shape
    for alone, together in zip(ours(texts), ours(texts, batch_size=2), strict=True):
        assert torch.allclose(torch.tensor(alone), torch.tensor(together), atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"num_labels": 1}, {"problem_type": "regression", "num_labels": 1},
                                     {"problem_type": "multi_label_classification"}, {"id2label": {0: "BAD", 1: "SO", 2: "GOOD"}}])
def test_text_classification_equals_transformers(bert: Callable[..., Path], changes: dict[str, Any]) -> None:
    folder = bert("classify", **changes)
    pair = {"text": "The hen", "text_pair": "the road"}
    for task, inputs, options in [
        ("text-classification", "The hen crossed.", {}), ("sentiment-analysis", ["The hen", "nothing"], {}),
        ("text-classification", "The hen", {"top_k": None}), ("text-classification", ["The hen", "Why?"], {"top_k": 2}),
        ("text-classification", "The hen", {"function_to_apply": "none"}), ("text-classification", pair, {}),
        ("text-classification", [pair, pair], {"top_k": 1}),
    ]:
        theirs = transformers.pipeline(task, str(folder), device=-1)(inputs, **options)
        alike(pipeline(task, folder)(inputs, **options), theirs)
    theirs = transformers.pipeline("text-classification", str(folder), device=-1, top_k=2)("The hen")
    alike(pipeline("text-classification", folder, top_k=2)("The hen"), theirs)
    texts = ["The hen", "Why did you cross?", "the"]
    alike(pipeline("text-classification", folder)(texts, batch_size=3), pipeline("text-classification", folder)(texts))
    mixed: list[Any] = ["The hen", pair, {"text": "Why?"}, pair, "the"]  # a text alone is framed otherwise than a pair
    alike(pipeline("text-classification", folder)(mixed, batch_size=5), [pipeline("text-classification", folder)([one])[0] for one in mixed])


@pytest.mark.parametrize("labels", [{0: "O", 1: "B-PER", 2: "I-PER"}, {0: "O", 1: "B-LOC", 2: "I-PER"}, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}])
@pytest.mark.parametrize("options", [{}, {"aggregation_strategy": "simple"}, {"aggregation_strategy": "none", "ignore_labels": []},
                                     {"aggregation_strategy": "simple", "ignore_labels": ["PER"]}, {"aggregation_strategy": "first"}])
def test_token_classification_equals_transformers(bert: Callable[..., Path], labels: dict[int, str], options: dict[str, Any]) -> None:
    folder = bert("tag", id2label=labels, max_position_embeddings=128)
    for inputs in (TEXT, ["The hen crossed.", "Why? 漢 naïve"]):
        for task in ("token-classification", "ner"):
            alike(pipeline(task, folder)(inputs, **options), transformers.pipeline(task, str(folder), device=-1)(inputs, **options))
    texts = ["The hen crossed.", "Why?"]
    alike(pipeline("ner", folder, **options)(texts, batch_size=2), pipeline("ner", folder, **options)(texts))


FORM = Prompt(template="The road: {text} Then it was [MASK].", examples=({"text": "dark", "answer": "so"},))


@pytest.mark.parametrize(("task", "head"), [("fill-mask", "masked"), ("feature-extraction", "body"), ("text-classification", "classify"),
                                            ("token-classification", "tag")])
def test_a_prompt_is_filled_before_a_text_is_judged(bert: Callable[..., Path], task: str, head: str) -> None:
    judge, texts = pipeline(task, bert(head)), ["The hen crossed.", "Why?"]
    filled = [FORM.fill(text, "[MASK]") for text in texts]
    assert judge(texts, prompt=FORM) == judge(filled) == pipeline(task, judge.model, prompt=FORM)(texts, batch_size=1)
    assert judge(texts[0], prompt=FORM) == judge(filled[0]) != judge(texts[0] if head != "masked" else "[MASK] [MASK]")
    with pytest.raises(UsageError, match="no place `tetx`"):
        judge({"tetx": "The hen"}, prompt=FORM)


def test_a_prompt_may_join_two_texts_and_mark_a_query(bert: Callable[..., Path]) -> None:
    pair, both = {"text": "The hen", "text_pair": "the road"}, Prompt(template="{text} crossed {text_pair}")
    judge = pipeline("text-classification", bert("classify"))
    assert judge(pair, prompt=both) == judge({"text": "The hen crossed the road"})
    guess, shots = pipeline("fill-mask", bert("masked")), Prompt(template="{text} was [MASK].", examples=({"text": "The road", "answer": "dark"},))
    assert guess("The hen", prompt=shots) == guess("The road was dark.\n\nThe hen was [MASK].")  # one mask, the example's is filled
    near, query = pipeline("sentence-similarity", bert("body"), pooling="mean"), Prompt(template="Why {text}")
    one = {"source_sentence": "the hen", "sentences": ["Why the hen", "The road"]}
    assert near(one, prompt=query) == near({**one, "source_sentence": "Why the hen"}) != near(one)


# ------------------------------------------------------------------------------------------ what is refused


def test_what_is_not_understood_is_refused(gpt2: Path, bert: Callable[..., Path]) -> None:
    masked, model = bert("masked"), threefold.AutoModelForCausalLM.from_pretrained(gpt2)
    for call, words, hint in [
        (lambda: pipeline("text-generatoin", gpt2), "`text-generatoin` is not a known task", "did you mean `text-generation`?"),
        (lambda: pipeline("text-generation"), "needs a model", ""),
        (lambda: pipeline("text-generation", masked), "no head for AutoModelForCausalLM", "AutoModelForMaskedLM"),
        (lambda: pipeline("fill-mask", model), "cannot be done by a model that was loaded for `causal`", "AutoModelForMaskedLM"),
        (lambda: pipeline("fill-mask", masked, topk=3), "`topk` is not a known argument of `fill-mask`", "did you mean `top_k`?"),
        (lambda: pipeline("fill-mask", masked)("nothing hidden"), r"there is no \[MASK\]", ""),
        (lambda: pipeline("fill-mask", masked)("a [MASK]", targets=""), "holds no token", ""),
        (lambda: pipeline("text-generation", gpt2, max_new_token=3), "`max_new_token` is not a known argument of generate", ""),
        (lambda: pipeline("text-generation", gpt2)("a", max_new_token=3), "`max_new_token` is not a known argument of generate", "max_new_tokens"),
        (lambda: pipeline("text-generation", gpt2)("a", return_full_text=True, return_tensors=True), "contradict", ""),
        (lambda: pipeline("ner", bert("tag"))("a", aggregation_strategy="max"), "`aggregation_strategy` is 'max'", "`none`, `simple` or `first`"),
        (lambda: pipeline("text-classification", bert("classify"))("a", calibrated=True), "holds no temperature", "finetune"),
        (lambda: pipeline("text-classification", bert("classify"))("a", function_to_apply="tanh"), "tanh", ""),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            call()  # type: ignore[no-untyped-call]
        assert hint in caught.value.hint


def test_a_model_does_what_it_was_made_for(gpt2: Path, t5: Path, bert: Callable[..., Path], tmp_path: Path) -> None:
    for model, task in ((gpt2, "text-generation"), (t5, "text2text-generation"), (bert("masked"), "fill-mask"), (bert("tag"), "token-classification"),
                        (bert("classify"), "text-classification"), (threefold.AutoModel.from_pretrained(gpt2), "feature-extraction")):
        found = pipeline(model=model)
        assert found.task == task and type(found) is type(pipeline(task, model))
    with pytest.raises(UsageError, match="no task follows from a model for `replaced`"):
        pipeline(model=written_out(tmp_path, "electra", "replaced", wordpiece(), BERT_NAMES))


def test_a_loaded_model_goes_where_it_is_told(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_missing", {"cuda": "no driver", "mps": "none", "cpu": ""}.get)
    model = threefold.AutoModelForCausalLM.from_pretrained(gpt2)
    for where in (-1, "cpu", torch.device("cpu"), 0, "mps", None):
        assert pipeline("text-generation", model, device=where).device.type == "cpu"
    assert len([note for note in model.notes if note.startswith("computing on the CPU")]) == 2
    with pytest.raises(UsageError, match="unknown device `gpu`"):
        pipeline("text-generation", model, device="gpu")


def test_a_model_that_was_made_needs_a_tokenizer(gpt2: Path) -> None:
    from threefold.model.build import build_model, sized

    tokenizer = threefold.AutoTokenizer.from_pretrained(gpt2)
    model = build_model(sized("gpt2", "nano", vocab_size=len(tokenizer)), seed=0)
    with pytest.raises(UsageError, match="a tokenizer is missing"):
        pipeline("text-generation", model)
    assert isinstance(tokenizer, PretrainedTokenizer)
    found = pipeline("text-generation", model, tokenizer, **GREEDY)("The hen")
    assert found[0]["generated_text"].startswith("The hen") and pipeline("text-generation", model, str(gpt2), **GREEDY)("The hen") == found


def test_people_cannot_spell_special_tokens_in_a_chat(gpt2: Path) -> None:
    """Where transformers would read `<|bot|>` as the token, the words of a message stay words."""
    ours = pipeline("text-generation", gpt2, return_tensors=True, do_sample=False, max_new_tokens=1)
    prompt = ours([{"role": "user", "content": "a <|bot|> b"}])[0]["generated_token_ids"][:-1]
    assert (prompt.count(1), prompt.count(2)) == (1, 1)  # the template's own tokens alone
