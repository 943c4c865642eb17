"""This package writes HTML pages that open offline, with curves (`write_report`) or a run's tokens (`run_report`)."""

from rlloss.report.charts import Arm as Arm
from rlloss.report.charts import Panel as Panel
from rlloss.report.charts import Table as Table
from rlloss.report.charts import make_folder as make_folder
from rlloss.report.charts import replace_file as replace_file
from rlloss.report.charts import smooth as smooth
from rlloss.report.charts import ticks as ticks
from rlloss.report.charts import write_report as write_report
