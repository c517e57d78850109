"""A run's folder made of numbers that a test knows, and a reader of the page that is made of it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

from bdtrain.tracking.jsonl import MetricsLog
from bdtrain.tracking.report import write_report
from bdtrain.tracking.report.read import BOOT_ID

VOID = {"meta", "input", "br"}
CONFIG = """\
run: {name: trial}
model: {shape: qwen3, num_layers: 2, hidden_size: 16, num_heads: 2, num_kv_heads: 1, head_dim: 8,
  ffn_size: 32, vocab_size: 128, vocab_multiple: 128}
diffusion: {algo: block_diffusion, block_size: 4}
train: {steps: 20, global_batch_size: 4, precision: fp32}
data: {kind: corpus, path: some/corpus, seq_len: 64}
parallel: {tp: 1, pp: 1, zero_stage: 1}
tracking: {mlflow: true, mlflow_uri: "http://someone:secret-word@server:5000"}
"""


class Page(HTMLParser):
    """Collects elements, the text inside each kind, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def lines(self, metric: str, axis: str = "steps") -> list[tuple[float, float]]:
        """Corners of a metric's curve on one axis."""
        inside, shown = False, False
        for tag, attributes in self.tags:
            if tag == "figure":
                inside = attributes["data-metric"] == metric
            elif tag == "svg":
                shown = attributes["class"] == f"on-{axis}"
            elif tag == "polyline" and inside and shown:
                pairs = (attributes["points"] or "").split()
                return [tuple(map(float, pair.split(","))) for pair in pairs]  # type: ignore[misc]
        return []

    def plotted(self) -> dict[str, dict[str, list[float]]]:
        return json.loads(next(text for text in self.texts["script"] if text.startswith("{")))


def train_line(step: int, loss: float) -> dict[str, float]:
    return {
        "train/loss": loss,
        "train/grad_norm": 0.5 + 1 / (1 + step),
        "train/lr": 1e-3,
        "train/tokens": 100 * step,
        "perf/tokens_per_second": 1000.0 + step,
        "perf/cpu_seconds": 2.0 * step,
        "fault/skipped_steps": 0,
    }


def validation_line(nelbo: float) -> dict[str, float]:
    return {
        "val/nelbo": nelbo,
        "val/nelbo_noise_error": 0.03,
        "val/nelbo_text_error": 0.04,
        "val/ppl": math.exp(nelbo),
        "val/bpb": nelbo / 2,
        "val/tokens": 5000,
    }


def make_run(folder: Path, *, steps: int = 20, end: str | None = "end") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "run.json").write_text(json.dumps({"run_uid": "u", "tokenizer": {"vocab_size": 128}}))
    with MetricsLog(folder / "metrics.jsonl", 1) as log:
        log.event("start", 0, world_size=2, torch="9", host="here")
        log.write(0, validation_line(5.0))
        for step in range(1, steps + 1):
            log.write(step, train_line(step, 5.0 - 2 * step / steps))
        log.write(steps, validation_line(3.0))
        if end is not None:
            log.event(end, steps, reason="finished" if end == "end" else "SIGTERM")
    if end is not None:
        reason = "finished" if end == "end" else "SIGTERM"
        left = {"reason": reason, "step": steps, "resumable": end != "end", "exit_code": 0}
        (folder / "EXIT.json").write_text(json.dumps(left))
    return folder


def read_page(folder: Path) -> tuple[Page, str]:
    content = write_report(folder).read_text(encoding="utf-8")
    return Page(content), content


def live_lock(folder: Path, pid: int) -> None:
    machine = BOOT_ID.read_text().strip() if BOOT_ID.exists() else None
    (folder / ".lock").write_text(json.dumps({"host": "h", "machine": machine, "pid": pid, "since": 0}))
