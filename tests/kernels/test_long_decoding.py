"""A hundred thousand steps: what decoding keeps and gives is what reading keeps and gives."""

import pytest
import torch
from sparsek_kernels import SparseKState, sparsek_attention

HEADS, GROUPS, DIM, PIECE = 6, 3, 4, 2500
BUDGET = {"topk": (0, 5, 40), "window": 7, "sinks": 2}
LONG = (pytest.mark.slow, pytest.mark.timeout(3600))  # three minutes of a processor
SLOPES = torch.tensor([0.0, 1e-3, 1e-4], dtype=torch.float64)


def held(state, row):
    """Sorted positions in the slots of each head of a row."""
    parts, first = [], 0
    for k in state.layout.topk:
        size = k + state.layout.window + state.layout.sinks
        parts.append(state.positions[row, first : first + size].sort().values)
        first += size
    return torch.cat(parts)


class Row:
    """A sequence of its own: its tokens, and the outputs of some of its steps."""

    def __init__(self, seed, length):
        new = torch.Generator().manual_seed(seed)
        self.length, self.step, self.outs = length, 0, {}
        self.q = torch.randn(1, HEADS, length, DIM, generator=new, dtype=torch.float64)
        self.k = torch.randn(1, GROUPS, length, DIM, generator=new, dtype=torch.float64)
        self.v = self.k.flip(3)
        # Few different scores, so that nearly every insertion meets a tie.
        scores = torch.randint(0, 6, (1, GROUPS, length), generator=new)
        self.scores = scores.to(torch.float64)

    def part(self, start, end):
        return [x[:, :, start:end] for x in (self.q, self.k, self.v, self.scores)]


def check(row, state, number):
    """The row's slots and noted outputs against reading its tokens in pieces."""
    own = SparseKState.empty(1, GROUPS, DIM, dtype=torch.float64, **BUDGET)
    for start in range(0, row.length, PIECE):
        end = min(start + PIECE, row.length)
        out, own = sparsek_attention(*row.part(start, end), state=own, slopes=SLOPES, **BUDGET)
        for step in range(start, end):
            if step in row.outs:
                torch.testing.assert_close(row.outs[step], out[0, :, step - start])
    assert torch.equal(held(state, number), held(own, 0))


@torch.no_grad()
@pytest.mark.parametrize("steps", [600, pytest.param(100_000, marks=LONG)], ids=["short", "long"])
def test_decoding_is_reading(steps):
    """One row stays for all steps; the others leave and give their places to new ones."""
    new = torch.Generator().manual_seed(0)

    def arrives(seed):
        return Row(seed, int(torch.randint(1, max(2, min(6000, steps // 3)), (1,), generator=new)))

    rows = [Row(1, steps), arrives(2), arrives(3)]
    state = SparseKState.empty(len(rows), GROUPS, DIM, dtype=torch.float64, **BUDGET)
    empty = SparseKState.empty(1, GROUPS, DIM, dtype=torch.float64, **BUDGET)
    finished = 0
    for step in range(steps):
        parts = zip(*(row.part(row.step, row.step + 1) for row in rows), strict=True)
        token = [torch.cat(part) for part in parts]
        out, state = sparsek_attention(*token, state=state, slopes=SLOPES, **BUDGET)
        for number, row in enumerate(rows):
            if row.step % 97 == 0 or row.step > row.length - 4:
                row.outs[row.step] = out[number, :, 0].clone()
            row.step += 1
            if row.step == row.length:
                check(row, state, number)
                finished += 1
                state.put_row(number, empty)
                rows[number] = arrives(step + 4)
    assert finished > 3
