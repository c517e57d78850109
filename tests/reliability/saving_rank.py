"""A rank without a model: works until it is asked to stop, saves for two seconds, leaves with code 0.

``saving_rank.py FOLDER``; needs no torch, so that a test of launchers waits for the launchers only.
"""

import os
import sys
import time
from pathlib import Path

from bdtrain.train.folder import write_exit
from bdtrain.train.signals import StopRequest

SAVE_S = 2.0


def main(folder):
    rank = int(os.environ["RANK"])
    with StopRequest() as request:
        (folder / f"working-{rank}").write_text(str(len(request.launchers)))
        step = 0
        while request.pending is None and step < 1200:
            step += 1
            time.sleep(0.05)
        time.sleep(SAVE_S)
        (folder / f"saved-{rank}").write_text(str(request.pending))
        if rank == 0:
            write_exit(folder, request.pending or "error", step, resumable=True, exit_code=0)


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
