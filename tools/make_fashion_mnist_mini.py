"""Makes dino_sd/assets/fashion_mnist_mini.npz, the small real set that ships in the package.

Of each class the first 1,000 training and the first 200 test images, in the order of the files they come from:

    python tools/make_fashion_mnist_mini.py [FOLDER of Fashion-MNIST's idx files]

The members are LZMA-compressed: `numpy.load` reads them as any other, and the file is a seventh smaller than that of
`numpy.savez_compressed`.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np

from dino_sd.data.source import open_source

PER_CLASS = {"train": 1000, "test": 200}
TARGET = Path(__file__).parents[1] / "dino_sd" / "assets" / "fashion_mnist_mini.npz"


def main() -> None:
    folder = f"@{sys.argv[1]}" if len(sys.argv) > 1 else ""
    arrays = {}
    for split, per_class in PER_CLASS.items():
        source = open_source(f"fashion-mnist:{split}{folder}", channels=1)
        labels_N = source.labels()
        assert labels_N is not None and source.stack is not None and source.classes is not None
        firsts = [np.flatnonzero(labels_N == label)[:per_class] for label in range(len(source.classes))]
        kept = np.sort(np.concatenate(firsts))
        arrays[f"{split}_images"] = source.stack[kept, 0].numpy()
        arrays[f"{split}_labels"] = labels_N[kept].astype(np.uint8)
    with zipfile.ZipFile(TARGET, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            # A fixed date: the same images give the same file.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue(), zipfile.ZIP_LZMA)
    print(f"{TARGET}: {TARGET.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
