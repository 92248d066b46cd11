"""Every kernel compiles for the GPUs we support, without one: it fits, and spills little."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
KERNELS = {
    "_sort_out", "_invert", "_count_rows", "_take_apart", "_histogram", "_running_sum",
    "_boundaries", "_ends", "_count_kept", "_compact",
    "_build", "_attend", "_query_gradient", "_delta", "_key_gradient", "row_centres",
    "breakpoints", "arrange", "_running", "_descend", "_finish", "_interior_runs",
    "_interior_means", "_less_means", "insert", "attend_slots",
    "insert_and_attend", "linears", "add_hidden", "normalise", "turn_heads", "turns",
    "best_of_parts", "best_of_all", "order_blocks", "_ends_of_short", "_list_short",
    "_cut_in_parts", "_segments_in_order", "_segment_tables", "_sequence_table", "_sort_blocks",
    "_thresholds_of_short", "_effective_scores", "_effective_gradients",
    "_join_stand_ins", "_stand_in_gradient",
}  # fmt: skip
READING = {"_list_documents", "_leave_state"}  # with a carried state
HOPPER = {"_attend_hopper", "_query_gradient_hopper", "_key_gradient_hopper"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "capability, dim, gate, softcap, shared, kernels",
    [
        ("9.0", 128, "straight_through", [], 227, KERNELS | READING | HOPPER),
        ("9.0", 256, "straight_through", ["--softcap", "50"], 227, KERNELS | READING),
        ("8.0", 64, "log", [], 163, KERNELS),
    ],
)
def test_every_kernel_compiles(capability, dim, gate, softcap, shared, kernels):
    words = ["--capability", capability, "--dim", str(dim), "--gate", gate, *softcap, "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "sparsek_cli.benchmarks.compile_report", *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        assert row["shared"] <= shared * 1024, row
        assert row["stack"] <= 512, row
        if row["kernel"] == "_attend_hopper":  # the one that takes several tiles
            written, compiled = row["carried"]
            assert written == compiled >= 8, row
