"""Look into a corpus: tools/inspect_data.py corpus/ --rows 3 --frequent 20 --order --dp 4 --steps 5."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bdtrain.data.inspect import describe_corpus, frequent_tokens, preview_order, show_rows
from bdtrain.errors import BdtrainError


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description="Show totals, rows and the order of a corpus.")
    parser.add_argument("corpus", type=Path, help="folder that tools/preprocess.py wrote")
    parser.add_argument("--split", default="train", help="train or valid")
    parser.add_argument("--seq-len", type=int, default=None, help="tokens per row (default: as stored)")
    parser.add_argument(
        "--rows", type=int, default=1, help="decode so many rows of the split, in stored order"
    )
    parser.add_argument(
        "--frequent", type=int, default=0, help="count tokens, show so many of the most frequent"
    )
    parser.add_argument("--order", action="store_true", help="show where the samples of the first steps lie")
    parser.add_argument("--dp", type=int, default=1, help="with --order: data-parallel ranks")
    parser.add_argument("--steps", type=int, default=2, help="with --order: steps to show")
    parser.add_argument("--global-batch-size", type=int, default=8, help="with --order: samples per step")
    parser.add_argument("--seed", type=int, default=1234, help="with --order: the run's seed")
    args = parser.parse_args()
    try:
        lines = describe_corpus(args.corpus)
        lines += show_rows(args.corpus, args.split, args.seq_len, args.rows)
        if args.frequent:
            lines += frequent_tokens(args.corpus, args.split, args.frequent)
        if args.order:
            lines += preview_order(
                args.corpus,
                args.split,
                args.seq_len,
                seed=args.seed,
                dp_size=args.dp,
                steps=args.steps,
                global_batch_size=args.global_batch_size,
            )
    except BdtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
