"""One layer over a pool of states, as a server has it: decoding steps in place, and reading."""
