"""Zip archives, one or many, read in place."""

import os
import stat
import struct
import zipfile
import zlib

import torch

from dino_sd.data.files import (
    IMAGE_EXTENSIONS,
    LARGEST_FILE,
    ArchiveSource,
    files_named,
    index_of_files,
    labels_of_members,
    labels_to_index,
    member_name,
    order_by_name,
)
from dino_sd.data.index import Index, Strings
from dino_sd.errors import UserError

FORM = "zip archives (.zip: a file, a pattern, shard-{000..123}.zip, or a folder of them)"
_HEADER = struct.Struct("<4s2xHH16xHH")  # signature, flags, method, lengths of the name and of the extra field


def open(spec: str, channels: int) -> "ZipSource | None":
    paths = files_named(spec, (".zip",))
    if paths is None:
        return None
    index = index_of_files("zip", paths, lambda: _index(paths))
    return ZipSource(spec, channels, paths, index) if len(index["places"]) else None


class ZipSource(ArchiveSource):
    """The images in zip archives, ordered by (file name, path), then archive and place in it.

    Labels are as in `labels_of_folders`; a single folder that everything lies in is passed over. Links and hidden files
    are left out.
    """

    def read(self, index: int) -> bytes:
        archive, offset, stored, size, checksum = self._places[index].tolist()
        if size > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes are more than {LARGEST_FILE:,}")
        header = self.read_at(archive, offset, _HEADER.size)
        signature, flags, method, name_length, extra_length = _HEADER.unpack(header)
        if signature != b"PK\3\4":
            raise ValueError(f"no file begins at byte {offset:,} of the archive")
        if flags & 1:
            raise ValueError("it is encrypted")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"it is compressed by method {method}; only deflate, {zipfile.ZIP_DEFLATED}, is known")
        data = self.read_at(archive, offset + _HEADER.size + name_length + extra_length, stored)
        if method == zipfile.ZIP_DEFLATED:
            data = _inflated(data, size)
        if len(data) != size:
            raise ValueError(f"it holds {len(data):,} bytes where {size:,} are declared")
        if zlib.crc32(data) != checksum:
            raise ValueError("its checksum is wrong")
        return data


def _inflated(data: bytes, size: int) -> bytes:
    """Never more than one byte above the size declared, whatever the data would grow to."""
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(inflated) > size:
        raise ValueError(f"it expands beyond the {size:,} bytes declared")
    return inflated


def _index(paths: list[str]) -> Index:
    names, places = [], []
    for archive, path in enumerate(paths):
        for member in _members(path):
            # Archives from Windows may have the other slash.
            name = member_name(os.fsencode(member.filename.replace("\\", "/")))
            if name.lower().endswith(IMAGE_EXTENSIONS) and not stat.S_ISLNK(member.external_attr >> 16):
                names.append(name)
                places.append((archive, member.header_offset, member.compress_size, member.file_size, member.CRC))
    order = order_by_name(names)
    names = [names[place] for place in order]
    return {
        **Strings.of(names).to_index("names"), **labels_to_index(*labels_of_members(names)),
        "places": torch.tensor([places[place] for place in order], dtype=torch.int64).reshape(-1, 5),
    }  # fmt: skip


def _members(path: str) -> list[zipfile.ZipInfo]:
    """What the list at the end of an archive says. Raises UserError where it is not a whole one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [member for member in archive.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError, struct.error) as error:
        raise UserError(f"data: '{path}' is not a whole zip archive ({error}); fetch or write it again") from error
