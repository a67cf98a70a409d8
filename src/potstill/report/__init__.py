"""What a run found out: intervals, verdicts, the report page, the model card, the terminal table."""

from potstill.report.build import build_report, report_of, write_report
from potstill.report.card import model_card
from potstill.report.table import print_table
from potstill.study.records import Decoding, MetricInfo, ModelRow, Study, TestRow, load_answers

__all__ = [
    "Decoding",
    "MetricInfo",
    "ModelRow",
    "Study",
    "TestRow",
    "build_report",
    "load_answers",
    "model_card",
    "print_table",
    "report_of",
    "write_report",
]
