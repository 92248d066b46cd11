"""Selection and key lists in one launch each, for calls that would wait for the CPU otherwise."""
