"""Write ``configs/schema.json`` (for editors) and ``configs/reference.md`` (for people) from the schema.

``--check`` writes nothing and fails when a file is not what would be written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bdtrain.config.reference import COMMAND, reference_text, schema_text

FOLDER = Path(__file__).resolve().parent.parent / "configs"


def main(arguments: list[str]) -> int:
    """Write or compare.

    Returns:
        0, or 1 when ``--check`` found a stale file.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where the files are (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    stale = []
    for name, text in (("schema.json", schema_text()), ("reference.md", reference_text())):
        path = options.folder / name
        if options.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(path)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    for path in stale:
        print(f"{path} is not what the schema says; run: {COMMAND}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
