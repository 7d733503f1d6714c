"""The accuracy matrix of a stream and the continual-learning metrics computed from it.

- Rows: the state of the pool, "base" and then "after task t"; columns: the tasks, then the base abilities.
- Cells may be empty (not evaluated); every metric skips them.
- In the formulas A[i, j] is the accuracy on column j after task i, row 0 is the base, T the last row with values.
- Independent of models and files; `to_json` is the form in `summary.json`.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

BASE = "base"
"""Name of row 0, and of the choice "no expert" in routing."""

LOPEZ_PAZ = "Lopez-Paz & Ranzato 2017, arXiv 1706.08840"
CHAUDHRY = "Chaudhry et al. 2018, arXiv 1801.10112"

FORMULAS: dict[str, tuple[str, str]] = {
    "average_accuracy": ("ACC = 1/T · Σ_{j=1..T} A[T, j]", LOPEZ_PAZ),
    "backward_transfer": ("BWT = 1/(T-1) · Σ_{j=1..T-1} (A[T, j] - A[j, j])", LOPEZ_PAZ),
    "forgetting": ("F = 1/(T-1) · Σ_{j=1..T-1} (max_{l=1..T-1} A[l, j] - A[T, j])", CHAUDHRY),
    "base_retention": ("FR = Σ_f A[T, f] / Σ_f A[0, f], f over the base abilities", "this project"),
    "routing_accuracy": ("RA = 1/N · Σ_p [expert(p) = own(p)], own: the task's expert, or base", "this project"),
}
"""Metric -> (formula, source); the report prints them. RA runs over all N prompts p of an evaluation."""


class AccuracyMatrix:
    """Accuracy on every column (fractions in [0, 1]) after every task of a stream."""

    def __init__(self, tasks: Sequence[str], benchmarks: Sequence[str] = ()) -> None:
        """An empty matrix. Raises ValueError if a name occurs twice or is "base"."""
        self.tasks, self.benchmarks = list(tasks), list(benchmarks)
        self.rows, self.columns = [BASE, *self.tasks], [*self.tasks, *self.benchmarks]
        names = [BASE, *self.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"accuracy matrix: names of tasks and benchmarks must differ; twice: {', '.join(twice)}")
        self._values: dict[tuple[str, str], float] = {}

    def record(self, row: str, accuracies: Mapping[str, float]) -> None:
        """Enters (or replaces) the accuracies {column: fraction} measured after `row`."""
        for column, accuracy in accuracies.items():
            self._check(row, column)
            if not 0.0 <= accuracy <= 1.0:
                raise ValueError(f"accuracy matrix: [{row}, {column}] must be a fraction in [0, 1], found {accuracy!r}")
            self._values[row, column] = float(accuracy)

    def value(self, row: str, column: str) -> float | None:
        """Returns the accuracy on `column` after `row`, or None where nothing was evaluated."""
        self._check(row, column)
        return self._values.get((row, column))

    @property
    def last(self) -> int:
        """T: index of the last row that has values; 0 as long as only the base was evaluated."""
        return max((self.rows.index(row) for row, _ in self._values), default=0)

    def to_json(self) -> dict[str, Any]:
        """Returns the plain form that `summary.json` holds under `accuracy_matrix`."""
        values = [[self._values.get((row, column)) for column in self.columns] for row in self.rows]
        names = {"rows": self.rows, "columns": self.columns, "tasks": self.tasks, "benchmarks": self.benchmarks}
        return {key: list(value) for key, value in names.items()} | {"values": values}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "AccuracyMatrix":
        """Reads what `to_json` wrote. Raises ValueError where names and values do not fit together."""
        plain = {"benchmarks" if key == "foundation" else key: value for key, value in plain.items()}  # the former key
        if missing := sorted({"rows", "columns", "tasks", "benchmarks", "values"} - set(plain)):
            raise ValueError(f"accuracy matrix: missing {', '.join(missing)}")
        matrix = cls(plain["tasks"], plain["benchmarks"])
        if list(plain["rows"]) != matrix.rows or list(plain["columns"]) != matrix.columns:
            raise ValueError("accuracy matrix: rows must be base + tasks, columns must be tasks + benchmarks")
        if len(plain["values"]) != len(matrix.rows):
            raise ValueError(f"accuracy matrix: {len(matrix.rows)} rows need as many rows of values")
        for row, values in zip(matrix.rows, plain["values"], strict=True):
            if len(values) != len(matrix.columns):
                raise ValueError(f"accuracy matrix: row {row!r} has {len(values)} values, {len(matrix.columns)} needed")
            pairs = zip(matrix.columns, values, strict=True)
            matrix.record(row, {column: value for column, value in pairs if value is not None})
        return matrix

    def _check(self, row: str, column: str) -> None:
        if row not in self.rows:
            raise ValueError(f"accuracy matrix: no row {row!r}; rows: {', '.join(self.rows)}")
        if column not in self.columns:
            raise ValueError(f"accuracy matrix: no column {column!r}; columns: {', '.join(self.columns)}")


def average_accuracy(matrix: AccuracyMatrix) -> float | None:
    """Mean accuracy after the last task over the tasks learned so far; None if none of them was evaluated.

        ACC = 1/T · Σ_{j=1..T} A[T, j]

    Source: Lopez-Paz & Ranzato 2017, arXiv 1706.08840, equation 2.
    """
    learned = matrix.tasks[: matrix.last]
    return _mean(matrix.value(matrix.rows[matrix.last], task) for task in learned)


def backward_transfer(matrix: AccuracyMatrix) -> float:
    """Mean change of a task's accuracy since it was learned; negative means forgetting, 0.0 for fewer than two tasks.

        BWT = 1/(T-1) · Σ_{j=1..T-1} (A[T, j] - A[j, j])

    Source: Lopez-Paz & Ranzato 2017, arXiv 1706.08840, equation 3.
    """
    last = matrix.rows[matrix.last]
    pairs = [(matrix.value(last, task), matrix.value(task, task)) for task in matrix.tasks[: max(matrix.last - 1, 0)]]
    return _mean(now - then for now, then in pairs if now is not None and then is not None) or 0.0


def forgetting(matrix: AccuracyMatrix) -> float:
    """Mean loss against the best accuracy a task ever had before the last one; 0.0 for fewer than two tasks.

        F = 1/(T-1) · Σ_{j=1..T-1} (max_{l=1..T-1} A[l, j] - A[T, j])

    Source: Chaudhry et al. 2018, arXiv 1801.10112, section 3 (the base, l = 0, does not take part).
    """
    last = matrix.rows[matrix.last]
    losses = []
    for task in matrix.tasks[: max(matrix.last - 1, 0)]:
        earlier = [matrix.value(row, task) for row in matrix.rows[1 : matrix.last]]
        best = max((value for value in earlier if value is not None), default=None)
        now = matrix.value(last, task)
        if best is not None and now is not None:
            losses.append(best - now)
    return _mean(losses) or 0.0


def base_retention(matrix: AccuracyMatrix) -> float | None:
    """Share of the base's accuracy on the base abilities that is retained; 1 means no loss.

        FR = Σ_f A[T, f] / Σ_f A[0, f]      over the benchmarks evaluated in both rows

    A ratio of sums, so that a benchmark on which the base scores near 0 does not dominate. None without benchmarks, or
    if the base scores 0 on all of them. Source: this project.
    """
    last = matrix.rows[matrix.last]
    pairs = [(matrix.value(last, benchmark), matrix.value(BASE, benchmark)) for benchmark in matrix.benchmarks]
    both = [(now, before) for now, before in pairs if now is not None and before is not None]
    total = sum(before for _, before in both)
    return sum(now for now, _ in both) / total if total > 0 else None


def continual_metrics(matrix: AccuracyMatrix) -> dict[str, float]:
    """Returns the metrics of the matrix by the names in FORMULAS, without undefined ones."""
    values = {
        "average_accuracy": average_accuracy(matrix),
        "backward_transfer": backward_transfer(matrix),
        "forgetting": forgetting(matrix),
        "base_retention": base_retention(matrix),
    }
    return {name: value for name, value in values.items() if value is not None}


def _mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are not None, or None."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None
