"""Ways to have several experts in one model, ready to run side by side: PEFT's and this project's.

All adapt the same frozen Linears with the same LoRA weights. A size is a one-layer Llama of a base's widths (with a
vocabulary of 32, so that the layer is all there is), or a single Linear. Knows nothing about measuring. Shapes: as in
`pipeline.routing`; S features before projection.
"""

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from peft import ArrowConfig, LoraConfig, XLoraConfig, create_arrow_model, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.xlora.classifier import XLoraClassifier
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, LlamaConfig, LlamaForCausalLM

from pipeline.config import ConfigError
from pipeline.models.tiny import TINY_BASE
from pipeline.routing.features import feature_width, project_prompts, prompt_features
from pipeline.routing.layer_classifiers import LayerClassifier
from pipeline.routing.prompt_router import PromptRouter
from pipeline.routing.routed_linear import Current, LinearExperts, PoolExperts, RoutedLinear, Running, Slot
from pipeline.routing.routes import Router, RoutingState
from pipeline.routing.statistics import PromptStatistics
from pipeline.routing.token_router import TokenRouter
from pipeline.routing.two_level import TwoLevelRouter

RANK, ALPHA, TOP_K, CANDIDATES = 16, 32, 2, 3
"""LoRA's rank and alpha; experts chosen (Arrow and `token`); candidates of `two_level`."""
SHARING = ("k_proj", "v_proj", "up_proj")
"""Linears whose input is that of the one before them."""
PROMPT, IMAGE = 512, 256
"""Tokens of the prompt, and how many of them stand for an image."""
VARIETY = 8
"""So many experts have weights of their own values; those after them repeat the values, in memory of their own."""
ONE_LAYER: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 32, "use_cache": False}
"""What models have in common; X-LoRA refuses a base that caches by default."""


def _internvl2_2b() -> LlamaConfig:
    """Widths of InternLM2-1.8B, the language model of InternVL2-2B."""
    return LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=8, **ONE_LAYER
    )


def _tiny() -> LlamaConfig:
    """Widths of the base that ships with the project."""
    text = AutoConfig.from_pretrained(TINY_BASE).text_config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return LlamaConfig(**{name: getattr(text, name) for name in names}, **ONE_LAYER)


MODELS: dict[str, Callable[[], LlamaConfig]] = {"internvl2_2b": _internvl2_2b, "tiny": _tiny}


def linear_widths(name: str) -> tuple[int, int]:
    """Reads a size such as 2048x8192: the widths of a Linear, in and out."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if match is None:
        raise ConfigError(f"no size {name!r}; known: {', '.join(MODELS)}, or a Linear's widths as in 2048x8192")
    return int(match[1]), int(match[2])


class Workload:
    """A size to measure at: its frozen base, its inputs, and the LoRA weights that all methods share."""

    def __init__(self, name: str, *, dtype: torch.dtype, seed: int) -> None:
        self.name, self.seed = name, seed
        self.is_model = name in MODELS
        torch.manual_seed(seed)
        if self.is_model:
            self.base: nn.Module = LlamaForCausalLM(MODELS[name]())
            self.width_in = self.width_out = self.base.config.hidden_size
        else:
            self.width_in, self.width_out = linear_widths(name)
            self.base = OneLinear(self.width_in, self.width_out)
        self.base.to(dtype).eval().requires_grad_(False)
        self.linears = {
            path: module
            for path, module in self.base.named_modules()
            if isinstance(module, nn.Linear) and path.endswith("_proj")
        }
        self.prompt_BTD = torch.randn(1, PROMPT, self.width_in).to(dtype)
        self.next_BTD = torch.randn(1, 1, self.width_in).to(dtype)
        positions_BT = torch.arange(PROMPT).unsqueeze(0)
        self.image_BT, self.text_BT = positions_BT < IMAGE, positions_BT >= IMAGE
        self._weights = {
            path: [
                (torch.randn(RANK, d) / d**0.5, torch.randn(o, RANK) / o**0.5)  # B as trained: not zero
                for _ in range(VARIETY)
            ]
            for path, (o, d) in ((path, linear.weight.shape) for path, linear in self.linears.items())
        }

    def weights(self, path: str, expert: int) -> tuple[Tensor, Tensor]:
        """Returns A (R, D) and B (O, R) of an expert in a Linear."""
        a_RD, b_OR = self._weights[path][expert % VARIETY]
        dtype = self.linears[path].weight.dtype
        return a_RD.to(dtype), b_OR.to(dtype)

    def copy(self) -> Any:
        """Returns modules of their own around the same base weights."""
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})

    def features(self) -> Tensor:
        """Returns the prompt's features (1, F), as a routed base takes them at prefill."""
        features_BS = prompt_features(self.prompt_BTD, self.image_BT, self.text_BT)
        return project_prompts(features_BS, feature_width(self.width_in, None))

    def memory_bytes(self, method: str, experts: int, tokens: int) -> tuple[float, float]:
        """Returns about how many bytes a method's weights take, and what comes on top while it is built or runs."""
        shapes = [(linear.in_features, linear.out_features) for linear in self.linears.values()]
        size = self.prompt_BTD.element_size()
        widest = max(d + o for d, o in shapes)
        longest = max(o for _, o in shapes)
        weights = size * experts * RANK * sum(d + o for d, o in shapes)
        temporary = size * (tokens * 3 * (widest + longest) + experts * RANK * widest)
        if method == "arrow":  # z, y before and after scaling
            temporary += size * tokens * experts * (RANK + 2 * longest)
        if method == "xlora":  # dummy and real scalings
            temporary += 2 * size * (PROMPT + 1) * len(shapes) * experts
        if method == "token_phatgoose":
            temporary += 4 * tokens * experts * (4 + RANK if experts <= 16 else 4)
        return weights + sum(p.nbytes for p in self.base.parameters()), temporary


