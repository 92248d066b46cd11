"""Selection in two launches, key lists in one, for calls that would wait for the CPU otherwise."""
