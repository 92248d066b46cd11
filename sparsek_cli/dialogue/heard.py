"""The tokens of a conversation, which undo, forks and comparisons go back to."""

from array import array
from collections.abc import Iterable


class Heard:
    """Tokens in order, four bytes each, in pieces that copies share: of a million tokens that were
    read there is one copy, however many moments a conversation can go back to.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self._pieces = [array("i", tokens)]
        self._own = True  # whether nobody else holds the last piece

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends; copies do not see it."""
        if not self._own:
            self._pieces.append(array("i"))
            self._own = True
        self._pieces[-1].extend(tokens)

    def copy(self) -> "Heard":
        """The tokens so far."""
        made = Heard()
        made._pieces, made._own = list(self._pieces), False
        self._own = False
        return made

    def tolist(self) -> list[int]:
        """All of them."""
        return [token for piece in self._pieces for token in piece]

    def __len__(self) -> int:
        return sum(map(len, self._pieces))
