"""Every key of every recipe takes values of its own type, in bounds, and nothing made of another.

`overwrite: "yes"` counted as true, `steps: true` as one step, `limit: "3"` as three samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
from pydantic import BaseModel

from sparsek_cli.api import verbs
from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.load import Draft, load_recipe
from sparsek_cli.recipes.schema_convert import ConvertRecipe
from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe
from sparsek_cli.recipes.schema_finetune import FinetuneRecipe
from sparsek_cli.recipes.schema_sources import (
    CopyBlock,
    NeedleBlock,
    StreamBlock,
    TextSource,
)
from sparsek_cli.scorers_alone.portable_recipe import portable

# Sources by the name that they have in the tree below, and what each cannot be without.
SOURCES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "text": (TextSource, {"kind": "text", "files": "text.txt"}),
    "needles": (NeedleBlock, {"kind": "needles", "filler": "text"}),
    "copies": (CopyBlock, {"kind": "copies", "filler": "text"}),
    "stream": (StreamBlock, {"kind": "stream", "stream": "series"}),
}
RECIPES = {"convert": ConvertRecipe, "finetune": FinetuneRecipe, "evaluate": EvaluateRecipe}


def leaves(kind: type[BaseModel], above: str = "") -> Iterator[tuple[str, frozenset[Any]]]:
    """Keys of a schema and the types that they take; blocks are walked into."""
    for name, field in kind.model_fields.items():
        key = f"{above}{field.alias or name}"
        if key == "data" and kind is FinetuneRecipe:
            continue
        types = frozenset(plain(field.annotation))
        blocks = [t for t in types if isinstance(t, type) and issubclass(t, BaseModel)]
        for block in blocks:
            yield from leaves(block, f"{key}.")
        if not blocks:
            yield key, types


def plain(annotation: Any) -> Iterator[Any]:
    """The types that a union is of, constraints taken off; a list or mapping is one."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from plain(arguments[0])
    elif origin in (Union, UnionType):
        for argument in arguments:
            yield from plain(argument)
    else:
        yield origin or annotation


KEYS = [(verb, key, types) for verb, kind in RECIPES.items() for key, types in leaves(kind)]
KEYS += [
    ("finetune", f"data.{name}.{key}", types)
    for name, (kind, _) in SOURCES.items()
    for key, types in leaves(kind)
    if key != "kind"
]
OPEN = ("architecture.settings",)  # any values, which the family's config class looks at
HUGE = (10**31, -(10**31), 10**400, 1e300, "1e400")
WRONG = (True, False, 0.5, 3.0, math.nan, math.inf, -math.inf, -1, -0.5, *HUGE, "3", "yes",
         "true",
         "1e-4", "", [], {}, [True], ["3"], [3.0], [-1], [10**31], [[]], {"a": True})  # fmt: skip


def draft(verb: str, key: str, value: Any) -> Draft:
    made = Draft()
    if key.startswith("data."):
        for name, (_, block) in SOURCES.items():
            made.set(f"data.{name}", dict(block), "before")
    elif key.startswith("architecture."):
        made.set("init", "random", "before")
        made.set("train", "all", "before")
    made.set(key, value, "here")
    return made


def at(recipe: BaseModel, key: str) -> Any:
    for part in key.split("."):
        names = {field.alias or name: name for name, field in type(recipe).model_fields.items()} \
            if isinstance(recipe, BaseModel) else {}  # fmt: skip
        recipe = recipe[part] if isinstance(recipe, dict) else getattr(recipe, names[part])
    return recipe


def fits(value: Any, types: frozenset[Any]) -> bool:
    """Whether a value, whatever its size, is of one of the types."""
    kinds = {
        bool: (bool,), int: (int, float), float: (float,), str: (str, Literal),
        list: (list, tuple), dict: (dict,),
    }  # fmt: skip
    return any(kind in types for kind in kinds[type(value)])


