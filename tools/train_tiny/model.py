"""The Llama architecture in plain torch, its weights named as Hugging Face names them.

Training on a module of our own keeps one static graph for `torch.compile`; the state dict it saves
is what `transformers.LlamaForCausalLM` loads (tests/model/test_embedded_model.py holds the two to
the same logits through the exported directory).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .settings import Shape


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.head_dim = shape.head_dim
        width, dim = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(width, self.heads * dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(self.heads * dim, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [batch, length, width], `cos` and `sin` [length, head_dim]."""
        batch, length, _ = x.shape
        # One product instead of three: at this width a launch costs more than a concatenation.
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        parts = F.linear(x, weight).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = torch.split(parts, [self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(
            q.contiguous(), k.contiguous(), v.contiguous(), is_causal=True, enable_gqa=True
        )
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), self.o_proj.weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the half-split layout that Hugging Face uses."""
    low, high = x.chunk(2, dim=-1)
    turned: Tensor = (x * cos + torch.cat([-high, low], dim=-1) * sin).to(x.dtype)
    return turned


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., width], same shape out."""
        both = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
        gate, up = both.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [batch, length, width], same shape out."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Backbone(nn.Module):
    """Embedding, layers and the last norm: what Hugging Face calls `model`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class TinyLlama(nn.Module):
    """A causal language model whose output matrix is its embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.stream_dtype = torch.float32
        """Of the residual stream; training on a GPU sets bfloat16, which serving will use."""
        self.model = Backbone(shape)
        half = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
        angles = torch.outer(
            torch.arange(shape.max_position_embeddings, dtype=torch.float64),
            shape.rope_theta**-half,
        )
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue
            # Residual branches start at zero, so that depth does not matter to the first steps.
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
            elif "embed" in name:
                nn.init.normal_(weight, std=0.02)
            else:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * 0.6)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] for token ids [batch, length]."""
        length = ids.shape[1]
        x = self.model.embed_tokens(ids).to(self.stream_dtype)
        cos, sin = self.cos[:length], self.sin[:length]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        logits: Tensor = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return logits

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats, a float32 scalar; `ids` and `targets` [batch, length]."""
        scores = self.logits(ids).flatten(0, 1).float()
        loss: Tensor = F.cross_entropy(scores, targets.flatten())
        return loss
