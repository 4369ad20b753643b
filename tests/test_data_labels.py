"""Sets of which only some images have labels."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dino_sd.data.evaluation import eval_batches
from dino_sd.data.geometry import make_views
from dino_sd.data.loader import Batches
from dino_sd.data.source import StackSource, labelled_only, open_source
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.errors import UserError
from dino_sd.shapes import NO_LABEL


def folder(root, paths):
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / path)
    return open_source(str(root), 3)


def mini(share=None, seed=0):
    source = open_source("fashion-mnist-mini:test", 1)
    if share is not None:
        source.keep_labels(share, seed)
    return source


def known(source):
    return set(np.flatnonzero(source.labels() != NO_LABEL).tolist())


def test_kept_labels_are_balanced_right_and_nested():
    whole = mini().labels()
    for share, per_class in ((0.1, 20), (0.2, 40), (0.0125, 2), (0.001, 1), (1.0, 200)):
        labels = mini(share).labels()
        assert np.bincount(labels[labels != NO_LABEL]).tolist() == [per_class] * 10
        assert np.array_equal(labels[labels != NO_LABEL], whole[labels != NO_LABEL])
    assert known(mini(0.001)) < known(mini(0.1)) < known(mini(0.2)) < known(mini(1.0))
    assert known(mini(0.1)) == known(mini(0.1)) != known(mini(0.1, seed=1))


def test_hidden_labels_are_none_everywhere():
    source = mini(0.1)
    assert sum(source.label(index) is None for index in range(len(source))) == 1800
    for size in ((28, 28), (14, 14)):  # from memory, and image by image
        labels = torch.cat([labels for _, labels, _ in eval_batches(source, size)])
        assert labels.tolist() == source.labels().tolist()
    batch = next(iter(Batches(source, ViewSpec((ViewGroup(1, (8, 8), (0.4, 1.0)),), 1), 0, 500, total_steps=1)))
    assert batch.labels.tolist() == source.labels()[batch.indices].tolist()
    assert source.classes == mini().classes


def test_the_fingerprint_tells_which_labels_are_kept(tmp_path):
    paths = [f"class{index % 2}/{index}.png" for index in range(10)]
    folder(tmp_path, paths)

    def files(share, seed):
        source = open_source(str(tmp_path), 3)
        source.keep_labels(share, seed)
        return source

    for make in (mini, files):
        marks = [make(*arguments).fingerprint() for arguments in ((1.0, 0), (0.2, 0), (0.4, 0), (0.4, 1))]
        assert len(set(marks)) == 4 and make(0.4, 0).fingerprint() == marks[2]
    assert mini(1.0).fingerprint() == mini().fingerprint()
    assert files(1.0, 0).fingerprint() == open_source(str(tmp_path), 3).fingerprint()


def test_labels_that_cannot_be_kept(tmp_path):
    with pytest.raises(UserError, match="has no labels to keep 0.1 of; use one folder a class"):
        folder(tmp_path, ["1.png"]).keep_labels(0.1, 0)
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(UserError, match=f"labelled: {share:g} is no share"):
            mini().keep_labels(share, 0)


def test_labelled_only_of_a_stack():
    source = mini(0.1)
    some = labelled_only(source)
    chosen = sorted(known(source))
    assert len(some) == 200 and some.labels().tolist() == mini().labels()[chosen].tolist()
    assert (some.name, some.channels, some.classes) == (source.name, 1, source.classes)
    assert torch.equal(some.stack, source.stack[chosen])
    assert torch.equal(some.image(7), source.image(chosen[7])) and some.label(7) == source.label(chosen[7])
    spec = ViewSpec((ViewGroup(1, (8, 8), (0.4, 1.0)),), 1)
    cut = StackSource("cut", source.stack[chosen], None, None)
    one, other = (make_views(x, spec, 0, 0, np.arange(200))[0][0] for x in (some, cut))
    assert torch.equal(one, other)
    marks = {
        some.fingerprint(),
        source.fingerprint(),
        *(labelled_only(mini(*a)).fingerprint() for a in ((0.2,), (0.1, 1))),
    }
    assert len(marks) == 4 and labelled_only(mini(0.1)).fingerprint() == some.fingerprint()
    whole = mini()
    assert labelled_only(whole) is whole


def test_a_folder_of_unlabelled_images_beside_the_classes(tmp_path):
    paths = ["b/1.png", "Unlabelled/2.png", "a/3.png", "unlabeled/deeper/4.png", "b/5.png"]
    source = folder(tmp_path, paths)
    assert source.classes == ["a", "b"] and source.labels().tolist() == [1, -1, 0, -1, 1]
    assert [source.label(index) for index in range(5)] == [1, None, 0, None, 1]
    some = pickle.loads(pickle.dumps(labelled_only(source)))
    assert some.stack is None and some.labels().tolist() == [1, 0, 1] and some.classes == ["a", "b"]
    assert torch.equal(some.image(1), source.image(2))
    with pytest.raises(IndexError):
        some.image(3)
    source.keep_labels(0.5, 0)
    assert source.labels()[[1, 2, 3]].tolist() == [-1, 0, -1] and (source.labels() == 1).sum() == 1
    assert len(labelled_only(source)) == 2 and labelled_only(source).fingerprint() != some.fingerprint()


@pytest.mark.parametrize(
    "paths",
    [["unlabelled/1.png", "unlabelled/2.png"], ["a/1.png", "unlabelled/2.png"], ["a/1.png", "b/2.png", "3.png"]],
)
def test_labels_need_two_class_folders_and_nothing_beside_them(tmp_path, paths):
    source = folder(tmp_path, paths)
    assert source.labels() is None and source.classes is None and len(source) == len(paths)
    with pytest.raises(UserError, match="no image of .* has a label; use one folder a class"):
        labelled_only(source)
