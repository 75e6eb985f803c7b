"""Matrices as the compiled products of a CPU read them: see `cpu_products.c`.

A packed matrix is a tensor of three dimensions, [outputs / 16, inputs, 16]: it says by itself what
it is, and takes the place of the one it was made of. A float32 matrix that came from a bfloat16
checkpoint is packed as bfloat16, which loses nothing.
"""

import dataclasses

import torch

from engine.models.weights import LayerWeights, ModelWeights

_PANEL = 16
"""Outputs side by side; `PANEL` of cpu_products.c."""

_MATRICES = ("qkv", "o", "gate_up", "down")


def is_packed(weight: torch.Tensor) -> bool:
    return weight.dim() == 3


def outputs(packed: torch.Tensor) -> int:
    """Rows of the matrix that was packed."""
    return packed.shape[0] * packed.shape[2]


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [n, k] float32, packed; as it is where n is no multiple of a panel's outputs."""
    rows, depth = weight.shape
    if rows % _PANEL:
        return weight
    narrow = weight.bfloat16()
    if torch.equal(narrow.float(), weight):
        # Outputs 0 and 8, 1 and 9, ... are neighbours: the halves of a 32-bit word.
        halves = narrow.view(rows // _PANEL, 2, _PANEL // 2, depth).permute(0, 3, 2, 1)
        return halves.contiguous().view(rows // _PANEL, depth, _PANEL)
    return weight.reshape(rows // _PANEL, _PANEL, depth).transpose(1, 2).contiguous()


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """What `pack` was given, as float32."""
    if not is_packed(weight):
        return weight
    panels, depth, _ = weight.shape
    if weight.dtype is torch.bfloat16:
        halves = weight.view(panels, depth, _PANEL // 2, 2).permute(0, 3, 2, 1)
        return halves.reshape(outputs(weight), depth).float()
    return weight.transpose(1, 2).reshape(outputs(weight), depth)


def packed_weights(weights: ModelWeights) -> ModelWeights:
    """All matrices of products packed. The embedding stays: it is looked up by rows."""
    return dataclasses.replace(
        weights,
        layers=tuple(_packed_layer(layer) for layer in weights.layers),
        output=pack(weights.output),
    )


def _packed_layer(layer: LayerWeights) -> LayerWeights:
    return dataclasses.replace(layer, **{name: pack(getattr(layer, name)) for name in _MATRICES})
