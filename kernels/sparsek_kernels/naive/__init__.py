"""N x N and sequential twins in plain PyTorch and Python: references for tests, nothing else."""
