"""Samples from the columns of a Parquet file: numbers, lists of numbers, or encoded images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnx_oamip.core.errors import DataError, EnvironmentMissing
from onnx_oamip.core.extras import imports_of
from onnx_oamip.core.records import (
    Array,
    Model,
    Port,
    Reading,
)
from onnx_oamip.data import parquet_pages
from onnx_oamip.data.images import affine, decode
from onnx_oamip.graph.input_guards import amount, memory

LABELS = ("labels", "label")
BATCH = 128
"""Rows that are decoded at a time; texts of one batch are held in one array, which has room for 2 GiB."""
VALUE = 16
"""Bytes that one value may take while it is decoded: itself, and its levels of nesting."""
DENSE, FREE = 16, 1 << 22
"""Times its bytes that the texts of a column chunk may take, if they take more than ``FREE``: images are packed."""
_TEXTS = ("BYTE_ARRAY",)


def check(path: Path) -> None:
    """Raise EnvironmentMissing, naming the file, where the extra ``parquet`` is not installed."""
    with imports_of("parquet", f"reading {path}"):
        import pyarrow.parquet  # noqa: F401


def load(path: Path, model: Model, reading: Reading) -> dict[str, Any]:
    """Arrays by input name, ``labels`` where there is such a column, and scales of images.

    An input takes the column of its name; the input of a model that has only one takes ``reading.column``, or the only
    column beside the labels. Images are bytes, or records of bytes as the datasets library writes them. Raises
    DataError for what cannot be read or does not fit, EnvironmentMissing without pyarrow, or of images without Pillow.
    """
    check(path)
    import pyarrow
    import pyarrow.parquet as reader

    try:
        with path.open("rb") as stream:
            file = reader.ParquetFile(stream)
            names = file.schema_arrow.names
            columns = _columns(names, model, reading, path)
            labels = next((n for n in LABELS if n in names and n not in columns.values()), None)
            wanted = [*columns.values(), *([labels] if labels else [])]
            # Texts stay in their dictionaries: a text of a megabyte that stands in every row is held once.
            texts = [
                c.path
                for c in map(file.schema.column, range(len(file.schema)))
                if c.physical_type in _TEXTS
            ]
            file = reader.ParquetFile(stream, read_dictionary=texts)
            parts, rows, held = [], 0, 0
            for group in range(file.num_row_groups):
                if not file.metadata.row_group(group).num_rows:
                    continue
                _fits(path, held + _asked(stream, file.metadata.row_group(group), wanted))
                for batch in file.iter_batches(min(reading.most, BATCH), [group], wanted):
                    parts.append(batch)
                    rows += batch.num_rows
                    held += batch.nbytes
                    if rows >= reading.most:
                        break
                if rows >= reading.most:
                    break
        if not rows:
            raise DataError(
                f"{path} holds no rows; at least one sample is needed, a few hundred are better."
            )
        table = pyarrow.Table.from_batches(parts).slice(0, reading.most)
        found: dict[str, Any] = {}
        for name, column in columns.items():
            found.update(_array(table.column(column), column, model.port(name), reading, path))
        if labels:
            found["labels"] = _stacked(_plain(table.column(labels)), f"{path}, column '{labels}'")
    except (DataError, EnvironmentMissing):
        raise
    except Exception as error:  # what broken files make pyarrow raise is not documented
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise DataError(
            f"{path} cannot be read as Parquet: {text.rstrip('.')}; write it again."
        ) from error
    return found


def _asked(stream: IO[bytes], group: Any, wanted: Sequence[str]) -> int:
    """Bytes that a row group takes at most once its columns are decoded, by what its pages say."""
    total = 0
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema.partition(".")[0] in {name.partition(".")[0] for name in wanted}:
            first = chunk.dictionary_page_offset
            start = chunk.data_page_offset if first is None else min(first, chunk.data_page_offset)
            size, values = parquet_pages.decoded(stream, start, chunk.total_compressed_size)
            if chunk.physical_type in _TEXTS and size > max(
                FREE, DENSE * chunk.total_compressed_size
            ):
                raise ValueError(
                    f"{amount(chunk.total_compressed_size)} stand for {amount(size)} of text in it"
                )
            total += size + VALUE * values
    return total


def _fits(path: Path, size: int) -> None:
    if size > (free := memory()):
        raise DataError(
            f"{path} asks for {amount(size)} of memory and this machine has {amount(free)}; give fewer samples, or "
            "write the file in smaller row groups."
        )


def _columns(names: list[str], model: Model, reading: Reading, path: Path) -> dict[str, str]:
    inputs = [p.name for p in model.inputs]
    if len(inputs) == 1:
        others = [n for n in names if n not in LABELS]
        chosen = reading.column or (
            inputs[0] if inputs[0] in names else others[0] if len(others) == 1 else None
        )
        if chosen is None or chosen not in names:
            what = (
                f"no column '{chosen}'"
                if chosen
                else f"several columns and none called '{inputs[0]}'"
            )
            raise DataError(f"{path} has {what}; choose one of {', '.join(names)} with `column`.")
        return {inputs[0]: chosen}
    missing = [n for n in inputs if n not in names]
    if missing:
        raise DataError(
            f"{path} has no column '{missing[0]}' for that input; it has {', '.join(names)}."
        )
    return {n: n for n in inputs}


def _array(column: Any, name: str, port: Port, reading: Reading, path: Path) -> Mapping[str, Any]:
    import pyarrow

    types = pyarrow.types
    where = f"{path}, column '{name}'"
    if column.null_count:
        raise DataError(f"{where} has {column.null_count} empty cells; remove those rows.")
    chunks = column.chunks
    if types.is_struct(column.type):
        if "bytes" not in [field.name for field in column.type]:
            raise DataError(
                f"{where} holds records without 'bytes', so no images; choose another with `column`."
            )
        chunks = [chunk.field("bytes") for chunk in chunks]
    kind = chunks[0].type
    if types.is_dictionary(kind) and types.is_binary(kind.value_type):
        # Chunk by chunk: all dictionaries together may be more than one array holds.
        held = [(chunk.dictionary, chunk.indices.to_pylist()) for chunk in chunks]
        cells = [partial(_text, texts, at) for texts, places in held for at in places]
        codes = decode(
            [(f"{where}, row {i}", cell) for i, cell in enumerate(cells)], port, reading, where
        )
        scale, offset = affine(port, reading, where)
        return {port.name: codes, f"{port.name}.scale": scale, f"{port.name}.offset": offset}
    values = _stacked(_plain(column), where)
    fixed = port.dims[1:]
    if values.ndim == 2 and len(fixed) > 1 and all(isinstance(d, int) and d > 0 for d in fixed):
        whole = int(np.prod([d for d in fixed if isinstance(d, int)]))
        if values.shape[1] == whole:  # lists are flat where the writer knows no shapes
            values = values.reshape(len(values), *(int(d) for d in fixed if d is not None))
    # Lists say nothing of the width of their numbers.
    same = (values.dtype.kind in "iu") == (port.dtype.kind in "iu") or values.dtype.kind in "iu"
    return {port.name: values.astype(port.dtype) if same and values.dtype.kind in "iuf" else values}


def _text(texts: Any, at: int | None) -> bytes:
    """One text of a dictionary, copied when it is asked for."""
    return b"" if at is None else texts[at].as_py()


def _plain(column: Any) -> Any:
    """One array of a column's chunks, of the type that an extension of Arrow's stores."""
    import pyarrow

    whole = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    return whole.storage if isinstance(whole, pyarrow.ExtensionArray) else whole


def _stacked(column: Any, where: str) -> Array:
    """Numbers, or lists of lists of them that are of one length on every level, as one array."""
    import pyarrow
    import pyarrow.compute as compute

    kinds = pyarrow.types
    shape = [len(column)]
    while any(
        f(column.type) for f in (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list)
    ):
        ends = compute.min_max(compute.list_value_length(column)).as_py()
        if column.null_count or ends["min"] != ends["max"]:
            raise DataError(
                f"{where} holds values of unequal shapes; every row needs the shape of the input."
            )
        shape.append(ends["max"] or 0)
        column = _plain(column.flatten())
    if column.null_count:
        raise DataError(
            f"{where} has lists with {column.null_count} empty places; remove those rows."
        )
    kind = column.type.value_type if kinds.is_dictionary(column.type) else column.type
    if not (kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind)):
        raise DataError(f"{where} holds {kind}; expected numbers, lists of numbers, or images.")
    return np.asarray(column.to_numpy(zero_copy_only=False)).reshape(shape)
