"""Models of llama.cpp's GGUF files in PyTorch: llama, gemma3 and qwen2, with LoRA, greedy generation, and adapters written as GGUF.

Weights are dequantized as llama.cpp would, and are not trained; they are kept in bfloat16, which the CPUs that this was run on multiply
twice as fast as float32. What is trained are the two thin factors that LoRA puts beside each of some matrices, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F

# Leaving query and key out avoids the permutation that the llama architecture's GGUF has for them.
TARGETS = ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def generator_of(seed: int) -> torch.Generator:
    """Random numbers on the device that all tensors are made on (`torch.set_default_device`)."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@dataclass
class Shape:
    architecture: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    epsilon: float
    rope_base: float
    local_rope_base: float
    sliding_pattern: int

    @staticmethod
    def of(reader: gguf.GGUFReader) -> "Shape":
        architecture = reader.fields["general.architecture"].contents()

        def value(key, default=None):
            field = reader.fields.get(f"{architecture}.{key}")
            return default if field is None else field.contents()

        width, heads = value("embedding_length"), value("attention.head_count")
        return Shape(
            architecture=architecture,
            width=width,
            layers=value("block_count"),
            heads=heads,
            kv_heads=value("attention.head_count_kv"),
            head_width=value("attention.key_length", width // heads),
            epsilon=value("attention.layer_norm_rms_epsilon"),
            rope_base=value("rope.freq_base", 10000.0),
            # gemma3: every sixth layer sees all tokens, the others have rotary frequencies of their own.
            local_rope_base=10000.0 if architecture == "gemma3" else value("rope.freq_base", 10000.0),
            sliding_pattern=6 if architecture == "gemma3" else 1,
        )


class Lora(torch.nn.Module):
    """`x ↦ scale · (x Aᵀ) Bᵀ`, with A `[rank, n_in]` and B `[n_out, rank]`; nothing at first, since B is zero."""

    def __init__(self, n_in: int, n_out: int, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(rank, n_in, generator=generator) / n_in**0.5)
        self.b = torch.nn.Parameter(torch.zeros(n_out, rank))
        self.scale = alpha / rank

    def forward(self, x):
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale


class Model(torch.nn.Module):
    def __init__(self, path: Path | str):
        super().__init__()
        reader = gguf.GGUFReader(str(path))
        self.shape = Shape.of(reader)
        self.weights = {}
        for tensor in reader.tensors:
            data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            value = torch.tensor(np.array(data, dtype=np.float32))
            self.weights[tensor.name] = value if value.ndim == 1 else value.to(torch.bfloat16)
        self.embedding = self.weights["token_embd.weight"]
        self.head = self.weights.get("output.weight", self.embedding)
        self.lora = torch.nn.ModuleDict()
        self.alpha = 0.0

    # LoRA

    def add_lora(self, rank: int, alpha: float, seed: int, targets=TARGETS):
        generator = generator_of(seed)
        self.alpha = alpha
        for layer in range(self.shape.layers):
            for name in targets:
                n_out, n_in = self.weights[f"blk.{layer}.{name}.weight"].shape
                self.lora[f"{layer}_{name}"] = Lora(n_in, n_out, rank, alpha, generator)

    def write_lora(self, path: Path | str, name: str):
        """llama.cpp's adapter format; matrices in F16."""
        writer = gguf.GGUFWriter(str(path), self.shape.architecture)
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", self.alpha)
        for key, lora in self.lora.items():
            layer, target = key.split("_", 1)
            for suffix, matrix in (("a", lora.a), ("b", lora.b)):
                data = matrix.detach().to(torch.float16).cpu().numpy()
                writer.add_tensor(f"blk.{layer}.{target}.weight.lora_{suffix}", np.ascontiguousarray(data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    # Forward

    def linear(self, layer: int, name: str, x):
        y = F.linear(x, self.weights[f"blk.{layer}.{name}.weight"])
        bias = self.weights.get(f"blk.{layer}.{name}.bias")
        if bias is not None:
            y = y + bias.to(y.dtype)
        key = f"{layer}_{name}"
        return y + self.lora[key](x) if key in self.lora else y

    def norm(self, x, name: str):
        """RMS norm in float32 of the float32 residual; out in bfloat16, for the products that follow."""
        weight = self.weights[name]
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.shape.epsilon)
        return (scaled * weight).to(torch.bfloat16)

    def rotate(self, x, positions, base: float):
        """Rotary embedding of `[batch, heads, tokens, head_width]`: neighbours in pairs for llama, halves for the others."""
        half = x.shape[-1] // 2
        angles = positions[:, None, :, None].float() * base ** (-torch.arange(half).float() / half)
        cos, sin = angles.cos(), angles.sin()
        x = x.float()
        if self.shape.architecture == "llama":
            even, odd = x[..., 0::2], x[..., 1::2]
            turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
        else:
            first, second = x[..., :half], x[..., half:]
            turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
        return turned.to(torch.bfloat16)

    def attention(self, layer: int, x, positions, cache):
        s = self.shape
        batch, tokens, _ = x.shape
        heads = lambda y, n: y.view(batch, tokens, n, s.head_width).transpose(1, 2)
        q = heads(self.linear(layer, "attn_q", x), s.heads)
        k = heads(self.linear(layer, "attn_k", x), s.kv_heads)
        v = heads(self.linear(layer, "attn_v", x), s.kv_heads)
        if s.architecture == "gemma3":
            q = self.norm(q, f"blk.{layer}.attn_q_norm.weight")
            k = self.norm(k, f"blk.{layer}.attn_k_norm.weight")
        local = (layer + 1) % s.sliding_pattern != 0
        base = s.local_rope_base if local else s.rope_base
        q, k = self.rotate(q, positions, base), self.rotate(k, positions, base)
        mask = None
        if cache is not None:
            k, v, mask = cache.extended(layer, k, v, positions)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.linear(layer, "attn_output", y.transpose(1, 2).reshape(batch, tokens, -1))

    def feed_forward(self, layer: int, x):
        gate, up = self.linear(layer, "ffn_gate", x), self.linear(layer, "ffn_up", x)
        gate = F.gelu(gate, approximate="tanh") if self.shape.architecture == "gemma3" else F.silu(gate)
        return self.linear(layer, "ffn_down", gate * up)

    def forward(self, tokens, positions=None, cache=None):
        """The normed residual after the last block, `[batch, tokens, width]`; [`logits`] makes logits of it."""
        s = self.shape
        if positions is None:
            positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
        x = F.embedding(tokens, self.embedding).float()
        if s.architecture == "gemma3":
            x = x * s.width**0.5
        for layer in range(s.layers):
            y = self.attention(layer, self.norm(x, f"blk.{layer}.attn_norm.weight"), positions, cache)
            x = x + self.after(layer, "post_attention_norm", y)
            y = self.feed_forward(layer, self.norm(x, f"blk.{layer}.ffn_norm.weight"))
            x = x + self.after(layer, "post_ffw_norm", y)
        return self.norm(x, "output_norm.weight")

    def after(self, layer: int, name: str, y):
        key = f"blk.{layer}.{name}.weight"
        return self.norm(y, key).float() if key in self.weights else y.float()

    def logits(self, x):
        return F.linear(x, self.head).float()

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], limit: int, stop: set[int], temperature=0.0, seed=0) -> list[list[int]]:
        """Answers of up to `limit` tokens to prompts of any lengths at once; greedy at temperature 0."""
        generator = generator_of(seed)
        longest = max(map(len, prompts))
        # Padded on the left, so that all prompts end together.
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        start = torch.tensor([longest - len(p) for p in prompts])
        cache = Cache(self.shape, start, longest + limit)
        positions = (torch.arange(longest)[None] - start[:, None]).clamp(min=0)
        x = self(tokens, positions, cache)[:, -1:]
        answers, open_ = [[] for _ in prompts], [True] * len(prompts)
        for step in range(limit):
            logits = self.logits(x)[:, 0]
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                chosen = logits.argmax(-1)
            for index, token in enumerate(chosen.tolist()):
                if open_[index] and token in stop:
                    open_[index] = False
                if open_[index]:
                    answers[index].append(token)
            if not any(open_) or step + 1 == limit:
                break
            positions = (longest + step - start)[:, None]
            x = self(chosen[:, None], positions, cache)
        return answers


class Cache:
    """Keys and values of all tokens up to now. What lies before a prompt's `start` is padding."""

    def __init__(self, shape: Shape, start, capacity: int):
        size = (shape.layers, len(start), shape.kv_heads, capacity, shape.head_width)
        self.k = torch.zeros(size, dtype=torch.bfloat16)
        self.v = torch.zeros(size, dtype=torch.bfloat16)
        self.start, self.used, self.layers = start, 0, shape.layers

    def extended(self, layer: int, k, v, positions):
        n = k.shape[2]
        end = self.used + n
        self.k[layer, :, :, self.used : end] = k
        self.v[layer, :, :, self.used : end] = v
        columns, rows = torch.arange(end), torch.arange(self.used, end)
        seen = (columns[None, None] <= rows[None, :, None]) & (columns[None, None] >= self.start[:, None, None])
        # A padding row sees itself, so that its softmax is one.
        seen = seen | (columns[None, None] == rows[None, :, None])
        if layer == self.layers - 1:
            self.used = end
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end], seen[:, None]
