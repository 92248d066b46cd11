"""Logits of all kinds, for what picks from them."""

import torch


def cases(count, dtype):
    """Logits [5, count]: of one program, of several, and not of a whole number of them."""
    new = torch.Generator().manual_seed(count)
    drawn = torch.randn(5, count, generator=new)
    zeros = torch.zeros(5, count)
    zeros[:, 1::2] = -0.0
    nans = drawn.clone()
    nans[1:3, count // 2 :] = float("nan")
    low = torch.full((5, count), -torch.inf)
    low[2, count // 3] = -1e4
    high = drawn.clone()
    high[:, count // 2] = torch.inf
    high[3, count - 1] = torch.inf
    for x in (drawn, drawn.round(), zeros, -zeros, nans, low, high):
        yield x.to(dtype)
    yield drawn.to(dtype)[::2]
