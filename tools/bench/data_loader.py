"""Speed of the data room: tools/bench/data_loader.py FILE [--seq-len 1024].

Prints MB per CPU-second of preprocessing FILE and million tokens per CPU-second of the loader on the result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bdtrain.data.loader import Loader
from bdtrain.data.preprocess import PreprocessOptions, preprocess
from bdtrain.data.source import TokenSource
from bdtrain.data.text import TextOptions, sample_texts
from bdtrain.data.tokenizer import train_tokenizer
from bdtrain.errors import BdtrainError


def cpu_seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU seconds of this process, threads included, for each repeat."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return times


def spread(amount: float, times: list[float]) -> str:
    """Rate of the fastest repeat, and the range of all."""
    rates = sorted(amount / one for one in times)
    return f"{rates[-1]:.1f} (of {len(rates)}: {rates[0]:.1f} to {rates[-1]:.1f})"


def measure(path: Path, folder: Path, *, vocab_size: int, seq_len: int, samples: int, repeats: int) -> None:
    """Train a tokenizer, preprocess, load; print the rates."""
    options = PreprocessOptions(text=TextOptions(document_separator="\n\n"), valid_fraction=0)
    texts = sample_texts([str(path)], options.text, max_bytes=2**24)
    train_tokenizer(texts, vocab_size=vocab_size, name=str(path)).save(folder / "tokenizer.model")
    outs = iter(range(repeats))
    times = cpu_seconds(
        lambda: preprocess(
            [str(path)], folder / "tokenizer.model", folder / f"corpus{next(outs)}", options=options
        ),
        repeats,
    )
    print(f"preprocess: {spread(path.stat().st_size / 1e6, times)} MB per CPU-second, {vocab_size} ids")
    source = TokenSource(folder / "corpus0", split="train", seq_len=seq_len, seed=0)
    batch = 64
    with Loader(source, global_batch_size=batch) as loader:
        times = cpu_seconds(lambda: [loader.batch(cursor) for cursor in range(0, samples, batch)], repeats)
    print(
        f"loader: {spread(samples * seq_len / 1e6, times)} million tokens per CPU-second, seq_len {seq_len}"
    )


def main() -> int:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description="Measure preprocessing and loading of a text file.")
    parser.add_argument("file", type=Path, help="plain text; blank lines separate its documents")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument(
        "--copies", type=int, default=12, help="repeat a small file: a pass needs some thousand rows"
    )
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16384, help="a multiple of 64")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "text.txt"
            path.write_bytes(args.file.read_bytes() * args.copies)
            measure(
                path,
                Path(folder),
                vocab_size=args.vocab_size,
                seq_len=args.seq_len,
                samples=args.samples,
                repeats=args.repeats,
            )
    except (BdtrainError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