@pytest.mark.parametrize(("verb", "key", "types"), KEYS, ids=[f"{v}-{k}" for v, k, _ in KEYS])
def test_types(verb, key, types):
    for value in WRONG:
        try:
            found = at(draft(verb, key, value).validated(RECIPES[verb]), key)
        except UsageError as error:
            assert "\n" not in error.message and error.hint
            # What holds of several keys together names them, too.
            names = ("here: ", "recipe", f"'{key.rpartition('.')[2]}'")
            assert any(name in error.message for name in names), error.message
            continue
        if key in OPEN or any((key, value) == also for also in ALSO):
            continue
        listed = found == [value] and verb == "evaluate"  # a single value is a list, too
        assert fits(value, types) or (listed and list in types), (value, found)
        for number in numbers(found):
            assert isinstance(number, bool) or 0 <= number <= 1e30, (value, found)
        same = [value] if listed else value
        assert (list(found) if isinstance(found, tuple) else found) == same, (value, found)


# Words for what a key takes: on and off are booleans to YAML; an empty text is an empty list.
ALSO = [("chat_template", True), ("chat_template", False), ("lengths", "3"), ("budgets", "3"),
        *((key, word) for key in ("tasks", "baselines", "budgets", "lengths", "text")
          for word in ("", "3", "yes", "true", "1e-4", "1e400"))]  # fmt: skip


def numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


def test_they_are_all_there():
    keys = {(verb, key) for verb, key, _ in KEYS}
    assert len(keys) == len(KEYS) > 110
    assert sum(bool in types for _, _, types in KEYS) == 13
    assert ("finetune", "data.needles.options.key_values") in keys


def test_a_number_of_numpy_is_a_number():
    made = verbs._validated(
        EvaluateRecipe, Draft(), "tiny", None, {"limit": np.int64(3), "yarn": np.float32(2)}
    )
    assert (made.limit, made.yarn) == (3, 2.0) and type(made.limit) is int


@pytest.mark.parametrize(
    ("recipe", "settings", "plain"),
    [
        (EvaluateRecipe, {"lengths": [np.int64(4)]}, {"lengths": [4]}),
        (EvaluateRecipe, {"lengths": np.array([4, 5])}, {"lengths": [4, 5]}),
        (FinetuneRecipe, {"lora": {"rank": np.int64(8)}}, {"lora": {"rank": 8}}),
        (FinetuneRecipe, {"sparsek": {"topk": np.int64(8)}}, {"sparsek": {"topk": 8}}),
    ],
)
def test_numbers_of_numpy_within_others_are_numbers(recipe, settings, plain):
    made = [verbs._validated(recipe, Draft(), "tiny", None, given) for given in (settings, plain)]
    assert made[0].model_dump() == made[1].model_dump()


def test_a_mistake_in_a_mapping_is_told_by_the_key_alone():
    """'sparsek.topk.constrained-int' was a name of pydantic's."""
    with pytest.raises(UsageError, match="'sparsek.topk' should") as error:
        verbs._validated(FinetuneRecipe, Draft(), "tiny", None, {"sparsek": {"topk": 1.5}})
    assert "constrained" not in str(error.value)
    with pytest.raises(UsageError, match="'sparsek.topk' should"):
        load_recipe(FinetuneRecipe, None, ["sparsek={topk: 1.5}"])


def test_a_source_may_be_called_as_one_of_its_keys_is():
    """`stream` of the shipped recipes is: its mistakes were told of data.stream.stream."""
    words = ["data.stream={kind: stream, stream: series}", "data.stream.weight=true"]
    with pytest.raises(UsageError) as error:
        load_recipe(FinetuneRecipe, None, words)
    assert error.value.message.startswith("'data.stream.weight=true': 'data.stream.weight' should")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("overwrite: 'yes'", "r.yaml:1: 'overwrite' should be a valid boolean, not 'yes'"),
        ("steps: true", "r.yaml:1: 'steps' should be a valid integer, not True"),
        ("steps: '3'", "r.yaml:1: 'steps' should be a valid integer, not '3'"),
        ("dtype: [bf16]", "r.yaml:1: 'dtype' should be 'auto', 'bfloat16' or 'float32'"),
    ],
)
def test_what_it_took_is_said(tmp_path, word, says):
    (tmp_path / "r.yaml").write_text(word)
    with pytest.raises(UsageError) as error:
        load_recipe(FinetuneRecipe, tmp_path / "r.yaml")
    assert says in error.value.message and error.value.hint


