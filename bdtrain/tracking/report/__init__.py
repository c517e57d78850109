"""``RUN/report.html``: one page on a run, made from its folder alone."""

from bdtrain.tracking.report.page import write_report

__all__ = ["write_report"]
