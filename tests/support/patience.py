"""How long a test waits for another process, in seconds.

It ends what hangs and decides nothing else: a machine that is slow, or busy, is no failure.
Pytest's own limit (pyproject.toml) is longer, and names no process.
"""

PATIENCE = 600
