"""Model files packed for disks and networks: exact, or with weights that share a few values; unpacked when loaded.

After Marino, Petrini, Malchiodi and Frasca, "Deep neural networks compression: A comparative survey and choice
recommendations" (Neurocomputing 520, 2023; HAM and sHAM). A model is smaller in the packed file only: what is unpacked
has dense weights again, and takes the memory and the time of the original.
"""

from __future__ import annotations

from .packing import Packed, Unpacked, pack, unpack

__all__ = ["Packed", "Unpacked", "pack", "unpack"]
