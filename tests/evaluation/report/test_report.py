"""Tables, comparison and the HTML page, from results made by hand."""

import copy
import json
import re

import pytest

from sparsek_cli.errors import UsageError


def unit(task, length, policy, value, *, metric="exact", budget=None, better=True, **extra):
    return {
        "task": task,
        "length": length,
        "policy": policy,
        "budget": budget,
        "primary": metric,
        "metrics": {
            metric: {"value": value, "stderr": 0.01, "higher_is_better": better, "samples": 8}
        },
        "samples": 8,
        "proof": {
            "backends": {} if policy == "dense" else {"pytorch": 9},
            "sparse_calls": 0 if policy == "dense" else 9,
            "kv_pairs": 4096 if policy == "dense" else 512,
            "kv_bytes": 8192 if policy == "dense" else 1024,
            "kv_tokens": length or 700,
            "kept_share": 1.0 if policy == "dense" else 0.125,
            "prompts": 8,
            "truncated_prompts": 0,
        },
    } | extra


@pytest.fixture
def report():
    curve = {"position": [10.0, 20.0], "loss": [3.0, 2.5]}
    depths = [[0.1, 1.0, "inn"], [0.9, 0.0, "room"]]
    units = []
    for policy, value in (("dense", 1.0), ("sparsek-64", 0.9), ("sparsek-128", 0.95)):
        budget = None if policy == "dense" else int(policy.split("-")[1])
        units.append(unit("recall_4", 4096, policy, value, budget=budget, by_depth=depths))
        units.append(
            unit("ppl", 4096, policy, 30 / value, metric="ppl", better=False, budget=budget,
                 loss_by_position=curve)
        )  # fmt: skip
    return {
        "format": 1,
        "model": {"name": "m <b>", "type": "sparsek_llama", "path": "/x", "sparsek": None},
        "recipe": {"truncate": "refuse", "limit": 8, "seed": 0},
        "environment": {"dtype": "torch.float32", "device": "cpu", "versions": {}, "git": None},
        "policies": ["dense", "sparsek-64", "sparsek-128"],
        "soundness": {},
        "fingerprint": "0",
        "units": units,
        "complete": True,
        "absent": [{"task": "scrolls_qmsum", "reason": "not there", "remedy": "unzip it"}],
        "timings": {},
    }


