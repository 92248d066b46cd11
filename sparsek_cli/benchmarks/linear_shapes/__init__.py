"""Linear maps of a 1B model's decoding step by many ways, and the step they make."""
