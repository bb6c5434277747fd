"""Ranges of activations by calibration: statistics, and the one schema of what they find."""
