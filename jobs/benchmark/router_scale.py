"""Measures the prompt router alone, from features of synthetic tasks: what ten to ten thousand experts cost, at two widths.

    python -m jobs.benchmark routers

A synthetic task is a Gaussian of its own: a mean, 16 directions in which its prompts vary much, and a spread of each feature;
base prompts are twelve others. Every fourth is of text alone, the others always have an image, so that no prompt is of a kind
that all experts have seen. All are drawn from seeds, and so are the scatters of a pool (five gigabytes on disk at 10,000
experts and 512 features, 47 at 1,536), again whenever the router asks for one. Experts that are added and removed lie in files,
as those of a pool do. Shapes: N prompts, F features.
"""

import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from jobs.terminal import Terminal, table
from pipeline.files import write_json
from pipeline.provenance import now, provenance
from pipeline.routing import coarse
from pipeline.routing.features import text_width
from pipeline.routing.null import components
from pipeline.routing.pooled import PooledStatistics
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.routes import NULL_EXPERT
from pipeline.routing.serialization import (
    StoredStatistics,
    read_scatter,
    read_statistics,
    statistics_tensors,
    write_tensors,
)
from pipeline.routing.statistics import PromptStatistics, upper_half

EXPERTS = (10, 100, 1000, 10_000)
WIDTHS = {"routers": 512, "routers_1536": 1536}
"""Features by key of the summary."""
ROWS, BASE_ROWS = 128, 1200
"""Prompts that a task's statistics, and those of the null expert, are taken of."""
COMPONENTS = 12
"""Kinds of base prompts, and components of the null expert."""
APART = 2.0
"""Deviation of a task's mean from that of all, in deviations of a feature within a task."""
DIRECTIONS = 16
ASKED, BASE_ASKED = 100, 40
"""Prompts of tasks, and base prompts, whose decisions are measured; one at a time."""
CHANGES = 12
"""Experts that are added, and removed."""
TEXT_ALONE = 4
"""One in so many tasks, and kinds of base prompts, has no images."""
PIECE = 250
"""Tasks whose scatters are summed in one product."""


def router_alone(output: Path, terminal: Terminal) -> None:
    """Measures both widths, writes `summary.json` below `output` after each, and shows the figures."""
    summary: dict[str, Any] = provenance("benchmark routers", now(), packages=("torch",))
    for key, width in WIDTHS.items():
        terminal.log(f"{width} features", "bold")
        summary[key] = measure(width, EXPERTS, terminal.log)
        write_json(output / "summary.json", summary)
        rows = [
            [f"{int(count):,}", *(f"{f[name]:.3f}" for name in ("accuracy", "base_accuracy", "decided_in_few_features")),
             *(f"{1000 * f[name]:.1f}" for name in ("seconds", "seconds_99_percent", "add_seconds", "remove_seconds")),
             f"{f['bytes'] / 1e9:.3f}", f"{f['memory_bytes'] / 1e9:.2f}"]
            for count, f in summary[key].items()
        ]  # fmt: skip
        header = [
            "experts",
            "tasks",
            "base",
            "few features",
            "ms a decision",
            "99 %",
            "ms to add",
            "to remove",
            "GB on disk",
            "memory",
        ]
        terminal.console.print(table(f"The prompt router, {width} features", header, rows))
    terminal.log(f"summary    {output / 'summary.json'}")


