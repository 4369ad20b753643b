"""Parquet files with a column of encoded images, in the layout of Hugging Face or not."""

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from dino_sd.data.files import files_named, index_of_files
from dino_sd.data.index import Index
from dino_sd.data.tables import Columns, TableSource, choose_columns, index_of_tables, need_pyarrow
from dino_sd.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

FORM = "Parquet files (.parquet: a file, a pattern, or a folder of them)"
_MOST_BYTES = 2**26  # of row groups kept, in a process
_MOST_OPEN = 16  # files, in a process


def open(spec: str, channels: int) -> "ParquetSource | None":
    paths = files_named(spec, (".parquet",))
    if paths is None:
        return None
    need_pyarrow(spec)
    columns = _columns(paths[0])
    index = index_of_files("parquet", paths, lambda: index_of_tables(paths, _tables(paths, columns), columns))
    return ParquetSource(spec, channels, paths, columns, index) if len(index["places"]) else None


class ParquetSource(TableSource):
    """The images in Parquet files: a cell is read with its row group, and the last few groups are kept.

    All files that are named count: where those of several splits lie in one folder, name one split's by a pattern.
    """

    def __init__(self, name: str, channels: int, paths: list[str], columns: Columns, index: Index):
        self._column = f"{columns.image}.bytes" if columns.struct else columns.image
        self._files: dict[tuple[int, int], tuple[ParquetFile, np.ndarray]] = {}
        self._groups: dict[tuple[int, int, int], pa.ChunkedArray] = {}
        super().__init__(name, channels, paths, index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}, "_groups": {}}

    def cell(self, table: int, row: int) -> bytes | dict | None:
        file, ends = self._file(table)
        group = int(np.searchsorted(ends, row, side="right"))
        key = (os.getpid(), table, group)  # a process that was forked reads its own
        if key in self._groups:
            column = self._groups.pop(key)
        else:
            column = file.read_row_group(group, columns=[self._column], use_threads=False).column(0)
        self._groups[key] = column  # the last one now
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > _MOST_BYTES:
            self._groups.pop(next(iter(self._groups)))
        return column[row - (int(ends[group - 1]) if group else 0)].as_py()

    def _file(self, table: int) -> "tuple[ParquetFile, np.ndarray]":
        """A file, and the rows at which its groups end."""
        key = (os.getpid(), table)
        if key not in self._files:
            if len(self._files) >= _MOST_OPEN:
                self._files.pop(next(iter(self._files)))
            file = _opened(self._paths[table])
            lengths = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            self._files[key] = file, np.cumsum(lengths)
        return self._files[key]


def _opened(path: str) -> "ParquetFile":
    """Raises OSError, or what pyarrow does, where it is no Parquet file."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path)


def _columns(path: str) -> Columns:
    import pyarrow as pa

    try:
        schema = _opened(path).schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _broken(path, error) from error
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):  # written by other tools
        features = {}
    return choose_columns(schema, features if isinstance(features, dict) else {}, path)


def _tables(paths: list[str], columns: Columns) -> "Iterator[pa.Table]":
    """Of each file its labels and the paths of its images, but no image."""
    import pyarrow as pa

    wanted = [f"{columns.image}.path"] if columns.has_paths else []
    wanted += [columns.label] if columns.label is not None else []
    first: dict = {}
    for path in paths:
        try:
            file = _opened(path)
            named = {name for name in (columns.image, columns.label) if name is not None}
            kinds = {field.name: field.type for field in file.schema_arrow if field.name in named}
            first = first or kinds
            if kinds != first or kinds.keys() != named:
                raise UserError(f"data: '{path}' has not the columns of '{paths[0]}'; name files of one kind")
            # Without a column, a table does not know how many rows it has.
            yield (
                file.read(wanted, use_threads=False) if wanted else pa.table({"row": np.arange(file.metadata.num_rows)})
            )
        except (pa.ArrowException, OSError) as error:
            raise _broken(path, error) from error


def _broken(path: str, error: Exception) -> UserError:
    reason = str(error).split("\n")[0]
    return UserError(f"data: '{path}' is not a whole Parquet file ({reason}); fetch or write it again")