def test_numbers_as_yaml_reads_them(tmp_path):
    """YAML 1.1 takes 1e-4 for a word, and `yes` for true. What is quoted is a word."""
    (tmp_path / "r.yaml").write_text("overwrite: yes\nlearning_rate: 1e-4\nepochs: 3\n")
    made = load_recipe(FinetuneRecipe, tmp_path / "r.yaml")
    assert (made.overwrite, made.learning_rate, made.epochs) == (True, 1e-4, 3.0)
    made = load_recipe(
        EvaluateRecipe, None, ["lengths=512,1024"], {"budgets": "64", "tasks": "ppl"}
    )
    for quoted in ("'1e-4'", "'0.0001'", '"1.0e-4"'):
        (tmp_path / "r.yaml").write_text(f"learning_rate: {quoted}\n")
        with pytest.raises(UsageError, match="'learning_rate' should be a valid number, not '"):
            load_recipe(FinetuneRecipe, tmp_path / "r.yaml")
    for written in ("1e-4", "1E-4", "+1.e-4", "100e-6", "1.0e-4"):
        assert load_recipe(FinetuneRecipe, None, [f"learning_rate={written}"]).learning_rate == 1e-4
    assert (made.lengths, made.budgets, made.tasks) == ([512, 1024], [64], ["ppl"])


def test_a_word_that_looks_like_a_number_is_one_where_text_belongs(tmp_path):
    """YAML 1.1 takes 12e5678 for a word; read as a number it was inf, and no revision."""
    (tmp_path / "r.yaml").write_text(
        "device: 12e5678\nout: 3e8\nlearning_rate: .5e-3\n"
        "data:\n  1e4: {kind: text, files: [1e2, a.txt], weight: 1e1}\n"
    )
    made = load_recipe(FinetuneRecipe, tmp_path / "r.yaml", ["model=1E6"])
    assert (made.device, made.out, made.model) == ("12e5678", "3e8", "1E6")
    assert made.data["1e4"].files == ["1e2", "a.txt"]
    numbers = (made.learning_rate, made.data["1e4"].weight)
    assert numbers == (5e-4, 10.0) and {type(number) for number in numbers} == {float}
    (tmp_path / "r.yaml").write_text("learning_rate: 12e5678\nout: 3e8\n")
    with pytest.raises(UsageError, match="r.yaml:1: 'learning_rate' should"):
        load_recipe(FinetuneRecipe, tmp_path / "r.yaml")
    made = load_recipe(EvaluateRecipe, None, ["text=1e3", "tasks=[1e2]", "lengths=[100]"])
    assert (made.text, made.tasks) == (["1e3"], ["1e2"])
    assert load_recipe(ConvertRecipe, None, ["model=m", "revision=12e5678"]).revision == "12e5678"
    settings = "architecture={type: llama, settings: {rope_theta: 1e4}}"
    words = ["init=random", "train=all", "tokenizer=tiny", settings]
    kept = load_recipe(FinetuneRecipe, None, words).architecture.settings["rope_theta"]
    assert type(kept) is float and kept == 1e4


