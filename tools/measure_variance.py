r"""Variance of a checkpoint's gradient under given noise plans, beside the variance of its loss.

    python tools/measure_variance.py --checkpoint runs/books/run/checkpoint --plan full --plan current
    python tools/measure_variance.py --checkpoint FOLDER --plan clip:0.45,0.95 --plan bernoulli:0.3,0.8 \
        --plan schedule:runs/books/run/refit/step-000001000/schedule.json --json variance.json

Gradients are those of the training step, with its keys and strata, on the same rows for every plan. Nothing
is updated.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bdtrain.config import positive_int


def main(arguments: list[str]) -> int:
    """Measure, print, write JSON.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="folder of a saved model")
    parser.add_argument(
        "--plan",
        required=True,
        action="append",
        help="full, clip:LOW,HIGH, bernoulli[:LOW,HIGH], current or schedule:FILE; once for each plan",
    )
    parser.add_argument("--batches", type=positive_int, default=32, help="batches (default: 32)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="rows of a batch (default: 8)")
    parser.add_argument(
        "--draws", type=positive_int, default=2, help="draws of the noise per batch (default: 2)"
    )
    parser.add_argument("--split", default="valid", choices=["valid", "train"], help="part of the corpus")
    parser.add_argument("--data", help="corpus folder; the one it was trained on if left out")
    parser.add_argument("--seed", type=int, help="of the noise and the order; the run's if left out")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)

    from bdtrain.errors import BdtrainError, report_failure

    try:
        from bdtrain.parallel.libraries import prepare_libraries

        prepare_libraries()
        from bdtrain.refit.full_gradients import measure_saved

        result = measure_saved(
            options.checkpoint,
            options.plan,
            batches=options.batches,
            batch_size=options.batch_size,
            draws=options.draws,
            seed=options.seed,
            split=options.split,
            data=options.data,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
        for line in result.lines():
            print(line)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n"
            options.json.write_text(text, encoding="utf-8")
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
