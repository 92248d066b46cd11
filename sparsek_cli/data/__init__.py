"""Text and generated documents become fixed-length training sequences.

A *source* is anything callable as `source(rng, length) -> (ids, roles)`: one document of at most
`length` tokens, a function of the state of `rng` (a `numpy.random.Generator`) and nothing else,
with one role per token:

    IGNORED  no loss on this token (a prompt, padding, a fact that cannot be known yet)
    TEXT     counted in the mean text loss
    ANSWER   counted in the mean answer loss (what a question asks for, a repeated passage)

The training loss is `mean over TEXT + answer_weight * mean over ANSWER`. A role belongs to the
token that is predicted; the shift by one is made where the loss is computed. Recipes name a source
by `kind`: `copies` is copy_source.py, `stream` is streams.py, `needles` is needle_source.py.
Several sources together are one dataset (mixture.py).
"""

IGNORED = 0
TEXT = 1
ANSWER = 2
