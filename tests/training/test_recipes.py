"""Every shipped fine-tuning recipe runs, and explains every key."""

import re

import pytest
import yaml
from verbs import finetune

from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.earlier_versions import RENAMED
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_finetune import FinetuneRecipe
from sparsek_cli.recipes.shipped import recipe_folder, recipe_names

NAMES = [name for name in recipe_names() if name.endswith(".finetune")]
SMALL = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "qwen3": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_explained(name):
    text = (recipe_folder() / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    for number, line in enumerate(text.splitlines(), start=1):
        # A key with a block below it is explained by the keys in the block.
        key = re.match(r"\s*[\w-]+:\s*[^#\s]", line)
        assert key is None or "# " in line, f"{name}.yaml:{number}: {line}"


# These need a chat template and 4096 tokens; the experiment's own test runs them.
LARGE = ("tiny", "small")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(LARGE)])
def test_it_runs(name, text_file, tmp_path, sparse_checkpoint, scratch):
    draft = load_recipe(FinetuneRecipe, name, verb="finetune")
    length = 256 if any(block.kind == "needles" for block in draft.data.values()) else 64
    words = [
        f"out={tmp_path / 'out'}", f"sequence_length={length}", "batch_size=2",
        "micro_batch_size=2", "steps=1", "tokens=null", "epochs=null", "evaluation.files=null",
        "evaluation.sequences=1", "evaluation.every=0", "save_steps=0", "data_workers=0",
        "device=cpu", "launch.strategy=ddp",
    ]  # fmt: skip
    for source, block in draft.data.items():
        if block.kind == "text":
            words += [f"data.{source}.files={text_file}", f"data.{source}.dataset=null"]
    if draft.init == "random":
        words += [f"architecture.settings.{k}={v}"
                  for k, v in SMALL[draft.architecture.type].items()]  # fmt: skip
        if draft.tokenizer == "tiny":
            words.append(next(word for word in scratch if word.startswith("tokenizer=")))
    else:
        words.append(f"model={sparse_checkpoint(window=4)}")
    done = finetune(load_recipe(FinetuneRecipe, name, words, verb="finetune"))
    assert done.steps == 1 and done.held_out_loss > 0


SETTLED_BEFORE = {
    "budget_stages": [], "scorers_shape_base": None, "keep_checkpoints": 1, "loss_chunk": 8192,
    "betas": [0.9, 0.95], "evaluation": {"needles": 4},
    "objective": {"lm": 1.0, "temperature": 1.0, "future": 0.0, "outputs": 0.0},
}  # fmt: skip


def test_recipes_of_earlier_versions_run_where_they_ask_for_what_is_done(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump({"model": "tiny", **SETTLED_BEFORE}))
    assert load_recipe(FinetuneRecipe, file).objective.lm == 1.0


@pytest.mark.parametrize(
    "word",
    [
        "budget_stages=[4,2]", "keep_checkpoints=2", "betas=[0.9,0.99]", "objective.temperature=2",
        "scorers_shape_base=true", "objective.future=1", "objective.outputs=1",
        "evaluation.needles=2",
    ],
)  # fmt: skip
def test_settled_keys_are_refused_with_what_to_do(word):
    with pytest.raises(UsageError, match="unknown key") as refused:
        load_recipe(FinetuneRecipe, None, [word], {"model": "tiny"})
    assert refused.value.hint.startswith("leave it out")
    assert load_recipe(FinetuneRecipe, None, [], {"model": "tiny"})


@pytest.mark.parametrize("name", RENAMED)
def test_renamed_recipes_say_what_they_are_now(name):
    with pytest.raises(UsageError, match="no recipe") as refused:
        load_recipe(FinetuneRecipe, name, verb="finetune")
    recipe, *words = refused.value.hint.removeprefix("it is --recipe ").split()
    load_recipe(FinetuneRecipe, recipe, words, {"model": "tiny"}, verb="finetune")
