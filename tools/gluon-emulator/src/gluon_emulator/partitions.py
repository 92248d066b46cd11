"""Partitions of warps as threads of which one runs at a time, and what orders them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager

from gluon_emulator.errors import Deadlock

_order: tuple[int, ...] = ()


@contextmanager
def run_first(*partitions: int):
    """These partitions run whenever they can, the first of them first; then the others."""
    global _order
    before, _order = _order, partitions
    try:
        yield
    finally:
        _order = before


class _Abandoned(BaseException):
    """Another partition has failed."""


class Warps:
    """One partition: its vector clock, its copies and products under way."""

    def __init__(self, number: int, size: int):
        self.number = number
        self.clock = [0] * size
        self.clock[number] = 1
        self.copies: list = []  # issued and not known to have landed
        self.products: list = []  # issued and not known to be done
        self.fence = 0  # tick of the last fence between the two ways to shared memory
        self.blocked: Callable[[], bool] | None = None
        self.is_done = False

    def learn(self, clock: Sequence[int]) -> None:
        self.clock = [max(a, b) for a, b in zip(self.clock, clock, strict=True)]

    def event(self) -> tuple[int, int]:
        return self.number, self.clock[self.number]

    def knows(self, event: tuple[int, int]) -> bool:
        number, time = event
        return self.clock[number] >= time


class Program:
    """One program of the grid: number 0 runs alone, then the partitions."""

    PARTITIONS = 3

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...]):
        self.place, self.grid = place, grid
        self.tick = 0
        self.warps = Warps(0, 1 + self.PARTITIONS)
        self.partitions: list[Warps] = []
        self.turn = threading.Condition()
        self.running: Warps | None = None
        self.failure: BaseException | None = None

    def next_tick(self) -> int:
        self.tick += 1
        return self.tick

    def specialise(self, functions: Sequence[tuple[Callable, tuple]]) -> None:
        if len(functions) != self.PARTITIONS:
            raise NotImplementedError(f"{len(functions)} partitions")
        for number in range(1, 1 + len(functions)):
            warps = Warps(number, 1 + len(functions))
            warps.learn(self.warps.clock)
            self.partitions.append(warps)
        self.warps.clock[0] += 1
        threads = [
            threading.Thread(target=self._run, args=(warps, function, arguments), daemon=True)
            for warps, (function, arguments) in zip(self.partitions, functions, strict=True)
        ]
        self.running = self._ready()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        for warps in self.partitions:
            self.warps.learn(warps.clock)

    def _run(self, warps: Warps, function: Callable, arguments: tuple) -> None:
        _current.program = self
        _current.warps = warps
        try:
            self._await_turn(warps)
            function(*arguments)
            if warps.copies or warps.products:
                raise AssertionError("a partition ends with copies or products under way")
        except _Abandoned:
            pass
        except BaseException as failure:
            self.failure = self.failure or failure
        with self.turn:
            warps.is_done = True
            self.running = self._ready()
            self.turn.notify_all()

    def _ready(self) -> Warps | None:
        """Who runs next, by the order asked for."""
        ranked = sorted(
            self.partitions,
            key=lambda w: _order.index(w.number - 1) if w.number - 1 in _order else len(_order),
        )
        for warps in ranked:
            if not warps.is_done and (warps.blocked is None or warps.blocked()):
                return warps
        if self.failure is None and not all(warps.is_done for warps in self.partitions):
            waiting = [w.number - 1 for w in self.partitions if not w.is_done]
            self.failure = Deadlock(f"partitions {waiting} wait for ever")
        return None

    def _await_turn(self, warps: Warps) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.running is warps or self.failure is not None)
        if self.failure is not None:
            raise _Abandoned

    def give_way(self, warps: Warps, until: Callable[[], bool] | None = None) -> None:
        """Lets others run; comes back when `until` holds and it is this partition's turn."""
        if warps.number == 0:
            if until is not None and not until():
                raise Deadlock("a wait before the partitions exist")
            return
        warps.blocked = until
        with self.turn:
            self.running = self._ready()
            self.turn.notify_all()
        self._await_turn(warps)
        warps.blocked = None


class _Current(threading.local):
    program: Program
    warps: Warps


_current = _Current()


def program() -> Program:
    return _current.program


def warps() -> Warps:
    return _current.warps


def run_program(
    place: tuple[int, ...], grid: tuple[int, ...], function: Callable, arguments: tuple, options
) -> None:
    _current.program = Program(place, grid)
    _current.warps = _current.program.warps
    function(*arguments, **options)


class Barrier:
    """An mbarrier: a phase ends when `count` arrivals are in, and the next begins."""

    def __init__(self):
        self.count = self.pending = None
        self.phase = 0
        self.gathered: list[int] | None = None
        self.released: list[int] | None = None

    def start(self, count: int) -> None:
        self.count = self.pending = count

    def arrive(self, count: int) -> None:
        me = warps()
        self.pending -= count
        if self.pending < 0:
            raise AssertionError("more arrivals than the barrier counts")
        known = self.gathered or [0] * len(me.clock)
        self.gathered = [max(a, b) for a, b in zip(known, me.clock, strict=True)]
        me.clock[me.number] += 1
        if self.pending == 0:
            self.released, self.gathered = self.gathered, None
            self.pending = self.count
            self.phase += 1
        program().give_way(me)

    def wait(self, parity: int) -> None:
        """Until the phase of this parity has ended; the phase before the first is odd."""
        me = warps()
        program().give_way(me, lambda: self.phase & 1 != int(parity))
        if self.released is not None:
            me.learn(self.released)
