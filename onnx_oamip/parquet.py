"""Samples from the columns of a Parquet file: numbers, lists of numbers, or encoded images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError, EnvironmentMissing
from .pictures import affine, decode
from .records import Array, Model, Port, Reading

LABELS = ("labels", "label")


def load(path: Path, model: Model, reading: Reading) -> dict[str, Any]:
    """Arrays by input name, ``labels`` where there is such a column, and scales of images.

    An input takes the column of its name; the input of a model that has only one takes ``reading.column``, or the only
    column beside the labels. Images are bytes, or records of bytes as the datasets library writes them. Raises
    DataError for what cannot be read or does not fit, EnvironmentMissing without pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet as reader
    except ImportError as error:
        raise EnvironmentMissing(f"reading {path} needs the package pyarrow; pip install pyarrow.") from error
    try:
        file = reader.ParquetFile(path)
        names = file.schema_arrow.names
        columns = _columns(names, model, reading, path)
        labels = next((n for n in LABELS if n in names and n not in columns.values()), None)
        wanted = [*columns.values(), *([labels] if labels else [])]
        parts, rows = [], 0
        for batch in file.iter_batches(batch_size=min(reading.most, 1024), columns=wanted):
            parts.append(batch)
            rows += batch.num_rows
            if rows >= reading.most:
                break
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0].rstrip('.')}.") from error
    if not rows:
        raise DataError(f"{path} holds no rows; at least one sample is needed, a few hundred are better.")
    table = pyarrow.Table.from_batches(parts).slice(0, reading.most)
    found: dict[str, Any] = {}
    for name, column in columns.items():
        found.update(_array(table.column(column), column, model.port(name), reading, path))
    if labels:
        found["labels"] = np.asarray(table.column(labels).to_numpy(zero_copy_only=False))
    return found


def _columns(names: list[str], model: Model, reading: Reading, path: Path) -> dict[str, str]:
    inputs = [p.name for p in model.inputs]
    if len(inputs) == 1:
        others = [n for n in names if n not in LABELS]
        chosen = reading.column or (inputs[0] if inputs[0] in names else others[0] if len(others) == 1 else None)
        if chosen is None or chosen not in names:
            what = f"no column '{chosen}'" if chosen else f"several columns and none called '{inputs[0]}'"
            raise DataError(f"{path} has {what}; choose one of {', '.join(names)} with --column.")
        return {inputs[0]: chosen}
    missing = [n for n in inputs if n not in names]
    if missing:
        raise DataError(f"{path} has no column '{missing[0]}' for that input; it has {', '.join(names)}.")
    return {n: n for n in inputs}


def _array(column: Any, name: str, port: Port, reading: Reading, path: Path) -> Mapping[str, Any]:
    import pyarrow

    kind = column.type
    where = f"{path}, column '{name}'"
    if column.null_count:
        raise DataError(f"{where} has {column.null_count} empty cells; remove those rows.")
    if pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        cells = column.to_pylist()
        content = [c.get("bytes") if isinstance(c, dict) else c for c in cells]
        codes = decode([(f"{where}, row {i}", c) for i, c in enumerate(content)], port, reading, where)
        scale, offset = affine(port, reading, where)
        return {port.name: codes, f"{port.name}.scale": scale, f"{port.name}.offset": offset}
    try:
        values: Array = np.stack([_nested(c) for c in column.to_pylist()])
    except (ValueError, TypeError) as error:
        raise DataError(f"{where} holds values of unequal shapes; every row needs the shape of the input.") from error
    fixed = port.dims[1:]
    if values.ndim == 2 and len(fixed) > 1 and all(isinstance(d, int) and d > 0 for d in fixed):
        whole = int(np.prod([d for d in fixed if isinstance(d, int)]))
        if values.shape[1] == whole:  # lists are flat where the writer knows no shapes
            values = values.reshape(len(values), *(int(d) for d in fixed if d is not None))
    # Lists say nothing of the width of their numbers.
    same = (values.dtype.kind in "iu") == (port.dtype.kind in "iu") or values.dtype.kind in "iu"
    return {port.name: values.astype(port.dtype) if same and values.dtype.kind in "iuf" else values}


def _nested(cell: Any) -> Array:
    return np.asarray(cell)
