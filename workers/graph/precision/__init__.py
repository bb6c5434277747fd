"""Graphs in other precisions than float32: 16-bit floats, and weights in four bits."""
