"""NELBO, perplexity and bits per byte of a checkpoint on held-out text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bdtrain.config import positive_int


def main(arguments: list[str]) -> int:
    """Evaluate, print, write JSON.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="folder of a saved model")
    parser.add_argument("--data", type=Path, help="corpus folder; the one it was trained on if left out")
    parser.add_argument("--text", type=Path, help="one UTF-8 text file instead of a corpus, as one document")
    parser.add_argument("--split", default="valid", choices=["valid", "train"], help="part of the corpus")
    parser.add_argument("--sequences", type=positive_int, help="rows to use; all if left out")
    parser.add_argument("--replicates", type=int, default=2, help="draws of the noise per row (default: 2)")
    parser.add_argument("--seed", type=int, help="seed of the noise; the run's if left out")
    parser.add_argument(
        "--batch-size", type=positive_int, help="rows per forward pass; four micro-batches if left out"
    )
    parser.add_argument(
        "--baselines", action="store_true", help="also unigram, bigram (fitted on the corpus) and gzip"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)

    from bdtrain.errors import BdtrainError, report_failure

    try:
        from bdtrain.parallel.libraries import prepare_libraries

        prepare_libraries()
        from bdtrain.validation.evaluate import evaluate_saved

        result = evaluate_saved(
            options.checkpoint,
            data=options.data,
            text=options.text,
            split=options.split,
            sequences=options.sequences,
            replicates=options.replicates,
            seed=options.seed,
            batch_size=options.batch_size,
            baselines=options.baselines,
        )
        for line in result.lines():
            print(line)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
