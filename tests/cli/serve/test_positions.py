"""What `sparsek serve` tells a server of rotary positions, and where it cannot."""

import json
from itertools import pairwise

import pytest

from sparsek_cli.serving import engines

ALL = ("vllm", "sparsek_vllm", *engines._SERVER_PARTS)


def test_positions_are_stretched_on_either_server_or_not_at_all(sparsek, converted, installed):
    """`chat` and `evaluate` had --yarn, and a server read no more than the model's own length."""
    from transformers import AutoConfig

    from sparsek_cli.loading.positions import stretch

    installed(*ALL)
    config = AutoConfig.from_pretrained(converted)
    stretch(config, 2.5)
    words = ["serve", converted, "--yarn", "2.5", "--dry-run"]

    def told(engine, *more):
        plan = json.loads(sparsek(*words, "--engine", engine, "--json", *more).out)
        assert plan["yarn"] == 2.5 and plan["request_bytes"]
        return plan["command"]

    command = told("vllm", "--", "--max-num-seqs", "9")
    assert json.loads(command[command.index("--hf-overrides") + 1]) == {
        "rope_parameters": dict(config.rope_parameters),
        "max_position_embeddings": config.max_position_embeddings,
    }
    command = told("transformers")
    assert command[command.index("--yarn") + 1] == "2.5"
    assert "2.5 times the model's own" in sparsek(*words).out
    assert json.loads(sparsek(*words[:2], "--json", "--dry-run").out)["yarn"] is None
    for flag, hint in (("--hf-overrides.a 1", "leave --hf-overrides"), ("--yarn 3", "before the")):
        shown = sparsek(*words, "--engine", "vllm", "--", *flag.split())
        assert shown.failed(2) and hint in shown.err
    assert sparsek("serve", converted, "--yarn", "1", "--dry-run").failed(2)


def test_a_file_of_flags_is_looked_into_for_what_changes_the_config(
    sparsek, converted, installed, tmp_path
):
    """vLLM takes the file's flags first, and of two --hf-overrides the last one."""
    installed(*ALL)
    file = tmp_path / "server.yaml"
    words = ["serve", converted, "--yarn", "2", "--dry-run", "--engine", "vllm", "--"]
    for text in ("hf-overrides: {a: 1}", "hf_overrides.a: 1", "port: 1\nhf-overrides: '{}'"):
        file.write_text(text)
        for flag in (["--config", file], [f"--config={file}"]):
            shown = sparsek(*words, *flag)
            assert shown.failed(2) and f"so does --hf-overrides in --config {file}" in shown.err
            assert "leave --hf-overrides out" in shown.err
            assert sparsek(*words[:2], *words[4:], *flag).code == 0, "without --yarn it may be"
    for text in ("max-num-seqs: 4", "", "- hf-overrides", "{", "\x00"):
        file.write_text(text)
        assert sparsek(*words, "--config", file).code == 0
    file.unlink()
    assert sparsek(*words, "--config", file).code == 0, "vLLM says what is wrong with it"


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "default"])
def test_vllm_is_told_the_length_where_positions_change_with_it(
    kind, sparsek, sparse_model, tokenizer, installed, tmp_path
):
    """By itself it reads no more than longrope's original length, and `factor` times dynamic's."""
    installed(*ALL)
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | {
        "longrope": {
            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 64,
        },
    }.get(kind, {})  # fmt: skip
    sparse_model("llama", rope_parameters=rope, max_position_embeddings=256).save_pretrained(
        tmp_path / "out"
    )
    tokenizer.save_pretrained(tmp_path / "out")
    file = tmp_path / "server.yaml"
    file.write_text("max_model_len: 99")
    said = {}
    for flags in ((), ("--max-model-len", "99"), ("--config", file), ("--hf-overrides.a", "1")):
        words = ["serve", tmp_path / "out", "--dry-run", "--json", "--engine", "vllm", "--", *flags]
        command = json.loads(sparsek(*words).out)["command"]
        told = [b for a, b in pairwise(command) if a == "--max-model-len"]
        said[" ".join(map(str, flags))] = told
    own = [] if kind == "default" else ["256"]
    assert [*said.values()] == [own, ["99"], [], []]
    plain = json.loads(sparsek(*words[:4], "--engine", "transformers").out)["command"]
    assert "--max-model-len" not in plain


def test_positions_that_cannot_be_stretched_are_told_before_a_server_starts(
    sparsek, tmp_path, installed, sparse_model, tokenizer
):
    installed(*ALL)
    learned = tmp_path / "learned"
    sparse_model("gpt2").save_pretrained(learned)
    tokenizer.save_pretrained(learned)
    line = ["serve", learned, "--dry-run", "--yarn", "2"]
    shown = sparsek(*line)
    assert shown.failed(2) and "no rotary positions" in shown.err and "drop --yarn" in shown.err
    assert sparsek(*line[:3]).code == 0
