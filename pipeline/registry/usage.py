"""Pages of exported folders: what lies there, and how to use it without this project."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlflow
import yaml
from mlflow.exceptions import MlflowException

from pipeline.models.stock_processor import WITH_VIDEO
from pipeline.registry.descriptions import DESCRIBED
from pipeline.registry.retries import RegistryError, is_away
from pipeline.registry.versions import MODELS, get_version
from pipeline.routing.pool import Pool
from pipeline.routing.store import ExpertReference

PROCESSOR = "processor"
"""Folder of the base's processor in an export."""


@dataclass(frozen=True)
class Shared:
    """What all pages of an export say."""

    source: str
    """Version that was exported."""
    base_name: str
    base_version: str
    """Version of the base in the registry."""
    base_fingerprint: str
    processor_class: str | None
    """Stock class of the base's processor; None for a tokenizer alone."""


@dataclass(frozen=True)
class Described:
    """What the registry knows of an expert."""

    reference: ExpertReference
    prompt: str | None = None
    """The task's prompt template; None where its run does not say."""
    max_tiles: int | None = None
    """Limit of tiles per image in training, where it was set."""
    samples: str = ""
    """Sample prompts with answers, in Markdown."""


def described(reference: ExpertReference) -> Described:
    """Asks the registry for an expert's prompt template and samples; what it no longer has is left out."""
    if reference.model is None or reference.version is None:
        return Described(reference)
    with suppress(RegistryError):  # the version was deleted; its files were in the cache
        version = get_version(reference.model, reference.version)
        paragraphs = (version.description or "").split("\n\n")
        samples = [f"{text}\n\n{answers}" for text, answers in pairwise(paragraphs) if text == DESCRIBED]
        config = _configuration(version.run_id)
        tasks = {task["name"]: task for task in config.get("stream", {}).get("tasks", ())}
        return Described(
            reference,
            tasks.get(reference.name, {}).get("prompt"),
            config.get("base", {}).get("max_tiles"),
            next(iter(samples), ""),
        )
    return Described(reference)


