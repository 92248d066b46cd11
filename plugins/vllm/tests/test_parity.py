"""vLLM answers what transformers answers with SparseK, and not what dense attention answers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import vllm
from checkpoints import LENGTH, LONG, NEW, TOPK_OF_FOUR, prompts
from sparsek_vllm import FAMILIES, NOT_ON_LOWEST, VERSIONS
from sparsek_vllm.heads import can_deal, dealt_heads
from sparsek_vllm.sizes import request_bytes
from transformers_answers import answers_apart
from vllm import SamplingParams

from sparsek_cli.families import TABLE
from sparsek_cli.hub import resolve
from sparsek_cli.loading import load_config
from sparsek_cli.loading.positions import stretch
from sparsek_cli.serving import plan as serving

GREEDY = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, prompt_logprobs=0)
TEN = prompts(10, longest=150)
MANY = prompts(64, longest=90)


def requests(batch):
    return [{"prompt_token_ids": prompt} for prompt in batch]


def assert_same(outputs, wanted, batch) -> None:
    """Greedy tokens and prompt log-probabilities are SparseK's; dense attention would fail."""
    compared = fooled = 0
    for output, want, prompt in zip(outputs, wanted, batch, strict=True):
        assert list(output.outputs[0].token_ids) == want.written
        got = [
            entry[token].logprob
            for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        ]
        gap = max(abs(a - b) for a, b in zip(got, want.logprobs, strict=True))
        assert gap < 2e-3, len(prompt)
        if len(prompt) > LONG:
            compared += 1
            gap = max(abs(a - b) for a, b in zip(got, want.dense_logprobs, strict=True))
            assert gap > 0.05, len(prompt)
        fooled += want.dense_written == want.written
    assert compared >= 4, "too few prompts are longer than the budget"
    assert fooled <= len(batch) // 2, "dense attention writes the same: nothing is proved"


def core_where(chosen, names):
    """Parameters, of which the chosen ones belong to the repository's `make test`."""
    return [pytest.param(n, marks=[pytest.mark.core] if n in chosen else []) for n in names]


@pytest.mark.parametrize("family", core_where(["qwen3"], FAMILIES))
def test_families(family, checkpoint, expected, run_engine):
    folder = checkpoint(family)
    if family in NOT_ON_LOWEST and not vllm.__version__.startswith(VERSIONS[1]):
        with pytest.raises(Exception, match="does not load"), run_engine(folder):
            pass
        return
    wanted = expected(folder, TEN)  # first: vLLM changes transformers' classes that it runs itself
    with run_engine(folder) as llm:
        outputs = llm.generate(requests(TEN), GREEDY, use_tqdm=False)
    assert_same(outputs, wanted, TEN)


WAYS = {
    "chunks of 24": {"max_num_batched_tokens": 24},
    "compiled": {"enforce_eager": False},
    "prefix caching": {"enable_prefix_caching": True, "mamba_block_size": 16},
    "five blocks": {"num_gpu_blocks_override": 5},
}


@pytest.mark.parametrize("way", core_where(["chunks of 24", "prefix caching"], WAYS))
def test_ways_to_run(way, checkpoint, expected, run_engine):
    folder = checkpoint("qwen3")
    with run_engine(folder, **WAYS[way]) as llm:
        outputs = llm.generate(requests(MANY), GREEDY, use_tqdm=False)
        metrics = {metric.name: metric for metric in llm.get_metrics()}
        assert metrics["vllm:num_preemptions"].value == 0
        assert_same(outputs, expected(folder, MANY), MANY)
        if way == "prefix caching":
            before = metrics["vllm:prefix_cache_hits"].value
            no_logprobs = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
            again = llm.generate(requests(MANY), no_logprobs, use_tqdm=False)
            found = {metric.name: metric for metric in llm.get_metrics()}
            assert found["vllm:prefix_cache_hits"].value > before, "no prefix was found again"
            for output, want in zip(again, expected(folder, MANY), strict=True):
                assert list(output.outputs[0].token_ids) == want.written


def test_requests_that_are_given_up_leave_nothing_behind(checkpoint, expected, run_engine):
    """Their blocks go to others at once, full of what the first owner kept."""
    folder = checkpoint("qwen3")
    with run_engine(folder, num_gpu_blocks_override=5, max_num_seqs=4) as llm:
        core = llm.llm_engine
        for number, prompt in enumerate(MANY[:12]):
            core.add_request(f"gone-{number}", {"prompt_token_ids": prompt}, GREEDY)
        for _ in range(7):
            core.step()
        core.abort_request([f"gone-{number}" for number in range(12)])
        outputs = llm.generate(requests(TEN), GREEDY, use_tqdm=False)
    assert_same(outputs, expected(folder, TEN), TEN)


