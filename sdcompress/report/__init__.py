"""From a run's files to a page a person looks at."""

from sdcompress.report.page import not_measured, picture_quality, write_report

__all__ = ["not_measured", "picture_quality", "write_report"]
