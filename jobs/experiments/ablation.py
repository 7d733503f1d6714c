"""Ablation: which settings of experts and routers matter."""

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from jobs.benchmark.real_size import readings
from jobs.experiments import pools
from jobs.experiments.charts import bars, pairs
from jobs.experiments.experiment import Chart, Configure, Experiment, Figures, Result, Results, Run, Table
from jobs.experiments.seeds import of_results, ratio, shown
from jobs.experiments.settings import DEMO_STEPS, DEMO_TASKS, stream, task
from pipeline.config import RouterConfig
from pipeline.data.demo import confusable
from pipeline.data.demo.abilities import BENCHMARKS
from pipeline.evaluation.matrix import BASE
from pipeline.learning.baselines import ROUTERS
from pipeline.learning.learn import LearnResult
from pipeline.learning.session import StreamSession
from pipeline.routing.features import project_prompts, text_width
from pipeline.routing.gaussian import solve
from pipeline.routing.null import components
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.routes import NULL_EXPERT
from pipeline.routing.statistics import PromptStatistics

PROMPTS = 40
"""Prompts per task and ability."""
FEW = ("renamed", "clock", "successor")
"""Tasks that are trained anew for each setting of training."""
LINEARS = {
    "attention": r".*language_model\..*\.[qkvo]_proj",
    "MLP": r".*language_model\..*\.(gate|up|down)_proj",
}
"""Linears that experts can be of, beside all of them."""
TRAINED = {
    "rank 4": ("expert.rank=4",),
    "rank 16, all Linears, 25 router steps (as the demo)": (),
    "rank 32": ("expert.rank=32",),
    **{f"{name} alone": (f"expert.target_modules={pattern}",) for name, pattern in LINEARS.items()},
    "5 router steps": ("router.steps=5",),
    "100 router steps": ("router.steps=100",),
}
"""Settings that need trainings of their own."""
ROUTED: dict[str, dict[str, Any]] = {
    "token, phatgoose, k = 1": {**ROUTERS["token_phatgoose"], "top_k": 1},
    "token, phatgoose, k = 2": {**ROUTERS["token_phatgoose"], "top_k": 2},
    "token, phatgoose, k = 4": {**ROUTERS["token_phatgoose"], "top_k": 4},
    "token, phatgoose, temperature 0.2": {**ROUTERS["token_phatgoose"], "temperature": 0.2},
    "token, phatgoose, temperature 5": {**ROUTERS["token_phatgoose"], "temperature": 5.0},
    "two-level, 2 candidates": {**ROUTERS["two_level"], "candidates": 2},
    "two-level, 3 candidates": {**ROUTERS["two_level"], "candidates": 3},
    "two-level, temperature 0.2": {**ROUTERS["two_level"], "temperature": 0.2},
    "two-level, temperature 5": {**ROUTERS["two_level"], "temperature": 5.0},
    "prompt": ROUTERS["prompt"],
}
"""Settings of a pool that was learned once."""
CONFUSABLE = 24
"""Confusable tasks of which only prompts are looked at, for settings of the prompt router."""
FEATURE_ROWS = {"train": 400, "eval": 40}
LABEL, ONE = "ablation", "ablation-pool"
FEATURES = "ablation-features"


def runs(seed: int, configure: Configure) -> list[Run]:
    """Returns a run per setting of training, one for those of a learned pool, and, once, what prompts alone tell."""
    own = f"expert.steps={DEMO_STEPS}", f"evaluation.limit={PROMPTS}"
    few = stream([task(name) for name in FEW])
    made = [Run(ONE, seed, configure(ONE, seed, stream([task(name) for name in DEMO_TASKS]), *own), measure_routers)]
    for number, overrides in enumerate(TRAINED.values()):
        label = f"{LABEL}-{number}"
        made.append(Run(label, seed, configure(label, seed, few, *own, *overrides), measure_trained))
    if seed == 0:  # nothing in it is random
        made.append(Run(FEATURES, seed, None, compute=compute_features))
    return made


def measure_trained(session: StreamSession, learned: LearnResult) -> Result:
    """Returns the pool's accuracy with the default router and with the paper's."""
    names = [*learned.pool.names, *BENCHMARKS]
    given = pools.oracle(session, learned.pool, names).accuracies()
    result = {"oracle": fmean(given[name] for name in learned.pool.names)}
    for router in ("prompt", "token_phatgoose"):
        result |= {
            f"{router}_{key}": value for key, value in _routed(session, learned, router, ROUTERS[router]).items()
        }
    metrics = learned.summary["tasks"].values()
    return result | {"seconds_per_step": fmean(t["step_seconds"] / max(t["samples"], 1) for t in metrics)}


def measure_routers(session: StreamSession, learned: LearnResult) -> Result:
    """Returns the accuracy of one pool by settings of its router."""
    return {name: _routed(session, learned, name, settings) for name, settings in ROUTED.items()}


def _routed(session: StreamSession, learned: LearnResult, who: str, settings: Mapping[str, Any]) -> Result:
    tasks = learned.pool.names
    names = [*tasks, *BENCHMARKS]
    base = session.evaluate(names, None, BASE, who="the base").accuracies()
    accuracy = pools.routed(session, learned.pool.routed_by(**settings), names, who).accuracies()
    kept = ratio(sum(accuracy[name] for name in BENCHMARKS), sum(base[name] for name in BENCHMARKS))
    return {"new": fmean(accuracy[name] for name in tasks), "base_kept": kept}


# What prompts alone tell: where they would be sent, with any features and settings; no expert is needed.


