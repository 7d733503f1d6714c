"""What `plan` prints: parameters, memory by part and moment, hours, disk, and its verdict."""

from typing import Any

from jobs.terminal import Terminal, table
from pipeline.planning.advice import Change, changed, largest_micro_batch
from pipeline.planning.job import EXPERT_STAGE, job_fits, job_moments, served_pool, worst_moment
from pipeline.planning.plan import CONTEXT, FRAGMENTATION, Plan
from pipeline.planning.summary import POOLS


def show(terminal: Terminal, plan: Plan, gpu: str | None, changes: list[Change]) -> None:
    """Prints the plan."""
    for drawn in (_parameters(plan), _memory(plan, gpu), _job(plan, gpu), _time(plan, gpu), _disk(plan)):
        terminal.console.print(drawn)
    for line in _notes(plan):
        terminal.log(line)
    first, *others = verdict(plan, gpu, changes)
    terminal.log(first, "bold green" if job_fits(plan) else "bold red")
    for line in others:
        terminal.log(line)


def _parameters(plan: Plan) -> Any:
    architecture, expert = plan.architecture, plan.config.expert
    rows = [[part, f"{count:,}", "frozen"] for part, count in architecture.parameters.items() if count]
    rows.append(["base", f"{architecture.total:,}", "frozen"])
    adapter = architecture.adapter_parameters(expert.rank)
    rows.append([f"adapter, rank {expert.rank}", f"{adapter:,}", f"trained ({adapter / architecture.total:.2%})"])
    rows.append(["routing vectors", f"{architecture.vector_parameters:,}", "trained after it"])
    kinds = list(dict.fromkeys(linear.path.rpartition(".")[2] for linear in architecture.adapted))
    title = f"{plan.config.base.label}: {len(architecture.adapted)} Linears adapted ({', '.join(kinds)})"
    return table(title, ["parameters", "count", ""], rows)


def _memory(plan: Plan, gpu: str | None) -> Any:
    """Both rows' peaks by part, and all moments' totals below."""
    columns = {"typical row": plan.typical, "longest row": plan.longest}
    moments = {name: plan.moments(row) for name, row in columns.items()}
    peaks = {name: plan.peak(row)[0] for name, row in columns.items()}
    small = plan.peak(plan.longest)[1] < 1e9

    def size(value: float) -> str:
        return f"{value / 1e6:.1f}" if small else _gb(value)

    parts = dict.fromkeys(part for name in columns for part in moments[name][peaks[name]])
    rows = []
    for part in parts:
        values = [moments[name][peaks[name]].get(part, 0) for name in columns]
        if any(values):
            rows.append([part, *map(size, values)])
    rows.append(["[bold]at the peak[/bold]", *(f"[bold]{size(plan.peak(row)[1])}[/bold]" for row in columns.values())])
    for moment in next(iter(moments.values())):
        rows.append([f"  {moment}", *(size(sum(moments[name][moment].values())) for name in columns)])
    rows += [[f"in CPU memory: {part}", *[size(value)] * 2] for part, value in plan.cpu.items()]
    what, workers = f"GPU ({gpu})" if gpu else "worker", plan.config.training.workers
    where = f"each of {workers} {what.replace('GPU', 'GPUs') if gpu else 'workers'}" if workers > 1 else f"the {what}"
    header = ["MB, rows of" if small else "GB, rows of", *(f"{row.tokens:,} tokens" for row in columns.values())]
    return table(f"Memory of {where}, micro-batch {plan.micro_batch}", header, rows)


def _job(plan: Plan, gpu: str | None) -> Any:
    """Every moment of the job, in order, and what it needs most for."""
    moments, worst = [*job_moments(plan), served_pool(plan)], worst_moment(plan)
    size = _gb if worst.bytes >= 1e9 else lambda value: f"{value / 1e6:.1f}"
    rows = []
    for moment in moments:
        first = sorted(moment.parts.items(), key=lambda part: -part[1])[:3]
        mark = ("[bold]", "[/bold]") if moment.name == worst.name else ("", "")
        rows.append(
            [
                f"{mark[0]}{moment.name}{mark[1]}",
                moment.when,
                str(moment.gpus) if gpu else "-",
                f"{mark[0]}{size(moment.bytes)}{mark[1]}",
                ", ".join(f"{part} {size(value)}" for part, value in first),
            ]
        )
    unit = "GB" if worst.bytes >= 1e9 else "MB"
    header = ["moment", "when it needs most", "GPUs", f"{unit} of each" if gpu else unit, "largest parts"]
    return table("Every moment of the job", header, rows)


