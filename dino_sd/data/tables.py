"""Tables with a column of encoded images, in the layout of Hugging Face or not: what Parquet and Arrow files share."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dino_sd.data.files import FileSource, labels_from_index, labels_of_names, labels_to_index, order_by_name
from dino_sd.data.index import Index, Strings
from dino_sd.errors import UserError
from dino_sd.shapes import NO_LABEL

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGES = ("image", "img", "jpg", "png", "bytes")
_LABELS = ("label", "labels", "cls", "class", "fine_label")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. struct: images are structs of `bytes` and, where has_paths, `path`; else plain bytes.

    label: a column of whole numbers or of text, or None. classes: names of the numbers, where they are known.
    """

    image: str
    struct: bool
    has_paths: bool
    label: str | None
    classes: list[str] | None


class TableSource(FileSource):
    """Images in the cells of tables, ordered by (file name, path), then table and row.

    index: of `index_of_tables`. A subclass says how to read a cell.
    """

    def __init__(self, name: str, channels: int, paths: list[str], index: Index):
        self._paths, self._places = paths, index["places"]
        super().__init__(name, channels, Strings.from_index(index, "names"), *labels_from_index(index))

    @abstractmethod
    def cell(self, table: int, row: int) -> bytes | dict | None:
        """A cell of the column of images, as Python objects. May raise what pyarrow does."""

    def files(self) -> list[str]:
        return self._paths

    def path(self, index: int) -> str:
        table, row = self._places[index].tolist()
        return f"{self._paths[table]}[{row}]"

    def read(self, index: int) -> bytes:
        import pyarrow as pa

        try:
            cell = self.cell(*self._places[index].tolist())
        except (pa.ArrowException, NotImplementedError) as error:
            raise ValueError(str(error).split("\n")[0]) from error
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if data is None:
            raise ValueError("its cell is null")
        return data


def need_pyarrow(spec: str) -> None:
    """Raises UserError where pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"data: '{spec}' is read by pyarrow; install the extra: pip install 'dino-sd[parquet]'"
        ) from error


def choose_columns(schema: "pa.Schema", features: dict, where: str) -> Columns:
    """The columns of images and of labels. features: what Hugging Face's `datasets` wrote about them, {} for nothing.

    Images are the column of encoded files called image, img, jpg, png or bytes, or the only one there is. Raises
    UserError where none, or more than one, comes into question.
    """
    fitting = [field.name for field in schema if _is_bytes(field.type) or _has_bytes(field.type)]
    chosen = [name for name in _IMAGES if name in fitting] or fitting
    if len(chosen) != 1 and not set(chosen) & set(_IMAGES):
        held = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(
            f"data: '{where}' has {'no column' if not chosen else 'several columns'} of encoded images; expected one "
            f"of bytes, or of structs with `bytes`, named {', '.join(_IMAGES)}; it holds {held}"
        )
    kind = schema.field(chosen[0]).type
    labels = [name for name in _LABELS if name in schema.names and _is_label(schema.field(name).type)]
    feature = features.get(labels[0]) if labels else None
    classes = feature.get("names") if isinstance(feature, dict) else None
    classes = [str(name) for name in classes] if isinstance(classes, list) and classes else None
    struct = not _is_bytes(kind)
    has_paths = struct and kind.get_field_index("path") >= 0
    return Columns(chosen[0], struct, has_paths, labels[0] if labels else None, classes)


def _is_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_bytes(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)


def _is_label(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def index_of_tables(
    paths: list[str], tables: Iterable["pa.Table"], columns: Columns, chosen: np.ndarray | None = None
) -> Index:
    """names, places (table, row) and labels of all rows, in the order of `order_by_name`.

    tables: one a path, with the column of labels and, where columns.has_paths, that of images, of which only the paths
    are looked at. Names are these where all rows have one, else `FILE-ROW`. chosen: rows of all tables in a row, in
    the order in which they count, or None for all.
    """
    found: list[str | None] = []
    values: list[int | str | None] = []
    lengths = []
    for table in tables:
        lengths.append(table.num_rows)
        if columns.has_paths:
            column = table.column(columns.image)
            found += column.flatten()[column.type.get_field_index("path")].to_pylist()
        if columns.label is not None:
            values += table.column(columns.label).to_pylist()
    tables_N = np.repeat(np.arange(len(lengths)), lengths)
    rows_N = np.concatenate([np.arange(length) for length in lengths])
    places_N2 = np.stack([tables_N, rows_N], axis=1)
    if chosen is not None:
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(places_N2):
            raise UserError(f"data: '{paths[0]}': indices point beyond its {len(places_N2):,} rows; save the set again")
        places_N2 = places_N2[chosen]
        found = [found[i] for i in chosen.tolist()] if found else []
        values = [values[i] for i in chosen.tolist()] if values else []
    if found and all(found):
        names = [path.encode("utf-8", "surrogatepass") for path in found if path]
    else:
        files = [os.path.basename(path) for path in paths]
        names = [os.fsencode(f"{files[table]}-{row:08d}") for table, row in places_N2.tolist()]
    order = order_by_name(names)
    labels = _labels([values[i] for i in order], columns.classes, paths[0]) if values else (None, None)
    return {
        **Strings.of(names[i] for i in order).to_index("names"), **labels_to_index(*labels),
        "places": torch.from_numpy(places_N2[order]).to(torch.int64),
    }  # fmt: skip


def _labels(
    values: Sequence[int | str | None], classes: list[str] | None, where: str
) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels, classes): numbers are those of the classes where these are known; null or -1 is no label."""
    if classes is None or any(isinstance(value, str) for value in values):
        return labels_of_names(["" if value is None else str(value) for value in values])
    labels_N = np.array([NO_LABEL if value is None else value for value in values], dtype=np.int64)
    if labels_N.max() >= len(classes):
        raise UserError(
            f"data: '{where}' has the label {labels_N.max()} but names only {len(classes)} classes; mend it"
        )
    if labels_N.max() < 0:
        return None, None
    return np.maximum(labels_N, NO_LABEL), classes