# OLMoE's norms span heads, which so stay in order; ranks then differ in slots.
@pytest.mark.parametrize("family", ["qwen3", "olmoe"])
def test_two_ranks(family, checkpoint, expected, run_engine, monkeypatch):
    """Heads are dealt by their slots where they can be, so that weights are read in that order."""
    assert dealt_heads(TOPK_OF_FOUR[0], 2) == [[0, 3], [1, 2]]
    assert can_deal(TABLE[family]) == (family == "qwen3")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = checkpoint(family, kv_heads=4)
    wanted = expected(folder, TEN)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with run_engine(folder, num_gpu_blocks_override=None, **options) as llm:
        outputs = llm.generate(requests(TEN), GREEDY, use_tqdm=False)
        config = llm.llm_engine.vllm_config
    printed = request_bytes(config.model_config.hf_config, torch.float32, ranks=2)
    assert config.cache_config.num_gpu_blocks == 2**30 // printed, "by sparsek serve"
    assert_same(outputs, wanted, TEN)


def test_an_8_bit_cache(checkpoint, expected, run_engine):
    """Prompts in one piece: codes are made where a piece ends, so pieces would matter."""
    folder = checkpoint("llama", cache_dtype="int8")
    short = prompts(8, longest=60, shortest=50)
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 1}
    with run_engine(folder, **options) as llm:
        outputs = llm.generate(requests(short), GREEDY, use_tqdm=False)
    assert_same(outputs, expected(folder, short), short)


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])  # olmo2: by transformers' own code
def test_stretched_positions(family, checkpoint, run_engine, tmp_path):
    """What `sparsek serve --yarn` hands on reaches vLLM's model, beyond its own length too."""
    folder = checkpoint(family)
    shutil.copytree(folder, tmp_path / "long")
    config = load_config(folder, family)
    stretch(config, 2)
    config.save_pretrained(tmp_path / "long")
    batch = [*TEN, *prompts(2, longest=LENGTH + 60, shortest=LENGTH + 20)]
    wanted = answers_apart(tmp_path / "long", batch)
    plain = answers_apart(folder, TEN)
    assert [w.written for w in wanted[:-2]] != [w.written for w in plain]
    planned = serving.plan(resolve(str(folder)), engine="vllm", yarn=2).command
    changed = json.loads(planned[planned.index("--hf-overrides") + 1])
    with run_engine(folder, hf_overrides=changed, max_model_len=2 * LENGTH) as llm:
        outputs = llm.generate(requests(batch), GREEDY, use_tqdm=False)
    assert_same(outputs, wanted, batch)


LLAMA3 = {
    "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_type": "llama3",
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(("family", "scaling"), [("llama", LLAMA3), ("qwen3", YARN)])
def test_positions_as_transformers_4_wrote_them(family, scaling, checkpoint, run_engine, tmp_path):
    """Most bases are so old, and what is made of them keeps their config.json's spelling."""
    folder = shutil.copytree(checkpoint(family), tmp_path / "old")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    plain = answers_apart(folder, TEN)
    del config["rope_parameters"]
    file.write_text(json.dumps(config | {"rope_theta": 500.0, "rope_scaling": scaling}))
    wanted = answers_apart(folder, TEN)
    assert [w.written for w in wanted] != [w.written for w in plain]
    with run_engine(folder) as llm:
        outputs = llm.generate(requests(TEN), GREEDY, use_tqdm=False)
    assert_same(outputs, wanted, TEN)


# starcoder2: by transformers' own code.
@pytest.mark.parametrize(
    "family, length, more",
    [("phi3", 96, {}), ("phi3", 256, {"attention_factor": 2.0}), ("starcoder2", 256, {})],
)
def test_positions_do_not_depend_on_the_servers_length(
    family, length, more, checkpoint, run_engine, tmp_path
):
    """vLLM takes longrope's short factors where it is told to read no more than they are for."""
    folder = shutil.copytree(checkpoint(family), tmp_path / "long")
    config = load_config(folder, family)
    config.rope_parameters |= {
        "rope_type": "longrope", "original_max_position_embeddings": 100,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + n for n in range(8)], **more,
    }  # fmt: skip
    if family == "phi3":
        config.original_max_position_embeddings = 100
    config.save_pretrained(folder)
    batch = prompts(10, longest=length - NEW - 4, shortest=LONG + 1)
    wanted = answers_apart(folder, batch)
    with run_engine(folder, max_model_len=length) as llm:
        outputs = llm.generate(requests(batch), GREEDY, use_tqdm=False)
    assert_same(outputs, wanted, batch)
