"""Whole runs: what changes, what does not, what is written."""

import filecmp
import json
import os
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from verbs import finetune

from sparsek_cli.errors import UsageError
from sparsek_cli.training.plan import plan as make_plan
from sparsek_cli.training.run import run
from sparsek_cli.training.storage.resume import part_folder


def weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_scorers_only(recipe, sparse_checkpoint, tmp_path):
    model = sparse_checkpoint()
    made = recipe(
        "objective={lm: 0, distill: 1}", "keep_better=false", "scorer_learning_rate=1e-2",
        model=model,
    )  # fmt: skip
    done = finetune(made)
    moved = changed(weights(model), weights(tmp_path / "out"))
    assert moved and all(".scorer." in name for name in moved)
    for shard in model.glob("base-*.safetensors"):
        ours = tmp_path / "out" / shard.name
        assert filecmp.cmp(shard, ours, shallow=False)
        assert os.stat(ours).st_ino == os.stat(shard).st_ino or os.stat(ours).st_nlink == 1
    with safe_open(tmp_path / "out" / "sparsek.safetensors", "pt") as scorers:
        assert len(scorers.metadata()["sparsek_sha256"]) == 64
    assert done.kept == "end" and done.steps == 3
    assert not part_folder(tmp_path / "out").exists()


def test_lora_is_merged(recipe, sparse_checkpoint, tmp_path):
    model = sparse_checkpoint()
    finetune(recipe("train=lora", "lora.rank=2", model=model))
    before, after = weights(model), weights(tmp_path / "out")
    moved = changed(before, after)
    assert any("q_proj" in name for name in moved) and any(".scorer." in name for name in moved)
    assert not any("mlp" in name or "norm" in name or "embed" in name for name in moved)


def test_two_lora_runs_of_one_seed_are_equal(recipe, sparse_checkpoint, tmp_path):
    model, found = sparse_checkpoint(), []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # whatever was drawn before
        words = ("train=lora", "lora.rank=2", "steps=1", "evaluation.held_out=0", f"seed={seed}")
        finetune(recipe(*words, model=model, out=f"out{number}"))
        found.append(weights(tmp_path / f"out{number}"))
    assert changed(found[0], found[1]) == set() and changed(found[0], found[2])


def test_lora_teacher_is_the_base(recipe, sparse_checkpoint, tmp_path):
    made = recipe("train=lora", "objective={lm: 0, distill: 1}", "lora.targets=[q_proj]",
                  "lora.scorers=false", model=sparse_checkpoint())  # fmt: skip
    finetune(made)
    moved = changed(weights(tmp_path / "sparse"), weights(tmp_path / "out"))
    assert moved and all("q_proj" in name for name in moved)


class FurtherLoss(TrainerCallback):
    """The teacher's pass comes first; the model's own scorers feel it."""

    needs_teacher = True

    def __init__(self, model, teacher):
        self.model, self.teacher, self.begun, self.steps = model, teacher, 0, 0

    def begin(self, roles, bounds):
        self.begun += 1

    def loss(self):
        scorers = (p for name, p in self.model.named_parameters() if ".scorer." in name)
        return sum(p.square().sum() for p in scorers)

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def test_a_further_loss_of_layers_counts_and_follows_the_run(recipe, sparse_checkpoint):
    words = ("objective={lm: 1e-9, distill: 0}", "evaluation.held_out=0", "keep_better=false")
    plan = make_plan(recipe(*words, model=sparse_checkpoint()))
    made = []

    def make(model, teacher):
        made.append(FurtherLoss(model, teacher))
        return made[0]

    done = run(replace(plan, settings=replace(plan.settings, layer_losses=(make,))))
    (found,) = made
    assert found.teacher is not None and found.steps == done.steps == 3
    assert found.begun == 2 * done.steps and done.loss > 1e-3  # two micro-batches a step


def test_all_weights(recipe, sparse_checkpoint, tmp_path):
    model = sparse_checkpoint()
    finetune(recipe("train=all", "checkpointing=true", model=model))
    before, after = weights(model), weights(tmp_path / "out")
    assert changed(before, after) == set(before)


