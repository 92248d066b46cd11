"""Converted models on their way elsewhere: the plain dense checkpoint, scorers alone, the hub."""
