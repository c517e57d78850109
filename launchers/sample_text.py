"""Generate text from a checkpoint, block by block with a cache."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bdtrain.config import positive_int


def main(arguments: list[str]) -> int:
    """Generate and print.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path, help="folder of a saved model")
    parser.add_argument(
        "--prompt", action="append", help="text to continue; repeat for a batch (default: none)"
    )
    parser.add_argument(
        "--tokens", type=positive_int, default=128, help="tokens to generate at most (default: 128)"
    )
    parser.add_argument(
        "--samples", type=positive_int, default=1, help="continuations of each prompt (default: 1)"
    )
    parser.add_argument(
        "--method",
        default="ancestral",
        choices=["ancestral", "first_hitting", "confidence", "static"],
        help="ancestral: --steps steps a block, as the noise has it (default); first_hitting: one token a "
        "call, exact in continuous time; confidence: all tokens above --threshold; static: equal shares",
    )
    parser.add_argument(
        "--steps", type=positive_int, help="denoising steps per block; one per token if left out"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.9, help="of the method confidence (default: 0.9)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the best token (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus (default: 1, all tokens)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    options = parser.parse_args(arguments)

    from bdtrain.errors import BdtrainError, report_failure

    try:
        from bdtrain.parallel.libraries import prepare_libraries

        prepare_libraries()
        from bdtrain.validation.generation import sample_saved

        texts = sample_saved(
            options.checkpoint,
            prompts=[p for p in (options.prompt or [""]) for _ in range(options.samples)],
            max_tokens=options.tokens,
            method=options.method,
            steps=options.steps,
            threshold=options.threshold,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error)
    for text in texts:
        if options.json:
            print(json.dumps(text.to_dict(), ensure_ascii=False))
        else:
            print(
                f"--- {len(text.tokens)} tokens, {text.network_calls} network calls (one of them for each "
                f"finished block), stopped by {text.stopped_by}"
            )
            print(text.prompt + text.text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