def test_a_commit_of_digits_alone_is_told_to_be_quoted(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\nrevision: 1234567\n")
    for recipe, words in ((tmp_path / "r.yaml", []), (None, ["model=m", "revision=1234567"])):
        with pytest.raises(UsageError, match="'revision' should be .*, not 1234567") as refusal:
            load_recipe(ConvertRecipe, recipe, words)
        assert 'word or name: revision: "..."' in refusal.value.hint
    (tmp_path / "r.yaml").write_text("model: m\ntext: [a.txt, 2024]\n")
    with pytest.raises(UsageError, match="'text.1' should be .*, not 2024") as refusal:
        load_recipe(EvaluateRecipe, tmp_path / "r.yaml")
    assert 'word or name: text: ["..."]' in refusal.value.hint
    (tmp_path / "r.yaml").write_text('model: m\nrevision: "0123456"\n')
    assert load_recipe(ConvertRecipe, tmp_path / "r.yaml").revision == "0123456"


def test_such_words_are_written_again_as_they_were(tmp_path):
    (tmp_path / "r.yaml").write_text("learning_rate: 1e-4\nrevision: 12e5678\n1e4: a\n")
    assert portable(tmp_path / "r.yaml") == (tmp_path / "r.yaml").read_text()
    (tmp_path / "1e3.yaml").write_text("extends: 1e4\n")
    (tmp_path / "1e4.yaml").write_text("seed: 3\n")
    assert load_recipe(FinetuneRecipe, tmp_path / "1e3.yaml").seed == 3


@pytest.mark.parametrize(
    "options",
    ["needles: 3", "needles: [5, 2]", "needles: [a, b]", "questions: -1", "key_values: 2",
     "splits: [x]", "documents: [0]", "documents: []", "facts: [0, 0]", "what: 1"],
)  # fmt: skip
def test_options_of_generators(options):
    """They were given on as they stood: a TypeError after the text was read, or nothing."""
    word = f"data.n={{kind: needles, filler: text, options: {{{options}}}}}"
    words = ["data.text={kind: text, files: a.txt}", word]
    with pytest.raises(UsageError, match=r"data\.n\.options\."):
        load_recipe(FinetuneRecipe, None, words)
    made = load_recipe(FinetuneRecipe, None, [*words[:1], word.replace(options, "facts: [2, 3]")])
    assert made.data["n"].options.model_dump() == {"facts": (2, 3)}
    assert FinetuneRecipe.model_validate(made.model_dump(mode="json")) == made


def test_a_limit_beside_a_recipe_takes_the_place_of_those_of_its_tasks(tmp_path):
    """`evaluate --recipe tiny --limit 1` measured as many samples as the file says of each task."""
    (tmp_path / "r.yaml").write_text("limit: 8\nlimits: {ppl: 2}\n")
    made = [
        load_recipe(EvaluateRecipe, tmp_path / "r.yaml", words, {"limit": flag})
        for words, flag in (([], None), ([], 1), (["limit=1"], None), (["limits={ppl: 3}"], 1))
    ]
    limits = [(one.limit, one.limits) for one in made]
    assert limits == [(8, {"ppl": 2}), (1, {}), (1, {}), (1, {"ppl": 3})]


def test_a_limit_in_a_recipe_takes_the_place_of_those_in_what_it_extends(tmp_path):
    """`extends: tiny` and `limit: 1` measured as many samples as tiny says of each task."""
    (tmp_path / "base.yaml").write_text("limit: 8\nlimits: {ppl: 2, recall_1: 2}\n")
    (tmp_path / "mine.yaml").write_text("extends: base\nlimit: 1\n")
    (tmp_path / "own.yaml").write_text("extends: base\nlimit: 1\nlimits: {ppl: 3}\n")
    (tmp_path / "part.yaml").write_text("extends: mine\nlimits: {ppl: 4}\n")
    (tmp_path / "less.yaml").write_text("extends: base\nlimits: {ppl: 5}\n")
    made = [load_recipe(EvaluateRecipe, tmp_path / f"{n}.yaml") for n in ("mine", "own", "part")]
    assert [(one.limit, one.limits) for one in made] == [(1, {}), (1, {"ppl": 3}), (1, {"ppl": 4})]
    assert load_recipe(EvaluateRecipe, tmp_path / "less.yaml").limits == {"ppl": 5, "recall_1": 2}
    words = ["limits.ppl=6", "limit=7"]
    for said in (words, words[::-1]):
        made = load_recipe(EvaluateRecipe, tmp_path / "base.yaml", said)
        assert (made.limit, made.limits) == (7, {"ppl": 6})


def test_a_length_beside_that_of_a_recipe_says_how_to_drop_it():
    with pytest.raises(UsageError, match="not several .steps=null drops a recipe's"):
        load_recipe(FinetuneRecipe, "lora", ["epochs=1"], verb="finetune")
    assert load_recipe(FinetuneRecipe, "lora", ["epochs=1", "steps=null"], verb="finetune").epochs
