"""Weights in the formats of other software, and from them; no process group is needed for either."""
