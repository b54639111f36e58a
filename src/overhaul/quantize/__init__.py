"""Storing weights, and computing, in fewer bits: one file per method."""
