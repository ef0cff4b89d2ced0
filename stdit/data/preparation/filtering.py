"""`filter`: keep the rows that fulfil a condition."""

from stdit.data.preparation.expressions import column_types, parse_filter
from stdit.data.preparation.flow import RowResult, Task, write_results
from stdit.data.preparation.table import REFUSED


def filter_clips(task: Task, where: str) -> list[str]:
    """Keep the rows for which `where` is true; files are not opened. Returns a summary; raises UserError."""
    table = task.open()
    condition = parse_filter(where, column_types(table.rows, table.columns))
    results = []
    for row in table.rows:
        reason = row.get(REFUSED) or condition.objection(row)
        results.append(RowResult(row, [] if reason else [row], reason))
    return write_results(task, table, results)
