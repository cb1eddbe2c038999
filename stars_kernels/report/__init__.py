"""Reports: what a run did, as one HTML page that needs nothing else."""

from stars_kernels.report.page import write_report
from stars_kernels.report.source import Row, Run, read_runs

__all__ = ["Row", "Run", "read_runs", "write_report"]
