"""Decoding steps by fewer launches: modules that own kernels replace."""
