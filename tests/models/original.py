"""Folders of InternVL2 as it was published, in small: configuration, random weights, tokenizer files."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.convert_slow_tokenizer import import_protobuf

CONFIGS = Path(__file__).parent / "configs"
"""The original configurations, with all that bears on the computation."""

IMAGE_WORDS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]

VISION_300M = {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
VISION_6B = {"norm_type": "rms_norm", "qkv_bias": False, "qk_normalization": True}

LLM: dict[str, dict[str, Any]] = {
    "InternLM2ForCausalLM": {
        "bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "Qwen2ForCausalLM": {
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "sliding_window": 16,
    },
    "Phi3ForCausalLM": {
        "num_key_value_heads": 6,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "original_max_position_embeddings": 20,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.1, 2.0, 4.0, 9.0]},
    },
    "LlamaForCausalLM": {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": None},
}
TEMPLATES = {"Phi3ForCausalLM": "phi3-chat", "Qwen2ForCausalLM": "Hermes-2"}


def small_config(
    language_class: str = "InternLM2ForCausalLM", vision: Mapping[str, Any] = VISION_300M, **text: Any
) -> dict[str, Any]:
    """Returns the config.json of a small model: tiles of 56 pixels, 16 patches, 4 tokens."""
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "llm_config": {
            "architectures": [language_class],
            "hidden_act": "silu",
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            "vocab_size": 0,
            **LLM.get(language_class, {}),
            **text,
        },
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "template": TEMPLATES.get(language_class, "internlm2-chat"),
        "torch_dtype": "float32",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "hidden_act": "gelu",
            "hidden_size": 32,
            "image_size": 56,
            "intermediate_size": 64,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": 14,
            **vision,
        },
    }


def shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of every original tensor."""
    vision, text = config["vision_config"], config["llm_config"]
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    yield "vision_model.embeddings.class_embedding", (1, 1, width)
    yield "vision_model.embeddings.position_embedding", (1, (vision["image_size"] // patch) ** 2 + 1, width)
    yield "vision_model.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield "vision_model.embeddings.patch_embedding.bias", (width,)
    for i in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}"
        yield f"{layer}.attn.qkv.weight", (3 * width, width)
        if vision["qkv_bias"]:
            yield f"{layer}.attn.qkv.bias", (3 * width,)
        if vision["qk_normalization"]:
            yield f"{layer}.attn.q_norm.weight", (width,)
            yield f"{layer}.attn.k_norm.weight", (width,)
        for name, out, into in (("attn.proj", width, width), ("mlp.fc1", inner, width), ("mlp.fc2", width, inner)):
            yield f"{layer}.{name}.weight", (out, into)
            yield f"{layer}.{name}.bias", (out,)
        for name in ("norm1", "norm2"):
            yield f"{layer}.{name}.weight", (width,)
            if vision["norm_type"] == "layer_norm":
                yield f"{layer}.{name}.bias", (width,)
        yield f"{layer}.ls1", (width,)
        yield f"{layer}.ls2", (width,)
    shuffled, wide = width * int(1 / config["downsample_ratio"]) ** 2, text["hidden_size"]
    for name, *shape in (("0", shuffled), ("1", wide, shuffled), ("3", wide, wide)):
        yield f"mlp1.{name}.weight", tuple(shape)
        yield f"mlp1.{name}.bias", (shape[0],)
    yield from _language_shapes(text)


def _language_shapes(text: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    (language_class,) = text["architectures"]
    internlm2 = language_class == "InternLM2ForCausalLM"
    wide, inner = text["hidden_size"], text["intermediate_size"]
    keys = text["num_key_value_heads"] * (wide // text["num_attention_heads"])
    up, down = (inner, wide), (wide, inner)
    biased, norms = set(), ("input_layernorm", "post_attention_layernorm")
    if internlm2:
        linears = {"attention.wqkv": (wide + 2 * keys, wide), "attention.wo": (wide, wide)}
        biased = set(linears) if text["bias"] else set()
        linears |= {"feed_forward.w1": up, "feed_forward.w2": down, "feed_forward.w3": up}
        norms = ("attention_norm", "ffn_norm")
    elif language_class == "Phi3ForCausalLM":
        linears = {"self_attn.qkv_proj": (wide + 2 * keys, wide), "self_attn.o_proj": (wide, wide)}
        linears |= {"mlp.gate_up_proj": (2 * inner, wide), "mlp.down_proj": down}
    else:
        linears = {f"self_attn.{name}_proj": (size, wide) for name, size in (("q", wide), ("k", keys), ("v", keys))}
        biased = set(linears) if language_class == "Qwen2ForCausalLM" else set()
        linears |= {"self_attn.o_proj": (wide, wide), "mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
    yield f"language_model.model.{'tok_embeddings' if internlm2 else 'embed_tokens'}.weight", (text["vocab_size"], wide)
    for i in range(text["num_hidden_layers"]):
        for name, shape in linears.items():
            yield f"language_model.model.layers.{i}.{name}.weight", shape
            if name in biased:
                yield f"language_model.model.layers.{i}.{name}.bias", shape[:1]
        for name in norms:
            yield f"language_model.model.layers.{i}.{name}.weight", (wide,)
    yield "language_model.model.norm.weight", (wide,)
    yield f"language_model.{'output' if internlm2 else 'lm_head'}.weight", (text["vocab_size"], wide)


def random_weights(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, Tensor]:
    """Returns random weights under their original names; norms and layer scales near one, so that every part matters."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config):
        values = torch.randn(shape, generator=random)
        if len(shape) > 1:
            weights[name] = values * 1.2 / math.sqrt(shape[-1])
        else:
            weights[name] = 0.3 * values if name.endswith(".bias") else 1 + 0.2 * values
    return weights


WORDS = (
    "th he the ▁the ▁t is ▁is wh at what ▁w im ag age image us er user as ist an ant assistant assist sy st em system co or "
    "lor color ▁co re ed red bl ue blue ta ar star ▁▁ nt tar hat ha ▁wh ▁what ▁s ▁st"
)
PIECES = [*WORDS.split(), "\n\n"]


def sentencepiece_model(unused: int = 6, *, prefix: bool = False) -> Any:
    """Returns a small BPE model of sentencepiece's format: bytes, characters, PIECES with shuffled scores, unused pieces."""
    model = import_protobuf().ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = prefix, False

    def add(piece: str, score: float, piece_type: int) -> None:
        model.pieces.add(piece=piece, score=score, type=piece_type)

    add("<unk>", 0, 2)
    add("<s>", 0, 3)
    add("</s>", 0, 3)
    for byte in range(256):
        add(f"<0x{byte:02X}>", 0, 6)
    order = torch.randperm(len(PIECES), generator=torch.Generator().manual_seed(3)).tolist()
    for piece, rank in zip(PIECES, order, strict=True):
        add(piece, -float(rank), 1)
    for i, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz\n?.<|>_/"):
        add(letter, -float(len(PIECES) + i), 1)
    for i in range(unused):
        add(f"[UNUSED_TOKEN_{140 + i}]", -float(1000 + i), 1)
    return model


def sentencepiece_encode(model: Any, text: str) -> list[int]:
    """Encodes text that holds no special token, as sentencepiece does: again and again, the best pair of neighbours."""
    scores = {p.piece: p.score for p in model.pieces if p.type == 1}
    numbers = {p.piece: i for i, p in enumerate(model.pieces)}
    text = ("▁" if model.normalizer_spec.add_dummy_prefix and text else "") + text.replace(" ", "▁")
    symbols = list(text)
    while True:
        pairs = [
            (-scores[a + b], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in scores
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    encoded: list[int] = []
    for symbol in symbols:
        encoded += [numbers[symbol]] if symbol in scores else [numbers[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return encoded


def _flags(words: Mapping[int, str], **flags: bool) -> dict[str, dict[str, Any]]:
    usual = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(number): {"content": word, **usual, **flags} for number, word in words.items()}


def write_tokenizer(folder: Path, language_class: str) -> int:
    """Writes an original tokenizer's files; returns the size of its vocabulary."""
    added, settings = (
        _byte_level(folder) if language_class == "Qwen2ForCausalLM" else _sentencepiece(folder, language_class)
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 8192, **settings}))
    numbers = {word: number for number, word in added.items() if number > 2}
    (folder / "added_tokens.json").write_text(json.dumps(numbers))
    return max(added) + 1


def _byte_level(folder: Path) -> tuple[dict[int, str], dict[str, Any]]:
    """Qwen2's: all bytes, some merges, added tokens behind them."""
    letters = [*map(chr, range(33, 127)), *map(chr, range(161, 173)), *map(chr, range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    merges = [("t", "h"), ("th", "e"), ("r", "e"), ("re", "d"), ("Ġ", "the"), ("u", "s"), ("e", "r"), ("us", "er")]
    pieces = [*letters, *(a + b for a, b in merges)]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    added = dict(enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE_WORDS], len(pieces)))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"}
    return added, {**settings, "pad_token": "<|endoftext|>", "added_tokens_decoder": _flags(added)}


def _sentencepiece(folder: Path, language_class: str) -> tuple[dict[int, str], dict[str, Any]]:
    """InternLM2's, whose added tokens take the places of unused pieces, or Phi-3's, where they stand behind all pieces."""
    phi3 = language_class == "Phi3ForCausalLM"
    model = sentencepiece_model(0 if phi3 else 6, prefix=phi3)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    count, added = len(model.pieces), {0: "<unk>", 1: "<s>", 2: "</s>"}
    settings = {
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "add_bos_token": True,
    }
    if phi3:
        words = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
        added |= enumerate([*words, *IMAGE_WORDS], count)
        decoder = _flags(added) | _flags({count + 3: "<|end|>"}, special=False)
        decoder |= _flags({count + i: words[i] for i in (1, 2, 4)}, rstrip=True)
        return added, {
            **settings,
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "added_tokens_decoder": decoder,
        }
    words = [f"<|{name}|>" for name in ("plugin", "interpreter", "action_end", "action_start", "im_end", "im_start")]
    added |= enumerate([*words, *IMAGE_WORDS], count - len(words))
    settings |= {"tokenizer_class": "InternLM2Tokenizer", "added_tokens_decoder": _flags(added)}
    return added, {**settings, "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}


def write_folder(
    folder: Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor] | None = None,
    *,
    files: int = 3,
    pickled: bool = False,
) -> dict[str, Tensor]:
    """Writes an original folder; returns its weights (random ones where none are given). Sets the vocabulary's size."""
    folder.mkdir(parents=True, exist_ok=True)
    (language_class,) = config["llm_config"]["architectures"]
    config["llm_config"]["vocab_size"] = write_tokenizer(folder, language_class)
    weights = random_weights(config) if weights is None else dict(weights)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, weights, files=files, pickled=pickled)
    return weights


def write_weights(folder: Path, weights: Mapping[str, Tensor], *, files: int = 3, pickled: bool = False) -> None:
    """Writes weights into one file or several with an index, as transformers of the time named them."""
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = list(weights)
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"{stem}.{ending}" if files == 1 else f"{stem}-{number + 1:05d}-of-{files:05d}.{ending}"
        part: Sequence[str] = names[number * len(names) // files : (number + 1) * len(names) // files]
        tensors = {name: weights[name] for name in part}
        if pickled:
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
