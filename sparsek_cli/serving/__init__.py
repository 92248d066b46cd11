"""Serving over HTTP: which server runs a converted model, and how it is started."""
