"""What `generate` does over a SparseK cache.

prefill      the prompt, read in chunks
decoding     greedy search and sampling, token by token
cuda_graphs  one decoding step, captured once and replayed
"""
