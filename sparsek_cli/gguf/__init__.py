"""GGUF files as bases of a conversion: found, checked by their headers, unpacked."""
