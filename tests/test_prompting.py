"""Prompts: the files that come along, what they make of a text, what is refused, and every pipeline that takes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.test_cli import run
from tests.test_remote import Server, opened, server
from tests.test_tasks import CHAT, LONGER, bert, gpt2, t5
from threefold import AutoModelForCausalLM, pipeline, prompting
from threefold.errors import ConfigError, UsageError
from threefold.prompting import Prompt, load_prompt, parse_prompt, stripped

__all__ = ["bert", "gpt2", "run", "server", "t5"]
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = prompting.names()
each = pytest.mark.parametrize("name", NAMES)
TEXTS = ["breakfast", "a {text} with {{braces}}", "두 줄\n있는 글", " spaces ", "a => b, c"]


# -- the files ---------------------------------------------------------------------------------------------------------


@each
def test_a_prompt_that_comes_along_is_as_its_file_says(name: str) -> None:
    form = load_prompt(name)
    assert form.name == name and form.what and form.sample.keys() >= set(form.open)
    assert form.language == ("ko" if name.endswith("-ko") else "en")
    assert len(form.stop) <= 4, "no protocol takes more"
    assert not form.shown().endswith(" "), "a space belongs to the word behind it"
    assert {"ko", "en"} == {load_prompt(other).language for other in (name.removesuffix("-ko"), name.removesuffix("-ko") + "-ko")}


@each
def test_both_languages_have_the_same_places_and_settings(name: str) -> None:
    a, b = (load_prompt(name.removesuffix("-ko") + end) for end in ("", "-ko"))
    assert (a.task, set(a.places), a.open, a.temperature, len(a.examples)) == (b.task, set(b.places), b.open, b.temperature, len(b.examples))
    assert (a.template, a.examples) != (b.template, b.examples) or not a.examples


@each
def test_an_example_answers_as_a_model_should(name: str) -> None:
    """What stands in an example comes back whole where a model writes it: no stop string cuts it, but for the `;` of SQL."""
    form = load_prompt(name)
    for example in form.examples:
        written = form.gap + example["answer"] + form.join + "more"
        assert form.answer(written) == example["answer"].rstrip(";")


@pytest.mark.parametrize(("name", "filled"), [
    ("completion", "Breakfast is the"),
    ("translation", "Translate English to German: breakfast =>"),
    ("pattern", "gaot => goat, sheo => shoe, pohne =>"),
    ("completion-ko", "아침 식사는"),
    ("translation-ko", "영어에서 한국어로 번역: breakfast =>"),
])
def test_the_samples_of_the_first_prompts(name: str, filled: str) -> None:
    assert load_prompt(name).shown() == filled


# -- filling -----------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_goes_in_as_it_is_and_stands_last(name: str, text: str) -> None:
    form = load_prompt(name)
    filled = form.fill(text if len(form.open) == 1 else dict.fromkeys(form.open, text))
    marked = form.fill(dict.fromkeys(form.open, "\0"))
    assert filled == marked.replace("\0", text)
    assert marked.count("\0") >= len(form.open)
    shots = [form.gap + one["answer"] + form.join for one in form.examples]
    at = 0
    for shot in shots:  # in order, and none behind the text
        at = marked.index(shot, at) + len(shot)
    assert at <= marked.index("\0") or "\0" in form.lead


def test_places_have_defaults_and_several_are_filled_by_name() -> None:
    form = load_prompt("translation")
    assert form.given(target="French").fill("bread") == form.fill({"text": "bread", "target": "French"}) == "Translate English to French: bread =>"
    assert form.fill("bread") == "Translate English to German: bread =>", "the prompt itself is as it was"
    sql = load_prompt("sql")
    assert sql.given(schema="a(b)").fill("How many?") == sql.fill({"schema": "a(b)", "question": "How many?"})
    for wrong, words in [("How many?", "2 open places"), ({"question": "a"}, "no value for `schema`"),
                         ({"question": "a", "schema": "b", "tables": "c"}, "no place `tables`"), ({"question": 3, "schema": "b"}, "expected a text")]:
        with pytest.raises(UsageError, match=words):
            sql.fill(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "  ", "a", " a b \n", "\n\n a", "a  \n b  c \n ", "\ta"])
@pytest.mark.parametrize("width", [1, 2, 3, 50])
def test_a_stream_is_stripped_as_a_text_is(text: str, width: int) -> None:
    pieces = [text[at:at + width] for at in range(0, len(text), width)]
    assert "".join(stripped(pieces)) == text.strip()


# -- strict reading ----------------------------------------------------------------------------------------------------

GOOD = 'what = "x"\ntemplate = "Q: {text}"\n'


@pytest.mark.parametrize(("text", "words", "hint"), [
    (GOOD + 'tempalte = "{text}"', "p.toml:3: unknown key `tempalte`", "did you mean `template`?"),
    (GOOD + 'stop = "a"', "p.toml:3: `stop`: expected a list of texts", ""),
    (GOOD + 'stop = [""]', "none of them empty", ""),
    (GOOD + "new_tokens = 0", "p.toml:3: `new_tokens`: expected a whole number, 1 or more, got `0`", ""),
    (GOOD + "new_tokens = true", "`new_tokens`", ""),
    (GOOD + "temperature = -1", "`temperature`: expected a number from 0", ""),
    (GOOD + "language = 3", "`language`: expected a text, got `3`", ""),
    (GOOD + 'task = "poetry"', "`task` is `\"poetry\"`", "known:"),
    (GOOD + '[sample]\ntxet = "a"', "`sample` has `txet`", "`text`"),
    (GOOD + '[defaults]\ncolour = "a"', "`defaults` has `colour`", "`text`"),
    (GOOD + '[[examples]]\ntext = "a"', "example 1 has no `answer`", ""),
    (GOOD + '[[examples]]\nanswer = "a"', "example 1 has no `text`", ""),
    (GOOD + '[[examples]]\ntext = "a"\nanswer = "b"\n[[examples]]\ntext = "a"\nanswer = "b"\nansewr = "c"', "example 2 has `ansewr`", "`answer`"),
    (GOOD + '[[examples]]\ntext = 3\nanswer = "b"', "`examples`: expected", ""),
    ('template = "no place"', "no place for a text", "{text}"),
    ('template = "{text.__class__}"', "a place is a name in small letters", "written twice"),
    ('template = "{text!r}"', "got `{text!r}`", ""),
    ('template = "{text:>9}"', "got `{text:>9}`", ""),
    ('template = "{0}"', "a place is a name", ""),
    ('template = "{}"', "a place is a name", ""),
    ('template = "{text} }"', "cannot be filled", "written twice"),
    ('template = "{answer}"', "a place is called `answer`", ""),
    ('what = "x"', "`template` is missing", ""),
    ("template = ", "not TOML", ""),
    (GOOD + 'a = 1\nb = 2\nstop = 3', "3 problems", ""),
])
def test_what_does_not_hold_is_told_with_its_line(text: str, words: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")
    for read in (lambda: parse_prompt(text, "p.toml"), lambda: load_prompt(tmp_path / "p.toml")):
        with pytest.raises(ConfigError) as caught:
            read()
        assert words in str(caught.value).replace(f"{tmp_path}/", "") and "p.toml" in str(caught.value)
        assert hint in caught.value.hint or hint in str(caught.value)


def test_a_prompt_is_found_by_name_path_or_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('template = "Is {text} good?\\n"\n', encoding="utf-8")
    mine = load_prompt(path)
    assert mine.name == "mine" and mine == load_prompt(str(path)) == load_prompt(mine) and mine.fill("it") == "Is it good?\n"
    assert mine.shown() == "Is {text} good?\n", "without a sample a place shows its name"
    for which, words, hint in [("sentimnt", "no prompt `sentimnt`", "did you mean `sentiment`?"), ("../prompts/sql", "no prompt", ""),
                               (tmp_path / "no.toml", "cannot read the prompt", "threefold prompts")]:
        with pytest.raises(UsageError, match=words) as caught:
            load_prompt(which)
        assert hint in caught.value.hint


# -- the command line --------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


def test_the_verb_lists_shows_and_copies(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("prompts", "--json")
    assert code == 0 and [json.loads(line)["name"] for line in out.splitlines()] == NAMES
    assert run("prompts", "show", "pattern")[1] == "gaot => goat, sheo => shoe, pohne =>\n"
    assert run("prompts", "show", "translation", "bread", "--with", "target=French")[1] == "Translate English to French: bread =>\n"
    shown = json.loads(run("prompts", "show", "sql", "--json")[1])
    assert shown["filled"] == load_prompt("sql").shown() and shown["stop"] == list(load_prompt("sql").stop)
    mine = tmp_path / "mine.toml"
    assert run("prompts", "copy", "sentiment-ko", "--out", mine)[0] == 0 and load_prompt(mine) == load_prompt("sentiment-ko")
    assert run("prompts", "copy", "sentiment-ko", "--out", mine)[0] == 2
    assert run("prompts", "show", mine)[1] == load_prompt("sentiment-ko").shown() + "\n"
    for words, says in [(("show", "patern"), "did you mean `pattern`?"), (("show", "translation", "--with", "target"), "names no value"),
                        (("show", "translation", "--with", "tongue=a"), "no place `tongue`")]:
        code, out, err = run("prompts", *words)
        assert (code, out) == (2, "") and says in err


def test_generate_fills_a_prompt_and_gives_the_answer_alone(run: Run, gpt2: Path, tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text('template = "The {text} crossed"\nnew_tokens = 9\ntemperature = 0\n', encoding="utf-8")
    code, out, _ = run("generate", gpt2, "hen", "--prompt", tmp_path / "p.toml")
    plain = run("generate", gpt2, "The hen crossed", "--temperature", 0, "--max-new-tokens", 9)[1]
    assert code == 0 and out == plain.strip() + "\n" and out.strip()
    asked = json.loads(run("generate", gpt2, "hen", "--prompt", tmp_path / "p.toml", "--max-new-tokens", 4, "--json")[1])
    assert asked["prompt"] == "The hen crossed" and out.startswith(asked["text"]) and len(asked["text"]) < len(out)
    ends = out.strip()[3:5]
    (tmp_path / "q.toml").write_text((tmp_path / "p.toml").read_text() + f"stop = [{json.dumps(ends)}]\n", encoding="utf-8")
    assert run("generate", gpt2, "hen", "--prompt", tmp_path / "q.toml")[1].strip() == out.strip().partition(ends)[0].strip()
    code, out, err = run("generate", gpt2, "hen", "--with", "a=b")
    assert (code, out) == (2, "") and "no `--prompt`" in err


# -- pipelines ---------------------------------------------------------------------------------------------------------

WORDS: dict[str, Any] = {"min_new_tokens": 6, "bad_words_ids": [[0], [1], [2]]}  # a random model says something
FORM = Prompt(template="The {text} crossed the", lead="{mood}: ", defaults={"mood": "Well"}, new_tokens=12, temperature=0)


def said(result: Any) -> Any:
    """The text in a result of any shape."""
    while isinstance(result, list):
        (result,) = result
    return next(iter(result.values()))


@pytest.mark.parametrize("task", ["text-generation", "text2text-generation", "summarization", "translation", "translation_en_to_de", "text-to-sql"])
def test_every_pipeline_that_writes_takes_a_prompt(task: str, gpt2: Path, t5: Path, tmp_path: Path) -> None:
    """By name, path or as it is: what comes back is what the filled text gives, up to a stop string, without white space."""
    asking = task == "text-to-sql"
    places = {"text": "hen", "mood": "So"} if not asking else {"question": "hen", "schema": "So"}
    form = Prompt(template="{schema}: The {question} crossed the", new_tokens=12, temperature=0) if asking else FORM
    folder, kind = (gpt2, task) if task == "text-generation" else (t5, "text2text-generation")
    plain = pipeline(kind, folder, **WORDS, do_sample=False, max_new_tokens=12, **{"return_full_text": False} if folder == gpt2 else {},
                     **{"num_beams": 1} if asking else {})
    ours = pipeline(task, folder, prompt=form, **WORDS)
    whole = said(plain("So: The hen crossed the"))
    assert said(ours(places)) == whole.strip() and whole.strip()
    if not asking:
        assert said(ours("hen")) == said(plain("Well: The hen crossed the")).strip()
        assert [said(one) for one in ours(["hen", "cock"])] == [said(ours("hen")), said(ours("cock"))]
    stop = whole.strip()[2:4]
    for which in (Prompt(**{**vars(form), "stop": (stop,)}), tmp_path / "p.toml"):
        lines = [f"{key} = {json.dumps(getattr(form, key))}" for key in ("template", "lead", "new_tokens", "temperature")]
        defaults = [f"{key} = {json.dumps(value)}" for key, value in form.defaults.items()]
        (tmp_path / "p.toml").write_text("\n".join([*lines, f"stop = {json.dumps([stop])}", "[defaults]", *defaults]) + "\n", encoding="utf-8")
        assert said(ours(places, prompt=which)) == whole.partition(stop)[0].strip()
    with pytest.raises(UsageError, match="no prompt `summry`"):
        pipeline(task, folder, prompt="summry")


def test_an_answer_is_not_written_on_behind_its_stop_string(gpt2: Path) -> None:
    ours = pipeline("text-generation", gpt2, prompt=FORM, return_tensors=True)
    whole = ours("hen")[0]["generated_token_ids"]
    text = ours.tokenizer.decode(whole[-12:])
    cut = Prompt(**{**vars(FORM), "stop": (text[4:6],)})
    found = ours("hen", prompt=cut)[0]["generated_token_ids"]
    assert whole[:len(found)] == found and len(whole) - 12 < len(found) < len(whole)
    drawn = {"do_sample": True, "temperature": 1.0, "seed": 3, "num_return_sequences": 3}
    many = [row["generated_token_ids"] for row in ours("hen", **drawn)]
    letter = next(c for c in ours.tokenizer.decode(many[0][-12:])[2:] if c.isascii() and c.isprintable())
    for row, short in zip(many, ours("hen", prompt=Prompt(**{**vars(FORM), "stop": (letter,)}), **drawn), strict=True):
        cut_ids = short["generated_token_ids"]
        rest = ours.tokenizer.decode(row[len(row) - 12:])
        assert row[:len(cut_ids)] == cut_ids and (len(cut_ids) == len(row)) == (letter not in rest[:-1] or rest.index(letter) == len(rest) - 1)


def test_a_call_overrules_a_prompt_and_a_prompt_the_model(gpt2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    model.generation_config = {"max_new_tokens": 3, "do_sample": True, "eos_token_id": None}
    ours = pipeline("text-generation", model, prompt=FORM, return_tensors=True)
    before = len(pipeline("text-generation", model, return_tensors=True)("Well: The hen crossed the")[0]["generated_token_ids"]) - 3
    for options, count in [({}, 12), ({"max_new_tokens": 5}, 5)]:
        assert len(ours("hen", **options)[0]["generated_token_ids"]) - before == count
    assert ours("hen") == ours("hen", seed=7), "temperature 0 draws nothing"
    assert ours("hen", temperature=5.0, do_sample=True, seed=1) != ours("hen", temperature=5.0, do_sample=True, seed=2)
    warm = Prompt(**{**vars(FORM), "temperature": 5.0})
    assert ours("hen", prompt=warm, seed=1) != ours("hen", prompt=warm, seed=2)
    assert ours("hen", prompt=warm, do_sample=False) == ours("hen")


def test_in_a_chat_the_last_question_is_filled_in(gpt2: Path) -> None:
    ours = pipeline("text-generation", gpt2, do_sample=False, max_new_tokens=8)
    for chat in (CHAT, LONGER):
        filled = [*chat[:-1], {"role": "user", "content": FORM.fill(chat[-1]["content"])}]
        answer = ours(filled, return_full_text=False)[0]["generated_text"].strip()
        assert ours(chat, prompt=FORM, max_new_tokens=8)[0]["generated_text"] == [*filled, {"role": "assistant", "content": answer}]
        assert ours(chat, prompt=FORM, return_full_text=False)[0]["generated_text"] == answer
    full = ours("hen", prompt=FORM, return_full_text=True)[0]["generated_text"]
    assert full.startswith("Well: The hen crossed the") and full.strip() != FORM.fill("hen")
    with pytest.raises(UsageError, match="no message of the user"):
        ours([{"role": "system", "content": "a"}], prompt=FORM)
    with pytest.raises(UsageError, match="no prompt says where they go"):
        ours({"text": "a"})


def test_a_served_model_is_sent_the_filled_prompt(server: Server) -> None:
    ours = pipeline("text-generation", opened(server, "openai"))
    form = Prompt(template="Name a {text}.", stop=(" Tiber",), new_tokens=7, temperature=0)
    assert ours("river", prompt=form) == [{"generated_text": "The river is called"}]
    body = server.seen[0]["body"]
    assert body["messages"] == [{"role": "user", "content": "Name a river."}] and body["stop"] == [" Tiber"] and "temperature" not in body
    assert 7 in (body.get("max_tokens"), body.get("max_completion_tokens"))
    ours(["river", "lake"], prompt=form, max_new_tokens=9)
    assert [seen["body"]["messages"][0]["content"] for seen in server.seen[1:]] == ["Name a river.", "Name a lake."]
    assert 9 in (server.seen[-1]["body"].get("max_tokens"), server.seen[-1]["body"].get("max_completion_tokens"))
