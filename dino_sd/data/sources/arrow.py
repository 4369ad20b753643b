"""A folder that Hugging Face's `datasets` wrote with `save_to_disk`, read without that library."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dino_sd.data.files import index_of_files
from dino_sd.data.index import Index
from dino_sd.data.tables import Columns, TableSource, choose_columns, index_of_tables, need_pyarrow
from dino_sd.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

FORM = "a folder written by save_to_disk of Hugging Face's datasets"
_INDICES = ("_indices_files", "_indices_data_files")  # of newer and of older versions


def open(spec: str, channels: int) -> "ArrowSource | None":
    folder = os.path.abspath(os.path.expanduser(spec))
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        splits = _json(folder, "dataset_dict.json").get("splits")
        splits = [str(split) for split in splits] if isinstance(splits, list) and splits else ["train"]
        raise UserError(
            f"data: '{spec}' holds the splits {', '.join(splits)}; name one, as {spec.rstrip('/')}/{splits[0]}"
        )
    if not os.path.isfile(os.path.join(folder, "state.json")):
        return None
    state = _json(folder, "state.json")
    if not isinstance(state.get("_data_files"), list):
        return None  # of another program
    need_pyarrow(spec)
    paths = _files(folder, state, "_data_files")
    mappings = [path for key in _INDICES for path in _files(folder, state, key)]
    if not paths:
        raise UserError(f"data: '{spec}' names no data files in its state.json; save the set again")
    columns = choose_columns(_table(paths[0]).schema, _features(folder), spec)
    index = index_of_files("arrow", [*paths, *mappings], lambda: _index(paths, mappings, columns))
    return ArrowSource(spec, channels, paths, columns, index) if len(index["places"]) else None


class ArrowSource(TableSource):
    """The images of a saved set; its files are mapped into memory, not read."""

    def __init__(self, name: str, channels: int, paths: list[str], columns: Columns, index: Index):
        self._column = columns.image
        self._columns: dict[tuple[int, int], pa.ChunkedArray] = {}
        super().__init__(name, channels, paths, index)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_columns": {}}

    def cell(self, table: int, row: int) -> bytes | dict | None:
        key = (os.getpid(), table)  # a process that was forked maps its own
        if key not in self._columns:
            self._columns[key] = _mapped(self._paths[table]).column(self._column)
        return self._columns[key][row].as_py()


def _index(paths: list[str], mappings: list[str], columns: Columns) -> Index:
    chosen = None
    if mappings:
        tables = [_table(path) for path in mappings]
        if any(table.column_names != ["indices"] for table in tables):
            raise UserError(f"data: '{mappings[0]}' holds no indices; save the set again")
        chosen = np.concatenate([table.column("indices").to_numpy() for table in tables]).astype(np.int64)
    return index_of_tables(paths, (_table(path) for path in paths), columns, chosen)


def _mapped(path: str) -> "pa.Table":
    """A file as a table whose cells are mapped. Raises OSError, or what pyarrow does, where it is not a whole one."""
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(path)).read_all()


def _table(path: str) -> "pa.Table":
    """As `_mapped`. Raises UserError instead."""
    import pyarrow as pa

    try:
        return _mapped(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"data: '{path}' is not a whole Arrow stream ({reason}); save the set again") from error


def _features(folder: str) -> dict:
    features = _json(folder, "dataset_info.json").get("features")
    return features if isinstance(features, dict) else {}


def _json(folder: str, name: str) -> dict:
    try:
        found = json.loads((Path(folder) / name).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"data: '{name}' in '{folder}' cannot be read ({error}); save the set again") from error
    return found if isinstance(found, dict) else {}


def _files(folder: str, state: dict, key: str) -> list[str]:
    """The files that a list in state.json names; they lie in the folder, whatever path they once had."""
    try:
        return [os.path.join(folder, os.path.basename(file["filename"])) for file in state.get(key) or []]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data: 'state.json' in '{folder}' names no files ({error}); save the set again") from error
