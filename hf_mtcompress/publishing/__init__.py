"""From the record of a run to what people see: model card, report, picture, repository. No torch in here."""

from hf_mtcompress.publishing.card import render_card
from hf_mtcompress.publishing.hub import PushResult, push_folder
from hf_mtcompress.publishing.lint import lint_card
from hf_mtcompress.publishing.picture import draw_comparison, draw_interference
from hf_mtcompress.publishing.report import report_rows, report_table
from hf_mtcompress.publishing.repository import collect_repository

__all__ = [
    "PushResult",
    "collect_repository",
    "draw_comparison",
    "draw_interference",
    "lint_card",
    "push_folder",
    "render_card",
    "report_rows",
    "report_table",
]
