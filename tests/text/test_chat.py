"""Chat templates render as in transformers."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from threefold.errors import UsageError
from threefold.text import chat

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