class SyntheticTasks:
    """Tasks by number, each drawn from its own seed; negative numbers are kinds of base prompts."""

    def __init__(self, width: int) -> None:
        self.width = width

    def prompts(self, number: int, count: int, *, part: int = 0) -> Tensor:
        """Returns prompts (N, F) of a task, others for another `part`."""
        task = torch.Generator().manual_seed(2 * (number + COMPONENTS))
        mean_F = APART * torch.randn(self.width, generator=task)
        spread_F = torch.rand(self.width, generator=task) + 0.5
        mixing_KF = torch.randn(DIRECTIONS, self.width, generator=task) / DIRECTIONS**0.5
        own = torch.Generator().manual_seed(2 * ((number + COMPONENTS) * 16 + part) + 1)
        along_NK, noise_NF = (torch.randn(count, n, generator=own) for n in (DIRECTIONS, self.width))
        x_NF = mean_F + along_NK @ mixing_KF + spread_F * noise_NF
        if self.with_image(number) == 0:
            x_NF[:, text_width(self.width) :] = 0
        return x_NF

    def with_image(self, number: int) -> int:
        """Returns how many of the prompts that statistics are taken of have an image."""
        return 0 if number % TEXT_ALONE == TEXT_ALONE - 1 else ROWS

    def statistics(self, number: int) -> PromptStatistics:
        """Returns what a task leaves behind; its scatter is drawn again when it is asked for."""
        mean_F = self.prompts(number, ROWS).double().mean(0)
        return self.described(number, mean_F)

    def described(self, number: int, mean_F: Tensor) -> PromptStatistics:
        """Returns the same of a mean that somebody has."""
        return PromptStatistics(ROWS, mean_F, partial(self.scatter, number), with_image=self.with_image(number))

    def scatter(self, number: int) -> Tensor:
        """Draws a task's scatter (F, F)."""
        x_NF = self.prompts(number, ROWS).double()
        centred_NF = (x_NF - x_NF.mean(0)).float()
        return (centred_NF.T @ centred_NF).double()

    @cached_property
    def null(self) -> tuple[PromptStatistics, ...]:
        """The components of the null expert."""
        kinds = [self.prompts(-kind - 1, BASE_ROWS // COMPONENTS) for kind in range(COMPONENTS)]
        return components(torch.cat(kinds), COMPONENTS)


def measure(width: int, experts: Sequence[int], log: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Returns the figures by number of experts, for one width F. Pools of several sizes share the first ones' experts."""
    tasks, results = SyntheticTasks(width), dict[str, Any]()
    statistics: list[PromptStatistics] = []
    few: list[PromptStatistics] = []
    pooled = PooledStatistics.of(tasks.null)
    with TemporaryDirectory() as folder:
        files = [_stored(tasks, max(experts) + i, Path(folder)) for i in range(CHANGES)]
        new, size = (
            [StoredStatistics(partial(read_statistics, file), partial(read_scatter, file)) for file in files],
            files[0].stat().st_size,
        )
        for count in experts:
            began = perf_counter()
            pooled = _summed(tasks, statistics, few, pooled, count)
            prepared = perf_counter() - began
            began = perf_counter()
            router = PromptRouter(statistics, tasks.null, pooled=pooled, few=few)
            assert router.gaussians is not None
            router.choices(tasks.prompts(0, 1))
            opened = perf_counter() - began
            results[str(count)] = {
                "width": width,
                **_decisions(tasks, router, count),
                **_changes(tasks, router, new),
                "bytes": count * size,
                "bytes_per_expert": size,
                "solve_seconds": opened,
                "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
            log(f"  {count} experts, {width} features: drawn in {prepared:.0f} s, then {perf_counter() - began:.0f} s")
    return results


def _stored(tasks: SyntheticTasks, number: int, folder: Path) -> Path:
    """Writes a task's statistics as an expert's are; returns the file."""
    file = folder / f"{number}.safetensors"
    write_tensors(file, statistics_tensors(tasks.statistics(number)))
    return file


def _summed(
    tasks: SyntheticTasks,
    statistics: list[PromptStatistics],
    few: list[PromptStatistics],
    pooled: PooledStatistics,
    count: int,
) -> PooledStatistics:
    """Appends tasks until there are `count`, and returns their sums: many scatters in one product, or it would take an hour."""
    for start in range(len(statistics), count, PIECE):
        numbers = range(start, min(start + PIECE, count))
        x_PNF = torch.stack([tasks.prompts(number, ROWS) for number in numbers])
        mean_PF = x_PNF.double().mean(1)
        centred_PNF = (x_PNF.double() - mean_PF[:, None]).float()
        within_FF = (centred_PNF.flatten(0, 1).T @ centred_PNF.flatten(0, 1)).double()
        means = PromptStatistics.of(mean_PF)
        joined = pooled + replace(means, count=ROWS * means.count, scatter=within_FF + ROWS * means.scatter_FF)
        pooled = replace(joined, scatter_FF=pooled.scatter_FF + within_FF)  # each about its own mean
        few_PNX = coarse.projected(centred_PNF.flatten(0, 1)).view(len(numbers), ROWS, -1)
        new = [tasks.described(number, mean_F) for number, mean_F in zip(numbers, mean_PF, strict=True)]
        few += coarse.unpacked(new, (few_PNX.mT @ few_PNX)[:, *upper_half(coarse.WIDTH)].float())
        statistics += new
    return pooled


def _decisions(tasks: SyntheticTasks, router: PromptRouter, count: int) -> dict[str, Any]:
    """Measures decisions on one prompt at a time: of tasks all over the pool, and base prompts."""
    numbers = [i * count // ASKED for i in range(ASKED)]
    rows = [(n, tasks.prompts(n, 1, part=1 + i % 8)) for i, n in enumerate(numbers)]
    rows += [(NULL_EXPERT, tasks.prompts(-1 - i % COMPONENTS, 1, part=1 + i // COMPONENTS)) for i in range(BASE_ASKED)]
    right, seconds = list[bool](), list[float]()
    for number, x_1F in rows:
        began = perf_counter()
        chosen = int(router.choices(x_1F))
        seconds.append(perf_counter() - began)
        right.append(chosen == number)
    slowest = sorted(seconds)[int(0.99 * len(seconds))]
    few = 1.0
    if router.few is not None:
        x_BP = coarse.projected(torch.cat([x_1F for _, x_1F in rows]))
        _, lead_B2 = router.ranked(router.few, x_BP, 2, reject=False)
        few = float((lead_B2[:, 1] <= -coarse.CERTAIN).double().mean())
    return {
        "decided_in_few_features": few,
        "seconds": fmean(seconds),
        "seconds_median": median(seconds),
        "seconds_99_percent": slowest,
        "accuracy": fmean(right[:ASKED]),
        "base_accuracy": fmean(right[ASKED:]),
    }


def _changes(tasks: SyntheticTasks, router: PromptRouter, new: Sequence[PromptStatistics]) -> dict[str, Any]:
    """Measures adding experts one after the other, deciding after each, and removing them again."""
    seconds: dict[str, list[float]] = {"add": [], "first_decision": [], "remove": []}
    x_1F = tasks.prompts(0, 1, part=9)
    for statistics in new:
        began = perf_counter()
        router = router.insert(len(router.experts), statistics)
        added = perf_counter()
        router.choices(x_1F)
        seconds["add"].append(added - began)
        seconds["first_decision"].append(perf_counter() - added)
    for _ in new:
        began = perf_counter()
        router = router.remove(len(router.experts) - 1)
        seconds["remove"].append(perf_counter() - began)
    return {f"{what}_seconds": median(values) for what, values in seconds.items()} | {
        f"{what}_seconds_max": max(values) for what, values in seconds.items()
    }
