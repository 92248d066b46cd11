"""Quantised bases, each way that is read: converted, the base untouched, and used by every verb."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsek_cli as sparsek
from sparsek_cli import quantised
from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.errors import UsageError
from sparsek_cli.models import budget, sparsek_attentions
from sparsek_cli.quantised.gradients import check_gradients

TRAINED = ("bitsandbytes_4", "bitsandbytes_8", "torchao")
PACKED = (*TRAINED, "gptq", "awq")
UNPACKED = ("fp8", "compressed_tensors", "mxfp4")
WAYS = (*PACKED, *UNPACKED)
# Both sides compute in bfloat16, in another order.
NEAR = 4e-2
IDS = torch.randint(3, 90, (1, 48), generator=torch.Generator().manual_seed(1))
SMALL = {
    "sequence_length": 64, "batch_size": 1, "micro_batch_size": 1, "device": "cpu",
    "evaluation": {"sequences": 1, "held_out": 0.3, "questions": 0},
}  # fmt: skip


def load(folder: Path) -> torch.nn.Module:
    """As any program would: by transformers alone, which chooses by itself how to unpack."""
    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": "cpu"}).eval()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / one.float().abs().max())


@pytest.fixture
def text(tmp_path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("A boat and a house and a garden. " * 200)
    return str(file)


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_it_converts_and_computes_as_the_quantised_base(way, base_of, converted_of):
    base, out = base_of(way), converted_of(way)
    (shard,) = read_shards(base)
    assert (out / "base-00001.safetensors").samefile(shard.path)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (out, base))
    assert ours["quantization_config"] == theirs["quantization_config"]
    dense, sparse = load(base), load(out)
    assert quantised.stays_packed(sparse.config) == (way in PACKED)
    for attention in sparsek_attentions(sparse):
        for parameter in attention.scorer.parameters():
            assert type(parameter) is torch.nn.Parameter and parameter.dtype == torch.float32
    with budget(sparse, topk=64):
        assert apart(dense(IDS).logits, sparse(IDS, use_cache=False).logits) < NEAR
    whole = sparse(IDS, use_cache=False).logits
    cache, steps = sparse(IDS[:, :40]).past_key_values, []
    for at in range(40, 48):
        steps.append(sparse(IDS[:, at : at + 1], past_key_values=cache).logits)
    assert apart(whole[:, 40:], torch.cat(steps, 1)) < NEAR


@pytest.mark.parametrize("way", WAYS)
def test_it_says_so_generates_and_comes_back(way, base_of, converted_of, tmp_path):
    base, out = base_of(way), converted_of(way)
    config = json.loads((out / "config.json").read_text())
    assert f"quantised ({quantised.described(config)})" in (out / "README.md").read_text()
    model, _ = sparsek.load(out, device="cpu", dtype="float32")
    assert model.generate(IDS, max_new_tokens=4, do_sample=False, min_new_tokens=4).shape[1] == 52
    assert model(IDS[:, :4]).logits.isfinite().all()
    dense = Path(sparsek.export(out, tmp_path / "dense").out)
    assert (dense / "model.safetensors").samefile(base / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(load(dense)(IDS).logits, load(base)(IDS).logits)


@pytest.mark.parametrize("way", TRAINED)
def test_gradients_go_through_packed_weights(way, converted_of):
    """One that is cut off on the way would leave scorers and adapters of lower layers wrong."""
    model = load(converted_of(way))
    check_gradients(model)
    linear = model.model.layers[1].mlp.down_proj
    forward = linear.forward
    linear.forward = lambda x: forward(x.detach()) + 0 * x.sum(-1, keepdim=True)
    with pytest.raises(UsageError, match="hands no gradient on"):
        check_gradients(model)


def test_a_kernel_for_inference_alone_is_found_before_training():
    """GPTQ's for AVX512, which hands gradients on and refuses `train()`: no package is needed."""

    class Packed(torch.nn.Linear):
        def train(self, mode=True):
            if mode:
                raise NotImplementedError("inference only")
            return super().train(mode)

    config = SimpleNamespace(quantization_config={"quant_method": "gptq", "bits": 4})
    model = torch.nn.Sequential(Packed(4, 4)).eval()
    model.config, model.dtype, model.device = config, torch.float32, torch.device("cpu")
    with pytest.raises(UsageError, match=r"its Packed hands no gradient on \(cpu\)"):
        check_gradients(model)


