"""`transformers serve` runs a converted model sparsely, or says in one line why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsek_cli.errors import SparsekError

SERVED = """
import os, sys
sys.path.insert(0, {support!r})
from transformers.cli.serving.model_manager import ModelManager  # as the server does, and first

def load(**options):
    manager = ModelManager(device="cpu", **options)
    return manager.load_model_and_processor(manager.process_model_name({folder!r}))

def refused(words, **options):
    try:
        load(**options)
    except Exception as error:
        assert words in str(error), error
        print("refused")

refused("trust_remote_code=True", trust_remote_code=False)
refused("would switch SparseK off", trust_remote_code=True, attn_implementation="sdpa")
model, processor = load(trust_remote_code=True)
from sparse_path import assert_sparse, counted_attention
assert_sparse(model)
ids = processor("hi there", return_tensors="pt").input_ids
with counted_attention() as layers:
    model.generate(ids, max_new_tokens=3, do_sample=False)
assert len(layers) >= 2
print("sparse", flush=True)
os._exit(0)  # the manager's timers would be waited for
"""


def test_the_server_s_loader_runs_sparse(saved, clean_program):
    pytest.importorskip("transformers.cli.serving.model_manager")
    support = str(Path(__file__).parents[1] / "support")
    code = SERVED.format(support=support, folder=str(saved("qwen3")))
    done = clean_program(code)
    assert done.stdout.split()[-3:] == ["refused", "refused", "sparse"], done.stderr[-3000:]


def test_continuous_batching_is_refused_and_the_hint_works(saved):
    model = AutoModelForCausalLM.from_pretrained(saved())
    model.generation_config.pad_token_id = 0
    for attempt in (
        model.init_continuous_batching,
        lambda: model.generate_batch([[3, 4, 5]], max_new_tokens=2),
    ):
        with pytest.raises(SparsekError, match="continuous batching") as refusal:
            attempt()
        # A traceback, which is what users of the library see, ends in the hint.
        assert refusal.value.__notes__ == [f"hint: {refusal.value.hint}"]
    ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    out = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=2, do_sample=False)
    assert out.shape == (2, 6)
