"""Speed of the kernels beside their rivals, in one process and on the same data."""
