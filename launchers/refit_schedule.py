"""Fit the noise plan of a run again: one snapshot, a watch over a run, or any saved models (--help)."""

from __future__ import annotations

import sys

from bdtrain.refit.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
