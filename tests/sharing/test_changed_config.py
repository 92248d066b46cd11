"""What was changed in config.json after a model was made is told, and what is a user's to choose
is no fault.
"""

import json
import logging
import shutil

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import sparsek_cli as sparsek
from sparsek_cli import hub
from sparsek_cli.diagnosis.model import _config
from sparsek_cli.output import written_config
from sparsek_cli.output.written_config import KEY, changes

INDEX = "model.safetensors.index.json"


@pytest.fixture
def out(llama, tmp_path):
    return shutil.copytree(llama[1], tmp_path / "out")


def edit(folder, change) -> None:
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def rope(fields):
    """The block of rotary positions, in whichever spelling the file has."""
    return fields.setdefault("rope_parameters", {"rope_theta": fields.get("rope_theta", 10000.0)})


def turn(fields):
    rope(fields)["rope_theta"] = 500.0


def stretch(fields):
    rope(fields).update(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
    fields["max_position_embeddings"] = 256


WRONG = [
    (turn, "rope_parameters.rope_theta 500.0 (was 10000.0)"),
    (lambda f: f["sparsek"].update(gate="log"), "sparsek.gate log (was straight_through)"),
    (lambda f: f.update(rms_norm_eps=0.5), "rms_norm_eps 0.5 (was"),
    (lambda f: (f["sparsek"].update(sinks=0), f.update(rms_norm_eps=0.5)), "rms_norm_eps 0.5 (was"),
    (lambda f: f.update(hidden_act="gelu"), "hidden_act gelu (was silu)"),
    (lambda f: (stretch(f), turn(f)), "rope_parameters.rope_type yarn (was default)"),
]
CHOSEN = [
    (lambda f: f["sparsek"].update(topk=4, window=6, sinks=0), "sparsek.window 6 (was 8)"),
    (stretch, "rope_parameters.factor 4.0 (was none)"),
]
NOTHING = [
    lambda f: f.update(eos_token_id=5, temperature=0.5, torch_dtype="float16", note="mine"),
    lambda f: f.update(transformers_version="9", use_cache=False, attention_dropout=0.1),
    lambda f: rope(f).setdefault("rope_type", "default"),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_another_model_than_was_made_is_told_by_doctor_and_by_loaders(change, told, out, caplog):
    """It loaded without a word, and doctor passed it."""
    edit(out, change)
    [row] = _config(hub.resolve(out))
    assert row.ok is False and told in row.detail and KEY in row.hint
    with caplog.at_level(logging.WARNING, "sparsek_cli"):
        AutoModelForCausalLM.from_pretrained(out)
        sparsek.load(out, device="cpu")
    [said] = [record.message for record in caplog.records if "was changed" in record.message]
    assert told in said and str(out) in said and "put it back" in said
    # As the hint says.
    file = out / INDEX
    index = json.loads(file.read_text())
    del index["metadata"][KEY]
    file.write_text(json.dumps(index))
    assert changes(out) is None and not [*_config(hub.resolve(out))]


def exported(out, tmp_path):
    sparsek.export(out, tmp_path / "exported")


def planned(out, tmp_path):
    """As by `--dry-run`."""
    from sparsek_cli.sharing import dense

    dense.plan(str(out), tmp_path / "exported")


def scorers(out, tmp_path):
    sparsek.export_scorers(out, tmp_path / "exported")


def scorers_file(out, tmp_path):
    sparsek.export_scorers(out, tmp_path / "exported.safetensors")


def again(out, tmp_path):
    sparsek.convert(out, tmp_path / "exported", again=True, calibrate="none")


@pytest.mark.parametrize("make", [exported, planned, scorers, scorers_file, again])
def test_what_is_made_of_a_changed_model_says_so(make, out, tmp_path, caplog):
    """Doctor and loaders did, and what was exported carried the change on without a word."""
    edit(out, turn)
    with caplog.at_level(logging.WARNING, "sparsek_cli"):
        make(out, tmp_path)
    [said] = [record.message for record in caplog.records if "was changed" in record.message]
    assert "rope_theta 500.0 (was 10000.0)" in said and str(out) in said and "put it back" in said
    # As the hint says.
    edit(out, lambda fields: rope(fields).update(rope_theta=10000.0))
    caplog.clear()
    shutil.rmtree(tmp_path / "exported", ignore_errors=True)
    (tmp_path / "exported.safetensors").unlink(missing_ok=True)
    make(out, tmp_path)
    assert "was changed" not in caplog.text


@pytest.mark.parametrize(("change", "told"), CHOSEN)
def test_budgets_and_stretched_positions_are_a_user_s_to_choose(change, told, out, caplog):
    edit(out, change)
    [row] = _config(hub.resolve(out))
    assert row.ok is None and told in row.detail
    with caplog.at_level(logging.WARNING, "sparsek_cli"):
        sparsek.load(out, device="cpu")
    assert "was changed" not in caplog.text


@pytest.mark.parametrize("change", NOTHING)
def test_what_changes_no_answer_is_no_change(change, out):
    edit(out, change)
    [row] = _config(hub.resolve(out))
    assert row.ok is True and row.detail == "config.json is what was written"


def test_the_same_config_spelled_otherwise_is_the_same(out):
    """As by an older program, which leaves out what is the default."""

    def respell(fields):
        fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
        fields["torch_dtype"] = fields.pop("dtype")
        del fields["attention_bias"]

    edit(out, respell)
    assert changes(out) == []
    AutoConfig.from_pretrained(out).save_pretrained(out)
    assert changes(out) == []


def test_a_warning_is_given_once_for_a_folder(out, caplog):
    edit(out, turn)
    with caplog.at_level(logging.WARNING, "sparsek_cli"):
        for _ in range(3):
            written_config.say_changes(out)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", '{"metadata": 3}', '{"metadata": {"sparsek_config": 3}}']
)
def test_an_index_that_says_nothing_is_no_fault(text, out):
    (out / INDEX).write_text(text)
    assert changes(out) is None


def test_trained_scorers_are_written_with_the_config_that_they_learnt_by(out, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Who walks at night? A quiet man. " * 200)
    settings = {"steps": 1, "sequence_length": 64, "batch_size": 1, "data": text, "save_steps": 0}
    edit(out, lambda f: f["sparsek"].update(window=6))
    tuned = sparsek.finetune(out, tmp_path / "tuned", recipe="scorers", **settings).out
    assert changes(out) and changes(hub.resolve(tuned).path) == []


def test_the_length_is_told_where_it_chooses_rotary_factors(make_checkpoint, convert, tmp_path):
    """Nothing else depends on it: elsewhere it is a user's."""
    rope_of_both = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    }  # fmt: skip
    told = []
    for kind, block in (("plain", None), ("long", rope_of_both)):
        base = make_checkpoint(
            tmp_path / kind, "llama", max_position_embeddings=128, rope_parameters=block
        )
        out = convert(base, tmp_path / f"{kind}-out")
        edit(out, lambda fields: fields.update(max_position_embeddings=64))
        told.append([change.text() for change in changes(out) if not change.chosen])
    assert told == [[], ["max_position_embeddings 64 (was 128)"]]
