"""The longest text of a model, which YaRN in its config stretches; and the ways beyond it."""

from __future__ import annotations

import copy
import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny_families import tiny_config

import sparsek_cli as sparsek
from sparsek_cli.conversion.geometry import geometry
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.measured_model import most_tokens, ways_beyond
from sparsek_cli.families import TABLE
from sparsek_cli.families.positions import check_rotary, context_length
from sparsek_cli.loading.configs import load_config
from sparsek_cli.loading.positions import can_stretch, stretch
from sparsek_cli.models import sparsek_config_from

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("own", "rope", "expected"),
    [
        (128, YARN, 512),  # as Qwen2.5's card says
        (128, {"type": "yarn", "factor": 4}, 512),  # transformers takes its own length then
        (512, YARN, 512),  # the stretched length stands there already
        (131072, YARN | {"factor": 32.0, "original_max_position_embeddings": 4096}, 131072),
        (128, {"full_attention": YARN, "sliding_attention": {"rope_type": "default"}}, 512),
        (128, {"rope_type": "linear", "factor": 4.0}, 128),
        (128, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 128),
        (128, {"rope_type": "yarn", "factor": "four"}, 128),
        (128, None, 128),
    ],
)
def test_the_context_is_what_yarn_makes_of_it(own, rope, expected):
    assert context_length(own, rope) == expected


PLAIN = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "width", "odd"),
    [
        ({"partial_rotary_factor": 0.25}, 4, 1),
        ({"partial_rotary_factor": 0.25}, 8, None),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.25}}, 20, 5),
        ({"rope_parameters": {"full_attention": PLAIN | {"partial_rotary_factor": 0.5}}}, 10, 5),
        ({"rotary_pct": 0.4}, 80, None),  # as Phi 2: 32
        ({"rotary_dim": 3}, 8, 3),
        ({"rope_parameters": PLAIN}, 5, 5),
        ({"rope_parameters": None}, 5, None),  # nothing is turned
        ({"partial_rotary_factor": "half"}, 5, None),  # transformers says what is wrong with it
    ],
)
def test_rotary_positions_turn_pairs(config, width, odd):
    if odd is None:
        return check_rotary(config, width)
    with pytest.raises(UsageError, match=f"turn {odd} of the {width} features") as refusal:
        check_rotary(config, width)
    assert "partial_rotary_factor" in refusal.value.hint


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 64, "factor": 2.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        (YARN | {"factor": -4.0}, "yarn\\) with factor -4.0, and it is a number above 0"),
        (YARN | {"factor": 0}, "factor 0"),
        (YARN | {"factor": float("nan")}, "factor nan"),
        (YARN | {"factor": "four"}, "factor 'four'"),
        (YARN | {"beta_fast": 1, "beta_slow": 32}, "beta_slow 32 and beta_fast 1, and beta_slow"),
        (YARN | {"original_max_position_embeddings": -1}, "original_max_position_embeddings -1"),
        ({"rope_type": "linear", "factor": -2}, "linear\\) with factor -2"),
        ({"type": "dynamic", "factor": 0.0}, "dynamic\\) with factor 0.0"),
        (
            LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0},
            "low_freq_factor 4.0 and high",
        ),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor 4.0 and high_freq_factor 4.0"),
        ({"full_attention": YARN | {"factor": -4}, "sliding_attention": PLAIN}, "factor -4"),
        (
            LONG | {"short_factor": [1.0]},
            "with 1 numbers in short_factor, and it takes 4",
        ),
        (LONG, None),
        (YARN | {"beta_slow": 0}, None),  # 0 is as if it were left out
        (YARN | {"beta_fast": 0}, None),
        (YARN | {"attention_factor": 0}, "attention_factor 0"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 0, "low_freq_factor": -1}, None),
        (
            {"sliding_attention": PLAIN | {"partial_rotary_factor": 0.5}, "full_attention": LONG},
            None,  # its layers turn whole heads
        ),
        (
            {"sliding_attention": PLAIN, "full_attention": LONG | {"partial_rotary_factor": 0.5}},
            "4 numbers in short_factor, and it takes 2",
        ),
        (YARN | {"beta_fast": None, "attention_factor": None}, None),
        (YARN | {"factor": 0.5}, None),  # unusual, and computed as it says
        (LLAMA3, None),
        (PLAIN | {"factor": -1}, None),  # nobody reads it
        (PLAIN | {"rope_theta": "10000"}, "rope_theta is '10000', and it is a number above 0"),
        (YARN | {"rope_theta": "1e4"}, "rope_theta is '1e4', and it is a number above 0"),
        (PLAIN | {"rope_theta": 0}, "rope_theta is 0, and"),
        (PLAIN | {"rope_theta": None}, None),
        ({"rope_type": "who", "factor": 2.0}, "a way \\('who'\\) that transformers does not have"),
        ({"rope_type": 3}, "a way \\(3\\) that transformers"),
        ({"sliding_attention": PLAIN, "full_attention": YARN | {"rope_type": "Yarn"}}, "'Yarn'"),
        ({"type": "su", "short_factor": [1.0] * 4}, None),  # Phi-3's first name of longrope
    ],
)
def test_scaling_that_is_nonsense_is_refused(dense_config, rope, says):
    """transformers warns, and computes with it."""
    for key in ("rope_parameters", "rope_scaling"):
        if says is None:
            check_rotary({key: rope}, 8)
            continue
        with pytest.raises(UsageError, match=says) as refusal:
            check_rotary({key: rope}, 8)
        assert refusal.value.hint
    if says is not None and "rope_type" in rope:
        config = dense_config("llama").to_dict() | {"rope_parameters": rope}
        with pytest.raises(UsageError, match=says):
            geometry(config, TABLE["llama"])


