"""Tables in files, read a batch at a time: Parquet, Arrow IPC (Feather), CSV and TSV, and text lists of `path label`."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from engine.folders import CHUNK_BYTES
from engine.places import Place
from engine.schema import InputError, first_line

BATCH_ROWS = 16_384
STREAM_ROWS = 64
PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")
TEXT = (".csv", ".tsv", ".txt")
"""Files whose columns are all read as strings: what they are is known only at their end."""
TABLES = (*PARQUET, *ARROW)
LINE = r"^(?P<path>.*\S)\s+(?P<label>-?\d+)\s*$"


def suffix_of(path: str) -> str:
    """Return the lower-case ending of a file's name, with its dot, or ''."""
    name = path.rsplit("/", 1)[-1]
    return "." + name.rpartition(".")[2].lower() if "." in name else ""


def _unreadable(file: Place, error: Exception, what: str) -> InputError:
    return InputError(f"{file.uri} cannot be read as {what}: {first_line(error)}")


def open_parquet(file: Place, ahead: bool = False) -> pq.ParquetFile:
    """Open a Parquet file to be read a page at a time; raises InputError where it is none.

    `ahead` fetches the columns of a row group at once, and keeps all that it has fetched until the file is closed: for
    what is read whole.
    """
    try:
        return pq.ParquetFile(file.path, filesystem=file.fs, buffer_size=CHUNK_BYTES, pre_buffer=ahead)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(file, error, "Parquet") from error


def open_arrow(file: Place, columns: list[str] | None = None) -> pa.ipc.RecordBatchFileReader:
    """Open an Arrow IPC file for some of its columns; raises InputError where it is none, or a stream."""
    try:
        local = isinstance(file.fs, pafs.LocalFileSystem)
        source = pa.memory_map(file.path) if local else file.fs.open_input_file(file.path)
        if columns is None:
            return pa.ipc.open_file(source)
        names = pa.ipc.open_file(source).schema.names
        return pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in columns]))
    except (pa.ArrowInvalid, OSError) as error:
        hint = "an Arrow file (a stream is none: write it with pyarrow.ipc.new_file, or give the folder of save_to_disk)"
        raise _unreadable(file, error, hint) from error


def _open_csv(file: Place, names: list[str] | None, columns: list[str] | None = None) -> pacsv.CSVStreamingReader:
    convert = pacsv.ConvertOptions(
        column_types={name: pa.string() for name in names or ()},
        include_columns=columns,
        strings_can_be_null=True,
        null_values=[""],
    )
    parse = pacsv.ParseOptions(delimiter="\t" if suffix_of(file.path) == ".tsv" else ",", newlines_in_values=True)
    try:
        stream = file.fs.open_input_stream(file.path)
        return pacsv.open_csv(stream, pacsv.ReadOptions(block_size=CHUNK_BYTES), parse, convert)
    except (pa.ArrowInvalid, OSError) as error:
        raise _unreadable(file, error, "CSV with a header") from error


def schema_of(file: Place) -> pa.Schema:
    """Return the columns of a table's file, with their metadata."""
    suffix = suffix_of(file.path)
    if suffix == ".txt":
        return pa.schema([("path", pa.string()), ("label", pa.string())])
    if suffix in TEXT:
        with _open_csv(file, None) as reader:
            return pa.schema([pa.field(name, pa.string()) for name in reader.schema.names])
    if suffix in ARROW:
        return open_arrow(file).schema
    with open_parquet(file) as parquet:
        return parquet.schema_arrow


def same_schema(files: list[Place]) -> pa.Schema:
    """Return the columns of a pool's files; raises InputError where a file has not those of the first one."""
    first = schema_of(files[0])
    for file in files[1:]:
        schema = schema_of(file)
        if not schema.equals(first):
            odd = [f.name for f in first if f.name not in schema.names or schema.field(f.name).type != f.type]
            odd += [name for name in schema.names if name not in first.names]
            raise InputError(f"{file.uri} has not the columns of the pool's first file; these differ: {', '.join(odd)}")
    return first


def batches(file: Place, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield some columns of a table's file, in order, never more than a batch of them in memory.

    a.b names a field of a struct; the struct comes with that field alone where the file allows it.
    """
    suffix = suffix_of(file.path)
    whole = [name.split(".")[0] for name in columns]
    if suffix == ".txt":
        yield from _lines(file)
    elif suffix in TEXT:
        yield from _csv_batches(file, columns)
    elif suffix in ARROW:
        reader = open_arrow(file, whole)
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index).select(whole)
            for start in range(0, len(batch), BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)
    else:
        with open_parquet(file) as parquet:
            for batch in parquet.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                yield batch.select(whole)


def _csv_batches(file: Place, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with _open_csv(file, schema_of(file).names, columns) as reader:
        try:
            for batch in reader:
                yield batch.select(columns)
        except pa.ArrowInvalid as error:
            raise _unreadable(file, error, "CSV") from error


def _lines(file: Place) -> Iterator[pa.RecordBatch]:
    """Yield (path, label) of the lines `path label`; empty lines are no rows."""
    rest, first = b"", 1
    with file.fs.open_input_stream(file.path) as stream:
        while True:
            data = stream.read(CHUNK_BYTES)
            block, newline, left = (rest + data).rpartition(b"\n") if data else (rest, b"", b"")
            rest = left
            lines = block.split(b"\n") if newline or (not data and block) else []
            if lines:
                yield _parsed(file, lines, first)
                first += len(lines)
            if not data:
                return


def _parsed(file: Place, lines: list[bytes], first: int) -> pa.RecordBatch:
    try:
        texts = pa.array(lines, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid as error:
        raise _unreadable(file, error, "text") from error
    parts = pc.extract_regex(texts, LINE)
    bad = pc.and_(parts.is_null(), pc.not_equal(pc.utf8_trim_whitespace(texts), ""))
    if pc.any(bad).as_py():
        at = pc.index(bad, True).as_py()
        raise InputError(f"{file.uri}: line {first + at} is not `path label`: {texts[at].as_py()[:80]!r}")
    parts = parts.drop_null()
    return pa.record_batch([parts.field("path"), parts.field("label")], names=["path", "label"])


def extent_rows(file: Place) -> list[int]:
    """Return the rows of each row group of a Parquet file, or of each record batch of an Arrow file."""
    if suffix_of(file.path) in ARROW:
        reader = open_arrow(file)
        return [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]
    with open_parquet(file) as parquet:
        return [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]


def read_extent(file: Place, index: int, columns: list[str], most_bytes: int) -> pa.Table | None:
    """Return some columns of a row group or record batch; None for a row group of more bytes, before compression."""
    if suffix_of(file.path) in ARROW:
        return pa.Table.from_batches([open_arrow(file, columns).get_batch(index)]).select(columns)
    with open_parquet(file, ahead=True) as parquet:
        if parquet.metadata.row_group(index).total_byte_size > most_bytes:
            return None
        return parquet.read_row_group(index, columns=columns)


def stream_row_group(file: Place, index: int, columns: list[str], low: int, high: int) -> Iterator[tuple[int, pa.Table]]:
    """Yield (row within the group, piece) for rows [low, high) of a row group too large to be held.

    What comes before them is read and dropped, a page of each column at a time.
    """
    with open_parquet(file) as parquet:
        at = 0
        for batch in parquet.iter_batches(STREAM_ROWS, row_groups=[index], columns=columns, use_threads=False):
            first, last = max(low, at), min(high, at + len(batch))
            if first < last:
                yield first, pa.Table.from_batches([batch.slice(first - at, last - first)])
            at += len(batch)
            if at >= high:
                return
