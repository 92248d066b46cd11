"""A chat template that does not end is refused; those in use pass, and refusals stay theirs."""

from __future__ import annotations

import sys

import pytest
from bad_models import ENDLESS

from sparsek_cli.dialogue.template_steps import MOST_STEPS, check_template
from sparsek_cli.errors import SparsekError

LOREM = "{{ lipsum(n=100000, min=1000, max=2000) }}"


@pytest.mark.parametrize("text", [*ENDLESS.values(), LOREM])
def test_endless_ones(tokenizer, text):
    mended = tokenizer.chat_template
    for template in (text, {"default": text, "tools": mended}):
        tokenizer.chat_template = template
        with pytest.raises(SparsekError, match="the chat template of 'm'") as refusal:
            check_template(tokenizer, "m")
        assert "mend or remove it" in refusal.value.hint
    for followed in (mended, None):
        tokenizer.chat_template = followed
        check_template(tokenizer, "m")


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no roles here') }}",  # told to whoever renders
        "{% for %}",
        "**bold** {{ namespace(**{'a': 2}).a }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for i in range(5000) %}x{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(0) }}",  # Python ends it
    ],
)
def test_others_pass_and_tracing_ends(tokenizer, text):
    seen = sys.gettrace()
    tokenizer.chat_template = text
    check_template(tokenizer, "m")
    assert sys.gettrace() is seen


def test_the_limit_is_far_above_a_long_template(tokenizer):
    """Every message thirty times over: no template in use loops as much."""
    tokenizer.chat_template = (
        "{% for i in range(30) %}{% for m in messages %}{% if m.role == 'tool' %}t{% else %}"
        "{{ m.content | trim }}{% endif %}{% endfor %}{% endfor %}"
    )
    check_template(tokenizer, "m")
    assert MOST_STEPS >= 100 * 30 * 4
