"""Which keys a layer keeps: SparseK's own choice and the rivals it is compared with."""