class OneLinear(nn.Module):
    """A base that is a single Linear."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.only_proj = nn.Linear(width_in, width_out, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Returns y (B, T, O)."""
        return self.only_proj(x_BTD)


class Step(NamedTuple):
    """One forward pass to measure, and what puts everything back for the next."""

    run: Callable[[], object]
    reset: Callable[[], object]


class Method:
    """One way to have several experts, ready to run; `more` goes with every call."""

    caches = True
    """Whether it can decode with a KV cache."""

    def __init__(self, workload: Workload, module: nn.Module, **more: Any) -> None:
        self.workload, self.module, self.more = workload, module.eval(), more

    def decide(self) -> None:
        """Does what comes before a prompt is read."""

    def start_decoding(self) -> None:
        """Turns from reading the prompt to decoding."""

    def reset(self) -> None:
        """Forgets what a single Linear chose when it read the prompt."""

    def step(self, tokens: int) -> Step:
        """Returns the step of prefill (all tokens of the prompt) or of decoding (one)."""
        workload, decoding = self.workload, tokens == 1
        if not workload.is_model:
            self.decide()
            if decoding:
                self.module(workload.prompt_BTD, **self.more)
                self.start_decoding()
            x_BTD = workload.next_BTD if decoding else workload.prompt_BTD
            return Step(lambda: self.module(x_BTD, **self.more), (lambda: None) if decoding else self.reset)
        if not self.caches:
            seen_BTD = torch.cat([workload.prompt_BTD, workload.next_BTD], dim=1) if decoding else workload.prompt_BTD
            return Step(lambda: self._read(seen_BTD, None), lambda: None)
        if not decoding:
            return Step(lambda: self._prefill(DynamicCache()), lambda: None)
        cache = DynamicCache()
        self._prefill(cache)
        self.start_decoding()
        prompt = [(layer.keys, layer.values) for layer in cache.layers]

        def reset() -> None:
            for layer, (keys, values) in zip(cache.layers, prompt, strict=True):
                layer.keys, layer.values = keys, values

        return Step(lambda: self._read(workload.next_BTD, cache), reset)

    def _prefill(self, cache: Any) -> Tensor:
        """Decides, and reads the prompt."""
        self.decide()
        return self._read(self.workload.prompt_BTD, cache)

    def _read(self, x_BTD: Tensor, cache: Any) -> Tensor:
        """Returns the logits of the last token (1, 1, 32)."""
        use = {"past_key_values": cache, "use_cache": cache is not None}
        return self.module(inputs_embeds=x_BTD, logits_to_keep=1, **use, **self.more).logits


