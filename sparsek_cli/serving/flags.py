"""What stands after -- in `sparsek serve`, read as the server will read it.

vLLM's parser takes underscores for hyphens, `--flag=value` for `--flag value`, and any beginning of
a name that fits one name alone; of a flag given twice the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsek_cli.errors import UsageError

# Flags of the servers that say what flags of ours say.
_OURS = {
    "--host": "--host",
    "--port": "--port",
    "--dtype": "--dtype",
    "--revision": "--revision",
    "--yarn": "--yarn",
    "--served-model-name": "MODEL",
    "--model": "MODEL",
}
# With these nobody answers at an address and port over HTTP.
_ELSEWHERE = ("--uds", "--headless", "--grpc")
_ENCRYPTED = ("--ssl-certfile", "--ssl-keyfile")
_RANKS = "--tensor-parallel-size"
_SHORT = {"-tp": _RANKS, "-t": _RANKS}
_PREFIXES, _NO_PREFIXES = "--enable-prefix-caching", "--no-enable-prefix-caching"
_CACHE_DTYPE = "--kv-cache-dtype"
OVERRIDES = "--hf-overrides"
LENGTH = "--max-model-len"
_FILE = "--config"
_AT_ONCE, _BLOCKS = "--max-num-seqs", "--num-gpu-blocks-override"
_MEMORY = ("--gpu-memory-utilization", "--device-memory-utilization", "--kv-cache-memory-bytes")
# What leaves open how many bytes a request takes, and why.
_OPEN = {
    _FILE: "its file may hold any flag",
    OVERRIDES: "it changes the model's config",
    _PREFIXES: "further blocks keep the prefixes of prompts",
}
_KNOWN = (
    *_OURS, *_ELSEWHERE, *_ENCRYPTED, _RANKS, _CACHE_DTYPE, *_OPEN, _NO_PREFIXES,
    _AT_ONCE, _BLOCKS, *_MEMORY, LENGTH,
)  # fmt: skip


class Flags:
    """Flags that are handed on.

    Args:
        words: as they were typed.

    Raises:
        UsageError: a flag that says what one of ours says, or that moves the server away from
            address and port.
    """

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self._values: dict[str, str] = {}
        for number, word in enumerate(words):
            name = _name(word)
            if name is None:
                continue
            _check(name, word.partition("=")[0])
            following = words[number + 1 : number + 2]
            _, given, value = word.partition("=")
            self._values.pop(name, None)  # the last one counts, and the order is kept
            self._values[name] = value if given else "".join(following)

    @property
    def encrypted(self) -> bool:
        """Whether the server will speak HTTPS."""
        return any(name in self._values for name in _ENCRYPTED)

    @property
    def cache_dtype(self) -> str:
        """What vLLM is told to keep keys and values in; `auto`: as the model computes them."""
        return self._values.get(_CACHE_DTYPE, "auto")

    @property
    def ranks(self) -> int:
        """GPUs that share each layer's heads.

        Raises:
            UsageError: it is no number from 1 on.
        """
        said = self._values.get(_RANKS, "1")
        if not said.isdecimal() or int(said) < 1:
            raise UsageError(f"{_RANKS} is {said!r}", hint="a number of GPUs, from 1 on")
        return int(said)

    def place_of(self, flag: str) -> str | None:
        """Where a flag is given: that itself, or the file of --config; None: nowhere."""
        if flag in self._values:
            return flag
        return f"{_FILE} {self._values[_FILE]}" if flag in self._of_file() else None

    def _of_file(self) -> set[str | None]:
        """The flags in the file of --config; none where vLLM will refuse the file."""
        import yaml

        if _FILE not in self._values:
            return set()
        try:
            said = yaml.safe_load(Path(self._values[_FILE]).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return set()
        return {_name(f"--{key}") for key in said} if isinstance(said, dict) else set()

    @property
    def memory_said(self) -> bool:
        """Whether they say how much memory the server takes."""
        return any(name in self._values for name in _MEMORY)

    def at_once(self, most: int) -> int | None:
        """Requests under way together, `most` where nothing is said; None: a word that is none."""
        said = [self._values[name] for name in (_AT_ONCE, _BLOCKS) if name in self._values]
        if not all(word.isdecimal() for word in said):
            return None
        return min([int(word) for word in said], default=most)

    def bytes_left_open(self) -> str | None:
        """Why nobody can say beforehand how many bytes a request takes, or None."""
        for name, why in _OPEN.items():
            if name in self._values and not (name == _PREFIXES and self._without_prefixes()):
                return f"{name}: {why}"
        return None

    def _without_prefixes(self) -> bool:
        given = list(self._values)
        return _NO_PREFIXES in given and given.index(_NO_PREFIXES) > given.index(_PREFIXES)


def _name(word: str) -> str | None:
    """The flag that a word means, as the server spells it; None: one of no interest here."""
    key = word.partition("=")[0].partition(".")[0]  # `--flag.key value` is a piece of a flag
    if not key.startswith("--"):
        return _SHORT.get(key)
    key = key.replace("_", "-")
    if key in _KNOWN:
        return key
    meant = [known for known in _KNOWN if known.startswith(key) and key != "--"]
    return meant[0] if meant else None


def _check(name: str, typed: str) -> None:
    if name in _OURS:
        raise UsageError(
            f"{typed} is handed on to the server", hint=f"give {_OURS[name]} before the --"
        )
    if name in _ELSEWHERE:
        raise UsageError(
            f"with {typed} nobody would answer at the address that is printed",
            hint=f"leave {typed} out; --host and --port say where to listen",
        )
