"""What is left of an evaluation: the result folder, its tables, plots and comparisons."""
