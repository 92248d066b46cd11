"""A tiny converted checkpoint beside its dense base, and small local data."""

import copy
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location(
    "sparsek_tests_conftest", Path(__file__).parents[1] / "conftest.py"
)
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)

SPARSEK = {"topk": 40, "window": 24, "sinks": 4}
LENGTH = 640  # tokens, which are characters for the tests' tokenizer


@pytest.fixture(scope="session", autouse=True)
def _task_files_are_read_once():
    """lm-eval reads those of a folder again for every task and length, for a tenth of a second.

    Of all its folders thousands of files include the same few, which it reads as often.
    """
    if importlib.util.find_spec("lm_eval") is None:  # kernels' tests on a bare machine
        yield
        return
    from lm_eval.tasks import _yaml_loader, manager

    read, known = manager.TaskIndex.build, {}
    read_file, included = _yaml_loader.load_yaml, {}

    def build(paths, **options):
        key = (*map(str, paths), *options.items())
        if key not in known:
            known[key] = read(paths, **options)
        return dict(known[key])  # loading adds names, and copies what it changes of an entry

    def include(path, *, resolve_func, **options):
        if resolve_func:  # a function may be another one by now
            return read_file(path, resolve_func=True, **options)
        if path not in included:
            included[path] = read_file(path, resolve_func=False, **options)
        return dict(included[path])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager.TaskIndex, "build", staticmethod(build))
        patch.setattr(_yaml_loader, "load_yaml", include)  # known to itself by this name
        yield


def words(count: int, seed: int = 0) -> str:
    """`count` random short words."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(count))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> tuple[Path, Path]:
    """(dense folder, converted folder) with the same weights; llama, random."""
    folder = tmp_path_factory.mktemp("models")
    dense = shared.save_tiny_checkpoint(folder / "dense", "llama", max_position_embeddings=2048)
    return dense, save_converted(dense, folder / "converted", SPARSEK)


@pytest.fixture(scope="session", autouse=True)
def _their_model_is_checked_once(checkpoints):
    """Each evaluation passes hundreds of tokens through it, to find out whether it is sound.

    Other models are checked each time; test_soundness is about what is found.
    """
    from sparsek_cli.evaluation import run

    check, known = run.check_policies, {}

    def check_once(model, policies, max_length):
        if model.config._name_or_path != str(checkpoints[1]):
            return check(model, policies, max_length)
        key = (str(model.config.to_dict()), model.dtype, str(policies), max_length)
        if key not in known:
            known[key] = check(model, policies, max_length)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "check_policies", check_once)
        yield


@pytest.fixture
def convert() -> Callable[..., Path]:
    """`convert(dense folder, folder)` -> the second, converted as `checkpoints` is."""
    return lambda dense, folder: save_converted(dense, folder, SPARSEK)


def save_converted(dense: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """The dense checkpoint with random scorers, saved as a converted one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparsek_cli.models import sparsek_config_from

    config = sparsek_config_from(AutoConfig.from_pretrained(dense), settings)
    base = AutoModelForCausalLM.from_pretrained(dense)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(base.state_dict(), strict=False)
    model.save_pretrained(folder)
    shared.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A --data folder: text/ and small SCROLLS sets of all three kinds."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for number in range(3):
        text = ". ".join(words(9, number * 1000 + i).capitalize() for i in range(160))
        (folder / "text" / f"{number}.txt").write_text(text + ".", encoding="utf-8")
    rows = {"qasper": [], "contract_nli": [], "quality": [], "gov_report": [], "fairytale_qa": []}
    for number in range(4):
        document = words(60, number // 2)
        question = f"What is {words(2, 50 + number)}?"
        answer = ["yes", words(2, 3), "no", words(3, 4)][number]
        verdict = ["Entailment", "Contradiction", "Not mentioned", "Entailment"][number]
        options = [words(2, 70 + i) for i in range(4)]
        choices = " ".join(f"({c}) {o}" for c, o in zip("ABCD", options, strict=True))
        rows["qasper"].append((f"{question}\n\n{document}", answer))
        rows["fairytale_qa"].append((f"{question}\n\n{document}", words(3, 4)))
        rows["contract_nli"].append((f"{words(5, number)}\n\n{document}", verdict))
        rows["quality"].append((f"{question}\n\n {choices}\n\n{document}", options[number]))
        rows["gov_report"].append((document, words(12, number)))
    for config, items in rows.items():
        (folder / config).mkdir()
        lines = [
            json.dumps({"id": f"{config}{i}", "pid": f"p{i}", "input": text, "output": output})
            for i, (text, output) in enumerate(items)
        ]
        (folder / config / "validation.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def recipe(checkpoints, data, tmp_path) -> Callable[..., Any]:
    """`recipe(**keys)`: an EvaluateRecipe on the converted model, small by default."""
    from sparsek_cli.evaluation.tasks.catalogue import catalogue
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    def sized(tasks: list[str]) -> bool:
        return any(name in catalogue() and catalogue()[name].lengths for name in tasks)

    def make(**keys: Any) -> Any:
        defaults = {
            "model": str(checkpoints[1]),
            "data": str(data),
            "lengths": [LENGTH] if sized(keys.get("tasks", ["ppl"])) else [],
            "limit": 4,
            "out": str(tmp_path / "out"),
            "device": "cpu",
            "max_new_tokens": 6,
        }
        return EvaluateRecipe(**(defaults | keys))

    return make


@pytest.fixture
def console():
    """A console that says nothing."""
    from sparsek_cli.console import Console

    return Console(quiet=True)


@pytest.fixture
def run():
    from verbs import evaluate

    return evaluate
