"""Samples from the columns of a Parquet file: numbers, lists of numbers, or encoded images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from onnx_oamip.data.array_checks import LABELS
from onnx_oamip.data.images import load_encoded
from onnx_oamip.data.loaded import Format, Loaded
from onnx_oamip.data.unequal import Stored, UnequalArrays
from onnx_oamip.graph.input_guards import amount, memory

LABEL_COLUMNS = ("labels", "label")
BATCH_ROWS = 128
"""Rows that are decoded at a time. The texts of one batch share one array, which is limited to 2 GiB."""
BYTES_PER_VALUE = 16
"""Bytes that one value may take while it is decoded: the value, and its levels of nesting."""
MAX_TEXT_EXPANSION = 16
"""Size of the texts of a column chunk relative to its bytes: encoded images do not compress further."""
ALWAYS_ALLOWED_TEXT_BYTES = 1 << 22
"""Size of texts that is accepted whatever their expansion."""
MAX_REASON_CHARACTERS = 200
"""Characters of pyarrow's message in an error."""
_TEXT_TYPES = ("BYTE_ARRAY",)


def matches(source: str) -> bool:
    """Test for a Parquet file by its suffix.

    Args:
        source: Path.

    Returns:
        True if the suffix is .parquet.
    """
    return Path(source).suffix == ".parquet"


def check_extra(source: str) -> None:
    """Check that the extra ``parquet`` is installed.

    Args:
        source: File that will be read.

    Raises:
        EnvironmentMissing: It is not.
    """
    with imports_of("parquet", f"reading {source}"):
        import pyarrow.parquet  # noqa: F401


def load(source: str, model: Model, reading: Reading) -> Loaded:
    """Load the columns of a model's inputs.

    An input takes the column of its name; the input of a model with a single one takes ``reading.column``, or the only
    column beside the labels. Images are bytes, or records of bytes as the datasets library writes them.

    Args:
        source: File to load.
        model: Model that reads the samples.
        reading: Column, number of samples, and treatment of images.

    Returns:
        Arrays by input name, ``labels`` if there is such a column, and scale and offset of images.

    Raises:
        DataError: The file cannot be read or does not fit the model.
        EnvironmentMissing: pyarrow is not installed, or Pillow for images.
    """
    check_extra(source)
    path = Path(source)
    try:
        return _load(path, model, reading)
    except (DataError, EnvironmentMissing):
        raise
    except Exception as error:
        # The exceptions of pyarrow for broken files are not documented.
        text = str(error)
        reason = text.splitlines()[0][:MAX_REASON_CHARACTERS] if text else type(error).__name__
        raise DataError(
            f"{path} cannot be read as Parquet: {reason.rstrip('.')}; write it again."
        ) from error


def _load(path: Path, model: Model, reading: Reading) -> Loaded:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as stream:
        file = pyarrow.parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        columns = _input_columns(names, model, reading, path)
        free = [n for n in LABEL_COLUMNS if n in names and n not in columns.values()]
        label_column = free[0] if free else None
        wanted = list(columns.values())
        if label_column:
            wanted.append(label_column)
        # Texts stay in their dictionaries: a text of a megabyte that stands in every row is stored once.
        leaves = map(file.schema.column, range(len(file.schema)))
        texts = [leaf.path for leaf in leaves if leaf.physical_type in _TEXT_TYPES]
        file = pyarrow.parquet.ParquetFile(stream, read_dictionary=texts)
        batches = _read_batches(file, stream, wanted, reading.most, path)
    if not sum(batch.num_rows for batch in batches):
        raise DataError(
            f"{path} holds no rows; at least one sample is needed, a few hundred are better."
        )
    table = pyarrow.Table.from_batches(batches).slice(0, reading.most)
    arrays: dict[str, Stored] = {}
    records: list[Mapping[str, Any]] = []
    notes: tuple[str, ...] = ()
    for name, column in columns.items():
        loaded = _input_arrays(table.column(column), column, model.port(name), reading, path)
        arrays |= loaded.arrays
        records += [] if loaded.reading is None else [loaded.reading]
        notes += loaded.notes
    if label_column:
        stored = _storage(table.column(label_column))
        arrays[LABELS] = _stacked(stored, f"{path}, column '{label_column}'")
    return Loaded(arrays, str(path), records[0] if records else None, notes)


