"""tau of every prefix: breakpoints in order, and queries that descend through them together."""
