"""Compiles every Triton kernel for a GPU that need not be there, and reports what it takes.

python -m sparsek_cli.benchmarks.compile_report [--capability 9.0] [--dim 128] [--gate log]
    [--softcap 30] [--json]

A call of the backend on CPU tensors is recorded instead of launched: each distinct launch is
compiled with the argument types and divisibilities it was made with. Prints registers, stack bytes
(spills) and shared memory per kernel; `--softcap` compiles them for capped logits and, in decoding,
sink logits; `--json` adds what loops carry, as written and as compiled.
Never set TRITON_INTERPRET with it.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip
SHOWN = ("GATE", "WINDOW", "KIND", "M", "DOT", "EARLY", "K", "CAPPED")
LONG = 32_768
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Stands in for JITFunction.run."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.rows: dict[str, dict] = {}

    def launch(self, kernel: JITFunction, *args, grid=None, warmup=False, **kwargs) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            value, path = values[name], (index,)
            fixed = value is None or (isinstance(value, int) and value == 1)
            if kernel.params[index].is_constexpr or fixed:
                signature[name], constants[path] = "constexpr", value
            elif torch.is_tensor(value):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[path] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[path] = [["tt.divisibility", 16]]
        key = f"{kernel.fn.__name__} {signature} {constants}"
        if key in self.rows:
            return
        options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
        source = _source_type(kernel)(kernel, signature, constants, attributes)
        made = triton.compile(source, target=self.target, options=options)
        flags = {kernel.arg_names[path[0]]: value for path, value in constants.items()}
        self.rows[key] = {
            "kernel": kernel.fn.__name__,
            "shared": made.metadata.shared,
            **_resources(made.asm["cubin"]),
            "carried": [_carried(made.asm[stage]) for stage in ("source", "ttgir")],
            "constants": {n: v for n, v in flags.items() if n in SHOWN},
            **options,
        }


def _source_type(kernel: JITFunction) -> type[ASTSource]:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _carried(ir: str) -> int:
    """Most values that a loop of the program carries.

    Triton 3.6 and 3.7 drop one that only bounds loops inside, which then keeps its first value: as
    many must be there when compiled as were written.
    """
    loops = re.findall(r"iter_args\((.*?)\) ->", ir)
    return max((carried.count(" = ") for carried in loops), default=0)


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found.group(1)), "stack": int(found.group(2))}


def report(
    capability: tuple[int, int], dim: int, gate: str, dtype: torch.dtype, softcap: float | None
) -> list[dict]:
    """One row per distinct kernel of a prefill, its backward pass and a decoding step."""
    from sparsek_kernels.dispatch import as_if_long
    from sparsek_kernels.state import SlotLayout, SparseKState
    from sparsek_kernels.triton import pipeline
    from sparsek_kernels.triton import run as read_prompt
    from sparsek_kernels.triton.decode.likeliest import likeliest
    from sparsek_kernels.triton.decode.step import step
    from sparsek_kernels.triton.geometry import geometry

    recorder = Recorder(10 * capability[0] + capability[1])
    JITFunction.run = lambda kernel, *args, **kwargs: recorder.launch(kernel, *args, **kwargs)
    pipeline.device_capability = lambda device: capability
    heads, groups, length, topk, window = 8, 2, 2048, 256, 256
    q = torch.zeros(1, heads, length, dim, dtype=dtype)
    k = torch.zeros(1, groups, length, dim, dtype=dtype)
    scores = torch.zeros(1, groups, length, dtype=torch.float64)
    pairs = torch.zeros(heads, 1, 2 * dim + 2)
    settings = pipeline.Settings((topk,) * groups, window, 4, gate, dim**-0.5, softcap)
    shape = geometry(q.shape, k.shape, q.device)
    own = pipeline.hopper_kernels
    for hopper_kernels in {own, lambda *_: None}:  # with Hopper's own kernels and without
        pipeline.hopper_kernels = hopper_kernels
        for ways in (as_if_long, nullcontext):
            with ways():
                found = pipeline.forward(q, k, k, scores, settings, shape, stand_ins=pairs)
                pipeline.backward(
                    q, q, k, k, scores, *found, settings, shape,
                    score_grad=True, deterministic=False, stand_ins=pairs,
                )  # fmt: skip
    pipeline.hopper_kernels = own
    for bounds in (None, torch.tensor([0, 9, LONG], dtype=torch.int32)):
        _score_gradient(bounds)
        _effective_scores(bounds)
    if gate == "straight_through":  # a prompt with a state takes no other on Triton
        layout = SlotLayout((topk,) * groups, window, 4)
        read = SparseKState.empty(1, groups, dim, topk=topk, window=window, sinks=4, dtype=dtype)
        read_prompt(
            q, k, k, scores, layout=layout, slopes=None, gate=gate, cu_seqlens=None, state=read,
            scale=1.0, softcap=softcap, sink_logits=None, stand_ins=pairs,
        )  # fmt: skip
    own_logits = None if softcap is None else torch.zeros(heads)
    for rows, own_pairs in product((2, 8), (None, pairs)):  # in one launch and in two
        held = SparseKState.empty(rows, groups, dim, topk=topk, window=window, sinks=4, dtype=dtype)
        token = torch.zeros(rows, groups, 1, dim, dtype=dtype)
        query = torch.zeros(rows, heads, 1, dim, dtype=dtype)
        step(
            query, token, token, torch.zeros(rows, groups, 1), torch.zeros(groups), held,
            scale=1.0, softcap=softcap, sink_logits=own_logits, stand_ins=own_pairs,
        )  # fmt: skip
    likeliest(torch.zeros(2, 128256, dtype=dtype))
    _linear_maps(dim, dtype)
    return list(recorder.rows.values())


def _score_gradient(bounds: torch.Tensor | None) -> None:
    """In rows so long that sums are made in larger blocks."""
    from sparsek_kernels.triton import pipeline
    from sparsek_kernels.triton.geometry import geometry

    scores = torch.zeros(1, 1, LONG, dtype=torch.float64)
    shape = geometry((1, 4, LONG, 1), scores[..., None].shape, scores.device, bounds)
    tau = pipeline.prefix_thresholds(scores, (9,), 9, shape, 4)
    runs, changes = pipeline.interior_runs(scores, tau, 9, shape, 4)
    rows = torch.zeros(1, 4, LONG)
    pipeline.score_gradient(rows[:, :1], rows, runs, changes)


def _effective_scores(bounds: torch.Tensor | None) -> None:
    """As a scorer leaves scores: when their keys leave, and their gradient."""
    from sparsek_kernels.triton.effective import effective_gradients, effective_scores
    from sparsek_kernels.triton.geometry import geometry
    from sparsek_kernels.triton.selection import selection_ends

    scores, slopes = torch.zeros(1, LONG, 8).transpose(1, 2), torch.zeros(8)
    keys = scores[..., None].shape
    shape = geometry(keys, keys, scores.device, bounds)
    found = effective_scores(scores, slopes, shape)
    selection_ends(scores, (9,) * 8, 9, shape, slopes=slopes)
    kinds = {"scores": scores.dtype, "by_token": True, "slopes": slopes.dtype}
    effective_gradients(found, found, shape, **kinds)


def _linear_maps(dim: int, dtype: torch.dtype) -> None:
    """The maps of a decoding step of one row and of several, at the shape of a 1B model."""
    from sparsek_kernels.triton import linears

    wide = torch.zeros(8192, 2048, dtype=dtype)
    norm = linears.Norm(torch.zeros(2048, dtype=dtype), 1e-5)
    inner = torch.zeros(128, 2048)
    linears.bf16_parts(inner)
    scorer = linears.Scorer(inner[:8], inner[0, :8], inner, inner[0, :128], inner[:8, :128])
    maps = [(wide[:2048], None), (wide[:512], None), (wide[:512], None)]
    early = linears.Shape(8, 512, 4, dot=True, early=True, overlap=True)
    # As shipped, and by ways that other shapes of a map may take.
    for rows, shape in (
        (1, None),
        (4, None),
        (4, linears.Shape(8, 256, 4)),
        (4, early),
        (16, early),
    ):
        given = {"shape": shape}
        x = torch.zeros(rows, 2048, dtype=dtype)
        turn = (torch.zeros(rows, dim, dtype=dtype),) * 2
        q, k, *_ = linears.project(x, maps, dim, norm=norm, turn=turn, scorer=scorer, **given)
        gated = linears.gated(x, maps[0], maps[0], norm=norm, **given)
        linears.linear(gated, maps[0][0], residual=x, **given)
        inner = torch.zeros(rows, 8192, dtype=dtype)
        linears.linear(inner, wide.view(2048, 8192), residual=x, **given)
        linears.norm_rotate(q, k, norm.weight[:dim], norm.weight[:dim], 1e-5, turn)
        linears.rms_norm(x, norm)
        linears.rotary(
            torch.zeros(rows, dtype=torch.int64), norm.weight[: dim // 2].float(), 1.0, dtype
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--gate", default="straight_through")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    major, minor = map(int, args.capability.split("."))
    rows = report((major, minor), args.dim, args.gate, getattr(torch, args.dtype), args.softcap)
    if args.json:
        json.dump(rows, sys.stdout)
        return
    for row in rows:
        print("{kernel:16s} {registers:4d} registers {stack:5d} stack {shared:7d} shared".format(
            **row), row["constants"])  # fmt: skip


if __name__ == "__main__":
    main()