def _read_batches(
    file: Any,
    stream: IO[bytes],
    columns: Sequence[str],
    max_rows: int,
    path: Path,
) -> list[Any]:
    """Record batches of the columns, until at least ``max_rows`` rows are read."""
    batches: list[Any] = []
    rows = 0
    size = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        if not metadata.num_rows:
            continue
        _check_memory(path, size + _decoded_bytes(stream, metadata, columns))
        for batch in file.iter_batches(min(max_rows, BATCH_ROWS), [group], columns):
            batches.append(batch)
            rows += batch.num_rows
            size += batch.nbytes
            if rows >= max_rows:
                return batches
    return batches


def _decoded_bytes(
    stream: IO[bytes],
    group: Any,
    columns: Sequence[str],
) -> int:
    """Upper bound on the bytes of a row group's columns after decoding, by the headers of its pages."""
    total = 0
    roots = {name.partition(".")[0] for name in columns}
    for chunk in map(group.column, range(group.num_columns)):
        if chunk.path_in_schema.partition(".")[0] not in roots:
            continue
        start = chunk.data_page_offset
        if chunk.dictionary_page_offset is not None:
            start = min(chunk.dictionary_page_offset, start)
        stored = chunk.total_compressed_size
        decoded = parquet_pages.decoded_size(stream, start, stored)
        if chunk.physical_type in _TEXT_TYPES:
            allowed = max(ALWAYS_ALLOWED_TEXT_BYTES, MAX_TEXT_EXPANSION * stored)
            if decoded.bytes > allowed:
                raise ValueError(
                    f"{amount(stored)} stand for {amount(decoded.bytes)} of text in it"
                )
        total += decoded.bytes + BYTES_PER_VALUE * decoded.values
    return total


def _check_memory(path: Path, size: int) -> None:
    free = memory()
    if size > free:
        raise DataError(
            f"{path} asks for {amount(size)} of memory and this machine has {amount(free)}; give fewer samples, or "
            "write the file in smaller row groups."
        )


def _input_columns(
    names: Sequence[str],
    model: Model,
    reading: Reading,
    path: Path,
) -> dict[str, str]:
    """Column of each input."""
    inputs = [port.name for port in model.inputs]
    if len(inputs) == 1:
        return {inputs[0]: _only_column(names, inputs[0], reading, path)}
    missing = [name for name in inputs if name not in names]
    if missing:
        raise DataError(
            f"{path} has no column '{missing[0]}' for that input; it has {', '.join(names)}."
        )
    return {name: name for name in inputs}


def _only_column(
    names: Sequence[str],
    input_name: str,
    reading: Reading,
    path: Path,
) -> str:
    """Column of a model's only input."""
    others = [name for name in names if name not in LABEL_COLUMNS]
    chosen = reading.column
    if not chosen and input_name in names:
        chosen = input_name
    elif not chosen and len(others) == 1:
        chosen = others[0]
    if chosen and chosen in names:
        return chosen
    finding = (
        f"no column '{chosen}'" if chosen else f"several columns and none called '{input_name}'"
    )
    raise DataError(f"{path} has {finding}; choose one of {', '.join(names)} with `column`.")