def test_all_weights_towards_the_start(recipe, sparse_checkpoint, tmp_path):
    made = recipe("train=all", "objective={lm: 0, distill: 1}", model=sparse_checkpoint())
    assert 0 < finetune(made).loss < 1
    assert len(weights(tmp_path / "out")) == len(weights(tmp_path / "sparse"))


def test_without_held_out_text_nothing_is_evaluated(recipe, scratch):
    done = finetune(recipe(*scratch, "evaluation={held_out: 0, every: 1}"))
    assert done.steps == 3 and done.held_out_loss is None


def test_a_random_policy_is_trained_and_comes_back(recipe, scratch, tmp_path, text_file):
    from transformers import AutoModelForCausalLM

    from sparsek_cli.loading import load_tokenizer
    from sparsek_cli.models import RandomScorer, sparsek_attentions
    from sparsek_cli.training.model import build_random, random_config

    made = recipe(*scratch, "sparsek={topk: 8, window: 8, scorer: random}")
    finetune(made)
    assert not [name for name in weights(tmp_path / "out") if ".scorer." in name]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    config = random_config(made.architecture, made.attention, made.sequence_length, tokenizer)
    fresh = build_random(config, seed=made.seed).eval()
    fresh.load_state_dict(model.state_dict(), strict=False)
    ids = torch.arange(64)[None] % 20
    for attention in sparsek_attentions(model):
        assert isinstance(attention.scorer, RandomScorer)
        assert (attention.scorer.slopes == 0).all()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fresh(ids).logits)


def test_a_time_limit_ends_the_run_and_writes_it(recipe, scratch, tmp_path):
    done = finetune(recipe(*scratch, "steps=100000", "minutes=0.01"))
    assert 0 < done.steps < 1000
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_folder_is_complete(recipe, sparse_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finetune(recipe("train=all", "sparsek.topk=4", "steps=1", model=sparse_checkpoint()))
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.sparsek["topk"] == 4
    assert AutoTokenizer.from_pretrained(out)("Anna").input_ids
    card = (out / "README.md").read_text()
    assert "finetune" in card and "\n1 step, " in card
    assert "sequence_length: 64" in (out / "finetune.yaml").read_text()
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("attention", ["dense", "sparsek"])
def test_loss_falls_from_scratch(recipe, scratch, tmp_path, attention):
    words = [*scratch, "steps=40", "learning_rate=1e-2", "weight_decay=0.1"]
    if attention == "sparsek":
        words.append("sparsek={topk: 8, window: 8}")
    done = finetune(recipe(*words))
    assert done.loss < 2.0 < 4.0
    assert done.held_out_loss < 2.5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("sparsek" in config) == (attention == "sparsek")


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        ({"eval_loss": 1.0, "eval_recall": 0.5}, "end"),
        ({"eval_loss": 9.0, "eval_recall": 1.0}, "start"),
        ({"eval_loss": float("nan"), "eval_recall": 1.0}, "start"),
        ({"eval_loss": 1.0, "eval_recall": 0.4}, "start"),
    ],
)
def test_the_better_scorers_are_kept(recipe, sparse_checkpoint, tmp_path, monkeypatch, end, kept):
    from sparsek_cli.training.trainer import SparsekTrainer

    def measured(self, prefix):
        first = {"eval_loss": 2.0, "eval_recall": 0.5}
        return first if self.state.global_step == 0 else end

    monkeypatch.setattr(SparsekTrainer, "_measure", measured)
    model = sparse_checkpoint()
    done = finetune(recipe("objective={lm: 0, distill: 1}", "scorer_learning_rate=0.1",
                           model=model))  # fmt: skip
    assert done.kept == kept
    moved = changed(weights(model), weights(tmp_path / "out"))
    assert bool(moved) == (kept == "end")
    assert done.held_out_recall == (end["eval_recall"] if kept == "end" else 0.5)


