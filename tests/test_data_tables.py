"""Parquet files and sets saved by Hugging Face's `datasets` are sources as good as a folder."""

import json
import multiprocessing
import pickle
import sys

import numpy as np
import pytest
import torch
from test_data_archives import (
    CLASSES,
    LABELS,
    age,
    assert_labels,
    assert_same_views,
    fail,
    folder,
    images,
    read_by,
    reference,
)

from dino_sd.data.source import BadImage, open_source
from dino_sd.data.sources import arrow, parquet
from dino_sd.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMED = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": [*CLASSES, "gnu"]}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dino_sd.data.index._WORTH_KEEPING", 1)


def table(order=range(64), labels=LABELS, label="label", features=None):
    """As Hugging Face lays it out: the rows `order` of the 64 images."""
    names = list(images())
    cells = [{"bytes": images()[names[i]], "path": names[i]} for i in order]
    columns = {"image": pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
    columns |= {} if labels is None else {label: pa.array([labels[i] for i in order])}
    metadata = {} if features is None else {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def parquet_of(path, rows, group=10):
    pq.write_table(rows, path, row_group_size=group)
    return str(path)


def saved(root, tables, features=NAMED, indices=None, key="_indices_files"):
    """What `save_to_disk` leaves."""
    root.mkdir()
    files = []
    for number, rows in enumerate(tables):
        files.append({"filename": f"data-{number:05d}-of-{len(tables):05d}.arrow"})
        stream(root / files[-1]["filename"], rows)
    state = {"_data_files": files, "_fingerprint": "0", "_split": "train"}
    if indices is not None:
        stream(root / "indices.arrow", pa.table({"indices": pa.array(indices, pa.uint64())}))
        state[key] = [{"filename": "indices.arrow"}]
    (root / "state.json").write_text(json.dumps(state))
    (root / "dataset_info.json").write_text(json.dumps({"features": features}))
    return str(root)


def stream(path, rows):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)


MIXED = np.random.default_rng(0).permutation(64).tolist()


def test_parquet_gives_the_views_and_labels_of_a_folder(tmp_path):
    (tmp_path / "parts").mkdir()
    parquet_of(tmp_path / "parts/a.parquet", table(MIXED[:30], features=NAMED))
    parquet_of(tmp_path / "parts/b.parquet", table(MIXED[30:], features=NAMED))
    words = [CLASSES[label] for label in LABELS]
    by_classes = {
        str(tmp_path / "parts"): [*CLASSES, "gnu"], str(tmp_path / "parts/*.parquet"): [*CLASSES, "gnu"],
        str(tmp_path / "parts/{a,b}.parquet"): [*CLASSES, "gnu"],
        parquet_of(tmp_path / "plain.parquet", table(MIXED)): ["0", "1", "2", "3"],
        parquet_of(tmp_path / "words.parquet", table(MIXED, words, "class")): CLASSES,
        parquet_of(tmp_path / "none.parquet", table(MIXED, None)): None,
    }  # fmt: skip
    for spec, classes in by_classes.items():
        source = open_source(spec, 3)
        assert_same_views(source, reference(tmp_path))
        if classes is None:
            assert source.classes is None and source.labels() is None
        else:
            assert_labels(source, classes)


def test_arrow_gives_the_views_and_labels_of_a_folder(tmp_path):
    rows = table()
    specs = [
        saved(tmp_path / "one", [table(MIXED)]), saved(tmp_path / "two", [table(MIXED[:20]), table(MIXED[20:])]),
        saved(tmp_path / "mapped", [rows.slice(0, 40), rows.slice(40)], indices=MIXED),
        saved(tmp_path / "older", [rows], indices=MIXED, key="_indices_data_files"),
    ]  # fmt: skip
    for spec in specs:
        source = open_source(spec, 3)
        assert_same_views(source, reference(tmp_path))
        assert_labels(source, [*CLASSES, "gnu"])
    fewer = open_source(saved(tmp_path / "fewer", [rows], indices=[9, 3, 3]), 3)
    assert [fewer.path(index).rpartition("[")[2] for index in range(3)] == ["3]", "3]", "9]"]
    assert fewer.labels().tolist() == [LABELS[3], LABELS[3], LABELS[9]]
    with pytest.raises(UserError, match="indices point beyond its 64 rows"):
        open_source(saved(tmp_path / "beyond", [rows], indices=[64]), 3)


def test_columns_of_bytes_and_rows_without_names(tmp_path):
    files = list(images().values())
    plain = pa.table({"id": list(range(64)), "png": pa.array(files, pa.large_binary()), "x": pa.array([b""] * 64)})
    source = open_source(parquet_of(tmp_path / "plain.parquet", plain), 3)
    assert_same_views(source, reference(tmp_path))
    assert source.path(13) == f"{tmp_path}/plain.parquet[13]" and source.classes is None
    unnamed = table().set_column(0, "picture", pa.array([{"bytes": data} for data in files]))
    assert_same_views(open_source(parquet_of(tmp_path / "unnamed.parquet", unnamed), 3), reference(tmp_path))
    for columns, problem in (({"a": files, "b": files}, "several columns"), ({"a": [1]}, "no column")):
        with pytest.raises(UserError, match=rf"x.parquet' has {problem} of encoded images; .*it holds a \("):
            open_source(parquet_of(tmp_path / "x.parquet", pa.table(columns)), 3)


def test_sixteen_bits_are_seen_where_names_say_nothing(tmp_path):
    ramp = np.arange(32, dtype=np.uint16).reshape(4, 8) * 2000
    np.save(tmp_path / "a.npy", ramp)
    rows = pa.table({"image": [(tmp_path / "a.npy").read_bytes()] * 3})
    source = open_source(parquet_of(tmp_path / "x.parquet", rows), 1)
    assert source.dtype == torch.uint16 and np.array_equal(source.image(1)[0], ramp)


def test_nulls(tmp_path):
    data = images()["00.PNG"]
    rows = pa.table({"image": [{"bytes": data, "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]})
    rows = rows.append_column("label", pa.array([1, None, -1]))
    for spec in (parquet_of(tmp_path / "x.parquet", rows), saved(tmp_path / "x", [rows])):
        source = open_source(spec, 3)
        assert source.image(0).shape == (3, 30, 40)
        for index in (1, 2):
            with pytest.raises(BadImage, match=rf"\[{index}\]: cannot be read \(its cell is null\)"):
                source.image(index)
        assert [source.label(index) is None for index in range(3)] == [False, True, True]
        assert source.classes[source.label(0)] == ("1" if spec.endswith("parquet") else "dog")
    with pytest.raises(UserError, match="has the label 4 but names only 1 classes"):
        features = {"label": {"names": ["a"]}}
        open_source(parquet_of(tmp_path / "y.parquet", table([0], [4], features=features)), 3)


def test_a_row_is_read_with_its_group_alone_and_few_groups_are_kept(tmp_path, monkeypatch):
    source = open_source(parquet_of(tmp_path / "x.parquet", table(), group=8), 3)
    file, _ = source._file(0)
    source._groups.clear()  # of those looked at for the type of their pixels
    asked = []

    class Watched:
        def read_row_group(self, group, columns, use_threads):
            asked.append((group, columns))
            return file.read_row_group(group, columns=columns)

    monkeypatch.setattr(source, "_file", lambda table: (Watched(), np.arange(8, 65, 8)))
    for index in (0, 7, 63, 0, 63):
        assert source.read(index) == images()[list(images())[index]]
    assert asked == [(0, ["image.bytes"]), (7, ["image.bytes"])]
    monkeypatch.setattr(parquet, "_MOST_BYTES", 1)
    for index in (8, 9, 0, 1):
        source.read(index)
    assert [group for group, _ in asked[2:]] == [1, 0] and len(source._groups) == 1


def test_a_set_of_several_splits_says_which(tmp_path):
    (tmp_path / "both").mkdir()
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        saved(tmp_path / "both" / split, [table()])
    with pytest.raises(UserError, match="holds the splits train, test; name one, as .*/both/train"):
        open_source(f"{tmp_path}/both/", 3)
    assert len(open_source(str(tmp_path / "both/test"), 3)) == 64


def test_a_state_json_of_another_program_is_no_table(tmp_path):
    folder(tmp_path / "x", {"state.json": b"{}", "1.png": images()["00.PNG"]})
    assert len(open_source(str(tmp_path / "x"), 3)) == 1


@pytest.mark.parametrize("name", ["x.parquet", "x/data-00000-of-00001.arrow"])
def test_a_table_that_is_not_whole(tmp_path, name):
    parquet_of(tmp_path / "x.parquet", table())
    saved(tmp_path / "x", [table()])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=f"{name}' is not a whole .*again") as caught:
        open_source(str(tmp_path / name.split("/")[0]), 3)
    assert "\n" not in str(caught.value)


def test_files_of_different_kinds(tmp_path):
    parquet_of(tmp_path / "a.parquet", table())
    parquet_of(tmp_path / "b.parquet", pa.table({"text": ["x"]}))
    with pytest.raises(UserError, match="b.parquet' has not the columns of .*a.parquet"):
        open_source(str(tmp_path / "*.parquet"), 3)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    specs = parquet_of(tmp_path / "x.parquet", table()), saved(tmp_path / "x", [table()])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for spec in specs:
        with pytest.raises(UserError, match=r"pip install 'dino-sd\[parquet\]'"):
            open_source(spec, 3)


def test_copies_and_forked_workers_read_the_same(tmp_path):
    expected = reference(tmp_path)
    specs = parquet_of(tmp_path / "x.parquet", table(MIXED)), saved(tmp_path / "x", [table(MIXED)])
    sources = [open_source(spec, 3) for spec in specs]
    for source in sources:
        assert torch.equal(source.image(3), expected.image(3))
        copy = pickle.loads(pickle.dumps(source))
        assert torch.equal(copy.image(3), expected.image(3)) and copy.fingerprint() == source.fingerprint()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=read_by, args=(sources, sender))
    child.start()
    assert receiver.poll(60)
    assert receiver.recv() == [expected.image(3).tolist()] * len(sources)
    child.join(60)
    assert child.exitcode == 0


def test_the_second_opening_does_not_read_the_rows(tmp_path, monkeypatch):
    specs = parquet_of(tmp_path / "x.parquet", table()), saved(tmp_path / "x", [table()])
    age(specs[0])
    age(tmp_path / "x/data-00000-of-00001.arrow")
    before = [open_source(spec, 3).fingerprint() for spec in specs]
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "index_of_tables", fail)
        patch.setattr(arrow, "index_of_tables", fail)
        assert [open_source(spec, 3).fingerprint() for spec in specs] == before
    parquet_of(tmp_path / "x.parquet", table(range(9)))
    assert len(open_source(specs[0], 3)) == 9