def _input_arrays(
    column: Any,
    name: str,
    port: Port,
    reading: Reading,
    path: Path,
) -> Loaded:
    """Array of one input, with scale and offset if the column holds images."""
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
        return load_encoded(_encoded_images(chunks, where), port, reading, where)
    if types.is_dictionary(kind) and types.is_string(kind.value_type) and port.dtype == object:
        return Loaded({port.name: np.asarray(column.to_pylist(), np.str_)}, where)
    stored = _stacked(_storage(column), where)
    if isinstance(stored, UnequalArrays):
        values = _in_input_type(np.asarray(stored.values), port)
        return Loaded({port.name: UnequalArrays(values, stored.shapes)}, where)
    return Loaded({port.name: _in_input_type(_unflattened(stored, port), port)}, where)


def _in_input_type(values: Array, port: Port) -> Array:
    """Numbers in the type of the input: lists do not record its width. Fractions are never cast to integers."""
    is_integer = values.dtype.kind in "iu"
    to_floating = values.dtype.kind == "f" and port.dtype.kind not in "iu"
    return values.astype(port.dtype) if is_integer or to_floating else values


def _encoded_images(chunks: Sequence[Any], where: str) -> list[tuple[str, Callable[[], bytes]]]:
    """Name of each image, and a function that copies its bytes."""
    images: list[tuple[str, Callable[[], bytes]]] = []
    # Chunk by chunk: all dictionaries together may exceed the limit of one array.
    for chunk in chunks:
        for position in chunk.indices.to_pylist():
            content = partial(_text, chunk.dictionary, position)
            images.append((f"{where}, row {len(images)}", content))
    return images


def _text(texts: Any, position: int | None) -> bytes:
    """One text of a dictionary, empty for an empty cell."""
    return b"" if position is None else texts[position].as_py()


def _unflattened(values: Array, port: Port) -> Array:
    """Values in the shape of the input if every row is flat: some writers know no shapes."""
    fixed = [dim for dim in port.dims[1:] if isinstance(dim, int) and dim > 0]
    all_fixed = len(fixed) == len(port.dims[1:])
    if values.ndim == 2 and len(fixed) > 1 and all_fixed and values.shape[1] == np.prod(fixed):
        return values.reshape(len(values), *fixed)
    return values


def _storage(column: Any) -> Any:
    """One array of a column's chunks, in the type that an Arrow extension type stores."""
    import pyarrow

    combined = column.combine_chunks() if isinstance(column, pyarrow.ChunkedArray) else column
    return combined.storage if isinstance(combined, pyarrow.ExtensionArray) else combined


def _stacked(column: Any, where: str) -> Array | UnequalArrays:
    """Numbers, or nested lists of them, as one array; as one array per row where only the outer lists are unequal."""
    import pyarrow
    import pyarrow.compute

    types = pyarrow.types
    shape = [len(column)]
    rows: Array | None = None
    while _is_list(column.type):
        lengths = pyarrow.compute.list_value_length(column)
        limits = pyarrow.compute.min_max(lengths).as_py()
        if column.null_count:
            raise DataError(
                f"{where} has lists with {column.null_count} empty places; remove those rows."
            )
        if limits["min"] != limits["max"]:
            if len(shape) > 1:
                raise DataError(
                    f"{where} holds values of unequal shapes inside a row; only the outer lists may differ in length."
                )
            rows = np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)
        shape.append(limits["max"] or 0)
        column = _storage(column.flatten())
    if column.null_count:
        raise DataError(
            f"{where} has lists with {column.null_count} empty places; remove those rows."
        )
    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        raise DataError(f"{where} holds {kind}; expected numbers, lists of numbers, or images.")
    values = np.asarray(column.to_numpy(zero_copy_only=False))
    if rows is None:
        return values.reshape(shape)
    inner = np.broadcast_to(np.asarray(shape[2:], np.int64), (len(rows), len(shape) - 2))
    return UnequalArrays(values, np.concatenate([rows[:, None], inner], axis=1))


def _is_list(kind: Any) -> bool:
    import pyarrow

    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


FORMAT = Format("a .parquet file", matches, load, has_columns=True, check_extra=check_extra)