def _time(plan: Plan, gpu: str | None) -> Any:
    config, operations = plan.config, plan.operations
    rows = [
        ["rows a step", _dealt(plan)],
        ["tokens a step", f"{plan.rows_per_step * plan.typical.tokens:,}"],
    ]
    rows += [[f"operations a row: {name}", _tera(value)] for name, value in vars(operations).items() if value]
    rows.append(["operations a step", _tera(plan.rows_per_step * operations.total)])
    if plan.expert_seconds is None or plan.router_seconds is None or plan.step_seconds is None:
        rows.append(["hours", "not known for CPUs; give --gpu, or measure: pointsman benchmark training"])
    else:
        if plan.gathering_seconds:
            rows.append(["gathering weights (ZeRO-3), in the background", f"{plan.gathering_seconds:.1f} s a step"])
        rows.append(["a step", f"{plan.step_seconds:.2f} s"])
        if plan.caching_seconds is not None:
            rows.append(["image features of 1,000 rows, once", f"{_hours(1000 * plan.caching_seconds)} of one GPU"])
        rows.append([f"per task: expert stage, {config.expert.steps} steps", _hours(plan.expert_seconds)])
        rows.append([f"per task: router stage, {config.router.steps} steps", _hours(plan.router_seconds)])
        rows.append(
            [
                f"all evaluations, {plan.evaluated_tasks} tasks and benchmarks",
                f"{_hours(plan.evaluation_seconds)} of one GPU",
            ]
        )
        rows.append([f"training on the clock, {_together(plan)}", _hours(plan.clock_seconds)])
        rows.append(
            [
                f"[bold]the stream, {len(config.stream.tasks)} tasks[/bold]",
                f"[bold]{_hours(plan.gpu_seconds)} of GPU[/bold]",
            ]
        )
    return table(f"Time on {config.training.workers} x {gpu or 'CPU'}", ["", ""], rows)


def _disk(plan: Plan) -> Any:
    disk, tasks = plan.sizes, len(plan.config.stream.tasks)
    rows = [
        [
            "expert",
            f"{_mb(disk.expert)} = adapter {_mb(disk.adapter)}, vectors {_mb(disk.vectors)}, statistics {_mb(disk.statistics)}",
        ],
        [f"pool of this stream's {tasks}, experts included", _mb(disk.pool(tasks))],
        *([f"pool of {count}, experts included", _mb(disk.pool(count))] for count in POOLS),
        ["checkpoint while a task trains", _mb(disk.checkpoint)],
    ]
    if disk.row_features:
        rows.append(["image features of 1,000 rows", _mb(1000 * disk.row_features)])
    return table("Disk", ["", ""], rows)


def _notes(plan: Plan) -> list[str]:
    """What the plan takes for granted."""
    assumed, notes = plan.assumptions, []
    if plan.architecture.tower:
        notes.append(
            f"A typical row, which time is planned for, has {assumed.tiles} tiles of {plan.architecture.tile_tokens} tokens "
            f"and {assumed.text_tokens} of text (--tiles, --text-tokens); the longest is what data.max_tokens lets in."
        )
    notes.append(
        f"Logits are computed at answers only: {plan.typical.answer_tokens} tokens of a typical row, "
        f"{plan.longest.answer_tokens} of the longest (--answer-tokens, --longest-answer)."
    )
    evaluation = plan.config.evaluation
    notes.append(
        f"Inference in batches of up to {evaluation.batch_size} prompts and {evaluation.tokens_per_batch:,} tokens "
        "(evaluation.batch_size, evaluation.tokens_per_batch)."
    )
    if plan.gpu is not None:
        notes.append(
            "GPU figures are computed, not measured: no part of this plan was ever run on a GPU. pointsman benchmark gpu "
            "measures it on yours."
        )
        notes.append(
            f"Training reaches {assumed.utilisation:.0%} of {plan.gpu.operations / 1e12:g} dense bf16 TFLOP/s (--utilisation); "
            f"allowance for CUDA {_gb(CONTEXT)} GB and {FRAGMENTATION:.0%} of all tensors."
        )
    notes.append("Formulas and sources: --explain. How well memory is predicted: pointsman benchmark plan.")
    return notes


def verdict(plan: Plan, gpu: str | None, changes: list[Change]) -> list[str]:
    """Returns whether every moment fits with the longest rows, and otherwise what to change, in order."""
    worst = worst_moment(plan)
    when = worst.when if worst.name == EXPERT_STAGE else f"{worst.name}: {worst.when}"
    room = f"{_gb(worst.bytes)} of {_gb(plan.capacity)} GB on {gpu or 'this machine'} ({when})"
    if job_fits(plan):
        most = largest_micro_batch(plan)
        more = f"; up to training.micro_batch={most} would fit" if most and most > plan.micro_batch else ""
        return [f"fits       {room}{more}"]
    lines = [f"does not fit  {room}"]
    lines += [f"  then {'fits' if c.fits else 'still not'}: {c}   {_gb(c.bytes)} GB ({c.moment})" for c in changes]
    settings = {field: value for change in changes for field, value in change.settings.items()}
    if not job_fits(changed(plan, settings)):
        lines.append(
            "  no setting makes it fit: take a larger GPU, shorter rows (data.max_tokens, base.max_tiles) or more workers"
        )
    return lines


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _mb(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _together(plan: Plan) -> str:
    """Returns how many tasks are trained at a time, and on how many GPUs."""
    wanted, tasks, workers = plan.config.training.parallel_tasks, plan.parallel_tasks, plan.config.training.workers
    how_many = "one task at a time (auto: as many as there are GPUs for)" if wanted == "auto" else f"{tasks} at a time"
    return f"{how_many} on {tasks * workers} GPU{'s' * (tasks * workers > 1)}"


def _dealt(plan: Plan) -> str:
    """Returns how a step's rows are dealt."""
    workers, passes, rows = plan.config.training.workers, plan.accumulated, plan.micro_batch
    even = workers * passes * rows == plan.rows_per_step
    return f"{plan.rows_per_step} {'=' if even else '<'} {workers} x {passes} x {rows}"


def _tera(value: float) -> str:
    return f"{value / 1e12:,.2f} T" if value >= 1e11 else f"{value / 1e9:,.2f} G"


def _hours(seconds: float | None) -> str:
    assert seconds is not None
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
