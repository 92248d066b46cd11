"""Recipes: precedence, and mistakes reported where they were written."""

import os
import re
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from sparsek_cli.commands.options import split_words
from sparsek_cli.errors import UsageError
from sparsek_cli.recipes import shipped, yaml_lines
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_convert import ConvertRecipe
from sparsek_cli.recipes.shipped import find_recipe, recipe_folder, recipe_names


class Train(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lr: float = 1e-3
    steps: int = Field(10, gt=0, description="optimizer steps")


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid")
    topk: int | list[int] = 512
    gate: Literal["log", "kv"] = "log"
    train: Train = Train()


@pytest.fixture
def recipe(tmp_path):
    """`recipe(text)` -> path of a YAML file."""

    def write(text: str | bytes):
        file = tmp_path / "r.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write


def test_precedence_flag_word_recipe_default(recipe):
    file = recipe("topk: 1\ntrain:\n  lr: 3e-4\n  steps: 5\n")
    made = load_recipe(Recipe, file, ["topk=2", "train.steps=6"], {"topk": 3, "gate": None})
    assert (made.topk, made.train.steps, made.train.lr, made.gate) == (3, 6, 3e-4, "log")
    assert load_recipe(Recipe, None) == Recipe()
    assert load_recipe(Recipe, recipe("# nothing but a comment\n")) == Recipe()


def test_words_are_yaml_scalars():
    made = load_recipe(Recipe, None, ["topk=[1, 2]", "train.lr=3e-4", "gate=kv"])
    assert (made.topk, made.train.lr, made.gate) == ([1, 2], 3e-4, "kv")


@pytest.mark.parametrize(
    ("text", "error", "hint"),
    [
        ("topk: 1\ntrain:\n  stpes: 3\n", "r.yaml:3: unknown key 'train.stpes'", "'train.steps'"),
        ("lr: 3\n", "r.yaml:1: unknown key 'lr'", "did you mean 'train.lr'?"),
        ("zebra: 3\n", "unknown key 'zebra'", "known here: topk, gate, train"),
        ("\ntopk: many\n", "r.yaml:2: 'topk' should be a valid integer", ""),
        ("topk: [1, x]\n", "r.yaml:1: 'topk' should be a valid integer", ""),
        ("train:\n  lr: fast\n", "r.yaml:2: 'train.lr' should be a valid number, not 'fast'", ""),
        ("train:\n  steps: 0\n", "'train.steps' should be greater than 0", "optimizer steps"),
        ("train: 3\n", "r.yaml:1: 'train' should be a mapping, not 3", ""),
        ("gate: soft\n", "'gate' should be 'log' or 'kv', not 'soft'", ""),
        ("topk: 1\ntopk: 2\n", "r.yaml:2: key 'topk' is given twice", ""),
        ("- 1\n", "must be a mapping, not a list", ""),
        ("a: [1\n", "not valid YAML", ""),
        ("topk: !!python/object:os.system x\n", "not valid YAML", ""),
        (b"\xff\xfe", "not UTF-8", ""),
    ],
)
def test_mistakes_name_file_line_and_remedy(recipe, text, error, hint):
    with pytest.raises(UsageError) as caught:
        load_recipe(Recipe, recipe(text))
    assert error in caught.value.message and hint in caught.value.hint
    assert caught.value.hint and "\n" not in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "flags", "error"),
    [
        (["train.steps=abc"], {}, "'train.steps=abc': 'train.steps' should be a valid integer"),
        (["stpes=1"], {}, "'stpes=1': unknown key 'stpes'"),
        (["noequals"], {}, "'noequals' is no setting"),
        (["topk=[1"], {}, "'topk=[1':1: not valid YAML"),
        (["topk=1", "topk.a=1"], {}, "it has no part 'a'"),
        ([], {"train.steps": -1}, "--steps: 'train.steps' should be greater than 0, not -1"),
    ],
)
def test_mistakes_name_the_word_or_flag(words, flags, error):
    with pytest.raises(UsageError) as caught:
        load_recipe(Recipe, None, words, flags)
    assert error in caught.value.message