class Routed(Method):
    """The base with this project's routed Linears."""

    def __init__(self, workload: Workload, experts: int, router: Router) -> None:
        module, self.current, by_path = workload.copy(), Current([]), {}
        last = None
        for path, linear in workload.linears.items():
            vectors_ED = torch.randn(experts, linear.in_features)
            slots = [Slot(e, *workload.weights(path, e), ALPHA / RANK, vectors_ED[e]) for e in range(experts)]
            classifier = LayerClassifier(last)
            if not path.endswith(SHARING):
                # So little evidence that all on the list keep a weight: the dearest case.
                vector_CD = 1e-4 * torch.randn(experts + 1, linear.in_features)
                classifier = LayerClassifier(last, torch.arange(experts + 1), vector_CD, torch.zeros(experts + 1))
                last = path
            by_path[path] = LinearExperts.stacked(linear, slots, experts, classifier)
            module.set_submodule(path, RoutedLinear(linear, self.current, path))
        super().__init__(workload, module)
        self.experts, self.number, self.router = PoolExperts(by_path), experts, router

    @property
    def state(self) -> RoutingState:
        """What the Linears share."""
        assert self.current.running is not None
        return self.current.running.state

    def decide(self) -> None:
        """Decides as a routed base does: takes the features down, routes, notes which tokens are real."""
        route = self.router.route(self.workload.features())
        state = RoutingState(self.number, route, self.workload.image_BT | self.workload.text_BT)
        self.current.running = Running(state, self.experts, self.current)

    def start_decoding(self) -> None:
        """Keeps the decision."""
        self.state.decode()

    def reset(self) -> None:
        """Lets the Linear weigh the experts anew."""
        self.state.cached_choice.clear()


class Uncached(Method):
    """A model that reads everything anew for every token."""

    caches = False


def single(workload: Workload, experts: int = 1) -> Method:
    """One LoRA in PEFT, whatever the number of experts."""
    return Method(workload, _with_adapters(workload, ["default"]))


def mixed(workload: Workload, experts: int) -> Method:
    """PEFT's mixed batches: the user says which row goes to which adapter."""
    names = [f"expert_{e}" for e in range(experts)]
    return Method(workload, _with_adapters(workload, names), adapter_names=names[:1])


def arrow(workload: Workload, experts: int) -> Method:
    """PEFT's Arrow: the tokens choose by the adapters' singular vectors."""
    with tempfile.TemporaryDirectory() as folder:
        _with_adapters(workload, ["default"]).save_pretrained(folder)
        settings = ArrowConfig(top_k=min(TOP_K, experts), rng_seed=workload.seed)
        model = create_arrow_model(workload.copy(), [folder], settings, autocast_adapter_dtype=False)
    for layer, path in _lora_layers(model, workload):
        _grow(layer, workload, path, [f"task_{e}" for e in range(experts)])
        chooser = layer.lora_arrow["arrow_router"]
        chooser.on_adapter_change(layer.lora_A, layer.lora_B)
        # Singular vectors repeat as the weights do: those of the first are all that must be computed.
        names = chooser.task_adapter_names
        chooser.task_adapter_names = names[:VARIETY]
        chooser.build_prototypes(layer.lora_A, layer.lora_B)
        chooser.task_adapter_names = names
        chooser.prototypes = chooser.prototypes[torch.arange(experts) % VARIETY]
    return Method(workload, model)


def xlora(workload: Workload, experts: int) -> Method:
    """PEFT's X-LoRA: a first pass for a classifier of hidden states, a second with all experts, weighted by it."""
    names = [str(e) for e in range(experts)]  # what X-LoRA calls them, whatever the configuration says
    with tempfile.TemporaryDirectory() as folder:
        _with_adapters(workload, ["default"]).save_pretrained(folder)
        settings = XLoraConfig(hidden_size=workload.width_in, adapters={names[0]: folder})
        model = get_peft_model(workload.copy(), settings, autocast_adapter_dtype=False)
    layers = _lora_layers(model, workload)
    for layer, path in layers:
        _grow(layer, workload, path, names)
        layer.set_adapter(names)
    old = model.base_model.internal_xlora_classifier
    classifier = XLoraClassifier(workload.base, old.config, experts, len(layers), torch.device("cpu"))
    model.base_model.internal_xlora_classifier = classifier
    return Uncached(workload, model)


