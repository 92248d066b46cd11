"""Scorers without their base: the file that holds them, whose they are, and taking them out."""