@cache
def _features(name: str, part: str) -> Tensor:
    """Returns the features (N, 5 D) of a confusable task's, an ability's or the base prompts, unprojected."""
    if name in BENCHMARKS or name == "general":
        return readings.features(name, part)
    kind, number = name.rsplit("_", 1)
    drawn = confusable.examples(kind, int(number), FEATURE_ROWS[part], held_out=part == "eval")
    return readings.read(list(drawn))


def compute_features() -> Result:
    """Returns, by setting, the share of prompts of confusable tasks and of base abilities that are sent right."""
    settings, text = RouterConfig(), text_width(_features("general", "train").shape[-1])
    made: dict[str, Any] = {"features: all, unprojected": {}}
    made |= {
        f"features: projected to {narrow}": {"prepare": lambda x_NS, to=narrow: project_prompts(x_NS, to)}
        for narrow in (32, 64, 128, 256)
    }
    made |= {
        "features: image tokens alone": {"prepare": lambda x_NS: x_NS[:, text:]},
        "features: words alone": {"prepare": lambda x_NS: x_NS[:, :text]},
        "covariance: shared by all": {"shared": True},
    }
    made |= {f"shrinkage {s:g}": {"shrinkage": s} for s in (0.005, settings.shrinkage, 0.2, 0.5)}
    made |= {f"null components: {count}": {"null_components": count} for count in (1, 4, settings.null_components, 48)}
    return {name: sent_right(**changes) for name, changes in made.items()}


def sent_right(
    *,
    prepare: Any = lambda x_NS: x_NS,
    shared: bool = False,
    shrinkage: float = RouterConfig().shrinkage,
    null_components: int = RouterConfig().null_components,
    tasks: Sequence[str] = tuple(confusable.mixed(CONFUSABLE)),
) -> Result:
    """Returns the shares of held-out prompts that reach the right task, and the base, with these settings."""
    experts = [
        PromptStatistics.of(prepare(_features(name, "train")), quantile=RouterConfig().quantile, shrinkage=shrinkage)
        for name in tasks
    ]
    null = components(prepare(_features("general", "train")), null_components)
    router = PromptRouter(experts, null, shrinkage=shrinkage)
    weight_CF, bias_C = solve([*experts, *null], shrinkage=shrinkage)
    shares = []
    for number, name in [*enumerate(tasks), *((len(tasks), name) for name in BENCHMARKS)]:
        x_NF = prepare(_features(name, "eval"))
        if shared:  # the linear score, of which the shared covariance is all there is
            linear_NC = x_NF.double() @ weight_CF.T + bias_C
            null_N1 = linear_NC[:, len(tasks) :].logsumexp(-1, keepdim=True)
            chosen_N = torch.cat([linear_NC[:, : len(tasks)], null_N1], -1).argmax(-1)
        else:
            chosen_N = router.choices(x_NF)
            chosen_N = torch.where(chosen_N == NULL_EXPERT, len(tasks), chosen_N)
        shares.append(float((chosen_N == number).double().mean()))
    return {"own": fmean(shares[: len(tasks)]), "base": fmean(shares[len(tasks) :])}


def summarise(results: Results) -> Figures:
    """Returns the figures by setting: of training, of a learned pool's router, of the prompt router."""
    keys = "oracle", "prompt_new", "prompt_base_kept", "token_phatgoose_new", "token_phatgoose_base_kept"
    trained = {name: of_results(results[f"{LABEL}-{number}"], *keys) for number, name in enumerate(TRAINED)}
    routed = {name: of_results([result[name] for result in results[ONE]], "new", "base_kept") for name in ROUTED}
    prompts = {name: part for name, part in results[FEATURES][0].items() if name != "seconds"}
    return {
        "trained": trained,
        "routed": routed,
        "prompts": {name: of_results([part], "own", "base") for name, part in prompts.items()},
    }


def tables(figures: Figures) -> list[Table]:
    """Returns a table per kind of setting."""
    trained = [
        [
            name,
            *(
                shown(part, key)
                for key in (
                    "oracle",
                    "prompt_new",
                    "prompt_base_kept",
                    "token_phatgoose_new",
                    "token_phatgoose_base_kept",
                )
            ),
        ]
        for name, part in figures["trained"].items()
    ]
    header = ["trained with", "oracle", "prompt router", "base kept", "token router, phatgoose", "base kept"]
    return [
        Table(f"Settings of training ({', '.join(FEW)})", header, trained),
        Table(
            "Settings of a learned pool's router",
            ["router", "new tasks", "base abilities kept"],
            [[name, shown(part, "new"), shown(part, "base_kept")] for name, part in figures["routed"].items()],
        ),
        Table(
            f"Settings of the prompt router, {CONFUSABLE} confusable tasks",
            ["setting", "tasks' prompts sent right", "base prompts sent right"],
            [[name, shown(part, "own"), shown(part, "base")] for name, part in figures["prompts"].items()],
            "Where prompts would be sent, without any expert; features are unprojected unless said otherwise.",
        ),
    ]


def charts(figures: Figures) -> list[Chart]:
    """Returns the settings of a learned pool's router."""
    names = list(figures["routed"])

    def draw() -> Any:
        parts = [figures["routed"][name] for name in names]
        series = {"new tasks": pairs(parts, "new"), "base abilities kept": pairs(parts, "base_kept")}
        return bars(names, series)

    return [
        Chart("routers", "Settings of a learned pool's router", "Six tasks of the demo, trained once per seed.", draw)
    ]


EXPERIMENT = Experiment(
    version=1,
    runs=runs,
    summarise=summarise,
    tables=tables,
    charts=charts,
    notes=(
        f"{DEMO_STEPS} steps per task, {PROMPTS} prompts per task and ability. Settings of training are compared on three "
        "tasks, those of a learned pool's router on six tasks trained once per seed.",
        "The covariance is compared in its two forms: shared by all classes, and each class's own blended with it (all else).",
    ),
)
