"""The settings that `/set` changes."""

from dataclasses import fields
from difflib import get_close_matches

from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.errors import UsageError

COLDEST = 1e-6


def changed(sampling: Sampling, assignment: str) -> Sampling:
    """A copy of the settings with `key=value` (or `key value`) applied.

    Raises:
        UsageError: no such key, no value, or a value out of range.
    """
    key, _, value = assignment.replace("=", " ", 1).strip().partition(" ")
    value = value.strip()
    known = {f.name: f.type for f in fields(Sampling)}
    if key not in known:
        near = get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"/set knows {', '.join(known)}"
        raise UsageError(f"/set has no key '{key}'", hint=hint)
    if not value:
        raise UsageError(
            f"/set {key} needs a value", hint=f"for instance /set {key}={getattr(Sampling(), key)}"
        )
    kind = type(getattr(Sampling(), key))
    try:
        new = Sampling(**{**vars(sampling), key: kind(value)})
    except ValueError as error:
        raise UsageError(
            f"{key}={value} is not {'a whole number' if kind is int else 'a number'}",
            hint=f"for instance /set {key}={getattr(Sampling(), key)}",
        ) from error
    check_sampling(new)
    return new


def check_sampling(sampling: Sampling) -> None:
    """Raises UsageError for settings that mean nothing."""
    # Logits are divided by it: by less than this they are no float32 numbers.
    if sampling.temperature != 0 and not COLDEST <= sampling.temperature <= 100:
        raise UsageError(
            f"temperature {sampling.temperature} is out of range",
            hint=f"0 is greedy, 1 is plain; the least above 0 is {COLDEST:g}",
        )
    if not 0 < sampling.top_p <= 1:
        raise UsageError(f"top_p {sampling.top_p} is out of range", hint="it is above 0, up to 1")
    if sampling.max_new_tokens < 1:
        raise UsageError(
            f"max_new_tokens {sampling.max_new_tokens} is out of range", hint="it is at least 1"
        )
    if not 0 <= sampling.seed < 1 << 63:  # a reply adds its place to it, and torch takes 64 bits
        raise UsageError(
            f"seed {str(sampling.seed)[:40]} is out of range", hint="it is 0 or more, below 2^63"
        )
