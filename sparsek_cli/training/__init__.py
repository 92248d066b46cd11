"""Training: data and objective in, a better model out, on transformers' Trainer."""
