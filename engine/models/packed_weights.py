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

_CHECKED_ROWS = 1024
"""Rows compared at a time: a second copy of a whole vocabulary's matrix may not fit."""

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
    if _all_bfloat16(weight):
        # Outputs 0 and 8, 1 and 9, ... are neighbours: the halves of a 32-bit word.
        halves = weight.bfloat16().reshape(rows // _PANEL, 2, _PANEL // 2, depth)
        return halves.permute(0, 3, 2, 1).contiguous().view(rows // _PANEL, depth, _PANEL)
    return weight.reshape(rows // _PANEL, _PANEL, depth).transpose(1, 2).contiguous()


def _all_bfloat16(weight: torch.Tensor) -> bool:
    return all(
        torch.equal(part.bfloat16().float(), part) for part in torch.split(weight, _CHECKED_ROWS)
    )


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
    """All matrices of products packed, one by one: `weights` is used up, so that no second copy of
    it is ever in memory. The embedding stays: it is looked up by rows."""
    output = weights.output
    return dataclasses.replace(
        weights,
        layers=tuple(_packed_layer(layer) for layer in weights.layers),
        output=pack(output) if output is weights.embedding else _taken(output),
    )


def _packed_layer(layer: LayerWeights) -> LayerWeights:
    return dataclasses.replace(layer, **{name: _taken(getattr(layer, name)) for name in _MATRICES})


def _taken(weight: torch.Tensor) -> torch.Tensor:
    packed = pack(weight)
    if packed is not weight:
        weight.untyped_storage().resize_(0)
    return packed
