"""Backends: one package an engine, whose `__init__` holds the `Backend`. They do not import one another.

`options`, `signing` and `bundle_script` are what they share.
"""
