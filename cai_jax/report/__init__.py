"""The report of a run: one self-contained HTML file for a reader who has never seen the project."""

from cai_jax.report.page import write_report

__all__ = ["write_report"]
