"""The Python functions do what the verbs do, and nothing is imported before it is needed."""

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import sparsek_cli as sparsek
from sparsek_cli.errors import UsageError

SMALL = {"sequence_length": 64, "batch_size": 2, "micro_batch_size": 2, "device": "cpu"}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("A boat and a house and a garden. " * 200)
    return str(file)


@pytest.fixture
def converted(tmp_path):
    return sparsek.convert("tiny", tmp_path / "sparse", budget=64, calibrate="none", device="cpu")


def test_convert_finetune_evaluate_load_chat(converted, text, tmp_path):
    assert converted.data()["slots_per_kv_head"] == 64 and "verified" in converted.text()
    tuned = sparsek.finetune(
        converted.out, tmp_path / "tuned", data=text, steps=1, **SMALL,
        evaluation={"sequences": 1, "held_out": 0.3},
    )  # fmt: skip
    assert tuned.steps == 1 and tuned.held_out_loss > 0 and "held-out loss" in tuned.text()
    found = sparsek.evaluate(
        tuned.out, tmp_path / "results", tasks="ppl", text=[text], lengths=[300], limit=1,
        baselines=["dense"], device="cpu",
    )  # fmt: skip
    assert found.score("ppl", "sparsek") > 1 and found.score("ppl", "dense") > 1
    assert (tmp_path / "results" / "report.html").is_file() and found.out in found.text()
    with pytest.raises(KeyError):
        found.score("ppl", "window")
    model, tokenizer = sparsek.load(tuned.out, device="cpu")
    assert model.config.sparsek["window"] == 16 and not model.training
    assert model(**tokenizer("hello", return_tensors="pt")).logits.isfinite().all()
    session = sparsek.chat(tuned.out, device="cpu", max_new_tokens=3)
    assert "".join(session.ask("Hello?")) and session.stats().kv_bytes > 0
    coded = sparsek.chat(tuned.out, device="cpu", max_new_tokens=3, cache_dtype="int8")
    assert "".join(coded.ask("Hello?")) and coded.stats().kv_bytes < session.stats().kv_bytes / 2
    assert callable(sparsek.chat)  # which no module of that name has replaced


@pytest.mark.slow
def test_the_example_of_the_api_runs(tmp_path, monkeypatch, capsys):
    """As it stands in sparsek_cli/api, at sizes of a test."""
    from sparsek_cli import api

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "my-documents").mkdir()
    (tmp_path / "my-documents/a.txt").write_text("A boat, a house and a garden. " * 400)
    lines = [line for line in api.__doc__.splitlines() if line.startswith("    ")]
    code = textwrap.dedent("\n".join(lines))
    for given, small in (
        ("budget=512", 'budget=64, calibrate="none", device="cpu"'),
        ("steps=100", f"steps=1, **{SMALL}"),
        ("limit=4", 'limit=1, lengths=[600], baselines=[], device="cpu"'),
    ):
        assert given in code
        code = code.replace(given, small)
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_a_wrong_setting_is_named_as_it_was_written(tmp_path):
    with pytest.raises(UsageError, match="windw=: unknown key 'windw'") as caught:
        sparsek.convert("tiny", tmp_path / "out", windw=3)
    assert "window" in caught.value.hint
    with pytest.raises(UsageError, match="MODEL is missing"):
        sparsek.finetune(out=tmp_path / "out", data="x.txt")


