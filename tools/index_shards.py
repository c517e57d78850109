"""Rebuild the side files of a corpus, or check it: tools/index_shards.py corpus/ [--verify [--deep]]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bdtrain.data.shards import CorpusIndex, load_tokenizer, rebuild_index, verify_shard
from bdtrain.errors import BdtrainError


def main() -> int:
    """Go through all shards; report every fault, not only the first."""
    parser = argparse.ArgumentParser(description="Rebuild the .idx.npy files of a corpus from its archives.")
    parser.add_argument("corpus", type=Path, help="folder that tools/preprocess.py wrote")
    parser.add_argument(
        "--verify", action="store_true", help="change nothing, check files against index.json"
    )
    parser.add_argument(
        "--deep", action="store_true", help="with --verify: read all data and check every hash"
    )
    args = parser.parse_args()
    if args.deep and not args.verify:
        parser.error("--deep needs --verify")
    exit_code = 0
    try:
        index = CorpusIndex.load(args.corpus)
        load_tokenizer(args.corpus, index)
    except BdtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    records = [record for split in index.splits.values() for record in split.shards]
    for record in records:
        try:
            if args.verify:
                verify_shard(args.corpus, index, record, deep=args.deep)
            else:
                rebuild_index(args.corpus, index, record)
        except BdtrainError as error:
            print(f"error: {error}", file=sys.stderr)
            exit_code = error.exit_code
    if exit_code == 0:
        rows = sum(record.rows for record in records)
        print(f"{args.corpus}: {len(records)} shards, {rows} rows, {'intact' if args.verify else 'indexed'}")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
