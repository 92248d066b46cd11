"""How calls are timed: in turn, each after it had the device to itself."""

import time

import torch

from sparsek_cli.benchmarks.timing import interleaved_ms

CPU = torch.device("cpu")


def _calls(order: list[str]):
    def made(name: str, seconds: float):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    return {"short": made("short", 0.001), "long": made("long", 0.004)}


def test_every_round_times_each_call_once():
    order: list[str] = []
    took = interleaved_ms(_calls(order), CPU, repeats=3)
    assert order == 2 * ["short"] + 2 * ["long"] + 3 * ["short", "long"]
    assert 1 <= took["short"] < took["long"]


def test_a_call_is_repeated_before_it_is_timed():
    order: list[str] = []
    interleaved_ms(_calls(order), CPU, repeats=2, settle=0.02)
    turns = "".join(name[0] for name in order[4:])
    bursts = [part for part in turns.replace("sl", "s|l").replace("ls", "l|s").split("|") if part]
    assert [burst[0] for burst in bursts] == ["s", "l", "s", "l"]
    assert all(len(burst) > 3 for burst in bursts)
