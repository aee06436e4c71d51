"""One page for one run or several, which needs no network: `python -m pyvene_ext.report --help` says what is on it."""

from pyvene_ext.report.page import write_report
from pyvene_ext.report.run import Run

__all__ = ["Run", "write_report"]
