"""How the next token is drawn."""

import pytest
import torch

from sparsek_cli.dialogue.drawing.sampling import Sampling, draw


@pytest.mark.parametrize("top_p", [1e-3, 1e-30, 1e-300])
def test_the_likeliest_token_stays_however_small_top_p_is(top_p):
    """In float32 such a number may be 0: no token was left, and torch ended the chat."""
    logits = torch.tensor([0.1, 0.3, 0.2])
    assert draw(logits, Sampling(temperature=1.0, top_p=top_p)) == 1
