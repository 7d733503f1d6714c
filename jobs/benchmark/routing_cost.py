"""Measures what routing costs beside what one would pick instead: time and memory of a forward pass, on the CPU.

python -m jobs.benchmark routing --quick

- Time: each method takes turns with one LoRA in PEFT; a ratio is between the medians of the same rounds.
- Memory: the largest number of bytes at once beyond those before the pass, in a pass apart from the timed ones.
- One method stands in memory at a time. What would not fit, or take too long, is recorded with the reason.
- The summary is written after every method: an interrupted run leaves what it measured.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jobs.benchmark.tools.methods import (
    METHODS,
    MODELS,
    PROMPT,
    RANK,
    Method,
    Routed,
    Step,
    Workload,
    build,
    linear_widths,
)
from jobs.endings import user_errors
from jobs.terminal import Terminal, table
from pipeline.config import ConfigError
from pipeline.evaluation.plots import CYCLE, MUTED, OURS
from pipeline.files import write_json
from pipeline.provenance import now, provenance

SIZES = "internvl2_2b,tiny,2048x2048,2048x8192,8192x2048"
EXPERTS = "1,2,4,10,32,64,128,256,1000"
QUICK_SIZES, QUICK_EXPERTS = "tiny", "1,4,10"
ROUNDS, SHORTEST = 7, 0.3
"""Rounds of a measurement where they fit into its time, and the seconds that quick ones go on for."""
PACKAGES = ("torch", "transformers", "peft")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PHASES = {PROMPT: f"prefill of {PROMPT} tokens", 1: f"decoding one token after {PROMPT}"}

Result = dict[str, Any]
Cell = tuple[str, int, str]
"""A size, a number of experts, a method."""


def routing(
    sizes: Annotated[
        str | None,
        typer.Option(
            help=f"One layer of these models ({', '.join(MODELS)}) or Linears of these widths (2048x8192).",
            show_default=SIZES,
        ),
    ] = None,
    experts: Annotated[str | None, typer.Option(help="Numbers of experts.", show_default=EXPERTS)] = None,
    methods: Annotated[str, typer.Option(help="What to measure.")] = ",".join(METHODS),
    quick: Annotated[
        bool, typer.Option("--quick", help=f"Only --sizes {QUICK_SIZES} --experts {QUICK_EXPERTS}, half a minute.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Time for one measurement. A pass that takes twice as long is skipped.", min=0.01)
    ] = 3.0,
    memory_gb: Annotated[float, typer.Option(help="Skip what needs more memory than this, in GB (1e9 bytes).")] = 8.0,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.", min=1)] = 2,
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(DTYPES)}, for base, LoRA and inputs.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of weights and inputs.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of summary.json and routing.png.")] = Path(
        "runs/benchmark-routing"
    ),
) -> None:
    """What routing costs: this project's routers beside PEFT's ways to have several experts.

    Engines: single (one LoRA in PEFT: the floor of all ratios), arrow (PEFT's Arrow, top 2), xlora (PEFT's X-LoRA), mixed
    (PEFT's mixed batches: the user names the expert); token_phatgoose, token, prompt and two_level (this project's
    routers). All adapt the same Linears with the same LoRA weights of rank 16.

    Prefill reads a prompt of 512 tokens, decoding one token after it with the KV cache. X-LoRA runs the model twice and
    cannot cache: its decoding reads all 513 tokens, as its users have to.

    On a model, prefill with this project's routers includes the whole decision, from the prompt's features on: one layer
    pays here for what all layers of a base share. decision_seconds is its own time. While decoding the decision is held;
    so it is on a single Linear. token always mixes two experts here and two_level three, their dearest case; the cheap one
    is prompt.

    Results: a table of ratios, summary.json and routing.png. The whole run takes about 15 minutes on two cores.
    """
    terminal = Terminal()
    with user_errors():
        chosen = _names(sizes or (QUICK_SIZES if quick else SIZES))
        for size in chosen:
            if size not in MODELS:
                linear_widths(size)
        numbers = _numbers(experts or (QUICK_EXPERTS if quick else EXPERTS))
        wanted = _names(methods)
        for method in wanted:
            _check_name("--methods", method, METHODS)
        _check_name("--dtype", dtype, DTYPES)
        cells = cells_of(chosen, numbers, wanted)
        if not cells:
            raise ConfigError(f"--methods {methods}: runs on whole models only; add --sizes {', '.join(MODELS)}")
    torch.set_num_threads(threads)
    summary: dict[str, Any] = {
        **provenance("benchmark routing", now(), seed=seed, packages=PACKAGES),
        "threads": threads,
        "dtype": dtype,
        "memory_gb": memory_gb,
        "results": [],
    }
    results: list[Result] = summary["results"]
    file = output / "summary.json"
    measuring = Measuring(DTYPES[dtype], seed, seconds=seconds, memory_gb=memory_gb)
    for cell in _shown(cells, terminal):
        results += measuring.cell(*cell)
        write_json(file, summary)
    for size in chosen:
        for tokens in PHASES:
            _show(terminal, results, size, tokens)
    terminal.log(f"summary    {file}")
    model = next((size for size in (*MODELS, *chosen) if size in MODELS and size in chosen), None)
    if model is not None:
        file = output / "routing.png"
        ratios_over_experts(results, model).savefig(file, dpi=100)
        terminal.log(f"plot       {file}")


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(text: str) -> list[int]:
    names = _names(text)
    if not names or not all(name.isdecimal() and int(name) > 0 for name in names):
        raise ConfigError(f"--experts {text}: must be numbers from 1, e.g. 1,10,64")
    return sorted({int(name) for name in names})


def _check_name(option: str, name: str, names: Mapping[str, object]) -> None:
    if name not in names:
        raise ConfigError(f"{option}: no {name!r}; known: {', '.join(names)}")


def cells_of(sizes: Sequence[str], experts: Sequence[int], methods: Sequence[str]) -> list[Cell]:
    """Returns what to measure: `single` once a size, X-LoRA on models only."""
    cells: list[Cell] = []
    for size in sizes:
        if "single" in methods:
            cells.append((size, 1, "single"))
        fit = [name for name in methods if name != "single" and (size in MODELS or name != "xlora")]
        cells += [(size, number, name) for number in experts for name in fit]
    return cells


class Measuring:
    """Measures cells, those of one size after the other."""

    def __init__(self, dtype: torch.dtype, seed: int, *, seconds: float, memory_gb: float) -> None:
        self.dtype, self.seed, self.seconds, self.memory_gb = dtype, seed, seconds, memory_gb
        self._workload: Workload | None = None
        self._seen: dict[tuple[str, str, int], list[tuple[int, float]]] = defaultdict(list)
        """By size, method and tokens: numbers of experts and median seconds so far."""

    @torch.inference_mode()
    def cell(self, size: str, experts: int, name: str) -> list[Result]:
        """Returns the results of prefill and of decoding."""
        if self._workload is None or self._workload.name != size:
            self._workload = Workload(size, dtype=self.dtype, seed=self.seed)
            self._floor = build("single", self._workload, 1)
        workload = self._workload
        reasons = {tokens: self._too_much(workload, experts, name, tokens) for tokens in PHASES}
        if workload.is_model and reasons[PROMPT]:  # decoding comes after a prefill
            reasons[1] = reasons[1] or reasons[PROMPT]
        method = None if all(reasons.values()) else build(name, workload, experts)
        decision = {}
        if isinstance(method, Routed) and workload.is_model:
            (times,) = interleave([Step(method.decide, lambda: None)], self.seconds)
            decision = {"decision_seconds": median(times)}
        results = []
        for tokens, reason in reasons.items():
            result: Result = {"method": name, "size": size, "experts": experts, "tokens": tokens}
            result |= {"width_in": workload.width_in, "width_out": workload.width_out, "rank": RANK}
            if method is None or reason is not None:
                result |= {"seconds_median": None, "ratio_to_single": None, "extra_bytes": None, "skipped": reason}
            else:
                result |= self._measured(method, tokens) | decision
                self._seen[size, name, tokens].append((experts, result["seconds_median"]))
            results.append(result)
        return results

    def _measured(self, method: Method, tokens: int) -> Result:
        ours, floor = method.step(tokens), self._floor.step(tokens)
        extra_bytes = peak_bytes(ours.run)
        ours.reset()
        floor.run()
        floor.reset()
        times, floor_times = interleave([ours, floor], self.seconds)
        result: Result = {
            "seconds_median": median(times),
            "single_seconds_median": median(floor_times),
            "ratio_to_single": median(times) / median(floor_times),
            "extra_bytes": extra_bytes,
            "rounds": len(times),
        }
        if tokens == 1 and method.workload.is_model and not method.caches:
            result["note"] = f"no KV cache: reads all {PROMPT + 1} tokens"
        return result

    def _too_much(self, workload: Workload, experts: int, name: str, tokens: int) -> str | None:
        """Returns why a measurement must be skipped: for memory as computed, for time as it grew so far."""
        resident, more = (size / 1e9 for size in workload.memory_bytes(name, experts, tokens))
        if resident + more > self.memory_gb:
            return (
                f"needs about {resident + more:.2g} GB (weights {resident:.2g}, during the pass {more:.2g}), "
                f"more than --memory-gb {self.memory_gb:g}"
            )
        match self._seen[workload.name, name, tokens][-2:]:
            case [(fewer, before), (number, seconds)]:
                expected = seconds + max(0.0, seconds - before) / (number - fewer) * (experts - number)
                if expected > 2 * self.seconds:
                    return (
                        f"one pass would take about {expected:.2g} s ({seconds:.2g} s with {number} experts, "
                        f"{before:.2g} s with {fewer}), more than twice --seconds {self.seconds:g}"
                    )
        return None


def interleave(steps: Sequence[Step], seconds: float) -> list[list[float]]:
    """Returns each step's times in the same rounds: `ROUNDS` of them, more where they are short, fewer after `seconds`."""
    times: list[list[float]] = [[] for _ in steps]
    turns = list(zip(steps, times, strict=True))
    started = perf_counter()
    spent = 0.0
    while not times[0] or (spent < seconds and (len(times[0]) < ROUNDS or spent < SHORTEST)):
        turns.reverse()  # nobody always comes second
        for step, seconds_of_step in turns:
            begun = perf_counter()
            step.run()
            seconds_of_step.append(perf_counter() - begun)
            step.reset()
        spent = perf_counter() - started
    return times