@pytest.mark.parametrize("way", ["gptq", "awq"])
def test_where_none_would_training_is_refused(way, converted_of, text, tmp_path):
    for train in ("scorers", "lora", "all"):
        with pytest.raises(UsageError, match="hands no gradient on|cannot be") as refused:
            sparsek.finetune(
                converted_of(way),
                tmp_path / "out",
                data=text,
                steps=1,
                train=train,
                lora={"merge": False},
                **SMALL,
            )
        assert refused.value.hint
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("way", [*TRAINED, *UNPACKED])
def test_scorers_learn_and_the_base_is_linked(way, converted_of, text, tmp_path):
    out = converted_of(way)
    tuned = sparsek.finetune(
        out, tmp_path / "tuned", data=text, steps=2, train="scorers", keep_better=False, **SMALL
    )
    assert tuned.steps == 2 and tuned.held_out_loss > 0
    for file in out.glob("base-*.safetensors"):
        assert (tmp_path / "tuned" / file.name).samefile(file)
    before, after = (
        [p for a in sparsek_attentions(load(f)) for p in a.scorer.parameters()]
        for f in (out, Path(tuned.out))
    )
    assert not all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("way", [*TRAINED, "fp8"])
def test_adapters_learn_and_stay_apart(way, converted_of, text, tmp_path):
    out = converted_of(way)
    wanted = {"data": text, "steps": 1, "objective": {"distill": 0}, **SMALL}
    with pytest.raises(UsageError, match="weights cannot be trained"):
        sparsek.finetune(out, tmp_path / "all", train="all", **wanted)
    with pytest.raises(UsageError, match="cannot be merged") as refused:
        sparsek.finetune(out, tmp_path / "lora", train="lora", **wanted)
    assert "lora.merge=false" in refused.value.hint
    assert not list(tmp_path.glob("all*")) and not list(tmp_path.glob("lora*"))
    sparsek.finetune(out, tmp_path / "lora", train="lora", lora={"merge": False}, **wanted)
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(out), str(tmp_path / "lora"))
    assert adapted(IDS).logits.isfinite().all()


@pytest.mark.parametrize("way", ["fp8", "torchao"])
def test_it_is_evaluated_and_examined(way, converted_of, text, tmp_path):
    from sparsek_cli import hub
    from sparsek_cli.diagnosis.model import model as examined

    out = converted_of(way)
    found = sparsek.evaluate(
        out, tmp_path / "results", tasks="ppl", text=[text], lengths=[64], limit=1,
        baselines=["dense"], device="cpu",
    )  # fmt: skip
    assert found.score("ppl", "sparsek") > 1 and found.score("ppl", "dense") > 1
    checks = {c.name: c for c in examined(hub.resolve(str(out)), torch.device("cpu"))}
    assert all(check.ok is not False for check in checks.values()), checks
    kept = "unpacked in memory" if way in UNPACKED else ", packed in memory"
    assert kept in checks["weights"].detail


@pytest.mark.parametrize("way", ["fp8", "bitsandbytes_4"])
def test_scorers_alone_go_onto_it(way, base_of, converted_of, tmp_path):
    base, out = base_of(way), converted_of(way)
    alone = sparsek.export_scorers(out, tmp_path / "scorers")
    merged = Path(sparsek.merge(base, alone.out, tmp_path / "merged").out)
    model, _ = sparsek.load(base, scorers=alone.out, device="cpu", dtype="bfloat16")
    with torch.inference_mode():
        expected = load(out)(IDS, use_cache=False).logits
        for other in (load(merged), model):
            assert torch.equal(other(IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("way", ["fp8", "bitsandbytes_4"])
def test_it_is_converted_again_and_to_scorers_alone(way, base_of, converted_of, tmp_path):
    base, out = base_of(way), converted_of(way)
    again = sparsek.convert(out, tmp_path / "again", again=True, calibrate="none", device="cpu")
    for file in out.glob("base-*.safetensors"):
        assert (tmp_path / "again" / file.name).samefile(file)
    config = json.loads((base / "config.json").read_text())
    assert again.data()["quantised"] == quantised.described(config)
    sparsek.convert(
        base, tmp_path / "scorers", scorers_only=True, topk=8, window=8, calibrate="none",
        device="cpu",
    )  # fmt: skip
    sparsek.merge(base, tmp_path / "scorers", tmp_path / "merged")
    assert load(tmp_path / "merged")(IDS).logits.isfinite().all()


def test_packed_weights_train_in_one_process(converted_of):
    config = json.loads((converted_of("bitsandbytes_4") / "config.json").read_text())
    with pytest.raises(UsageError, match="in 2 processes"):
        quantised.check_training(config, "scorers", merges=False, processes=2)
