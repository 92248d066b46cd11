"""The result folder of an evaluation: record, tables, plots, comparisons."""
