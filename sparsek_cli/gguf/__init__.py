"""GGUF files: recognised, and their headers read; `conversion/from_gguf` makes bases of them."""