def _configuration(run_id: str | None) -> dict[str, Any]:
    """Reads the configuration of the run that trained an expert; empty where it logged none."""
    try:
        return dict(yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{run_id}/config.yaml")))
    except (MlflowException, OSError) as error:
        if isinstance(error, MlflowException) and is_away(error):
            raise
        return {}


def expert_page(shared: Shared, expert: Described, rank: int) -> str:
    """Returns the model card of an expert for stock PEFT."""
    name = expert.reference.name
    parts = [
        f"---\nbase_model: {shared.base_name}\nlibrary_name: peft\ntags: [lora]\n---",
        f"# {name}\n\nA LoRA of rank {rank} for task `{name}`, exported from `{shared.source}`"
        + (f" (`{expert.reference.model}/{expert.reference.version}`)." if expert.reference.model else "."),
        _base(shared),
        "## Prompts\n\n" + _prompts(expert),
        "## Use\n\n" + _use(shared, name, expert.max_tiles),
    ]
    return "\n\n".join(parts + [f"## Samples\n\n{expert.samples}"] * bool(expert.samples)) + "\n"


def peft_page(shared: Shared, names: Sequence[str]) -> str:
    """Returns the page above the experts for stock PEFT."""
    listed = "\n".join(f"- [{name}]({name}/README.md)" for name in names)
    intro = f"Exported from `{shared.source}`; `{PROCESSOR}/` is the base's."
    return f"# Experts for PEFT\n\n{intro}\n\n{_base(shared)}\n\n{listed}\n"


def pool_page(shared: Shared, pool: Pool) -> str:
    """Returns the page of a pool's folder."""
    retired = f" Retired: {', '.join(pool.retired)}; the base answers in their place." if pool.retired else ""
    return f"""# Pool of {len(pool.names)} experts

Exported from `{shared.source}`: {", ".join(pool.names)}. Router: `{pool.router.kind}`.{retired} The folder holds the experts,
their statistics and the router's settings; nothing else is needed but the base.

{_base(shared)}

## Use

Answering takes this project's package (`pipeline`):

```python
from pipeline.config import BaseModelConfig
from pipeline.models.bases import load_base
from pipeline.models.encoding import encode
from pipeline.models.generation import generate_answers
from pipeline.routing import Pool, RoutedModel

base = load_base(BaseModelConfig(path="{_base_path(shared)}"))
routed = RoutedModel(base.model, Pool.load("."))
chat = [{{"role": "user", "content": "your prompt"}}, {{"role": "assistant", "content": ""}}]
row = encode(base.processor, chat, [], answer=False)  # images: "<image>" in the prompt for each, and PIL images in the list
with routed.call() as call:
    print(generate_answers(base.model, base.processor, [row], max_new_tokens=64))
print(call.decisions[0].expert)  # None: the base
```
"""


def vllm_page(shared: Shared, manifest: dict[str, Any]) -> str:
    """Returns the page of a folder for vLLM."""
    first = manifest["models"][0]["id"]
    rows = "\n".join(f"| `{m['id']}` | {m['task']} | {m['rank']} |" for m in manifest["models"])
    return f"""# Experts for vLLM

Exported from `{shared.source}`. Each version of an expert is a model id of its own, since vLLM caches prefixes by the
adapter's name. `manifest.json` lists them, `router.json` says which id answers the prompts of which task. Ranks are padded
to those that vLLM has.

| model id | task | rank |
|---|---|---|
{rows}

{_base(shared)}

## Serve

```bash
export VLLM_PLUGINS=lora_filesystem_resolver VLLM_ALLOW_RUNTIME_LORA_UPDATING=true
export VLLM_LORA_RESOLVER_CACHE_DIR=$PWD/{manifest["lora_resolver_cache_dir"]}
vllm serve BASE --served-model-name {shared.base_name} --enable-lora --max-lora-rank {manifest["max_lora_rank"]} --max-loras 8
```

`BASE` is the base's folder or hub id. The served name must be `{shared.base_name}`: the resolver compares it with
`base_model_name_or_path` and answers 404 otherwise (`--base-name` of the export writes another). A request names the expert
as its model: `"model": "{first}"`, or `"model": "{shared.base_name}"` for the base alone. Several adapters are in a batch up
to `--max-loras`.
"""


def _base(shared: Shared) -> str:
    return (
        f"Base: `{shared.base_name}`, fingerprint `{shared.base_fingerprint}`; the registry that this was exported from has it "
        f"as `{MODELS}{shared.base_version}` (`mlflow artifacts download -u {MODELS}{shared.base_version} -d base`)."
    )


def _base_path(shared: Shared) -> str:
    return "base" if "/" not in shared.base_name and shared.base_name != "tiny" else shared.base_name


def _prompts(expert: Described) -> str:
    template = (
        f"In training, the text of a prompt was `{expert.prompt}`, where `{{question}}` is the row's own text."
        if expert.prompt
        else "The run that trained it does not say the prompt template."
    )
    return f"{template} The chat template of the base makes of it what the model reads, as below."


def _use(shared: Shared, name: str, max_tiles: int | None) -> str:
    vision = shared.processor_class is not None
    auto, processor = ("ImageTextToText", "AutoProcessor") if vision else ("CausalLM", "AutoTokenizer")
    images = ", AutoImageProcessor" if vision else ""
    lines = [
        "from peft import PeftModel",
        f"from transformers import AutoModelFor{auto}, {processor}{images}",
        "",
        f'model = AutoModelFor{auto}.from_pretrained("base")  # the base\'s folder, or its hub id',
        f'model = PeftModel.from_pretrained(model, "{name}").eval()',
        f'processor = {processor}.from_pretrained("{PROCESSOR}")',
    ]
    if vision:
        lines += [f'processor.image_processor = AutoImageProcessor.from_pretrained("{PROCESSOR}", backend="pil")']
        lines += [f"processor.image_processor.max_patches = {max_tiles}  # as in training"] * (max_tiles is not None)
        lines += [
            'chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "your prompt"}]}]',
            "text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)",
            'inputs = processor(images=[image], text=[text], return_tensors="pt")',
        ]
    else:
        lines += [
            'chat = [{"role": "user", "content": "your prompt"}]',
            "text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)",
            'inputs = processor([text], add_special_tokens=False, return_tensors="pt")',
        ]
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64, do_sample=False)",
        'answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]',
    ]
    code = "```python\n" + "\n".join(lines) + "\n```"
    return f"{code}{_note(shared)}" if vision else code


def _note(shared: Shared) -> str:
    needs = (
        f"`{shared.processor_class}` has a video processor, for which transformers needs torchvision; without, AutoTokenizer "
        "and AutoImageProcessor load from the same folder. "
        if shared.processor_class in WITH_VIDEO
        else ""
    )
    return (
        f"\n\n{needs}Images went through the PIL version of the image processor in training, hence the line that sets it: "
        "torchvision resizes to slightly other pixels."
    )
