"""Speed: kernels beside their rivals on the same data, models, training steps, launch shapes."""