def test_recall_is_measured_before_and_after(recipe, tmp_path):
    from verbs import convert

    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    wanted = ConvertRecipe(
        model="tiny", out=str(tmp_path / "sparse"), calibrate="none", topk=8, window=120, sinks=4
    )
    convert(wanted)
    done = finetune(
        recipe("objective.lm=0", "scorer_training=concurrent", "sequence_length=256", "steps=1",
               "batch_size=1", "micro_batch_size=1", "evaluation.questions=4",
               "keep_better=false", "evaluation.every=1",
               model=tmp_path / "sparse")
    )  # fmt: skip
    assert 0 <= done.held_out_recall <= 1 and 0 <= done.start_recall <= 1
    assert done.loss < 2


def test_several_sources(recipe, scratch, text_file):
    words = [
        f"data.text={{kind: text, files: {text_file}, weight: 0.5}}",
        "data.copies={kind: copies, filler: text, passage: [8, 16], weight: 0.2}",
        "data.facts={kind: needles, filler: text, weight: 0.3, document_length: 128, "
        "options: {key_values: 1.0}}",
        "objective.answer_weight=0.5",
        "sequence_length=256",
    ]
    done = finetune(recipe(*scratch, *words))
    assert 0 < done.loss < 20


def test_a_stream_is_trained_and_held_out(recipe, scratch, tmp_path):
    words = [w for w in scratch if not w.startswith("tokenizer")]
    words += ["tokenizer=series", "data={}", "data.stream={kind: stream, stream: series}",
              "sequence_length=100", "evaluation.every=1"]  # fmt: skip
    done = finetune(recipe(*words))
    assert 4 < done.held_out_loss < 8 and 4 < done.answer_loss < 8
    with pytest.raises(UsageError, match="needs `tokenizer: nucleotides`"):
        finetune(recipe(*words, "data.stream.stream=nucleotides", out="other"))


