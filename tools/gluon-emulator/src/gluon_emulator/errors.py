"""What the emulator finds."""


class Race(AssertionError):
    """Two accesses to one shared buffer that no barrier orders."""


class Deadlock(AssertionError):
    """Every partition waits for a barrier that nobody will complete."""


class OutOfBounds(AssertionError):
    """A load or store outside the tensor it was given."""
