"""From a run's files to a page a person looks at."""

from sdcompress.report.page import write_report

__all__ = ["write_report"]