def test_dry_run_plans_and_writes_nothing(recipe, sparse_checkpoint, tmp_path):
    model = sparse_checkpoint()
    before = sorted(tmp_path.iterdir())
    plan = make_plan(recipe("steps=null", "tokens=1000", model=model))
    assert sorted(tmp_path.iterdir()) == before
    sizes = plan.sizes
    assert sizes.steps == 4 and sizes.tokens == 1024 and sizes.accumulation == 2
    scorers = sum(t.numel() for n, t in weights(model).items() if ".scorer." in n)
    assert sizes.trained == scorers and sizes.frozen > sizes.trained
    assert "parameters learn" in plan.text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train=scorers"], "no scorers: it is dense"),
        (["train=all", "sparsek.topk=8"], "the model is dense"),
        (["train=all", "objective.distill=1"], "its own teacher"),
        (["train=all", "evaluation.questions=4"], "evaluation.questions: 64 tokens are too few"),
        (["train=all", "batch_size=5"], "no multiple of micro_batch_size"),
        (["train=all", "data={}"], "no training data"),
        (["train=lora", "lora.targets=[nonsense]"], "lora.targets"),
    ],
)
def test_impossible_requests(recipe, dense_checkpoint, tmp_path, words, message):
    made = recipe(*words, model=dense_checkpoint())
    with pytest.raises(UsageError, match=message):
        finetune(made)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_missing_logger_is_named_at_once(recipe, dense_checkpoint, monkeypatch):
    monkeypatch.setattr("sparsek_cli.training.plan.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="report_to: trackio is not installed"):
        finetune(recipe("train=all", "report_to=[trackio]", model=dense_checkpoint()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init=random"], "needs an 'architecture'"),
        (["steps=3", "tokens=100"], "one of 'steps', 'tokens', 'epochs'"),
        (["minutes=0"], "minutes"),
        (["sparsek.scorer=random"], "with init: random only"),
        (["objective={lm: 0}"], "nothing to minimise"),
        (["data.copies={kind: copies, filler: nobody}"], "must name a text source"),
        (["learning_rte=1"], "unknown key 'learning_rte'"),
        (["data.text.kind=novel"], "kind"),
        (["train=everything"], "train"),
    ],
)
def test_recipes_that_say_nonsense(recipe, words, message):
    with pytest.raises(UsageError, match=message):
        recipe(*words)


@pytest.mark.parametrize("train", ["scorers", "lora", "all"])
def test_bf16_keeps_scorers_in_float32(recipe, sparse_checkpoint, tmp_path, train):
    model = sparse_checkpoint(dtype="bfloat16")
    words = [f"train={train}", "dtype=bf16", "objective={lm: 1, distill: 0.5}",
             "checkpointing=true", "keep_better=false"]  # fmt: skip
    done = finetune(recipe(*words, model=model))
    assert 0 < done.loss < 20
    for name, tensor in weights(tmp_path / "out").items():
        wanted = torch.float32 if ".scorer." in name else torch.bfloat16
        assert tensor.dtype == wanted, name


class Notes:
    """A reporter that keeps what was said."""

    def __init__(self):
        self.said = []

    def say(self, text=""):
        self.said.append(text)

    @contextmanager
    def progress(self, description, total=None, *, logged=False):
        yield SimpleNamespace(advance=lambda *a, **k: None, describe=lambda *a, **k: None)


def test_a_held_out_text_of_one_token_measures_nothing(recipe, sparse_checkpoint, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Whisper walnut to the guard.")
    words = ("train=scorers", "evaluation.held_out=0.01", f"data.text.files={short}")
    made, notes = recipe(*words, model=sparse_checkpoint()), Notes()
    done = run(make_plan(made), notes)
    assert done.start_loss is None and done.held_out_loss is None and done.kept == "end"
    assert "held-out" not in done.text()
    assert any("of 1 held-out tokens none can be predicted" in line for line in notes.said)
    # As hinted: more of it is held out.
    made = recipe(*words, "evaluation.held_out=0.5", "overwrite=true", model=made.model)
    assert run(make_plan(made), notes).held_out_loss > 0.1


def test_documents_of_one_token_teach_nothing(recipe, scratch, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n' * 30)
    tokenizer = tmp_path / "tokenizer"
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(UsageError, match="every document of a text source is a single token"):
        finetune(recipe(*scratch, f"data.text.files={tmp_path / 'one.jsonl'}"))


def test_a_text_of_which_all_is_held_out_is_refused(recipe, scratch, tmp_path):
    """The first sequence was waited for for ever."""
    (tmp_path / "one.txt").write_text("A boat and a house. " * 20)
    with pytest.raises(UsageError, match=r"held_out 1.0 leaves nothing of data\.text"):
        finetune(
            recipe(*scratch, f"data.text.files={tmp_path / 'one.txt'}", "evaluation.held_out=1.0")
        )


@pytest.mark.parametrize("family", ["nemotron_h", "gpt2"])
def test_trained_scorers_have_the_names_of_the_files(family, recipe, sparse_checkpoint, tmp_path):
    """Some files name the base otherwise than the model does, or not at all."""
    from sparsek_cli.hub import resolve

    model = sparse_checkpoint(family)
    if family == "gpt2":
        for file in model.glob("*.safetensors"):
            tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
            file.unlink()
            save_file(tensors, file, metadata={"format": "pt"})
        index = model / "model.safetensors.index.json"
        fields = json.loads(index.read_text().replace('"transformer.', '"'))
        del fields["metadata"]["sparsek_samples"]  # of the tensors by their names
        index.write_text(json.dumps(fields))
    words = ["keep_better=false", "scorer_learning_rate=1e-2"]
    if family == "nemotron_h":
        with pytest.raises(UsageError, match="some layers of nemotron_h keep a state") as refusal:
            finetune(recipe(*words, model=model))
        assert "documents=joined" in refusal.value.hint
        words.append("documents=joined")
    assert finetune(recipe(*words, model=model)).held_out_loss > 0
    resolve(tmp_path / "out")
    moved = changed(weights(model), weights(tmp_path / "out"))
    assert moved and all(".scorer." in name for name in moved)
