"""Measuring a model against its dense self, at equal bytes, through lm-eval."""
