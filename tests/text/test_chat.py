"""Chat templates render as in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from tests.text import published
from threefold.errors import TokenizerError, UsageError
from threefold.text import chat
from threefold.text.pretrained import PretrainedTokenizer

MESSAGES = [{"role": "system", "content": "  Be brief. "}, {"role": "user", "content": "한국어 \"quoted\" <b>?"},
            {"role": "assistant", "content": "yes", "tool_calls": [{"name": "f", "arguments": {"x": [1, 2.5, None]}}]}]
TEMPLATES = {
    "chatml": "{% for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m['content'] + '<|im_end|>\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}\n{% endif %}",
    "llama": "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content | trim %}"
    "{% continue %}{% endif %}"
    "{% if loop.index0 is odd %}{{ '[INST] ' ~ ns.system ~ ' ' ~ m.content.strip() ~ ' [/INST]' }}"
    "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
    "tools": "{% macro show(m) %}{% for t in m.tool_calls or [] %}{{ t | tojson(indent=2) }}"
    "{{ t.arguments | tojson }}{% endfor %}{% endmacro %}"
    "{% for m in messages | selectattr('role', 'equalto', 'assistant') %}{{ show(m) }}{% endfor %}"
    "{{ tools | length if tools else 'none' }}",
    "dict": "{% for k, v in dict(a=1, b='x').items() %}{{ k }}={{ v }};{% endfor %}"
    "{{ messages | map(attribute='role') | join(',') }}"
    "{% if messages[0].missing is defined %}no{% endif %}{{ messages[-1]['content'].split('e')[0].upper() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_templates_render_as_in_transformers(name: str, prompt: bool) -> None:
    specials = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **specials
    )
    assert chat.render(TEMPLATES[name], MESSAGES, special_tokens=specials, add_generation_prompt=prompt) == expected[0]


@pytest.mark.parametrize(
    "messages",
    ["hi", {"role": "user", "content": "x"}, ["hi"], [{"content": "x"}], [{"role": "user", "content": object()}]],
)
def test_messages_of_another_form_are_refused(messages: object) -> None:
    with pytest.raises(UsageError):
        chat.render("{{ messages }}", messages)  # type: ignore[arg-type]


def test_surrogates_and_long_texts_pass() -> None:
    text = "a\ud800" + "x" * 300_000
    assert chat.render("{{ messages[0].content }}", [{"role": "user", "content": text}]) == text


@pytest.mark.parametrize(
    "change",
    ["messages.append(1)", "messages.pop()", "messages.insert(0, 1)", "messages.clear()", "messages.sort()", "messages.reverse()",
     "messages[0].update(role='x')", "messages[0].pop('role')", "messages[0].setdefault('x', 1)", "messages[0].popitem()",
     "messages[2].tool_calls.extend([1])", "dict(a=1).clear()", "[1].remove(1)"],
)
def test_a_template_cannot_change_what_it_is_given(change: str) -> None:
    with pytest.raises(TokenizerError, match="not safely callable|unsafe|may not|is not allowed"):
        chat.render("{{ " + change + " }}", MESSAGES)


FRAMED = ("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
          "{% if add_generation_prompt %}assistant:{% endif %}")


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_D11_a_conversation_begins_once(family: str, written: bool, tmp_path: Path) -> None:
    """A template that writes the beginning gives one, though the tokenizer puts one before every text; one that does not is
    followed as well. Spelt in a message it is text. Training, generation and transformers see the same ids."""
    getattr(published, family)(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(FRAMED if written else FRAMED.replace("{{ bos_token }}", ""))
    ours, theirs = PretrainedTokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("it was")[0] == ours.bos_token_id is not None
    messages = [{"role": "user", "content": "it was"}, {"role": "assistant", "content": "the best"}]
    for prompt in (False, True):
        ids = ours.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert ids == theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
        assert ids.count(ours.bos_token_id) == int(written) and (ids[0] == ours.bos_token_id) == written
    spelt = [{"role": "user", "content": f"{ours.bos_token}it{ours.eos_token}"}, messages[1]]
    ids = ours.apply_chat_template(spelt, return_dict=False)
    assert ids.count(ours.bos_token_id) == int(written) and ours.eos_token_id not in ids
    assert ours.decode(ids, skip_special_tokens=True).lstrip() == f"user: {ours.bos_token}it{ours.eos_token}\nassistant: the best\n"
    ours.save_pretrained(tmp_path / "saved")
    assert PretrainedTokenizer.load(tmp_path / "saved").apply_chat_template(spelt, return_dict=False) == ids


@pytest.mark.parametrize("family", ["t5", "marian", "bert", "biogpt"])
def test_S04_no_vocabulary_leads_from_a_message_to_a_special_token(family: str, tmp_path: Path) -> None:
    """In a Unigram vocabulary special tokens are pieces like others; in none of these does their spelling reach them."""
    getattr(published, family)(tmp_path)
    ours = PretrainedTokenizer.load(tmp_path)
    special = {*ours.all_special_ids} - {ours.unk_token_id}
    assert special
    for token in ours.all_special_tokens:
        for content in (token, f"a{token}b", token * 2, f" {token} "):
            ids = ours.apply_chat_template([{"role": "user", "content": content}], chat_template=FRAMED, return_dict=False)
            written = [ours.bos_token_id] if ours.bos_token_id is not None else []
            assert [i for i in ids if i in special] == written, content
