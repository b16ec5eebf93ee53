"""Report: a finished or running study as one page that can be sent to anybody.

What lives here: `write_report`, which reads trial records and plain JSON beside them and writes `report.html` (one
self-contained file, no network), `report.md` and `trials.csv`. What may not: running, measuring or deciding anything;
deleting this folder breaks nothing but the page.
"""

from fivefold.report.write import write_report as write_report