class Allocations(TorchDispatchMode):
    """Follows the tensors that operators make, those that composed operators make inside too, until they are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs one operator; a storage that it returns and was not given is new."""
        returned = func(*args, **(kwargs or {}))
        given = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(returned):
            if id(storage) not in given and id(storage) not in self._storages:
                gone = partial(self._gone, id(storage), storage.nbytes())
                self._storages[id(storage)] = weakref.ref(storage, gone)
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return returned

    def _gone(self, key: int, size: int, reference: object) -> None:
        self.live -= size
        del self._storages[key]


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def peak_bytes(run: Callable[[], object]) -> int:
    """Returns the largest number of bytes of tensors at once, beyond those before, while `run` runs.

    Counts storages from the operator that makes them until they are freed. Scratch memory inside one operator is not
    seen; on the CPU the methods here have none to speak of: PyTorch's profiler counts the same.
    """
    with Allocations() as allocations:
        run()
    return allocations.peak


def _shown(cells: Sequence[Cell], terminal: Terminal) -> Iterator[Cell]:
    """Yields the cells with a bar on a terminal, or with a line for each size and number of experts."""
    columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    plain, last = not terminal.console.is_terminal, ""
    with Progress(*columns, console=terminal.console, transient=True, disable=plain) as progress:
        bar = progress.add_task("", total=len(cells))
        for cell in cells:
            size, experts, method = cell
            now_at = f"{size}, {experts} experts"
            progress.update(bar, description=f"{now_at}: {method}")
            if plain and now_at != last:
                terminal.log(f"  {now_at} ...")
            last = now_at
            yield cell
            progress.advance(bar)