def routed(router_name: str, workload: Workload, experts: int) -> Method:
    """One of this project's routers."""
    if router_name.startswith("token"):
        phatgoose = router_name == "token_phatgoose"
        return Routed(
            workload, experts, TokenRouter(experts, null=True, phatgoose=phatgoose, top_k=TOP_K, temperature=1.0)
        )
    features_BF = workload.features()
    prompts = prompt_router(tuple(features_BF[0].tolist()), experts)
    if router_name == "prompt":
        return Routed(workload, experts, prompts)
    return Routed(workload, experts, TwoLevelRouter(prompts, candidates=CANDIDATES, temperature=1.0))


@lru_cache(maxsize=2)
def prompt_router(features_F: tuple[float, ...], experts: int) -> PromptRouter:
    """Builds a router with a null expert, for a prompt that lies in the middle of three classes.

    The first classes (with one or two experts: the null expert among them) are about equally likely, expert 0 a little
    ahead; all others are far away. They share one scatter, or 1000 experts would take 2 GB.
    """
    generator = torch.Generator().manual_seed(0)
    width, count = len(features_F), 1000
    here_F = torch.tensor(features_F, dtype=torch.float64)
    scatter_FF = count * torch.eye(width, dtype=torch.float64)
    means_CF = here_F + torch.randn(experts + 1, width, generator=generator, dtype=torch.float64)
    means_CF[:CANDIDATES] = here_F
    for near in range(1, min(CANDIDATES, experts + 1)):
        means_CF[near, near] += 0.5
    classes = [PromptStatistics(count, mean_F, scatter_FF) for mean_F in means_CF]
    return PromptRouter(classes[:-1], classes[-1:])


def _with_adapters(workload: Workload, names: Sequence[str]) -> Any:
    """Returns the base with these adapters in PEFT."""
    targets = sorted({path.rpartition(".")[-1] for path in workload.linears})
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)
    model = get_peft_model(workload.copy(), settings, adapter_name=names[0], autocast_adapter_dtype=False)
    for layer, path in _lora_layers(model, workload):
        _grow(layer, workload, path, names)
    model.peft_config.update(dict.fromkeys(names, model.peft_config[names[0]]))
    return model


def _lora_layers(model: nn.Module, workload: Workload) -> list[tuple[Any, str]]:
    """Returns PEFT's LoRA layers with the paths of their Linears in the base."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    return [(layer, next(path for path in workload.linears if name.endswith(path))) for name, layer in layers]


def _grow(layer: Any, workload: Workload, path: str, names: Sequence[str]) -> None:
    """Gives a LoRA layer these adapters, each with weights of its own and the settings of its first.

    This is what a `load_adapter` each would leave behind; their time is quadratic in their number, minutes at 1000.
    """
    first = next(iter(layer.lora_A))
    settings = (layer.r, layer.lora_alpha, layer.scaling, layer.lora_bias, layer.use_rslora, layer.use_dora)
    for e, name in enumerate(names):
        for setting in settings:
            setting[name] = setting[first]
        layer.lora_dropout[name] = nn.Identity()
        for part, weight in zip((layer.lora_A, layer.lora_B), workload.weights(path, e), strict=True):
            part[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            part[name].weight = nn.Parameter(weight.clone(), requires_grad=False)


METHODS: dict[str, Callable[[Workload, int], Method]] = {
    "single": single,
    "arrow": arrow,
    "xlora": xlora,
    "mixed": mixed,
    "token_phatgoose": partial(routed, "token_phatgoose"),
    "token": partial(routed, "token"),
    "prompt": partial(routed, "prompt"),
    "two_level": partial(routed, "two_level"),
}


def build(name: str, workload: Workload, experts: int) -> Method:
    """Builds a method, the same one for the same seed."""
    torch.manual_seed(workload.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        return METHODS[name](workload, experts)
