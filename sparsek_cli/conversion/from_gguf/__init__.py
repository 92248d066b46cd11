"""A GGUF file as the base of a conversion: found, planned with, unpacked."""
