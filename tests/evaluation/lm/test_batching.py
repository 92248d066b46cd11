"""Answers written side by side are the ones written alone, under every policy."""

import pytest

ALL = ["dense", "window", "random", "snapkv", "h2o"]


@pytest.mark.parametrize(
    ("limit", "policies"),
    [
        (None, ["dense", "snapkv"]),  # caches of three kinds, SparseK's among them
        pytest.param(None, ALL, marks=pytest.mark.slow),
        pytest.param(2048, ALL, marks=pytest.mark.slow),
    ],
)
def test_answers_do_not_depend_on_their_neighbours(recipe, console, tmp_path, limit, policies):
    import json

    from verbs import evaluate

    settings = {"tasks": ["scrolls_qasper", "recall_4"], "baselines": policies}
    settings |= {"budgets": [limit] if limit else []}
    answers, held = {}, {}
    for rows in (1, 3):
        out = tmp_path / str(rows)
        report = evaluate(
            recipe(**settings, batch_size=rows, out=str(out)), console, share_prefix=False
        )
        assert len(report["policies"]) == len(policies) + 1
        answers[rows] = {
            str(file.relative_to(out)): [
                text
                for line in file.read_text().splitlines()
                for text in json.loads(line)["responses"]
                if isinstance(text, str)
            ]
            for file in (out / "samples").rglob("*.jsonl")
        }
        assert len(answers[rows]) == 2 * len(report["policies"])
        proofs = [unit["proof"] for unit in report["units"]]
        kept = ("kv_tokens", "kv_pairs", "kv_bytes", "kept_share")
        held[rows] = [{key: proof[key] for key in kept} for proof in proofs]
        # What was written is counted, but for the last token, which nothing reads.
        assert all(proof["kv_tokens"] == proof["longest_prompt"] - 1 for proof in proofs)
    assert answers[1] == answers[3]
    assert held[1] == held[3]


def test_joined_rows_continue_where_they_were(checkpoints):
    import torch
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401
    from sparsek_cli.evaluation.lm.batching import join
    from sparsek_cli.evaluation.policies.registry import make_policy

    model = AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (1, n), generator=draw) for n in (150, 90, 201)]
    token = torch.randint(3, 128, (3, 1), generator=draw)
    for name in ("sparsek", "dense", "window", "snapkv", "h2o"):
        policy = make_policy(name)
        with policy.applied(model), torch.no_grad():
            caches = []
            for ids in prompts:
                caches.append(policy.new_cache(model))
                model(input_ids=ids, past_key_values=caches[-1])
                policy.end_prompt(model, caches[-1])
            joined = join(caches)
            extra = {} if joined.mask is None else {
                "attention_mask": torch.nn.functional.pad(joined.mask, (0, 1), value=True)
            }  # fmt: skip
            together = model(
                input_ids=token, past_key_values=joined.cache,
                position_ids=joined.positions[:, None], **extra,
            ).logits  # fmt: skip
            alone = [
                model(input_ids=token[i : i + 1], past_key_values=caches[i]).logits
                for i in range(3)
            ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