BOMB = "a0: &a0 [1, 1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(10)
)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (BOMB, "r.yaml: more than 100,000 values"),
        (BOMB.replace("a1: &a1 [", "a1: &a1 [&b {x: 1, <<: {y: 1}}, "), "more than 100,000 values"),
        ("a: &a [*a]\n", "r.yaml:1: an alias stands within what it stands for"),
        ("a: &a\n  b: {c: *a}\n", "r.yaml:1: an alias stands within"),
        ("a: " + "[" * 3000, "r.yaml:1: not valid YAML: values lie within each other too deeply"),
        ("a: [1,\n" + "[1, {b: " * 3000, "r.yaml:2: not valid YAML: values lie within each other"),
        ("- " * 3000, "r.yaml: not valid YAML: values lie within each other too deeply"),
        (" " * (1 << 20) + "a: 1", "r.yaml is larger than any recipe (1 MiB)"),
    ],
)
def test_yaml_without_end_is_refused_at_once(recipe, text, error):
    with pytest.raises(UsageError, match=re.escape(error)) as caught:
        load_recipe(Recipe, recipe(text))
    assert caught.value.hint
    if "\n" in text and not text.startswith("a0"):  # words are read as files are
        with pytest.raises(UsageError):
            load_recipe(Recipe, None, [text.strip().replace(": ", "=", 1)])


def test_brackets_beyond_the_deepest_are_not_read(monkeypatch):
    """Each was compared with all before it: three thousand took seconds."""
    started = []
    real = yaml.SafeLoader.fetch_flow_collection_start
    monkeypatch.setattr(
        yaml.SafeLoader,
        "fetch_flow_collection_start",
        lambda self, kind: (started.append(kind), real(self, kind)),
    )
    deep = "[" * yaml_lines.DEEPEST
    assert yaml_lines.parse_yaml(f"a: {deep}{']' * len(deep)}", "r", "h")[0]["a"]
    assert len(started) == len(deep)
    with pytest.raises(UsageError, match="too deeply"):
        yaml_lines.parse_yaml(f"a: {deep}{deep}", "r", "h")
    assert len(started) == 2 * len(deep)


def test_several_mistakes_are_counted(recipe):
    with pytest.raises(UsageError, match=r"\(and 1 more\)"):
        load_recipe(Recipe, recipe("topk: x\ngate: y\n"))


