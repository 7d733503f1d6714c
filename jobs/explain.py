"""Explains an answer: candidate experts with posterior and distance, and the weights per token.

python -m jobs.explain --pool runs/demo/pool --image digit.png --prompt "which digit is this ?"
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image

from jobs.endings import user_errors
from jobs.lazy import run_alone
from jobs.registry.options import RegistryUri, registry_address
from jobs.terminal import Terminal, table
from pipeline.config import BaseModelConfig, ConfigError

if TYPE_CHECKING:
    from pipeline.evaluation.calibration import Calibration
    from pipeline.routing.insight import Candidate, Explanation

PoolAddress = Annotated[
    str,
    typer.Option(
        "--pool",
        help="A pool's folder, as runs/demo/pool, or models:/tiny.pool.demo@champion of --registry.",
    ),
]
Images = Annotated[list[Path] | None, typer.Option("--image", help="An image of the prompt; may be given again.")]
Prompt = Annotated[str, typer.Option(help="The question; images go before it unless it says <image> itself.")]
BasePath = Annotated[
    str | None,
    typer.Option(
        "--base",
        help="The pool's base: checkpoint folder, hub id, or `tiny`; default: the registered one, of a folder `tiny`.",
    ),
]
Plot = Annotated[Path, typer.Option("--plot", help="PNG file for the plot of weights per Linear and token.")]
RouterName = Annotated[str | None, typer.Option("--router", help="Another router: token, prompt or two_level.")]


def main(
    pool: PoolAddress,
    prompt: Prompt,
    image: Images = None,
    base: BasePath = None,
    router: RouterName = None,
    plot: Plot = Path("explanation.png"),
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 64,
    registry_uri: RegistryUri = None,
) -> None:
    """Explain an answer: candidate experts with posterior and distance, and a plot of the weights per token."""
    with user_errors():
        if router is not None and router not in ("token", "prompt", "two_level"):
            raise ConfigError(f"--router {router!r}: choose token, prompt or two_level")
        images = [_open(path) for path in image or []]

        from pipeline.evaluation.calibration import calibration_of_run
        from pipeline.evaluation.plots import routing_of_a_prompt
        from pipeline.models.bases import load_base
        from pipeline.models.encoding import IMAGE_PLACEHOLDER, collate_for, encode
        from pipeline.models.generation import generate_answers
        from pipeline.prediction.pool_source import pool_source
        from pipeline.routing import PoolError, RoutedModel
        from pipeline.routing.insight import explain

        source = pool_source(pool, registry_address(registry_uri))
        loaded = source.pool()
        if router is not None:
            loaded = loaded.routed_by(kind=router)
        model = load_base(source.base() if base is None else BaseModelConfig(path=base))
        if model.fingerprint != loaded.base_fingerprint:
            raise PoolError(
                f"{pool}: made for base {loaded.base_label!r} with fingerprint {loaded.base_fingerprint}; "
                f"--base {base or model.folder} has {model.fingerprint}"
            )
        if IMAGE_PLACEHOLDER not in prompt:
            prompt = IMAGE_PLACEHOLDER * len(images) + prompt
        if prompt.count(IMAGE_PLACEHOLDER) != len(images):
            raise ConfigError(
                f"--prompt holds {prompt.count(IMAGE_PLACEHOLDER)} x {IMAGE_PLACEHOLDER}, --image was given "
                f"{len(images)} times"
            )
        conversation = [{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}]
        row = encode(model.processor, conversation, images, answer=False)
        routed = RoutedModel(model.model, loaded)
        (answer,) = generate_answers(model.model, model.processor, [row], max_new_tokens=max_new_tokens)
        inputs = collate_for(model.processor, [row], "left")
        del inputs["labels"]
        (explanation,) = explain(routed, inputs)
        tokens = [model.processor.tokenizer.decode([token]) for token in row.input_ids.tolist()]
        plot.parent.mkdir(parents=True, exist_ok=True)
        routing_of_a_prompt(explanation, tokens).savefig(plot, format="png", dpi=150, facecolor="white")
    known = calibration_of_run(Path(pool)) if explanation.decision.posterior is not None else None
    show(Terminal(), answer, explanation, known)
    typer.echo(f"plot       {plot.resolve()}")


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise ConfigError(f"--image {path}: no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"--image {path}: not an image that can be read: {error}") from None


def show(terminal: Terminal, answer: str, explanation: "Explanation", calibration: "Calibration | None" = None) -> None:
    """Prints the answer, the reason, what it is worth by the run's `calibration`, and the table of candidates."""
    terminal.log(f"answer     {answer}")
    terminal.log(f"expert     {explanation.decision.expert or 'base'}")
    terminal.log(f"because    {explanation.reason}")
    if calibration is not None and explanation.decision.posterior is not None:
        terminal.log(f"reliable   {calibration.explain(explanation.decision.posterior)}")
    header = ["candidate", "posterior", "log-lik.", "distance", "threshold", "within", "weight"]
    rows = [_row(candidate) for candidate in explanation.candidates]
    terminal.console.print(table("Candidate experts", header, rows))
    terminal.log(
        "posterior and log-likelihood (log-lik.): by the covariance that all experts share, best 0; distance: from the task by "
        "its own covariance, against the threshold that nearly all of its prompts keep (- where the text alone decides); "
        "weight: share in the answer"
    )


def _row(candidate: "Candidate") -> list[str]:
    within = {True: "yes", False: "no", None: "-"}[candidate.inside]
    values = [candidate.score, candidate.distance, candidate.threshold]
    score, distance, threshold = ("-" if value is None else _figure(value) for value in values)
    name = candidate.name or "base"
    return [name, f"{candidate.posterior:.1%}", score, distance, threshold, within, f"{candidate.weight:.1%}"]


def _figure(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1000 else "> 1000" if value > 0 else "< -1000"


if __name__ == "__main__":
    run_alone(main)
