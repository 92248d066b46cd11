"""Runs Gluon kernels for Hopper on a CPU: what they compute, and whether their warps race.

Triton's interpreter knows no Gluon, so kernels with specialised warps would first run on a GPU.
Here a kernel's own Python source runs against stand-ins for the few primitives that ours use:
every partition of `warp_specialize` is a thread, one of them at a time, in an order of our choice;
barriers count and flip as the hardware's do; copies land, and products read their operands, as
late as the barriers allow.

What it finds: wrong results, loads and stores outside a tensor, reads of what nobody wrote,
deadlocks, and every pair of accesses to one shared buffer that no barrier orders, by vector clocks
(FastTrack, Flanagan and Freund 2009), whatever the order in which the threads happened to run.
What it cannot: layouts, registers, timing, and races between the warps of one partition, where the
compiler places the barriers.
"""

from gluon_emulator.errors import Deadlock, OutOfBounds, Race
from gluon_emulator.modules import emulated_modules
from gluon_emulator.partitions import run_first

__all__ = ["Deadlock", "OutOfBounds", "Race", "emulated_modules", "run_first"]