def test_a_recipe_stands_below_the_settings(text, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps: 7\nseed: 3\ndata: {mine: {kind: text, files: nowhere.txt}}\n")
    with pytest.raises(UsageError, match="nothing to resume"):  # so everything else was right
        sparsek.finetune("tiny", tmp_path / "out", data=text, recipe=str(recipe), resume=True)


@pytest.mark.parametrize(
    "several",
    [lambda files: files, iter, set, np.array, lambda files: dict.fromkeys(files).keys(),
     lambda files: (Path(file) for file in files), lambda files: Path(files[0])],
    ids=["list", "iterator", "set", "array", "view", "generator", "path"],
)  # fmt: skip
def test_data_is_one_place_or_any_that_can_be_walked_through(text, tmp_path, several):
    with pytest.raises(UsageError, match="nothing to resume"):  # so everything else was right
        sparsek.finetune("tiny", tmp_path / "out", data=several([text]), resume=True)
    with pytest.raises(UsageError, match="data should be a path or a name, not 3"):
        sparsek.finetune("tiny", tmp_path / "out", data=iter([text, 3]))


@pytest.mark.parametrize("name", [n for n in sparsek.__all__ if n != "__version__"])
def test_functions_are_typed_and_documented(name):
    function = getattr(sparsek, name)
    signature = inspect.signature(function)
    assert function.__doc__ and "Args:" in function.__doc__
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(
        parameter.annotation is not inspect.Parameter.empty
        for parameter in signature.parameters.values()
    )
    assert name in dir(sparsek)


def test_naming_a_function_imports_no_torch():
    code = (
        "import sys, sparsek_cli as s; s.convert, s.finetune, s.evaluate, s.load, s.chat\n"
        "sys.exit(int('torch' in sys.modules or 'transformers' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_does_not_exist_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'conver'"):
        sparsek.conver  # noqa: B018


@pytest.mark.parametrize("value", ["no", 1, None])
def test_switches_are_true_or_false(tmp_path, value):
    """overwrite="no" replaced a folder."""
    for call in (
        lambda: sparsek.export("tiny", tmp_path / "a", overwrite=value),
        lambda: sparsek.export("tiny", tmp_path / "a", copy=value),
        lambda: sparsek.export_scorers("tiny", tmp_path / "a", overwrite=value),
        lambda: sparsek.merge("tiny", "s", tmp_path / "a", overwrite=value),
    ):
        with pytest.raises(UsageError, match="should be True or False"):
            call()


@pytest.mark.parametrize(
    "settings", [{"temperature": float("nan")}, {"temperature": 1e-300}, {"max_new_tokens": 0}]
)
def test_sampling_that_means_nothing(settings):
    """It was a RuntimeError of torch at the first word."""
    with pytest.raises(UsageError, match="out of range"):
        sparsek.chat("tiny", **settings)


def test_devices_are_named_as_in_torch():
    """A type of torch's was a bare TypeError; 0 is torch's cuda:0."""
    with pytest.raises(UsageError, match="device should be auto, cpu, .*not torch.float32"):
        sparsek.load("tiny", device=torch.float32)
    with pytest.raises(UsageError, match="device should be"):
        sparsek.load("tiny", device=True)
    with pytest.raises(UsageError, match="device 'cuda:99' is not there"):
        sparsek.load("tiny", device=99)
    model, _ = sparsek.load("tiny", device=torch.device("cpu"))
    assert model.device.type == "cpu"


def test_torchs_own_names_of_formats_and_devices_count(tmp_path):
    """As transformers takes them; torch.device did, and torch.dtype did not."""
    cpu = torch.device("cpu")
    model, _ = sparsek.load("tiny", device=cpu, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    settings = {"budget": 64, "calibrate": "none", "device": cpu, "dtype": torch.float32}
    assert sparsek.convert("tiny", tmp_path / "out", **settings).plan.calibration.dtype == "float32"
    with pytest.raises(UsageError, match="a path or a name, not Qwen3ForCausalLM") as caught:
        sparsek.load(model)
    assert "\n" not in caught.value.message


def test_a_switch_of_numpy_is_one(tmp_path):
    for value in (np.True_, np.False_):
        with pytest.raises(UsageError, match="a plain dense model already"):
            sparsek.export("tiny", tmp_path / "a", overwrite=value, copy=value)
    with pytest.raises(UsageError, match="should be True or False"):
        sparsek.export("tiny", tmp_path / "a", overwrite=np.int64(1))


ARGUMENTS = {
    "convert": {"model": "tiny", "out": "o", "recipe": None, "reporter": None},
    "finetune": {"model": "tiny", "out": "o", "data": "x", "recipe": None, "reporter": None},
    "evaluate": {"model": "tiny", "out": "o", "recipe": None, "resume": False, "reporter": None},
    "load": {"model": "tiny", "scorers": "s", "revision": None, "device": "cpu", "dtype": "auto",
             "cache_dtype": None},
    "export": {"model": "tiny", "out": "o", "revision": None, "reporter": None},
    "export_scorers": {"model": "tiny", "out": "o", "revision": None, "reporter": None},
    "merge": {"base": "tiny", "scorers": "s", "out": "o", "revision": None, "reporter": None},
    "chat": {"model": "tiny", "system": None, "temperature": 0.0, "top_p": 1.0,
             "max_new_tokens": 4, "seed": 0, "device": "cpu", "dtype": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("value", [3.5, ["a"], object()], ids=["number", "list", "object"])
@pytest.mark.parametrize(
    ("verb", "name"), [(verb, name) for verb, given in ARGUMENTS.items() for name in given]
)
def test_arguments_of_another_kind_are_named(tmp_path, monkeypatch, verb, name, value):
    """They were TypeErrors of whatever met them first."""
    monkeypatch.chdir(tmp_path)
    if name in ("temperature", "top_p") and value == 3.5:
        pytest.skip("a number")
    with pytest.raises(UsageError) as caught:
        getattr(sparsek, verb)(**ARGUMENTS[verb] | {name: value})
    text = name == "data" and value == ["a"]  # a file that is not there
    assert text or f"{name} should be" in caught.value.message
    assert caught.value.hint and not [*tmp_path.iterdir()]
