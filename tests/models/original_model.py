"""What the original InternVL2 code computes, written from its architecture, independently of the converter.

Fused projections stay fused, and there are loops instead of reshapes where the order of things matters. Shapes: B rows,
T tokens, D width, N tiles, W width of a head.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class OriginalModel:
    """InternViT, pixel shuffle, `mlp1` and a language tower over weights with their original names."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], image_token: int) -> None:
        self.config, self.weights, self.image_token = config, weights, image_token
        (self.language_class,) = config["llm_config"]["architectures"]
        self.internlm2 = self.language_class == "InternLM2ForCausalLM"

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _rms(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.weights[f"{name}.weight"]

    def _vision_norm(self, x: Tensor, name: str) -> Tensor:
        vision = self.config["vision_config"]
        if vision["norm_type"] == "rms_norm":
            return self._rms(x, name, vision["layer_norm_eps"])
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, vision["layer_norm_eps"])

    def vision(self, pixels: Tensor) -> Tensor:
        """Returns the tokens of tiles (N, 3, side, side)."""
        vision, weights = self.config["vision_config"], self.weights
        heads, eps, stem = vision["num_attention_heads"], vision["layer_norm_eps"], "vision_model.embeddings"
        patch = weights[f"{stem}.patch_embedding.weight"], weights[f"{stem}.patch_embedding.bias"]
        x = functional.conv2d(pixels, *patch, stride=vision["patch_size"])
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([weights[f"{stem}.class_embedding"].expand(len(x), 1, -1), x], 1)
        x = x + weights[f"{stem}.position_embedding"]
        for i in range(vision["num_hidden_layers"]):
            layer = f"vision_model.encoder.layers.{i}"
            q, k, v = self._linear(self._vision_norm(x, f"{layer}.norm1"), f"{layer}.attn.qkv").chunk(3, -1)
            if vision["qk_normalization"]:  # over all heads together
                q, k = self._rms(q, f"{layer}.attn.q_norm", eps), self._rms(k, f"{layer}.attn.k_norm", eps)
            seen = []
            for head_q, head_k, head_v in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
                scores = head_q @ head_k.transpose(1, 2) / math.sqrt(head_q.shape[-1])
                seen.append(scores.softmax(-1) @ head_v)
            x = x + self._linear(torch.cat(seen, -1), f"{layer}.attn.proj") * weights[f"{layer}.ls1"]
            inner = functional.gelu(self._linear(self._vision_norm(x, f"{layer}.norm2"), f"{layer}.mlp.fc1"))
            x = x + self._linear(inner, f"{layer}.mlp.fc2") * weights[f"{layer}.ls2"]
        grid = x[:, 1:].unflatten(1, (side, side))
        tokens = [  # the order of version 2: four neighbours side by side, rows first
            torch.cat([grid[:, i, j], grid[:, i, j + 1], grid[:, i + 1, j], grid[:, i + 1, j + 1]], -1)
            for i in range(0, side, 2)
            for j in range(0, side, 2)
        ]
        x = torch.stack(tokens, 1)
        x = functional.layer_norm(x, x.shape[-1:], weights["mlp1.0.weight"], weights["mlp1.0.bias"], 1e-5)
        return self._linear(functional.gelu(self._linear(x, "mlp1.1")), "mlp1.3")

    def _angles(self, length: int) -> tuple[Tensor, float]:
        """Returns the angle of each position and pair (T, W / 2), and the factor on cosine and sine."""
        text = self.config["llm_config"]
        width, base = text["hidden_size"] // text["num_attention_heads"], text["rope_theta"]
        scaling, limit = text.get("rope_scaling"), text["max_position_embeddings"]
        factors, stretch = torch.ones(width // 2), 1.0
        if scaling and scaling["type"] == "dynamic" and length > limit:
            base *= (scaling["factor"] * length / limit - (scaling["factor"] - 1)) ** (width / (width - 2))
        if scaling and scaling["type"] == "su":
            trained = text["original_max_position_embeddings"]
            factors = torch.tensor(scaling["long_factor" if length > trained else "short_factor"])
            stretch = math.sqrt(1 + math.log(limit / trained) / math.log(trained))
        speeds = torch.tensor([1 / base ** (2 * i / width) for i in range(width // 2)]) / factors
        return torch.outer(torch.arange(length).float(), speeds), stretch

    def _rotate(self, x: Tensor, angles: Tensor, stretch: float) -> Tensor:
        """Turns the pairs (i, i + W / 2) of a head (B, T, W), as complex numbers."""
        pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.full_like(angles, stretch), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    def _heads(self, x: Tensor, layer: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Returns the query heads, and for each of them its key and its value, (B, T, W) each."""
        text = self.config["llm_config"]
        queries, keys = text["num_attention_heads"], text["num_key_value_heads"]
        width, group = text["hidden_size"] // queries, queries // keys
        q: list[Tensor] = []
        k: list[Tensor] = []
        v: list[Tensor] = []
        if self.internlm2:
            fused = self._linear(x, f"{layer}.attention.wqkv").split(width, -1)
            for start in range(0, len(fused), group + 2):
                q += fused[start : start + group]
                k.append(fused[start + group])
                v.append(fused[start + group + 1])
        elif self.language_class == "Phi3ForCausalLM":
            fused = self._linear(x, f"{layer}.self_attn.qkv_proj").split(width, -1)
            q, k, v = list(fused[:queries]), list(fused[queries : queries + keys]), list(fused[queries + keys :])
        else:
            q, k, v = (list(self._linear(x, f"{layer}.self_attn.{p}_proj").split(width, -1)) for p in "qkv")
        return q, [k[i // group] for i in range(queries)], [v[i // group] for i in range(queries)]

    def _mlp(self, x: Tensor, layer: str) -> Tensor:
        if self.internlm2:
            gate, up = (self._linear(x, f"{layer}.feed_forward.{name}") for name in ("w1", "w3"))
        elif self.language_class == "Phi3ForCausalLM":
            gate, up = self._linear(x, f"{layer}.mlp.gate_up_proj").chunk(2, -1)
        else:
            gate, up = (self._linear(x, f"{layer}.mlp.{name}_proj") for name in ("gate", "up"))
        return self._linear(
            functional.silu(gate) * up, f"{layer}.{'feed_forward.w2' if self.internlm2 else 'mlp.down_proj'}"
        )

    def language(self, x: Tensor) -> Tensor:
        """Returns the logits of embeddings (B, T, D)."""
        text = self.config["llm_config"]
        eps, length = text["rms_norm_eps"], x.shape[1]
        norm1, norm2, output = (
            ("attention_norm", "ffn_norm", "attention.wo")
            if self.internlm2
            else ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj")
        )
        angles, stretch = self._angles(length)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        for i in range(text["num_hidden_layers"]):
            layer = f"language_model.model.layers.{i}"
            seen = []
            for q, k, v in zip(*self._heads(self._rms(x, f"{layer}.{norm1}", eps), layer), strict=True):
                q, k = self._rotate(q, angles, stretch), self._rotate(k, angles, stretch)
                scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(future, -math.inf)
                seen.append(scores.softmax(-1) @ v)
            x = x + self._linear(torch.cat(seen, -1), f"{layer}.{output}")
            x = x + self._mlp(self._rms(x, f"{layer}.{norm2}", eps), layer)
        x = self._rms(x, "language_model.model.norm", eps)
        head = f"language_model.{'output' if self.internlm2 else 'lm_head'}"
        return self._linear(x, head if f"{head}.weight" in self.weights else "language_model.model.embed_tokens")

    def __call__(self, input_ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Returns logits (B, T, V); the tokens of all tiles take the places of the image tokens, in order."""
        embedding = self.weights[
            f"language_model.model.{'tok_embeddings' if self.internlm2 else 'embed_tokens'}.weight"
        ]
        x = embedding[input_ids]
        if pixels is not None:
            x[input_ids == self.image_token] = self.vision(pixels).flatten(0, 1)
        return self.language(x)
