"""What `sparsek doctor` looks at: installation, kernels, and a model."""
