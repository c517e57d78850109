"""Write a run's page, ``RUN/report.html``: curves, key numbers, samples and events in one file.

    python tools/write_report.py runs/my-run
    python tools/write_report.py runs/my-run --open

A run writes it at the end of an attempt by itself. This makes it anew: of a run at work, of one that was
killed, or after an evaluation (``--json RUN/evaluation-NAME.json``) was put into its folder.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

from bdtrain.errors import BdtrainError, report_failure
from bdtrain.tracking.report import write_report


def main(arguments: list[str]) -> int:
    """Write the page.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--open", action="store_true", help="show it in a browser")
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.folder)
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error)
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")
    if options.open and not webbrowser.open(path.resolve().as_uri()):
        print(f"no browser was found; open {path.resolve().as_uri()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
