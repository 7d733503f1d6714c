"""Measures what the project adds to the work itself, as ratios within one run.

python -m jobs.benchmark training jobs/configs/demo.yaml    a stage of training against a plain loop
python -m jobs.benchmark plan                                   planned memory against measured
python -m jobs.benchmark routers                                the prompt router among ten thousand experts
python -m jobs.benchmark routers jobs/configs/demo.yaml     how well routers choose, among fifty experts too
python -m jobs.benchmark routing                                routers against PEFT's ways to have several experts
python -m jobs.benchmark data                                   preprocessing against datasets.map, memory, bad rows
python -m jobs.benchmark families                               every family of bases, learned, registered, reloaded
python -m jobs.benchmark gpu                                    memory of a whole job on a GPU, against its plan
python -m jobs.benchmark real-size                              width, resemblance, small tasks, streamed rows, threads
python -m jobs.benchmark scale                                  what the hundredth task costs, beside the tenth
python -m jobs.benchmark registry                               commands over hundreds of experts, one more version
python -m jobs.benchmark fresh-environment                      exports and the registered pool, elsewhere
python -m jobs.benchmark predict                                answering in bulk against a plain loop
python -m jobs.benchmark jobs                                   submitting to a running head, twice at once, with kills
python -m jobs.benchmark sweeps                                 ranks beside one training, ASHA beside a grid, kills
python -m jobs.benchmark text                                   two tasks on pretrained weights, and what was kept
"""

from jobs.lazy import Lazy, lazy_group
from jobs.submit_options import ComputingCommand


def _computing(target: str, summary: str) -> Lazy:
    return Lazy(target, summary, ComputingCommand)


BENCHMARKS = {
    "training": _computing("jobs.benchmark.training_speed:training", "The expert stage against a plain loop."),
    "plan": _computing("jobs.benchmark.memory_estimate:plan", "How well a plan predicts memory."),
    "routing": _computing("jobs.benchmark.routing_cost:routing", "Routing overhead against PEFT."),
    "routers": _computing("jobs.benchmark.routing_accuracy:routers", "Routing accuracy, also among 10,000 experts."),
    "data": _computing("jobs.benchmark.data_throughput:data", "Preprocessing beside datasets.map, memory, bad rows."),
    "families": _computing("jobs.benchmark.families:families", "Every family: learned, registered, reloaded."),
    "gpu": _computing("jobs.benchmark.gpu:gpu", "One GPU: memory of every moment against the plan, speed."),
    "real-size": Lazy(
        "jobs.benchmark.real_size.app:real_size", "What the small default hides, at the sizes that matter."
    ),
    "scale": _computing("jobs.benchmark.scale:scale", "What the hundredth task costs, beside the tenth."),
    "registry": _computing("jobs.benchmark.registry:registry", "Commands over hundreds of experts, one more version."),
    "fresh-environment": _computing(
        "jobs.benchmark.fresh_environment:fresh_environment", "What is exported and registered, without this project."
    ),
    "predict": _computing("jobs.benchmark.predict_speed:predict", "Answering in bulk against a plain loop."),
    "jobs": Lazy("jobs.benchmark.submitted_jobs:jobs", "Submitting: what it costs, twice at once, with kills."),
    "sweeps": Lazy("jobs.benchmark.sweeps:sweeps", "Ranks beside one training, ASHA beside a grid, kills."),
    "text": _computing("jobs.benchmark.pretrained_text:text", "Two tasks on pretrained weights, and what was kept."),
}

app = lazy_group(BENCHMARKS, "Measure what the project adds to the work itself.")
