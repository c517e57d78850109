"""Text to a corpus: tools/preprocess.py --input 'data/*.jsonl' --tokenizer tok/tokenizer.model --out corpus/.

A run that was stopped or killed resumes when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
import sys

from bdtrain.data.preprocess import PreprocessOptions, preprocess
from bdtrain.data.progress import ProgressLine
from bdtrain.data.text import TextOptions
from bdtrain.errors import BdtrainError


def parse() -> argparse.Namespace:
    """The command line; defaults are those of PreprocessOptions."""
    default = PreprocessOptions()
    parser = argparse.ArgumentParser(description="Tokenize text and pack it into shards.")
    add = parser.add_argument
    add(
        "--input", nargs="+", required=True, help="files, folders or quoted patterns: .txt, .jsonl, .jsonl.gz"
    )
    add("--tokenizer", required=True, help="tokenizer.model, from tools/train_tokenizer.py")
    add("--out", required=True, help="folder of the corpus")
    add(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; the result does not depend on it"
    )
    add("--valid-input", nargs="+", default=[], help="the same for the held-out split")
    add(
        "--valid-fraction",
        type=float,
        help=f"share of documents held out (default: {default.valid_fraction:g}; 0 with --valid-input)",
    )
    add("--text-field", default=default.text.text_field, help="key of the text in a line of .jsonl")
    add(
        "--text-suffix",
        nargs="+",
        default=default.text.text_suffixes,
        help="plain files to take from folders",
    )
    add(
        "--document-separator",
        help="text between documents of a plain file (default: the file is one document)",
    )
    add("--bos", action="store_true", help="begin every document with BOS")
    add("--dtype", help="uint16 or uint32 (default: the smallest that fits the vocabulary)")
    add("--row-length", type=int, default=default.row_length, help="tokens per stored row")
    add("--member-rows", type=int, default=default.member_rows, help="rows per member of a shard")
    add("--task-mib", type=float, help="MiB of input per task and shard (default: by the size of the input)")
    add(
        "--max-bad-fraction", type=float, default=0.0, help="share of faulty documents to leave out and count"
    )
    add("--quiet", action="store_true", help="no progress line")
    return parser.parse_args()


def main() -> int:
    """Parse, run, say what came out."""
    args = parse()
    fraction = 0.0 if args.valid_input else PreprocessOptions().valid_fraction
    options = PreprocessOptions(
        text=TextOptions(args.text_field, args.document_separator, tuple(args.text_suffix)),
        valid_fraction=fraction if args.valid_fraction is None else args.valid_fraction,
        bos=args.bos,
        dtype=args.dtype,
        row_length=args.row_length,
        member_rows=args.member_rows,
        task_bytes=None if args.task_mib is None else int(args.task_mib * 2**20),
        max_bad_fraction=args.max_bad_fraction,
    )
    show = ProgressLine(quiet=args.quiet)
    try:
        summary = preprocess(
            args.input,
            args.tokenizer,
            args.out,
            valid_inputs=args.valid_input,
            options=options,
            workers=args.workers,
            show=show,
        )
    except BdtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{args.out}: {summary.describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
