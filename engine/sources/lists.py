"""Lists of images: CSV, TSV, Parquet or Arrow with a column of paths or URIs, or a text file of `path label` a line.

The text files are how ImageNet-LT and its like are published. A path is absolute, a URI, or relative to `--images`, by
default the list's folder.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.fs as pafs

from engine.folders import digest_of
from engine.places import Place, masked_column
from engine.sources import paths
from engine.sources.ids import check_unique, names_rows
from engine.sources.listing import Listing, ListingWriter
from engine.sources.pool import Columns, Pool
from engine.sources.roles import Roles, class_label_names, find_roles, is_text, plain
from engine.sources.tables import TABLES, TEXT, batches, same_schema, suffix_of
from engine.sources.texts import TextTypes
from engine.sources.values import ClassNames
from engine.sources.walk import files_ending

USES = frozenset(("image", "label", "id", "metadata", "images"))
read, ids = paths.read, paths.ids


def files_of(place: Place) -> list[str]:
    """Return the names below the pool of its list's files, sorted; one file's name is ''."""
    return [name for name, _, _ in files_ending(place, TABLES)]


def _rows(batch: pa.RecordBatch, roles: Roles, schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch of a list as rows of the listing."""
    columns = [batch[roles.image].cast(pa.string())]
    if "id" in schema.names:
        columns.append(batch[str(roles.id)].cast(pa.string()))
    if "label" in schema.names:
        columns.append(batch[str(roles.label)].cast(schema.field("label").type))
    if "extra" in schema.names:
        fields = list(schema.field("extra").type)
        columns.append(pa.StructArray.from_arrays([batch[f.name].cast(f.type) for f in fields], fields=fields))
    return pa.record_batch(columns, schema=schema)


def _name_rows(listing: Listing, has_ids: bool, uri: str) -> str:
    """Return what names the rows: the ids given, else the paths where all are there and differ without keys, else ''."""

    def column(name: str) -> Iterator[pa.ChunkedArray]:
        return (table[name] for table in listing.tables())

    if has_ids:
        check_unique(lambda: column("id"), listing.num_rows, uri)
        return "id"
    return "path" if names_rows(lambda: map(masked_column, column("path")), listing.num_rows) else ""


def _list(files: list[Place], roles: Roles, label: pa.DataType | None, uri: str) -> tuple[Listing, ClassNames, TextTypes]:
    """Write the listing; gather class names and the types of text, over all rows."""
    writer = ListingWriter(paths.listing_schema(roles.id is not None, label, roles.metadata), masks=("path",))
    classes = ClassNames(roles.label or "", uri)
    types = TextTypes([name for name in (*roles.metadata.names, roles.label) if name])
    used = list(dict.fromkeys(name for name in (roles.image, roles.id, roles.label, *roles.metadata.names) if name))
    for file in files:
        as_text = suffix_of(file.path) in TEXT
        for batch in batches(file, used):
            rows = _rows(batch, roles, writer.schema)
            writer.add(rows)
            if label == pa.string():
                classes.add(rows["label"])
            for name in types.names if as_text else ():
                types.add(name, batch[name])
    return writer.finish(), classes, types


def list_pool(place: Place, columns: Columns) -> Pool:
    """List the rows of a list in its order: another order is another pool."""
    names = files_of(place)
    files = [place.at(name) if name else place for name in names]
    schema = same_schema(files)
    roles = find_roles(schema, columns, place.uri)
    label = None
    if roles.label:
        label = pa.string() if is_text(plain(schema.field(roles.label).type)) else pa.int64()
    listing, classes, types = _list(files, roles, label, place.uri)
    further, class_names = roles.metadata, class_label_names(schema, roles.label) if roles.label else None
    as_text = suffix_of(files[0].path) in TEXT
    if as_text:
        further = pa.schema([(name, types.type_of(name)) for name in further.names])
    if label == pa.string() and not (as_text and types.type_of(str(roles.label)) == pa.int64()):
        class_names = classes.names()
    base = Place(columns.images) if columns.images else place if place.kind() == pafs.FileType.Directory else place.folder
    detail = {
        "id": _name_rows(listing, roles.id is not None, place.uri),
        "columns": {"image": roles.image, "id": roles.id, "label": roles.label},
        "columns_left_out": roles.left_out,
    }
    digest = digest_of(["list", listing.digest, detail["columns"], str(further), class_names])
    return Pool(place.address, "list", listing.num_rows, digest, class_names, detail, listing, further, base.absolute)
