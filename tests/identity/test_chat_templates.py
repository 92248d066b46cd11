"""A chat template that does not end is refused; those in use pass, and refusals stay theirs."""

from __future__ import annotations

import json
import sys

import pytest
from bad_models import ENDLESS, both, file, tokenizer_config
from transformers import AutoTokenizer
from verbs import convert

import sparsek_cli as sparsek
from sparsek_cli.checkpoint_files import template_steps
from sparsek_cli.checkpoint_files.template_steps import MOST_STEPS, check_template
from sparsek_cli.errors import SparsekError
from sparsek_cli.recipes.schema_convert import ConvertRecipe
from sparsek_cli.sharing import dense

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


BROKEN = "{% for m in messages %}{{ m.content }"


def test_one_that_never_gives_a_text_is_told_once(tokenizer, caplog):
    template_steps._warn.cache_clear()
    tokenizer.chat_template = "{% if messages|length > 1 %}{{ raise_exception('a') }}{% endif %}"
    check_template(tokenizer, "m")
    assert not caplog.messages  # some conversations it takes
    tokenizer.chat_template = f"\n{BROKEN}"
    for name in ("m", "m", "in/a/folder/m"):
        check_template(tokenizer, name)
    assert len(caplog.messages) == 1
    assert "the chat template of 'm' fails whatever is said: unexpected '}' (line 2)" in caplog.text
    assert "mend or remove it" in caplog.text


def test_verbs_say_what_is_wrong_with_a_template(tmp_path, dense_checkpoint, caplog):
    """convert said nothing, and evaluate ended in a TemplateSyntaxError."""
    template_steps._warn.cache_clear()
    base, out = tmp_path / "broken", tmp_path / "out"
    file("chat_template.jinja", BROKEN)(dense_checkpoint(), base)
    sparsek.convert(base, out, topk=8, window=8, calibrate="none")
    assert "of 'broken' fails whatever is said: unexpected '}' (line 1)" in caplog.text
    recall = {"lengths": [256], "limit": 1, "baselines": ["window"], "out": str(tmp_path / "ev")}
    for fails in (
        lambda: sparsek.evaluate(out, tasks=["recall_1"], **recall),
        lambda: sparsek.evaluate(out, tasks=["ppl"], chat_template="on", **recall),
        lambda: "".join(sparsek.chat(out).ask("Who?")),
    ):
        with pytest.raises(SparsekError, match=r"the chat template failed: unexpected '}'") as told:
            fails()
        assert "chat_template.jinja" in told.value.hint


def says(word: str) -> str:
    return f"{word} {{{{ messages[0]['content'] }}}}"


@pytest.mark.parametrize("kind", ["files", "named in tokenizer_config.json"])
def test_all_templates_come_along_there_and_back(tmp_path, dense_checkpoint, kind):
    base, out, back = tmp_path / "templates", tmp_path / "out", tmp_path / "back"
    named = [{"name": name, "template": says(name)} for name in ("default", "tool_use")]
    files = {
        "chat_template.jinja": says("default"),
        "additional_chat_templates/tool_use.jinja": says("tool_use"),
        "chat_templates/other.jinja": says("other"),
        "chat_template.json": json.dumps({"chat_template": says("older")}),
    }
    good = dense_checkpoint()
    if kind == "files":
        base = good
        for name, text in files.items():
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_text(text)
    else:
        files = {}
        maker = both(file("chat_template.jinja", None), tokenizer_config(chat_template=named))
        maker(good, base)
    convert(ConvertRecipe(model=str(base), out=str(out), calibrate="none", topk=6, window=4))
    dense.run(dense.plan(str(out), back))
    for folder in (base, out, back):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for name in ("default", "tool_use"):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": "hi"}], tokenize=False, chat_template=name
            )
            assert text == f"{name} hi", folder
        for name, text in files.items():
            assert (folder / name).read_text() == text
