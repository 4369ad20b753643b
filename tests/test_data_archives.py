"""Patterns, lists, tar and zip archives give what a folder gives: the same views, to the bit, and the same labels."""

import functools
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sd.data.geometry import make_views
from dino_sd.data.source import open_source
from dino_sd.data.sources import list as lists
from dino_sd.data.sources import tar
from dino_sd.data.sources import zip as zips
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.errors import UserError

CLASSES = ["cat", "dog", "elk", "fox"]
LABELS = [(index * 7) % 4 for index in range(64)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dino_sd.data.index._WORTH_KEEPING", 1)


@functools.cache
def images() -> dict[str, bytes]:
    """64 files, JPEG and PNG, some of them to be turned."""
    files = {}
    for index in range(64):
        noise = np.random.default_rng(index).integers(0, 256, (5, 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((40 + index % 3, 30), Image.Resampling.BICUBIC)
        exif, file = Image.Exif(), io.BytesIO()
        if index % 4 == 1:
            exif[0x0112] = 1 + index % 8
        image.save(file, "PNG" if index % 2 == 0 else "JPEG", exif=exif)
        files[f"{index:02d}.{'PNG' if index % 2 == 0 else 'jpg'}"] = file.getvalue()
    return files


def in_classes() -> dict[str, bytes]:
    return {f"{CLASSES[label]}/{name}": data for label, (name, data) in zip(LABELS, images().items(), strict=True)}


def folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def tar_of(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def zip_of(path, files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def reference(tmp_path):
    return open_source(folder(tmp_path / "reference", images()), 3)


def assert_same_views(source, expected):
    spec = ViewSpec((ViewGroup(2, (24, 24), (0.4, 1.0)), ViewGroup(2, (12, 12), (0.05, 0.4))))
    assert len(source) == len(expected)
    one, other = (make_views(each, spec, 3, 1, np.arange(len(expected)))[0] for each in (source, expected))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_labels(source, classes=CLASSES):
    assert source.classes == classes and source.labels().tolist() == LABELS and source.label(1) == LABELS[1]


def age(path):
    """As if written long ago: what has just been written is not trusted to stay."""
    os.utime(path, (1e9, 1e9))
    return str(path)


def fail(*arguments):
    raise AssertionError("looked again")


def read_by(sources, pipe):
    pipe.send([source.image(3).tolist() for source in sources])


def test_every_form_gives_the_same_views_and_labels(tmp_path, monkeypatch):
    expected = reference(tmp_path)
    root = folder(tmp_path / "classes", in_classes())
    shuffled = sorted(in_classes(), key=lambda name: zlib.crc32(name.encode()))
    lines = [f"classes/{name},{name.split('/')[0]}" for name in shuffled]
    (tmp_path / "list.csv").write_text("path,label\n" + "\n".join(lines))
    monkeypatch.chdir(tmp_path)
    in_order = {name: in_classes()[name] for name in shuffled}
    below = {f"./all/{name}": data for name, data in in_order.items()}
    labelled = {
        "nested": root, "glob": "classes/*/*", "deep glob": f"{root}/**/*.[jP][pN]*", "list": "list.csv",
        "tar": tar_of("a.tar", in_order), "tar in a folder": tar_of("b.tar", below),
        "zip": zip_of("a.zip", in_order),
        "stored zip": zip_of("b.zip", below, zipfile.ZIP_STORED),
    }  # fmt: skip
    for spec in labelled.values():
        source = open_source(spec, 3)
        assert_same_views(source, expected)
        assert_labels(source)
        assert sorted(source.path(5).split("/")[-2:]) == sorted(["05.jpg", CLASSES[LABELS[5]]])
    for spec in (tar_of("c.tar", images()), zip_of("c.zip", images()), f"{tmp_path}/reference/*"):
        assert_same_views(open_source(spec, 3), expected)
        assert open_source(spec, 3).labels() is None and open_source(spec, 3).classes is None


@pytest.mark.parametrize(("kind", "pack"), [("tar", tar_of), ("zip", zip_of)])
def test_shards_are_one_source(tmp_path, kind, pack):
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        files = {name: data for place, (name, data) in enumerate(in_classes().items()) if place % 3 == shard}
        pack(tmp_path / f"shards/s-{shard:03d}.{kind}", files)
    folder(tmp_path / "shards", {"notes.md": b"not a shard"})
    specs = [str(tmp_path / name) for name in ("shards", f"shards/*.{kind}", f"shards/s-{{000..002}}.{kind}")]
    for spec in specs:
        assert_same_views(open_source(spec, 3), reference(tmp_path))
        assert_labels(open_source(spec, 3))
    with pytest.raises(UserError, match=f"s-003.{kind}' does not exist"):
        open_source(specs[2].replace("002", "003"), 3)


def test_more_shards_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("dino_sd.data.files._MOST_OPEN", 2)
    for shard, (name, data) in enumerate(images().items()):
        tar_of(tmp_path / f"{shard:02d}.tar", {name: data})
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    source = open_source(str(tmp_path / "*.tar"), 3)
    assert_same_views(source, reference(tmp_path))
    assert before is None or len(os.listdir("/proc/self/fd")) <= before + 2


def test_labels_of_webdataset(tmp_path):
    files, names = {}, {}
    for index, (name, data) in enumerate(images().items()):
        key = f"{'one' if index % 2 else 'two'}/{index:02d}"
        files[f"{key}.txt"] = b"a caption"
        files[f"{key}.{name[3:].lower()}"] = data
        files[f"{key}.cls"] = f" {LABELS[index]:02d}\n".encode()
        names[name] = data
    assert_labels(open_source(tar_of(tmp_path / "cls.tar", files), 3), ["0", "1", "2", "3"])
    for number, value in enumerate((["0", "1", "2", "3"], range(4), CLASSES)):
        as_json = {n.replace(".cls", ".json"): d for n, d in files.items()}
        for name in [name for name in as_json if name.endswith(".json")]:
            as_json[name] = json.dumps({"label": value[int(files[name.replace(".json", ".cls")])], "x": 1}).encode()
        source = open_source(tar_of(tmp_path / f"json{number}.tar", as_json), 3)
        assert_labels(source, CLASSES if value is CLASSES else ["0", "1", "2", "3"])
        assert_same_views(source, reference(tmp_path))


def test_samples_of_webdataset(tmp_path):
    png = images()["00.PNG"]
    first = {
        "a/x.left.png": png,
        "a/x.right.png": png,
        "a/x.cls": b"fox",
        "a/x.json": b'{"label": "cat"}',
        "a/y.jpg": png,
    }
    second = {"a/x.jpg": png, "a/x.json": b'{"label": null}', "a/z.jpg": png, "a/z.json": b'{"label": "cat"}'}
    paths = tar_of(tmp_path / "1.tar", first), tar_of(tmp_path / "2.tar", second)
    source = open_source(str(tmp_path / "{1,2}.tar"), 3)
    found = [(source.path(i), None if source.label(i) is None else source.classes[source.label(i)]) for i in range(5)]
    assert found == [
        (f"{paths[1]}/a/x.jpg", None), (f"{paths[0]}/a/x.left.png", "fox"), (f"{paths[0]}/a/x.right.png", "fox"),
        (f"{paths[0]}/a/y.jpg", None), (f"{paths[1]}/a/z.jpg", "cat"),
    ]  # fmt: skip
    tar_of(tmp_path / "3.tar", {"b.jpg": png, "b.json": b"{"})
    with pytest.raises(UserError, match="3.tar/b.json' cannot be read as JSON"):
        open_source(str(tmp_path / "3.tar"), 3)


def test_copies_and_forked_workers_read_the_same(tmp_path):
    (tmp_path / "list.txt").write_text("\n".join(f"reference/{name}" for name in images()))
    expected = reference(tmp_path)
    specs = [
        tar_of(tmp_path / "x.tar", images()), zip_of(tmp_path / "x.zip", images()), f"{tmp_path}/reference/*",
        str(tmp_path / "list.txt"),
    ]  # fmt: skip
    sources = [open_source(spec, 3) for spec in specs]
    for source in sources:
        assert torch.equal(source.image(3), expected.image(3))  # opens what it keeps open
        copy = pickle.loads(pickle.dumps(source))
        assert torch.equal(copy.image(3), expected.image(3)) and copy.fingerprint() == source.fingerprint()
        with pytest.raises(IndexError):
            source.image(64)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=read_by, args=(sources, sender))
    child.start()
    assert receiver.poll(60)
    assert receiver.recv() == [expected.image(3).tolist()] * len(sources)
    child.join(60)
    assert child.exitcode == 0


def test_the_second_opening_looks_at_nothing_but_the_files_times(tmp_path, monkeypatch):
    labelled = [f"{name},{name.split('/')[0]}" for name in in_classes()]
    (tmp_path / "list.csv").write_text("\n".join(labelled))
    paths = [
        age(tar_of(tmp_path / "x.tar", in_classes())), age(zip_of(tmp_path / "x.zip", in_classes())),
        age(tmp_path / "list.csv"),
    ]  # fmt: skip
    before = [open_source(path, 3).fingerprint() for path in paths]
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_members", fail)
        patch.setattr(zips, "_members", fail)
        patch.setattr(lists, "_entries", fail)
        for path, fingerprint in zip(paths, before, strict=True):
            source = open_source(path, 3)
            assert source.fingerprint() == fingerprint
            assert_labels(source)
        os.utime(paths[0], (1e9, 1e9 + 1))
        with pytest.raises(AssertionError, match="looked again"):
            open_source(paths[0], 3)
    fewer = dict(list(in_classes().items())[:9])
    (tmp_path / "list.csv").write_text("\n".join(labelled[:9]))
    for path in (tar_of(tmp_path / "x.tar", fewer), zip_of(tmp_path / "x.zip", fewer), str(tmp_path / "list.csv")):
        assert len(open_source(path, 3)) == 9
        with monkeypatch.context() as patch:  # it was just written, so it is not trusted yet
            patch.setattr(tar, "_members", fail)
            patch.setattr(zips, "_members", fail)
            patch.setattr(lists, "_entries", fail)
            with pytest.raises(AssertionError, match="looked again"):
                open_source(path, 3)
