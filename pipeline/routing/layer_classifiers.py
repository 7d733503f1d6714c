"""Layer classifiers: how likely a prompt is under each expert, by the inputs of the language model's Linears.

PHATGOOSE's token router compares each token with each expert's trained vector. Measured on the demo's stream, that
loses a third of what the experts know. What makes it strong: vectors solved from statistics, with the null
expert as a class; scores pooled over the prompt; layers that agree. At each distinct input of adapted Linears (query, key
and value share one, so do gate and up) the mean over the prompt's tokens, projected to `WIDTH`, is a sample of a Gaussian
classifier as in `gaussian`, and log-likelihoods add up through the depth:

    h_l  = mean of the Linear's input over the prompt's tokens
    L_lc = L_(l-1)c + <h_l, u_lc> + b_lc          u, b from the experts' summed statistics
    w_le = softmax over the list of ( L_le / temperature + log prior_e )

`README.md` beside this file has what else was tried. Shapes: B rows, T tokens, D input width, C classes, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.routing.features import project, projection
from pipeline.routing.gaussian import solve
from pipeline.routing.statistics import PromptStatistics

WIDTH = 64
"""Width to which inputs are projected: an expert's statistics then weigh little beside its LoRA."""


def pooled(x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
    """Returns the mean of inputs over the prompt's tokens (B, D), float32."""
    mask_BT = tokens_BT.to(x_BTD)  # of its precision, and on its device: layers may lie apart
    sum_BD = torch.bmm(mask_BT.unsqueeze(1), x_BTD).squeeze(1)
    return sum_BD.float() / mask_BT.float().sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class LayerClassifier:
    """The classifier of one Linear: classes by the inputs that it observes."""

    follows: str | None
    """The Linear before it whose log-likelihoods it adds to."""
    classes_C: Tensor | None = None
    """Classes with statistics here: indices into the pool, the pool's size for the null expert. None: its input is that
    of the Linear it follows, so there is nothing to add."""
    vector_CD: Tensor | None = None
    bias_C: Tensor | None = None

    def to(self, device: torch.device) -> "LayerClassifier":
        """Returns the same on another device."""
        tensors = (self.classes_C, self.vector_CD, self.bias_C)
        return LayerClassifier(self.follows, *(None if t is None else t.to(device) for t in tensors))


def layer_classifiers(
    paths: Sequence[str],
    experts: Sequence[Mapping[str, PromptStatistics]],
    null: Mapping[str, PromptStatistics],
    widths: Mapping[str, int],
    *,
    order: Sequence[str],
    shrinkage: float,
) -> dict[str, LayerClassifier]:
    """Solves the classifier of every Linear from the statistics of all experts and of the null expert.

    `paths` are the routed Linears in the order in which the model runs them, `widths` their input widths, `order` the names
    of all its modules. An input that several Linears share was recorded under the first of them (`LayerInputHook`): the
    first routed one among them observes it, whether or not that first one is routed itself.
    """
    observed_modules = {path for statistics in [*experts, null] for path in statistics}
    recorded_under: dict[str, str] = {}
    source = ""
    for name in order:
        source = name if name in observed_modules else source
        recorded_under[name] = source
    classifiers: dict[str, LayerClassifier] = {}
    last: str | None = None
    observed: set[str] = set()
    for path in paths:
        source = recorded_under[path]
        statistics_by_class = {i: s[source] for i, s in enumerate([*experts, null]) if source in s}
        if len(statistics_by_class) < 2 or source in observed:
            classifiers[path] = LayerClassifier(last)
            continue
        observed.add(source)
        weight_CF, bias_C = solve(list(statistics_by_class.values()), shrinkage=shrinkage)
        matrix_DF = projection(widths[path], weight_CF.shape[-1])
        vector_CD = weight_CF.float() if matrix_DF is None else weight_CF.float() @ matrix_DF.T
        classifiers[path] = LayerClassifier(last, torch.tensor(list(statistics_by_class)), vector_CD, bias_C.float())
        last = path
    return classifiers


def add_log_likelihood(
    classifier: LayerClassifier, before_BX: Tensor | None, x_BTD: Tensor, tokens_BT: Tensor, classes: int
) -> Tensor:
    """Returns the log-likelihoods of all `classes` after this Linear's input (B, X).

    A class without statistics here gets the mean of the others. That is a handicap, since the best of the others gains:
    training therefore takes statistics at all Linears of the language model, adapted or not.
    """
    rows = len(x_BTD)
    total_BX = x_BTD.new_zeros(rows, classes, dtype=torch.float32) if before_BX is None else before_BX
    if classifier.classes_C is None or classifier.vector_CD is None or classifier.bias_C is None:
        return total_BX
    own_BC = pooled(x_BTD, tokens_BT) @ classifier.vector_CD.T + classifier.bias_C
    own_BC = own_BC - own_BC.mean(-1, keepdim=True)
    return total_BX.index_add(-1, classifier.classes_C, own_BC)


class LayerInputHook:
    """Records the pooled, projected inputs of Linears while a model reads prompts.

    `tokens_BT` must be set before the language model runs, for all rows or for the first ones, which are then the only ones
    recorded. It applies to one forward pass: layers that recompute their activations in the backward pass are not recorded
    twice. A Linear whose input is the same tensor as that of the one before it is left out.
    """

    def __init__(self, model: Any, paths: Sequence[str]) -> None:
        self.tokens_BT: Tensor | None = None
        self.samples: dict[str, list[Tensor]] = {}
        self._last: Any = None
        observed_modules = dict(model.named_modules())
        self._hooks = [observed_modules[path].register_forward_pre_hook(self._observe(path)) for path in paths]
        self._hooks.append(model.get_decoder().register_forward_hook(self._end))

    def _observe(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x_BTD,) = args
            if x_BTD is self._last or self.tokens_BT is None:
                return
            self._last = x_BTD
            width, rows = min(WIDTH, x_BTD.shape[-1]), len(self.tokens_BT)
            pooled_BD = pooled(x_BTD.detach()[:rows], self.tokens_BT)
            self.samples.setdefault(path, []).append(project(pooled_BD, width).cpu())

        return hook

    def _end(self, *_: Any) -> None:
        self.tokens_BT = self._last = None

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self._end()
        for hook in self._hooks:
            hook.remove()
