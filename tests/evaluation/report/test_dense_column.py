"""The dense column is plain lm-eval on the dense checkpoint, and unlimited budgets are dense."""

import pytest

TASKS = [
    "ppl",
    "recall_1",
    "recall_4",
    "scrolls_qasper",
    "scrolls_contractnli",
    "scrolls_quality",
    "scrolls_govreport",
    "scrolls_fairytaleqa",
]
LENGTH = 640


def plain_lm_eval(checkpoints, data, tasks, **options):
    """{task: {metric: value}} from lm-eval's own model class and evaluate()."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from sparsek_cli.evaluation.tasks.catalogue import TASK_FOLDER, catalogue
    from sparsek_cli.silence import quiet_lm_eval

    dense = str(checkpoints[0])
    results = {}
    with quiet_lm_eval(), pytest.MonkeyPatch.context() as monkeypatch:
        lm = HFLM(pretrained=dense, device="cpu", dtype="float32", batch_size=1, **options)
        # The bound on answers that the recipes below set; lm-eval's default is 256.
        monkeypatch.setattr(HFLM, "max_gen_toks", 6)
        for name in tasks:
            chat = catalogue()[name].chat
            metadata = {
                "pretrained": dense, "data": str(data), "limit": 4, "seed": 0, "chat": chat,
                "max_seq_lengths": [LENGTH],
            }  # fmt: skip
            manager = TaskManager(
                include_path=str(TASK_FOLDER), include_defaults=False, metadata=metadata
            )
            loaded = manager.load([name])
            [task] = loaded["tasks"].values()
            if "max_gen_toks" in (task.config.generation_kwargs or {}):
                task.config.generation_kwargs["max_gen_toks"] = 6
            found = evaluate(
                lm, loaded, limit=4, apply_chat_template=chat, fewshot_as_multiturn=chat
            )["results"][name]
            results[name] = {
                key.split(",")[0]: value
                for key, value in found.items()
                if key.split(",")[0] in task.aggregation()
                and isinstance(value, int | float)
                and value == value
            }
    return results


@pytest.fixture(scope="module")
def plain(checkpoints, data):
    return plain_lm_eval(checkpoints, data, TASKS)


@pytest.fixture(scope="module")
def runs(checkpoints, data, tmp_path_factory):
    """{policy: {task: {metric: value}}} of one evaluation at the budget, one without limit."""
    from verbs import evaluate

    from sparsek_cli.console import Console
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    def run(name, share_prefix=True, **keys):
        settings = {
            "model": str(checkpoints[1]), "data": str(data), "lengths": [LENGTH], "limit": 4,
            "tasks": TASKS, "max_new_tokens": 6, "device": "cpu", "baselines": ["dense"],
            "out": str(tmp_path_factory.mktemp("runs") / name),
        }  # fmt: skip
        report = evaluate(
            EvaluateRecipe(**(settings | keys)), Console(quiet=True), share_prefix=share_prefix
        )
        found = {}
        for unit in report["units"]:
            values = {metric: item["value"] for metric, item in unit["metrics"].items()}
            found.setdefault(unit["policy"], {})[unit["task"]] = values
        return found

    shared = run("shared")
    whole = run("whole", share_prefix=False, budgets=[2048])
    return {
        "dense": shared["dense"],
        "dense, prompts read whole": whole["dense"],
        "sparsek": shared["sparsek"],
        "unlimited": whole["sparsek-2048"],
    }


@pytest.mark.slow
def test_columns(plain, runs):
    """One test, so that its two evaluations run once however many workers share the suite."""
    for column in ("dense", "dense, prompts read whole"):
        for task in TASKS:
            ours = runs[column][task]
            assert {metric: ours[metric] for metric in plain[task]} == plain[task], (column, task)
    for task in TASKS:
        unlimited, dense = runs["unlimited"][task], runs["dense"][task]
        for metric, value in dense.items():
            # ppl is a sum of floats in another order; everything else counts right answers.
            wanted = pytest.approx(value, rel=1e-5) if "ppl" in metric else value
            assert unlimited[metric] == wanted, (task, metric)
    sparse, dense = runs["sparsek"]["ppl"]["ppl"], runs["dense"]["ppl"]["ppl"]
    assert sparse != pytest.approx(dense, rel=1e-3)


def test_cutting_at_the_left_is_what_lm_eval_does(checkpoints, data, tmp_path):
    from verbs import evaluate

    from sparsek_cli.console import Console
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    tasks = ["scrolls_qasper", "scrolls_contractnli", "scrolls_fairytaleqa"]
    theirs = plain_lm_eval(checkpoints, data, tasks, max_length=150)
    recipe = EvaluateRecipe(
        model=str(checkpoints[1]), data=str(data), tasks=tasks, limit=4, baselines=["dense"],
        max_new_tokens=6, max_length=150, truncate="left", out=str(tmp_path), device="cpu",
    )  # fmt: skip
    report = evaluate(recipe, Console(quiet=True))
    for unit in report["units"]:
        if unit["policy"] == "dense":
            assert unit["proof"]["truncated_prompts"] > 0
            values = {metric: item["value"] for metric, item in unit["metrics"].items()}
            assert values == theirs[unit["task"]]
