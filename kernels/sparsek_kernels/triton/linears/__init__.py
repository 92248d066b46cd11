"""Linear maps of a few rows: the weights of a decoding step, read once at the memory's speed.

kernel     what runs on the device: which program computes what
segments   a map's outputs: products and what stands after them
products   weights times rows, four ways
inputs     the rows, and the norm before them
scores     scores of a step's tokens
row_scores the same by themselves
parts      weights of scores as tensor cores take them, for many rows
norms      norms by themselves
rotary     cosines and sines of rotary positions
launch     callers: plain, gated and projecting maps, and norms
shapes     how a launch is cut into programs
"""

from sparsek_kernels.triton.linears.launch import (
    MOST_ROWS,
    Norm,
    Scorer,
    gated,
    linear,
    norm_rotate,
    project,
    rms_norm,
)
from sparsek_kernels.triton.linears.parts import bf16_parts
from sparsek_kernels.triton.linears.rotary import rotary
from sparsek_kernels.triton.linears.row_scores import row_scores
from sparsek_kernels.triton.linears.shapes import Shape

__all__ = [
    "MOST_ROWS",
    "Norm",
    "Scorer",
    "Shape",
    "bf16_parts",
    "gated",
    "linear",
    "norm_rotate",
    "project",
    "rms_norm",
    "rotary",
    "row_scores",
]
