"""vLLM's own rules for LoRA folders, re-applied without vLLM, which cannot share an environment with this project.

Read in the sources of vLLM 0.33 (Apache-2.0): `vllm/plugins/lora_resolvers/filesystem_resolver.py` (the resolver),
`vllm/lora/peft_helper.py` (`PEFTHelper`), `vllm/lora/lora_model.py` (`LoRAModel.from_local_checkpoint`), `vllm/lora/utils.py`
(`parse_fine_tuned_lora_name`), `vllm/config/lora.py` (`MaxLoRARanks`), and `hf_to_vllm_mapper` and `packed_modules_mapping` of
`vllm/model_executor/models/{interns1,llava,qwen2_vl,qwen2_5_vl,qwen3_vl,idefics3,smolvlm,llama}.py`.
"""

import json
import math
from pathlib import Path

from safetensors import safe_open

MAX_LORA_RANKS = {1, 8, 16, 32, 64, 128, 256, 320, 512}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""Linears that vLLM computes as one, and those that adapters name instead."""
INNER = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
MAPPERS = {
    "internvl": INNER | {"model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector."},
    "llava": INNER | {"model.vision_tower.": "vision_tower.", "model.multi_modal_projector.": "multi_modal_projector."},
    "qwen2_vl": INNER | {"model.visual.": "visual.", "model.": "language_model.model."},
    "qwen2_5_vl": INNER | {"model.visual.": "visual.", "model.": "language_model.model."},
    "qwen3_vl": INNER | {"model.visual.": "visual."},
    "idefics3": {},
    "smolvlm": {},
    "text": {},
}  # fmt: skip
"""Prefixes of transformers' names and those of vLLM's modules, by family."""
LANGUAGE = {"idefics3": "model.text_model.", "smolvlm": "model.text_model.", "text": "model."}
"""Where vLLM's classes keep the language model; elsewhere `language_model.model.`."""


def resolved(cache: Path, lora_name: str, base_model_name: str) -> Path | None:
    """`FilesystemResolver.resolve_lora`: the folder of an adapter, None where it answers 404."""
    folder = (cache / lora_name).resolve()
    if not folder.is_relative_to(cache.resolve()) or not (folder / "adapter_config.json").exists():
        return None
    config = json.loads((folder / "adapter_config.json").read_text())
    fits = config["peft_type"] == "LORA" and config["base_model_name_or_path"] == base_model_name
    return folder if fits else None


def scaling(config: dict, *, max_lora_rank: int) -> float:
    """`PEFTHelper.from_dict` and `validate_legal`: the scaling of the update; raises ValueError for what vLLM refuses."""
    if max_lora_rank not in MAX_LORA_RANKS:
        raise ValueError(f"max_lora_rank {max_lora_rank} is not one of {sorted(MAX_LORA_RANKS)}")
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise ValueError(f"missing {missing}")
    refused = [
        name
        for name in (
            *("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"),
            *("use_bdlora", "use_qalora"),
        )
        if config.get(name)
    ]
    if refused or config.get("bias", "none") != "none" or isinstance(config.get("init_lora_weights", True), str):
        raise ValueError(f"unsupported: {refused or 'bias or init_lora_weights'}")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if not 0 < rank <= max_lora_rank:
        raise ValueError(f"rank {rank} is greater than max_lora_rank {max_lora_rank}")
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def loaded_modules(folder: Path, family: str) -> dict[str, dict[str, list[int]]]:
    """`LoRAModel.from_local_checkpoint`: shapes of A and B by vLLM's module names; raises ValueError for what it refuses."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError("no adapter_model.safetensors")
    expected = {"o_proj", "down_proj", *FUSED, *(name for names in FUSED.values() for name in names)}
    modules: dict[str, dict[str, list[int]]] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if not key.startswith("base_model.model."):
                raise ValueError(f"{key}: without PEFT's prefix")
            name = _mapped(key.replace("base_model.model.", ""), MAPPERS[family])
            parts = name.split(".")
            if parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
                raise ValueError(f"{name} is unsupported LoRA weight")
            module = ".".join(parts[:-2])
            if module.rsplit(".", 1)[-1] not in expected:
                raise ValueError(f"unexpected module {module}")
            if not module.startswith(LANGUAGE.get(family, "language_model.model.")):
                raise ValueError(f"{module} is no module of the language model")
            modules.setdefault(module, {})[parts[-2]] = file.get_slice(key).get_shape()
    return modules


def _mapped(name: str, mapper: dict[str, str]) -> str:
    """`WeightsMapper._map_name`: every prefix that fits, one after the other."""
    for prefix, new in mapper.items():
        if name.startswith(prefix):
            name = name.replace(prefix, new, 1)
    return name
