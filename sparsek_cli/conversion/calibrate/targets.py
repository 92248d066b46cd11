"""What a score should say about a key: how much some later query will want it.

The target is the log of the largest attention probability that any later query outside the
window, in any head of the group, gives the key (method.md section 5). Computed over blocks of
queries: no N x N tensor exists.
"""

from __future__ import annotations

import torch

from sparsek_cli.conversion.calibrate.collect import Recorded

# Most queries in a block, and most logits in it: 512 MB in float32.
_BLOCK = 256
_LOGITS = 1 << 27
# Log probabilities below this mean "never looked at"; without a floor they dominate the squares.
FLOOR = -16.0


def future_attention(
    recorded: Recorded, rows: torch.Tensor, answer: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log max attention probability per key over the given queries beyond the window.

    Args:
        recorded: one sequence in one layer.
        rows: [R] int64, ascending: the queries looked at.
        answer: [N] bool, queries that count in the second result.
        window: keys closer than this to a query do not count there.

    Returns:
        Two [G, N] float32 tensors, at least `FLOOR`: over all `rows`, over those in `answer`.
    """
    heads, _, size = recorded.query.shape
    groups, tokens, _ = recorded.key.shape
    device = recorded.query.device
    key = recorded.key.float()
    best = torch.full((groups, tokens), FLOOR, device=device)
    best_answer = best.clone()
    for rows_here in rows.split(max(1, min(_BLOCK, _LOGITS // (heads * tokens)))):
        block = rows_here.to(device)
        last = int(block[-1]) + 1
        query = (recorded.query[:, block].float() * recorded.scaling).reshape(groups, -1, size)
        logits = torch.matmul(query, key[:, :last].transpose(1, 2))
        logits = logits.view(groups, heads // groups, len(block), last)
        columns = torch.arange(last, device=device)
        first = int(block[0]) + 1
        # Only columns after the first query can lie in some query's future.
        late = columns[first:] > block[:, None]
        logits[..., first:].masked_fill_(late, -torch.inf)
        logits -= logits.logsumexp(-1, keepdim=True)
        near = max(0, int(block[0]) - window + 1)
        logits[..., near:].masked_fill_(columns[near:] > block[:, None] - window, -torch.inf)
        torch.maximum(best[:, :last], logits.amax((1, 2)), out=best[:, :last])
        asked = answer[rows_here].to(device)
        if bool(asked.any()):
            of_answers = logits[:, :, asked].amax((1, 2))
            torch.maximum(best_answer[:, :last], of_answers, out=best_answer[:, :last])
    return best, best_answer
