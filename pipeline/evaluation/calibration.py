"""Whether the router's posteriors are what they say: of the choices with a posterior of 0.9, nine in ten should be right.

    ECE = sum over bins b of n_b / N · | right_b / n_b - posterior_b / n_b |

Expected calibration error over 15 bins of equal width (Guo et al. 2017, arXiv 1706.04599); a choice is right where it is the
task's expert, of a base ability the base. Shapes: N prompts.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BINS = 15
"""Bins of equal width between 0 and 1."""


@dataclass(frozen=True)
class Calibration:
    """Choices by their posterior."""

    counts: Sequence[int]
    """Choices in each bin (a bin holds its upper bound)."""
    right: Sequence[int]
    """Those that are right."""
    posteriors: Sequence[float]
    """Sum of their posteriors."""

    @classmethod
    def of(cls, posterior_N: np.ndarray, right_N: np.ndarray) -> "Calibration":
        """Counts choices."""
        bin_N = np.clip(np.ceil(posterior_N * BINS).astype(int) - 1, 0, BINS - 1)
        sums = (np.bincount(bin_N, weights, BINS).tolist() for weights in (None, right_N, posterior_N))
        counts, right, posteriors = sums
        return cls(counts, [int(n) for n in right], posteriors)

    @classmethod
    def sum(cls, parts: Iterable["Calibration"]) -> "Calibration":
        """Returns that of the choices of all parts."""
        rows = [(part.counts, part.right, part.posteriors) for part in parts]
        counts, right, posteriors = (np.sum([row[i] for row in rows], axis=0).tolist() for i in range(3))
        return cls(counts, right, posteriors)

    @property
    def error(self) -> float:
        """The expected calibration error; 0 for no choices."""
        gaps = (abs(right - posterior) for right, posterior in zip(self.right, self.posteriors, strict=True))
        return sum(gaps) / max(sum(self.counts), 1)

    def explain(self, posterior: float) -> str:
        """Says how often choices with a posterior in the same bin were right."""
        place = min(max(int(np.ceil(posterior * BINS)) - 1, 0), BINS - 1)
        interval, count = f"{place / BINS:.0%} to {(place + 1) / BINS:.0%}", self.counts[place]
        if count == 0:
            return f"no evaluated prompt had a posterior of {interval}"
        return f"{self.right[place] / count:.1%} right of {count:,} evaluated prompts with a posterior of {interval}"

    def to_json(self) -> dict[str, Any]:
        """Returns the plain form."""
        return {"counts": list(self.counts), "right": list(self.right), "posteriors": list(self.posteriors)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Calibration":
        """Reads what `to_json` wrote. Raises KeyError or TypeError where it is something else."""
        return cls(plain["counts"], plain["right"], plain["posteriors"])


def calibration_of_run(pool: Path) -> Calibration | None:
    """Returns that of the run whose pool's folder this is, from its `summary.json`; None where there is none."""
    try:
        return Calibration.from_json(json.loads((pool.parent / "summary.json").read_text())["calibration"]["bins"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
