"""`filter`: the rows that fulfil a condition."""

from stdit.data.preparation.expressions import column_kinds, parse_condition
from stdit.data.preparation.flow import Result, Task, finish
from stdit.data.preparation.table import REFUSED


def filter_clips(task: Task, where: str) -> list[str]:
    """Keep the rows for which `where` holds; files are not opened. Returns a summary; raises UserError."""
    table = task.open()
    condition = parse_condition(where, column_kinds(table.rows, table.columns))
    results = []
    for row in table.rows:
        reason = row.get(REFUSED) or condition.objection(row)
        results.append(Result(row, [] if reason else [row], reason))
    return finish(task, table, results)
