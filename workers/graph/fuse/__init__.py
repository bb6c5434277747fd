"""Fusions: patterns of nodes that become one node of the same function."""
