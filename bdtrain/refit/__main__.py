"""``python -m bdtrain.refit``: what the trainer starts; see ``bdtrain.refit.command``."""

from __future__ import annotations

import sys

from bdtrain.refit.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
