"""`sparsek serve` reads what stands after -- as vLLM does, or what it prints would be untrue."""

from __future__ import annotations

import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from sparsek_cli.serving import flags


@pytest.fixture(scope="module")
def parser():
    return make_arg_parser(FlexibleArgumentParser())


def test_every_flag_that_matters_is_one_of_vllm_s_and_no_other_is_taken_for_it(parser):
    known = {name for action in parser._actions for name in action.option_strings}
    assert set(flags._KNOWN) - {"--revision", "--yarn"} <= known
    taken = {name: flags._name(name) for name in known}
    mistaken = {name: flag for name, flag in taken.items() if flag not in (None, name)}
    assert mistaken == {"-tp": "--tensor-parallel-size"}


@pytest.mark.parametrize(
    "words",
    [
        "-tp 2", "-tp=2", "-t 2", "--tensor-parallel-size 2", "--tensor_parallel_size=2",
        "--tensor-par 2", "-tp 4 --tensor-parallel-size 2", "--seed 1 -tp 2 --max-model-len 9",
        "--kv_cache_dtype bfloat16", "--kv-cache-dtype=fp8 -tp 2",
        "--enable_prefix_caching", "--enable-prefix-caching --no-enable-prefix-caching",
        "--no-enable-prefix-caching --enable-prefix", "--hf-overrides.topk 4",
        "--hf_overrides {}", "--ssl-keyfile key",
    ],
)  # fmt: skip
def test_spellings(words, parser):
    given, theirs = flags.Flags(words.split()), parser.parse_args(words.split())
    assert given.ranks == theirs.tensor_parallel_size
    assert given.cache_dtype == theirs.kv_cache_dtype
    assert given.encrypted == bool(theirs.ssl_keyfile)
    is_open = theirs.enable_prefix_caching or "overrides" in words
    assert (given.bytes_left_open() is not None) == bool(is_open)