@pytest.mark.parametrize(
    ("family", "given", "says"),
    [
        ("llama", {"rope_parameters": None, "rope_theta": "10000"}, "rope_theta is '10000'"),
        ("llama", {"rope_parameters": PLAIN | {"rope_type": "yarm"}}, "a way ('yarm')"),
        ("llama", {"rope_parameters": LONG | {"long_factor": [1.0] * 3}}, "3 numbers in long_fac"),
        ("phi3", {"rope_parameters": LONG | {"short_factor": [1.0] * 3}}, "3 numbers in short_fac"),
        (
            "phi3",
            {"rope_parameters": LONG | {"short_factor": ["a"] * 4}},
            "it is a list of numbers",
        ),
    ],
)
def test_a_file_s_positions_are_told_by_whoever_reads_it(family, given, says, make_checkpoint,
                                                         tmp_path):  # fmt: skip
    """They ended in transformers' own words: a KeyError, a validator's name, a power of text."""
    folder = make_checkpoint(tmp_path / "base", family)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | given
    file.write_text(json.dumps(config))
    for read in (lambda: load_config(folder, "base"), lambda: geometry(config, TABLE[family])):
        with pytest.raises(UsageError) as refusal:
            read()
        assert says in refusal.value.message and refusal.value.hint
        assert "Error" not in refusal.value.message
    if "yarm" in says:
        assert refusal.value.hint == "did you mean 'yarn'?"


@pytest.mark.parametrize(
    ("family", "width", "share"),
    [("phi", 4, 0.25), ("phi", 12, 0.25), ("stablelm", 5, None), ("gpt_neox", 12, 0.25)],
)
def test_an_odd_part_is_refused_before_anything_is_written(dense_config, family, width, share):
    """By `sparsek convert`, from config.json alone, and by the classes."""
    config = dense_config(family, hidden_size=4 * width)
    files = config.to_dict()
    if share is None:
        del files["rope_parameters"]  # the class's own share is a quarter
    else:
        files["rope_parameters"]["partial_rotary_factor"] = share
    odd = int(width * (share or 0.25))
    with pytest.raises(UsageError, match=f"turn {odd} of the {width} features"):
        geometry(files, TABLE[family])
    with pytest.raises(UsageError, match=f"turn {odd} of the {width} features"):
        sparsek_config_from(type(config).from_dict(files), {})


@pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
def test_a_share_that_the_file_leaves_to_the_class_counts(dense_config, family):
    """What transformers makes of it was refused, and what it cannot compute was taken."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = dense_config(family, hidden_size=64)
    files, width = made.to_dict(), 16
    pairs = int(width * {"phi": 0.5, "stablelm": 0.25, "llama": 1.0}[family]) // 2
    for count in (pairs, width // 2, width // 4):
        rope = LONG | {"short_factor": [1.0] * count, "long_factor": [2.0] * count}
        config = {**files, "rope_parameters": rope}
        theirs = type(made).from_dict(copy.deepcopy(config))  # which writes its share into it
        if count == pairs:
            geometry(config, TABLE[family])
            assert rope == config["rope_parameters"] and "partial_rotary_factor" not in rope
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](theirs)
            assert len(frequencies) == pairs
            continue
        with pytest.raises(RuntimeError, match="size of tensor"):
            ROPE_INIT_FUNCTIONS["longrope"](theirs)
        with pytest.raises(UsageError, match=f"{count} numbers in .*it takes {pairs}"):
            geometry(config, TABLE[family])


@pytest.mark.parametrize("key", ["beta_slow", "beta_fast"])
def test_zero_is_what_transformers_reads_as_left_out(dense_config, key):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    made = [
        dense_config("llama", rope_parameters={"rope_theta": 1e4, **YARN, **more})
        for more in ({}, {key: 0})
    ]
    left, zero = (ROPE_INIT_FUNCTIONS["yarn"](config)[0] for config in made)
    assert left.equal(zero)


THETA = {"rope_type": "default", "rope_theta": 1e5}


@pytest.mark.parametrize(
    ("keys", "lost"),
    [
        ({"rope_parameters": THETA}, "rope_theta 100000.0 is lost"),
        ({"rope_parameters": THETA | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         "partial_rotary_factor 0.5 is lost"),
        ({"rope_parameters": THETA, "rope_scaling": YARN | {"rope_theta": 1e6}}, "rope_theta"),
        ({"rope_parameters": THETA, "rope_theta": 1e5}, None),
        ({"rope_parameters": THETA | {"rope_theta": 1e4}}, None),  # what is taken then
        ({"rope_parameters": THETA, "rope_scaling": None}, None),
        ({"rope_parameters": None, "rope_theta": 1e5}, None),
        ({"rope_parameters": THETA, "rope_scaling": YARN | {"rope_theta": 1e5}}, None),
    ],
)  # fmt: skip
def test_a_second_block_takes_nothing_away(dense_config, keys, lost):
    """Cards say to add rope_scaling; beside rope_parameters it took the base of positions away."""
    from sparsek_cli.families.own_config import own_config
    from sparsek_cli.model_folder.config_file import check_config

    row = TABLE["llama"]
    config = dense_config("llama", max_position_embeddings=128)
    raw = config.to_dict() | {"rope_scaling": dict(YARN)} | keys
    if lost is None:
        check_config(raw, "it")
        theta = raw.get("rope_theta") or (raw["rope_parameters"] or {})["rope_theta"]
        read = own_config(row, raw).rope_parameters
        assert read["rope_theta"] == theta
        scaled = raw["rope_scaling"] is not None
        assert geometry(raw, row).context == (512 if scaled else 128)
        return
    with pytest.raises(UsageError, match=lost) as refusal:
        check_config(raw, "it")
    assert "take rope_scaling out" in refusal.value.hint
    written = {**raw["rope_parameters"], **raw["rope_scaling"]}  # as hinted
    check_config(raw | {"rope_parameters": written, "rope_scaling": None}, "it")


def test_of_several_blocks_the_one_of_full_attention_is_scaled(dense_config):
    """The hint had the keys written beside the blocks, where Gemma 3 does not look."""
    from sparsek_cli.model_folder.config_file import check_config

    both = {"full_attention": dict(THETA), "sliding_attention": dict(THETA)}
    raw = dense_config("gemma3_text").to_dict() | {"rope_parameters": both}
    with pytest.raises(UsageError, match="full_attention") as refusal:
        check_config(raw | {"rope_scaling": dict(YARN)}, "it")
    assert "rope_parameters.full_attention, beside what is there" in refusal.value.hint
    check_config(raw | {"rope_parameters": both | {"full_attention": THETA | YARN}}, "it")


@pytest.mark.parametrize("kind", ["su", None])
def test_ways_that_a_class_does_not_know_are_told_when_it_is_read(make_checkpoint, tmp_path, kind):
    """They ended in a KeyError of the model's; Phi-3 alone knows the first name of longrope."""
    folder = make_checkpoint(tmp_path / "base", "llama")
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": kind, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    with pytest.raises(UsageError, match="that transformers does not have") as refusal:
        load_config(folder, "it")
    assert "longrope" in refusal.value.hint


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_positions_of_images_in_a_text_part(make_checkpoint, tmp_path, key):
    """Taken out of Qwen2-VL, it was asked whether it meant longrope, which needs other keys."""
    folder = make_checkpoint(tmp_path / "base", "qwen2", rope_theta=1e6)
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"rope_theta": 1e6}
    del config["rope_parameters"]
    rope = {key: "mrope", "mrope_section": [1, 1, 2]}
    file.write_text(json.dumps(config | {"rope_scaling": rope}))
    for read in (lambda: load_config(folder, "it"), lambda: geometry(
            json.loads(file.read_text()), TABLE["qwen2"])):  # fmt: skip
        with pytest.raises(UsageError, match="by 'mrope', which places images") as refusal:
            read()
        assert refusal.value.hint.startswith('write "default" in its place')
    # As the hint says.
    file.write_text(json.dumps(config | {"rope_scaling": rope | {key: "default"}}))
    read = load_config(folder, "it").rope_parameters
    assert (read["rope_type"], read["rope_theta"]) == ("default", 1e6)