def test_names_find_shipped_recipes(monkeypatch, tmp_path):
    (tmp_path / "tiny.convert.yaml").write_text("topk: 7\n")
    monkeypatch.setattr(shipped, "recipe_folder", lambda: tmp_path)
    assert recipe_names() == ["tiny.convert"]
    for name in ("tiny.convert", "tiny.convert.yaml", "tiny"):
        assert load_recipe(Recipe, name, verb="convert").topk == 7
    with pytest.raises(UsageError) as caught:
        find_recipe("tiny.covnert")
    assert "tiny.convert" in caught.value.hint
    with pytest.raises(UsageError, match="is a folder"):
        find_recipe(tmp_path)
    os.mkfifo(tmp_path / "piped.yaml")
    with pytest.raises(UsageError, match="piped.yaml' is a FIFO"):
        find_recipe(tmp_path / "piped.yaml")
    # A folder of one's own does not hide a shipped recipe.
    (tmp_path / "work" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert find_recipe("tiny", verb="convert") == tmp_path / "tiny.convert.yaml"


def test_show_and_copy_take_the_names_that_the_guides_use(sparsek, monkeypatch, tmp_path):
    """`--recipe lora` was a name, and `recipes show lora` none."""
    monkeypatch.chdir(tmp_path)
    assert sparsek("recipes", "show", "lora").out == sparsek("recipes", "show", "lora.finetune").out
    assert sparsek("recipes", "copy", "lora").code == 0
    assert (tmp_path / "lora.finetune.yaml").is_file()
    shown = sparsek("recipes", "show", "tiny")
    assert shown.code == 2 and "name one: tiny.convert, tiny.evaluate" in shown.err
    assert "did you mean 'scorers.finetune'" in sparsek("recipes", "show", "scorer").err


def test_copy_goes_where_other_files_may_go(sparsek, make_checkpoint, monkeypatch, tmp_path):
    """`~` in quotes was a folder of that name, and a copy in a model kept --overwrite from it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sparsek("recipes", "copy", "lora", "~/mine.yaml").code == 0
    assert (tmp_path / "mine.yaml").is_file()
    base, out = str(make_checkpoint(tmp_path / "base")), str(tmp_path / "out")
    made = ["convert", base, out, "--topk", "8", "--window", "8", "--calibrate", "none"]
    assert sparsek(*made).code == 0
    shown = sparsek("recipes", "copy", "lora", out)
    assert shown.code == 2 and "lies inside" in shown.err
    assert sparsek(*made, "--overwrite").code == 0


def test_a_day_is_a_name_and_digits_are_told_to_be_quoted(recipe):
    """Folders are called after days; it was "not datetime.date(2026, 1, 31)"."""
    assert load_recipe(ConvertRecipe, recipe("out: 2026-01-31\n")).out == "2026-01-31"
    with pytest.raises(UsageError, match="topk' .*, not '2026-01-31'"):
        load_recipe(ConvertRecipe, recipe("topk: 2026-01-31\n"))
    for key, value in (("out", "20260131"), ("calibrate", "no"), ("tokenizer", "1.5")):
        with pytest.raises(UsageError, match=f"'{key}' should be") as refused:
            load_recipe(ConvertRecipe, recipe(f"{key}: {value}\n"))
        quoted = re.search(r'quotes if .*?: (\w+: "\.\.\.")', refused.value.hint)[1]
        written = quoted.replace("...", value) + "\n"
        assert getattr(load_recipe(ConvertRecipe, recipe(written)), key) == value


def test_split_words():
    assert split_words(["m", "a.b=1", "o"], "MODEL", "OUT") == (["m", "o"], ["a.b=1"])
    assert split_words(["m", "k=3"], "MODEL", "OUT") == (["m", None], ["k=3"])
    assert split_words(["./x=y"], "MODEL") == (["./x=y"], [])
    assert split_words(None, "MODEL") == ([None], [])
    with pytest.raises(UsageError, match="unexpected argument 'c'"):
        split_words(["a", "b", "c"], "MODEL", "OUT")
    with pytest.raises(UsageError, match="MODEL is missing"):
        split_words([], "MODEL", required=1)


def test_verb(sparsek, monkeypatch, tmp_path):
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "tiny.convert.yaml").write_text("# What it is for.\ntopk: 7\n")
    monkeypatch.setattr(shipped, "recipe_folder", lambda: folder)
    assert sparsek("recipes", "list").out == "tiny.convert  What it is for.\n"
    assert sparsek("recipes").out == sparsek("recipes", "list").out
    assert '"tiny.convert"' in sparsek("recipes", "list", "--json").out
    assert sparsek("recipes", "show", "tiny.convert").out == "# What it is for.\ntopk: 7\n"
    monkeypatch.chdir(tmp_path)
    assert sparsek("recipes", "copy", "tiny.convert").out == "tiny.convert.yaml\n"
    assert sparsek("recipes", "copy", "tiny.convert").failed(2)
    assert sparsek("recipes", "copy", "tiny.convert", "--overwrite").code == 0
    assert sparsek("recipes", "show", "tiny.covnert").failed(2)


def test_shipped_recipes_are_mappings_with_a_first_comment():
    for file in recipe_folder().glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        assert text.startswith("# "), f"{file.name}: the first line says what it is for"
        assert isinstance(yaml.safe_load(text), dict), file.name


@pytest.mark.parametrize(
    "place", ["{here}/sub/base", "sub/base", "sub/base.yaml", "{here}/sub/base.yaml"]
)
def test_extends_takes_a_path(tmp_path, place):
    """One with a slash was a ValueError of pathlib's."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/base.yaml").write_text("topk: 3\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"extends: {place.format(here=tmp_path)}\n")
    assert load_recipe(Recipe, mine).topk == 3
    for nowhere in ("sub/none", "/nowhere/none", "https://example.org/base.yaml"):
        mine.write_text(f"extends: {nowhere}\n")
        with pytest.raises(UsageError, match="no recipe '"):
            load_recipe(Recipe, mine)


def test_extends_lays_a_recipe_over_another(tmp_path):
    (tmp_path / "base.yaml").write_text("topk: 1\ntrain:\n  lr: 3e-4\n  steps: 5\n")
    (tmp_path / "mine.yaml").write_text("extends: base\ntrain:\n  steps: 6\n")
    (tmp_path / "other.yaml").write_text("extends: mine\ntopk: [2, 3]\n")
    made = load_recipe(Recipe, tmp_path / "other.yaml", ["gate=kv"])
    assert (made.topk, made.train.lr, made.train.steps, made.gate) == ([2, 3], 3e-4, 6, "kv")


@pytest.mark.parametrize(
    ("base", "mine", "error"),
    [
        ("topk: many\n", "extends: base\n", "base.yaml:1: 'topk'"),
        ("topk: 1\n", "extends: base\ntrain:\n  stpes: 2\n", "mine.yaml:3: unknown key"),
        ("extends: mine\n", "extends: base\n", "base.yaml:1: 'mine' extends this recipe in turn"),
        ("", "extends: [base]\n", "mine.yaml:1: 'extends' should be a recipe's name"),
        ("", "extends: nobody\n", "no recipe 'nobody'"),
        ("5: {a: 1}\n", "extends: base\n5: {b: 1}\n", "Keys should be strings, not 5"),
    ],
)
def test_mistakes_of_extending_are_named_where_they_stand(tmp_path, base, mine, error):
    (tmp_path / "base.yaml").write_text(base)
    (tmp_path / "mine.yaml").write_text(mine)
    with pytest.raises(UsageError) as caught:
        load_recipe(Recipe, tmp_path / "mine.yaml")
    assert error in caught.value.message and caught.value.hint


def unknown(tree, schema, root) -> list[str]:
    """Keys of a recipe that its schema has no place for."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    choices = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    objects = []
    for choice in choices:
        while "$ref" in choice:
            choice = root["$defs"][choice["$ref"].rpartition("/")[2]]
        if "properties" in choice or isinstance(choice.get("additionalProperties"), dict):
            objects.append(choice)
    if not isinstance(tree, dict) or not objects:
        return []
    found = []
    for choice in objects:
        wrong = []
        for key, value in tree.items():
            inner = choice.get("properties", {}).get(key, choice.get("additionalProperties"))
            wrong += unknown(value, inner, root) if isinstance(inner, dict) else [key]
        found.append(wrong)
    return min(found, key=len)


def test_editors_get_a_schema_that_knows_every_shipped_recipe(sparsek):
    import json

    seen = 0
    schemas = {}
    for verb in ("convert", "finetune", "evaluate"):
        schemas[verb] = json.loads(sparsek("recipes", "schema", verb).out)
    for name in recipe_names():
        verb = name.rpartition(".")[2]
        tree = yaml.safe_load(find_recipe(name).read_text())
        assert unknown(tree, schemas[verb], schemas[verb]) == [], name
        assert unknown({**tree, "no_such": 1}, schemas[verb], schemas[verb]) == ["no_such"]
        seen += 1
    assert seen > 10
    assert schemas["convert"]["properties"]["sinks"]["description"]
    refused = sparsek("recipes", "schema", "chat")
    assert refused.failed(2) and "convert, finetune, evaluate" in refused.err


def test_the_shell_can_complete():
    import os
    import subprocess
    import sys

    asked = {"_SPARSEK_COMPLETE": "complete_bash", "COMP_WORDS": "sparsek ev", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sparsek_cli"],
        env={**os.environ, **asked}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["evaluate"], done.stderr


def test_text_of_a_flag_keeps_what_words_say_of_it():
    from sparsek_cli.recipes.data import set_text
    from sparsek_cli.recipes.load import Draft
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

    draft = Draft(None, verb="finetune").words(["data.text.column=story", "model=m"])
    set_text(draft, ["a.jsonl"], "--data")
    source = draft.validated(FinetuneRecipe).data["text"]
    assert (source.kind, source.files, source.column) == ("text", ["a.jsonl"], "story")


def test_what_is_named_twice_is_measured_once():
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    words = ["lengths=64,32,032", "budgets=[14, 14]", "tasks=ppl,recall,ppl"]
    recipe = load_recipe(EvaluateRecipe, None, words, verb="evaluate")
    assert (recipe.lengths, recipe.budgets) == ([64, 32], [14])
    assert recipe.tasks == ["ppl", "recall"]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_begins_with_a_sentence_that_says_what_it_is_for(name):
    first = (recipe_folder() / f"{name}.yaml").read_text().split("\n", 1)[0]
    assert first.startswith("# ") and first.endswith(".") and not first.startswith("# sparsek ")


def test_a_dry_evaluation_says_the_samples_of_single_tasks(sparsek):
    shown = sparsek("evaluate", "tiny", "--recipe", "tiny", "--dry-run")
    assert "8 per task and length, 2 of ppl, 2 of recall_1, 4 of recall_4, 16 of" in shown.out
    shown = sparsek("evaluate", "tiny", "--recipe", "tiny", "--limit", "1", "--dry-run")
    assert "1 per task and length\n" in shown.out