def _show(terminal: Terminal, results: Sequence[Result], size: str, tokens: int) -> None:
    """Prints the ratios of one size: methods by experts, and why any are missing."""
    here = [r for r in results if r["size"] == size and r["tokens"] == tokens]
    floors = [r["single_seconds_median"] for r in here if r["seconds_median"] is not None]
    floor = f" ({1e3 * median(floors):.3g} ms)" if floors else ""
    routed = [r for r in here if r["method"] != "single"]
    ratios = {(r["method"], r["experts"]): r["ratio_to_single"] for r in routed}
    numbers = sorted({number for _, number in ratios})
    rows = []
    for method in dict.fromkeys(method for method, _ in ratios):
        values = [ratios[method, number] for number in numbers]
        rows.append([method, *("-" if value is None else f"{value:.2f}" for value in values)])
    terminal.log(f"{size}, {PHASES[tokens]}: time by number of experts, one LoRA = 1{floor}", "bold")
    if rows:
        terminal.console.print(table("", ["method", *map(str, numbers)], rows))
    for r in here:
        if "skipped" in r:
            terminal.log(f"  {r['method']}, {r['experts']} experts: {r['skipped']}")


def ratios_over_experts(results: Sequence[Result], size: str) -> Figure:
    """Draws the ratios of a model over the number of experts: a panel for prefill, one for decoding."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, len(PHASES), sharey=True)
    names = [name for name in METHODS if name != "single"]
    numbers = sorted({r["experts"] for r in results if r["size"] == size})
    for axes, (tokens, phase) in zip(panels, PHASES.items(), strict=True):
        for name, colour in zip(names, CYCLE, strict=False):
            points = [
                (r["experts"], r["ratio_to_single"])
                for r in results
                if (r["size"], r["tokens"], r["method"]) == (size, tokens, name) and r["ratio_to_single"] is not None
            ]
            if points:
                style = "o-" if name in OURS else "s--"
                axes.plot(*zip(*points, strict=True), style, color=colour, label=name, markersize=4)
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.set(xscale="log", yscale="log", title=f"{size}, {phase}", xlabel="experts")
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both", axis="y")
    panels[0].set_ylabel("time of a pass, one LoRA = 1")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend()
    return figure