def test_every_verb_counts_with_it(dense_model, tokenizer):
    model = dense_model("qwen2", max_position_embeddings=128, rope_scaling=dict(YARN))
    written = model.config.to_dict()
    assert geometry(written, TABLE["qwen2"]).context == 512
    old = {**written, "rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None}
    assert geometry(old, TABLE["qwen2"]).context == 512
    assert Engine(model).context_limit == 512
    said: list[str] = []
    assert most_tokens(model, tokenizer, None, said.append) == 512
    assert most_tokens(model, tokenizer, 400, said.append) == 400 and not said
    assert most_tokens(model, tokenizer, 1000, said.append) == 1000 and said


def test_only_ways_that_work_are_named(dense_model, tokenizer):
    for family, rope, ways in (
        ("qwen2", YARN, "--max-length N"),
        ("llama", None, "--yarn FACTOR or --max-length N"),
        ("gpt2", None, ""),
        ("opt", None, ""),
        ("jamba", None, "--max-length N"),  # has no positions at all
    ):
        model = dense_model(family, **({"rope_scaling": dict(rope)} if rope else {}))
        assert ways_beyond(model) == ways
        own = most_tokens(model, tokenizer, None, print)
        if "--max-length" in ways:
            assert most_tokens(model, tokenizer, 2 * own, lambda text: None) == 2 * own
        else:
            with pytest.raises(UsageError, match=f"beyond the {own:,} positions of this {family}"):
                most_tokens(model, tokenizer, 2 * own, print)
        if "--yarn" in ways:
            stretch(model.config, 2.0)
            assert most_tokens(model, tokenizer, None, print) == 2 * own
        else:
            with pytest.raises(UsageError, match="--yarn stretches rotary positions"):
                stretch(tiny_config(family, **({"rope_scaling": dict(rope)} if rope else {})), 2.0)


def test_phi_3_is_stretched_from_its_own_length(dense_config):
    """transformers put the length of longrope in its place, which is another key of Phi-3's."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    found = []
    for family, kind in (("llama", LlamaRotaryEmbedding), ("phi3", Phi3RotaryEmbedding)):
        config = dense_config(
            family, hidden_size=64, num_attention_heads=2, max_position_embeddings=128
        )
        stretch(config, 2.0)
        found.append(kind(config).inv_freq)
    assert found[0].equal(found[1])


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_what_transformers_will_not_save_is_said_when_it_is_stretched(
    family, saved, tmp_path, caplog
):
    """Phi-3's config takes no YaRN: it was an error of transformers' at save_pretrained."""
    model, _ = sparsek.load(saved(family), yarn=2.0, device="cpu")
    said = [r.getMessage() for r in caplog.records if r.name == "sparsek_cli"]
    if family == "llama":
        model.save_pretrained(tmp_path / "again")
        assert not said
        return
    [line] = said
    assert "used, and not saved" in line and "load it without yarn" in line
    with pytest.raises(StrictDataclassError):
        model.save_pretrained(tmp_path / "again")


def test_a_length_that_no_config_says_is_not_stretched():
    """RecurrentGemma names none: it was an AttributeError."""
    from transformers import RecurrentGemmaConfig

    config = RecurrentGemmaConfig()
    assert not can_stretch(config)
    with pytest.raises(UsageError, match="recurrent_gemma says no length of its own"):
        stretch(config, 2.0)
