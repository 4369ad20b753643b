"""k-NN accuracies equal those of the authors' published code."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_sd.evaluators.knn import knn

FOLDER = Path(os.environ.get("DINO_SD_REFERENCE") or Path(__file__).parents[2] / "shared" / "reference")


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers in {FOLDER} (DINO_SD_REFERENCE)")
def test_published_knn():
    stored = np.load(FOLDER / "knn.npz")
    names = {
        part: next(name for name in stored.files if name.startswith(part) and "label" in name)
        for part in ("train", "test")
    }
    ks = [int(name.removeprefix("top1_")) for name in stored.files if name.startswith("top1_")]
    temperature = float(stored["temperature"]) if "temperature" in stored.files else 0.07
    features = [torch.tensor(stored[name]) for part in ("train", "test") for name in (part, names[part])]
    for chunk in (100_000, 64):
        result = knn(*features, k=ks, temperature=temperature, chunk=chunk, train_chunk=10 * chunk)
        for k in ks:
            assert result[k][0] == pytest.approx(float(stored[f"top1_{k}"]), rel=1e-9, abs=1e-9)
            assert result[k][1] == pytest.approx(float(stored[f"top5_{k}"]), rel=1e-9, abs=1e-9)
