"""Cholesky factorisations that let other threads run.

``scipy.linalg`` holds the interpreter lock while LAPACK works, for minutes on a wide layer. No other thread runs then:
neither one that shares the work nor the one that ends the process for a signal. Routines of scipy that are called
through their addresses release the lock.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple, cast

import numpy as np
from scipy.linalg import cython_lapack

from onnx_oamip.core.records import Bools, Floats

_CAPSULES: Mapping[str, object] = cast("Mapping[str, object]", cython_lapack.__pyx_capi__)
"""Routines of LAPACK that scipy exports for compiled code, by name."""
TRIANGLE = b"U"
"""Triangle of a matrix that LAPACK reads and writes. It counts columns first: this is the lower triangle of ours."""
MIRROR = 256
"""Rows of a symmetric matrix that are mirrored at a time: whole triangles would be copied several times."""


class Cholesky(NamedTuple):
    """Cholesky factor of a symmetric positive definite matrix.

    Attributes:
        factor: L with ``L L'`` the matrix, in the lower triangle (n, n); the upper one has no meaning.
    """

    factor: Floats

    @classmethod
    def of(cls, matrix: Floats, *, overwrite: bool = False) -> Cholesky:
        """Factorises a matrix.

        Args:
            matrix: Symmetric and finite matrix, of which the lower triangle is read (n, n).
            overwrite: Whether the factor may take the memory of the matrix.

        Returns:
            The factor.

        Raises:
            numpy.linalg.LinAlgError: The matrix is not positive definite.
        """
        factor = _square(matrix, overwrite)
        if failed := _run("dpotrf", [len(factor), factor, len(factor)]):
            raise np.linalg.LinAlgError(
                f"the leading minor of order {failed} is not positive definite"
            )
        return cls(factor)

    def solve(self, right: Floats) -> Floats:
        """Solves a system with the matrix.

        Args:
            right: Right sides (n,) or (n, sides).

        Returns:
            The solutions, of the same shape.

        Raises:
            ValueError: The right sides have another length than the matrix.
        """
        if len(right) != len(self.factor):
            raise ValueError(f"{len(right)} rows of right sides for {len(self.factor)} unknowns")
        solved: Floats = np.array(right, np.float64, order="F")
        n = len(self.factor)
        sides = 1 if solved.ndim == 1 else solved.shape[1]
        _run("dpotrs", [n, sides, self.factor, n, solved, n])
        return solved

    def inverse(self, *, overwrite: bool = False) -> Floats:
        """Inverts the matrix, for a third of the work of solving for the identity.

        Args:
            overwrite: Whether the inverse may take the memory of the factor.

        Returns:
            The inverse, symmetric to the last bit (n, n).

        Raises:
            numpy.linalg.LinAlgError: An entry of the diagonal of the factor is zero.
        """
        inverse = _square(self.factor, overwrite)
        if failed := _run("dpotri", [len(inverse), inverse, len(inverse)]):
            raise np.linalg.LinAlgError(f"entry {failed} of the diagonal of the factor is 0")
        for first in range(0, len(inverse), MIRROR):
            last = first + MIRROR
            corner = inverse[first:last, first:last]
            np.copyto(corner, corner.T.copy(), where=_is_upper(len(corner)))
            inverse[first:last, last:] = inverse[last:, first:last].T
        return inverse

    def log_determinant(self) -> float:
        """Computes the logarithm of the determinant of the matrix.

        Returns:
            The logarithm, a sum over the diagonal of the factor.
        """
        return 2 * float(np.log(np.diagonal(self.factor)).sum())


@cache
def _is_upper(n: int) -> Bools:
    """Mask of the entries above the diagonal (n, n), with n up to ``MIRROR``."""
    mask: Bools = ~np.tri(n, dtype=bool)
    return mask


def _square(matrix: Floats, overwrite: bool) -> Floats:
    """The matrix with its rows one behind the other: a copy unless it may be overwritten and has that order."""
    rows, columns = matrix.shape
    if rows != columns:
        raise ValueError(f"the matrix has {rows} rows and {columns} columns, but must be square")
    if overwrite:
        return np.require(matrix, np.float64, ["C", "W"])
    return np.array(matrix, np.float64, order="C")


def _run(name: str, arguments: Sequence[int | Floats]) -> int:
    """Runs a routine.

    Args:
        name: Name of the routine.
        arguments: Its arguments between the triangle and the status. Arrays may be changed.

    Returns:
        The status: 0 for success.
    """
    if not all(a.size for a in arguments if isinstance(a, np.ndarray)):
        return 0  # LAPACK wants at least one row
    whole_number = _whole_number()
    status = whole_number(0)
    references = [
        ctypes.c_void_p(a.ctypes.data)
        if isinstance(a, np.ndarray)
        else ctypes.byref(whole_number(a))
        for a in arguments
    ]
    _routine(name, len(arguments) + 2)(TRIANGLE, *references, ctypes.byref(status))
    return int(status.value)


@cache
def _whole_number() -> type[ctypes.c_int] | type[ctypes.c_int64]:
    """Type of the whole numbers that the LAPACK of scipy takes, by the signature of a routine."""
    signature = _signature("dpotrf").decode()
    second = signature.partition(",")[2].partition(",")[0]
    return ctypes.c_int if second.split() == ["int", "*"] else ctypes.c_int64


@cache
def _routine(name: str, arguments: int) -> Callable[..., None]:
    """A routine of LAPACK, by the address that scipy exports for compiled code.

    Calls through ctypes release the interpreter lock.
    """
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype = ctypes.c_void_p
    address.argtypes = [ctypes.py_object, ctypes.c_char_p]
    pointer = address(_CAPSULES[name], _signature(name))
    types = [ctypes.c_char_p] + [ctypes.c_void_p] * (arguments - 1)
    return ctypes.CFUNCTYPE(None, *types)(pointer)


def _signature(name: str) -> bytes:
    """Declaration of a routine in C, as scipy exports it."""
    signature = ctypes.pythonapi.PyCapsule_GetName
    signature.restype = ctypes.c_char_p
    signature.argtypes = [ctypes.py_object]
    return bytes(signature(_CAPSULES[name]))
