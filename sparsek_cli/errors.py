"""The one exception a user is meant to read: what went wrong, and what to do about it."""

RAN_AND_FAILED = 1
USAGE = 2
INTERRUPTED = 130
# The hint where a model that nobody trains here answers with NaN.
DAMAGED_OR_TOO_LARGE = (
    "its weights are damaged or the dtype overflows: try --dtype float32, or look with "
    "`sparsek doctor MODEL`"
)


class SparsekError(Exception):
    """A failure with a cause and a remedy, printed as `error:` and `hint:` without a traceback.

    Args:
        message: what is wrong, one line, naming the file, key or value at fault.
        hint: what to do about it, one line.
        exit_code: `USAGE` (2) when the request itself is wrong, `RAN_AND_FAILED` (1) otherwise.
    """

    def __init__(self, message: str, *, hint: str = "", exit_code: int = RAN_AND_FAILED):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        if hint:
            self.add_note(f"hint: {hint}")  # for who sees a traceback: users of the library


class UsageError(SparsekError):
    """A request that cannot be carried out as written: exit code 2."""

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(message, hint=hint, exit_code=USAGE)


def refusal(error: BaseException | None) -> SparsekError | None:
    """The refusal of ours that an error comes from, or None."""
    while error is not None and not isinstance(error, SparsekError):
        error = error.__cause__ or error.__context__
    return error


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch on a GPU or torch on a CPU found no memory."""
    # By name: torch is not imported for this. Its allocator on CPUs, Triton and CUDA's libraries
    # have no class of their own.
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    said = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return full or any(words in str(error) for words in said)


def first_line(error: BaseException) -> str:
    """The first line of what a library says, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: BaseException) -> str:
    """Class and first line; of what huggingface_hub finds wrong with a field, what it is."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if type(error).__name__.startswith("StrictDataclass"):
        return " ".join(lines[:2])
    return f"{type(error).__name__}: {first_line(error)}"