def places(value, place=()):
    """Every key of a report, as the keys that lead to it."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*place, key)
        yield from places(inner, (*place, key))


def test_a_report_with_any_key_gone_is_refused_or_shown(report):
    from sparsek_cli.evaluation.report.stored_shapes import is_report
    from sparsek_cli.evaluation.report.table import markdown, text

    assert is_report(report)
    refused = 0
    for place in places(report):
        damaged = copy.deepcopy(report)
        inner = damaged
        for key in place[:-1]:
            inner = inner[key]
        if isinstance(inner, list):
            continue
        del inner[place[-1]]
        if is_report(damaged):
            assert text(damaged) and markdown(damaged), place
        else:
            refused += 1
    assert refused > 20


def test_table_has_deltas_bytes_and_absent_tasks(report):
    from sparsek_cli.evaluation.report.table import markdown, text

    shown = text(report)
    assert re.search(r"recall_4 +4096 +8 +exact +1\.000 ±0\.010 +0\.900 .* \(-0\.1\)", shown)
    assert re.search(r"ppl +4096 +8 +ppl \(lower\) +30\.00 .*33\.33 .*\(\+3\.33\)", shown)
    assert "1.00 KiB (1/8)" in shown
    assert "not measured: scrolls_qmsum: not there (unzip it)" in shown
    assert "| recall_4 | 4096 | 8 | exact |" in markdown(report)


def test_legend_only_of_what_is_there(report):
    from sparsek_cli.evaluation.report.notes import notes

    assert notes(report)[0].startswith("± standard error; in brackets")
    report["units"] = [u for u in report["units"] if u["policy"] != "dense"]
    assert notes(report)[0] == "± standard error."
    for unit in report["units"]:
        for metric in unit["metrics"].values():
            metric["stderr"] = None
    assert not any("±" in note or "brackets" in note for note in notes(report))


def test_notes_are_a_list_and_remedies_stand_once(report):
    from sparsek_cli.evaluation.report.table import markdown

    report["absent"] = [
        {"task": task, "reason": f"no {task} there", "remedy": "unzip it"} for task in ("a", "b")
    ]
    assert "\n- not measured: a: no a there; b: no b there (unzip it)\n" in markdown(report)


def test_slots_beyond_the_tokens_are_a_multiple(report):
    from sparsek_cli.evaluation.report.table import text

    for unit in report["units"]:
        unit["proof"]["kv_bytes"] = 1000 if unit["policy"] == "dense" else 4000
    assert "3.91 KiB (4x)" in text(report)


def test_bytes_stand_beside_the_tokens_that_dense_read(report):
    from sparsek_cli.evaluation.report.table import byte_rows

    report["units"] = [unit("scrolls_qasper", None, p, 1.0) for p in ("dense", "sparsek-64")]
    report["units"][1]["proof"]["kv_tokens"] = 940  # its answers were longer
    assert [row[1] for row in byte_rows(report)] == ["700"]
    del report["units"][0]
    assert [row[1] for row in byte_rows(report)] == ["940"]


def test_title_names_the_budgets_that_were_tried(report):
    from sparsek_cli.evaluation.report.table import title

    report["model"]["sparsek"] = {"topk": 100, "window": 20, "sinks": 4}
    assert "keeps 4 sinks + 100 selected + 20 window" in title(report)
    report["recipe"]["budgets"] = [64, 128]
    assert "keeps 64, 128 pairs per KV head" in title(report)
    report["recipe"]["budgets"] = None
    report["model"]["sparsek"]["topk"] = [None, [20, 30], 40]  # the first layer is of another kind
    assert "+ 30 (mean over heads) selected" in title(report)


def test_many_policies_become_lines(report):
    from sparsek_cli.evaluation.report.table import text

    report["policies"] = [*report["policies"], "a", "b", "c"]
    assert re.search(r"recall_4 +4096 +8 +exact +sparsek-64 +0\.900", text(report))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.000"), (1.0, "1.000"), (35.54321, "35.54"), (4096.4, "4096"), (1e-5, "1e-05")],
)
def test_numbers(value, shown):
    from sparsek_cli.evaluation.report.numbers_as_text import number

    assert number(value) == shown


def test_page_is_one_file_with_every_figure(report, figures):
    from html.parser import HTMLParser

    from sparsek_cli.evaluation.report.html import page

    html = page(report)
    assert html.count("<svg") == 3
    assert "m <b>" not in html
    assert "m &lt;b&gt;" in html
    assert not re.search(r'(src|href)="(?!#|data:|[\w_]+-)', html.replace('xlink:href="#', ""))
    assert "<script" not in html
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    HTMLParser().feed(html)


def test_groups_have_a_mean_where_their_tasks_are_alike(report):
    from sparsek_cli.evaluation.report.rows import rows
    from sparsek_cli.evaluation.report.table import text

    for policy, value in (("dense", 0.5), ("sparsek-64", 0.4), ("sparsek-128", 0.5)):
        report["units"].append(unit("recall_16", 4096, policy, value))
    report["recipe"]["tasks"] = ["recall", "ppl"]
    [mean] = [row for row in rows(report) if "mean" in row["task"]]
    assert mean["task"] == "recall, mean of 2"
    assert mean["cells"]["dense"]["value"] == 0.75
    assert mean["cells"]["sparsek-64"]["delta"] == pytest.approx(-0.1)
    assert mean["cells"]["sparsek-64"]["stderr"] == pytest.approx(0.01 / 2**0.5)
    assert mean["cells"]["dense"]["samples"] == 16
    assert "recall, mean of 2" in text(report)
    report["units"].pop()  # a task that lacks a policy is not comparable
    assert not [row for row in rows(report) if "mean" in row["task"]]


def test_figures_need_data(report, figures):
    assert set(figures(report)) == {"score_by_budget", "recall_by_depth", "loss_by_position"}
    report["units"] = [u for u in report["units"] if u["policy"] == "dense" and "ppl" in u["task"]]
    assert set(figures(report)) == {"loss_by_position"}


def test_score_by_length_has_a_line_per_policy(report):
    from sparsek_cli.evaluation.report.plots import score_by_length

    assert score_by_length(report) is None
    longer = [copy.deepcopy(unit) | {"length": 8192} for unit in report["units"]]
    for unit in longer:
        unit["metrics"][unit["primary"]]["value"] *= 2
    report["units"] = longer + report["units"]
    figure = score_by_length(report)
    panels = {ax.get_title(): ax for ax in figure.axes}
    assert set(panels) == {"recall_4", "ppl"}
    drawn = [container.lines[0].get_xydata().tolist() for container in panels["ppl"].containers]
    assert drawn == [[[4096, 30 / v], [8192, 60 / v]] for v in (1.0, 0.9, 0.95)]
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == report["policies"]


def write(folder, report):
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(report), encoding="utf-8")
    return str(folder)


def test_compare_shows_differences(report, tmp_path):
    from sparsek_cli.evaluation.report.compare import as_text, compare

    other = copy.deepcopy(report)
    other["units"][2]["metrics"]["exact"]["value"] = 0.5
    other["recipe"]["limit"] = 4
    del other["units"][-1]
    found = compare(write(tmp_path / "a", report), write(tmp_path / "b", other))
    changed = [row for row in found["scores"] if row["difference"]]
    assert [(row["policy"], row["a"], row["b"]) for row in changed] == [("sparsek-64", 0.9, 0.5)]
    shown = as_text(found)
    assert "not the same measurement, these settings differ: limit" in shown
    assert "only in A: 1 score" in shown
    assert "-0.4" in shown


def test_compare_says_that_prompts_were_made_otherwise(report, tmp_path):
    """`auto` is a chat template for a model that has one; openllm gives arc 25 examples."""
    from sparsek_cli.evaluation.report.compare import as_text, compare

    old, other = copy.deepcopy(report), copy.deepcopy(report)
    for one in report["units"]:
        one |= {"chat_template": False, "num_fewshot": 0}
    for one in other["units"]:
        one |= {"chat_template": True, "num_fewshot": 25 if one["task"] == "ppl" else 0}
    runs = [write(tmp_path / n, r) for n, r in (("a", report), ("b", other), ("old", old))]
    shown = as_text(compare(*runs[:2]))
    assert "not the same measurement, these settings differ: chat_template, num_fewshot" in shown
    assert compare(runs[0], runs[2])["differences"] == []
    for one in (report, other):
        one["units"] = [unit | {"task": "longproc_0.5k"} for unit in one["units"]]
    runs = [write(tmp_path / n, r) for n, r in (("a5", report), ("b5", other))]
    assert "settings differ: chat_template" in as_text(compare(*runs))


def test_two_equal_runs_in_two_folders_do_not_differ(report, tmp_path):
    from sparsek_cli.evaluation.report.compare import compare

    runs = []
    for name in ("a", "b"):
        one = copy.deepcopy(report)
        one["recipe"] |= {"out": str(tmp_path / name), "overwrite": name == "b"}
        runs.append(write(tmp_path / name, one))
    assert compare(*runs)["differences"] == []


def test_compare_pairs_the_same_prompts(report, tmp_path):
    from sparsek_cli.evaluation.report.compare import as_text, compare
    from sparsek_cli.evaluation.result_folder import Store

    other = copy.deepcopy(report)
    for name, run, scores in (("a", report, [1, 1, 0, 0]), ("b", other, [1, 1, 1, 0])):
        store = Store(tmp_path / name, "f", {}, resume=False, overwrite=False)
        samples = [
            {"doc_id": i, "prompt_hash": f"h{i}", "filter": "none", "scores": {"exact": score}}
            for i, score in enumerate(scores)
        ]
        store.save("dense", "recall_4@4096", {}, samples)
        (tmp_path / name / "results.json").write_text(json.dumps(run), encoding="utf-8")
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    rows = {(row["task"], row["policy"]): row for row in found["scores"]}
    assert rows["recall_4", "dense"]["paired"]
    assert rows["recall_4", "dense"]["stderr"] == pytest.approx(0.25)  # of 0, 0, 1, 0
    assert not rows["recall_4", "sparsek-64"]["paired"]
    assert rows["recall_4", "sparsek-64"]["stderr"] == pytest.approx(0.01 * 2**0.5)
    assert "the same prompts answered twice, or two measurements" in as_text(found)


def test_compare_without_common_scores_or_results(report, tmp_path):
    from sparsek_cli.evaluation.report.compare import compare

    other = copy.deepcopy(report)
    for item in other["units"]:
        item["length"] = 77
    first, second = write(tmp_path / "a", report), write(tmp_path / "b", other)
    with pytest.raises(UsageError, match="no score in common"):
        compare(first, second)
    with pytest.raises(UsageError, match=r"no results\.json"):
        compare(first, str(tmp_path))


def needles(report, dense, ours):
    for policy, value in (("dense", dense), ("sparsek-64", ours), ("sparsek-128", ours)):
        report["units"] += [
            unit(f"ruler_niah_single_{i}", 4096, policy, value, metric="score") for i in (1, 2)
        ]
    report["recipe"]["tasks"] = ["niah"]


def test_needle_tasks_show_the_share_of_dense(report):
    from sparsek_cli.evaluation.report.html import page
    from sparsek_cli.evaluation.report.table import markdown, text

    needles(report, 0.8, 0.6)
    for shown in (text(report), markdown(report)):
        assert shown.count("0.600 ±0.010 (-0.2, 75%)") == 4
        assert "0.900 ±0.010 (-0.1)" in shown  # recall has no share
        assert "in needle tasks also the share of its score" in shown
    assert page(report).count(">-0.2, 75%<") == 6  # two tasks and their mean, two policies
    assert "niah, mean of 2" in text(report)


def test_what_dense_cannot_do_is_said_to_say_nothing(report):
    from sparsek_cli.evaluation.report.html import page
    from sparsek_cli.evaluation.report.retrieval import unanswered_by_dense
    from sparsek_cli.evaluation.report.table import markdown, text

    forms = (text, markdown, page)
    assert not any("nothing about this model" in form(report) for form in forms)
    needles(report, 0.0, 0.0)
    report["units"][0]["metrics"]["exact"]["value"] = 0.1  # dense, recall_4
    said = "recall_4@4096, ruler_niah_single_1@4096, ruler_niah_single_2@4096 say nothing about"
    assert all(said in form(report) for form in forms)
    assert unanswered_by_dense(report["units"])[0] == {
        "task": "recall_4", "length": 4096, "metric": "exact", "dense": 0.1
    }  # fmt: skip


def test_answers_in_other_words_are_answers(report):
    from sparsek_cli.evaluation.report.retrieval import unanswered_by_dense
    from sparsek_cli.evaluation.report.table import text

    for one in report["units"]:
        if one["task"] == "recall_4":
            one["metrics"]["contains"] = one["metrics"]["exact"] | {"value": 0.7}
            one["metrics"]["exact"]["value"] = 0.0
    assert unanswered_by_dense(report["units"]) == []
    assert re.search(r"recall_4 +4096 +8 +contains +0\.700", text(report))


def test_oracles_and_shared_slots_are_explained(report):
    from sparsek_cli.evaluation.report.notes import notes

    report["policies"] = ["dense", "snapkv:shared-64", "kvzip-64"]
    shown = "\n".join(notes(report))
    assert "snapkv:shared-64 read each prompt densely" in shown
    assert "kvzip-64: the oracle" in shown
    assert "snapkv:shared-64: the same slots in all" in shown
