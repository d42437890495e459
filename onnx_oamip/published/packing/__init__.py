"""Model files packed for disks and networks: exact, or with weights that share a few values; unpacked when loaded.

After HAM and sHAM: Marinò et al., "Compression strategies and space-conscious representations for deep neural networks"
(ICPR 2020), and "Compact representations of convolutional neural networks via weight pruning and quantization"
(arXiv 2108.12704).

A model is smaller in the packed file only: an unpacked model has dense weights again, and takes the memory and the time
of the original.
"""

from __future__ import annotations

from onnx_oamip.published.packing.packing import (
    Packed,
    Unpacked,
    pack,
    unpack,
)

__all__ = ["Packed", "Unpacked", "pack", "unpack"]
