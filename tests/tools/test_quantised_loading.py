"""Libraries that quantise while loading leave scorers as they are, and attention sparse."""

from __future__ import annotations

import pytest
import torch
from sparse_path import assert_sparse
from transformers import AutoModelForCausalLM

import sparsek_cli.models  # noqa: F401


def quanto():
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_8():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4():
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory, make_sparse):
    """Of 64 features: a block of bitsandbytes' 4 bits, which some CPUs' kernels want whole."""
    home = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    make_sparse("llama", **sizes).save_pretrained(home)
    return home


@pytest.mark.parametrize("how", [quanto, torchao, bitsandbytes_8, bitsandbytes_4])
@torch.no_grad()
def test_only_the_base_is_quantised(how, wide, ids):
    model = AutoModelForCausalLM.from_pretrained(wide).eval()
    loaded = AutoModelForCausalLM.from_pretrained(wide, quantization_config=how()).eval()
    ours, theirs = (m.model.layers[0].self_attn for m in (model, loaded))
    plain = torch.nn.Parameter
    kinds = {type(theirs.q_proj), type(theirs.q_proj.weight)}
    assert kinds != {torch.nn.Linear, plain}
    for name, weight in theirs.scorer.named_parameters():
        assert type(weight) is plain and weight.dtype == torch.float32
        assert torch.equal(weight, ours.scorer.get_parameter(name))
    logits = loaded(ids).logits
    assert logits.isfinite().all() and not torch.equal(logits, model(ids).logits)
    assert_sparse(loaded)
