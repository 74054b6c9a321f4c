"""Value banks in compressed or offloaded storage: 8 or 4 bits, on disk, or in CPU memory.

    V rows   M slots   W width of a slot

Each class replaces the bank's nn.Embedding: codes [...] -> rows [..., M W].
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class QuantizedRows(nn.Module):
    """Rows in 8 or 4 bits with a scale per row and slot, dequantised when gathered.

    An element x of a slot with largest magnitude m is stored as round(x / s), where s = m / 127, or
    m / 7 for 4 bits (two elements per byte, the first in the low bits). Raises ValueError for
    another number of bits, or for 4 bits and an odd width.
    """

    packed: Tensor  # int8 [V, M, W], or uint8 [V, M, W / 2]
    scale: Tensor  # float32 [V, M, 1]

    def __init__(self, rows: int, slots: int, width: int, bits: int) -> None:
        super().__init__()
        if bits not in (4, 8) or width % (8 // bits):
            raise ValueError(
                f"bank of {bits} bits and width {width}: expected 8 bits, or 4 and an even width"
            )
        self.bits, self.embedding_dim = bits, slots * width
        dtype, per_byte = (torch.int8, 1) if bits == 8 else (torch.uint8, 2)
        self.register_buffer("packed", torch.zeros(rows, slots, width // per_byte, dtype=dtype))
        self.register_buffer("scale", torch.zeros(rows, slots, 1))

    @classmethod
    @torch.no_grad()
    def quantize(cls, weight: Tensor, slots: int, bits: int) -> QuantizedRows:
        """Quantize a bank's weight [V, M W]."""
        table = cls(len(weight), slots, weight.shape[1] // slots, bits).to(weight.device)
        for chunk, packed, scale in zip(
            weight.split(256), table.packed.split(256), table.scale.split(256), strict=True
        ):
            values = chunk.float().unflatten(1, (slots, -1))
            largest = 2 ** (bits - 1) - 1
            scale.copy_(values.abs().amax(dim=-1, keepdim=True).div(largest).clamp(min=1e-30))
            integers = (values / scale).round().to(torch.int8)
            if bits == 4:
                nibbles = (integers + 8).view(torch.uint8)
                integers = nibbles[..., ::2] | (nibbles[..., 1::2] << 4)
            packed.copy_(integers)
        return table

    def forward(self, codes: Tensor) -> Tensor:
        """Codes int64 [...] -> rows [..., M W] in the scales' dtype."""
        integers = self.packed[codes]
        if self.bits == 4:
            pairs = torch.stack([integers & 15, integers >> 4], dim=-1)
            integers = pairs.flatten(-2).view(torch.int8) - 8
        return (integers * self.scale[codes]).flatten(-2)


class DiskRows(nn.Module):
    """Rows read from a safetensors file when gathered; pages that were read are released.

    Raises ValueError if the file has no matrix `name` of floating-point rows.
    """

    def __init__(self, path: Path, name: str) -> None:
        super().__init__()
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            entry: dict[str, Any] = json.loads(file.read(start - 8)).get(name, {})
            self.pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if entry.get("dtype") not in DTYPES or len(entry["shape"]) != 2:
            raise ValueError(f"{path}: '{name}': expected a matrix of {', '.join(DTYPES)}")
        shape, begin = entry["shape"], start + entry["data_offsets"][0]
        count = shape[0] * shape[1]
        dtype = DTYPES[entry["dtype"]]
        self.rows = torch.frombuffer(self.pages, dtype=dtype, count=count, offset=begin).view(shape)
        self.embedding_dim = shape[1]

    def forward(self, codes: Tensor) -> Tensor:
        """Codes int64 [...] -> rows [..., M W] on the codes' device."""
        rows = self.rows[codes.cpu()]
        if hasattr(self.pages, "madvise"):  # without it, pages that were read stay in memory
            self.pages.madvise(mmap.MADV_DONTNEED)
        return rows.to(codes.device)

    def __deepcopy__(self, memo: object) -> DiskRows:
        return self  # the rows are read-only


class CPURows(nn.Module):
    """Rows in CPU memory, copied to the codes' device when gathered."""

    __deepcopy__ = DiskRows.__deepcopy__

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = weight.detach().cpu()
        self.embedding_dim = weight.shape[1]

    def forward(self, codes: Tensor) -> Tensor:
        """Codes int64 [...] -> rows [..., M W] on the codes' device."""
        return self.rows[codes.cpu()].to(codes.device)


def make_bank_storage(kind: str, path: Path, name: str, weight: Tensor, slots: int) -> nn.Module:
    """A module that stores a bank's `weight`, the tensor `name` of a safetensors file, as `kind`.

    int8 and int4 quantize the rows, disk reads rows from the file, cpu keeps them in CPU memory.
    Raises ValueError for another kind.
    """
    if kind in ("int8", "int4"):
        return QuantizedRows.quantize(weight, slots, int(kind[3:]))
    if kind == "disk":
        return DiskRows(path, name)
    if kind == "cpu":
        return CPURows(weight)
    raise ValueError(f"bank {kind!r}: expected int8, int4, disk or cpu")
