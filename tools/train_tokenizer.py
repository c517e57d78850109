"""Train a tokenizer: tools/train_tokenizer.py --input 'data/*.jsonl' --vocab-size 32000 --out tok/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bdtrain.data.text import TextOptions, sample_texts
from bdtrain.data.tokenizer import train_tokenizer
from bdtrain.errors import BdtrainError


def main() -> int:
    """Parse, train, save, say what came out."""
    parser = argparse.ArgumentParser(description="Train a lossless BPE tokenizer (sentencepiece).")
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or quoted patterns")
    parser.add_argument(
        "--vocab-size", type=int, default=32000, help="ids, special ones and 256 bytes included"
    )
    parser.add_argument("--out", required=True, help="folder for tokenizer.model")
    parser.add_argument(
        "--max-mib", type=float, default=100.0, help="train on about so much text, chosen by hash"
    )
    parser.add_argument("--text-field", default="text", help="key of the text in a line of .jsonl")
    parser.add_argument("--text-suffix", nargs="+", default=[".txt"], help="plain files to take from folders")
    parser.add_argument("--document-separator", help="text between documents of a plain file")
    args = parser.parse_args()
    options = TextOptions(args.text_field, args.document_separator, tuple(args.text_suffix))
    try:
        texts = sample_texts(args.input, options, max_bytes=int(args.max_mib * 2**20))
        tokenizer = train_tokenizer(texts, vocab_size=args.vocab_size, name=" ".join(args.input))
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out / "tokenizer.model")
    except BdtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{out / 'tokenizer.model'}: {tokenizer.vocab_size} ids, sha256 {tokenizer.sha256[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
