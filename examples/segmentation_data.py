"""Write an HDF5 file of images with discs in noise, and their masks."""

import sys

import h5py
import numpy as np


def discs(count, size=16, seed=0):
    """Images and masks of shape (count, 1, size, size)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    middle, radius = rng.uniform(4, size - 4, (count, 2)), rng.uniform(2, 5, count)
    far = np.hypot(y - middle[:, 0, None, None], x - middle[:, 1, None, None])
    masks = (far < radius[:, None, None])[:, None].astype("float32")
    return masks + rng.normal(scale=0.5, size=masks.shape).astype("float32"), masks


if __name__ == "__main__":
    images, masks = discs(160)
    with h5py.File(sys.argv[1], "w") as file:
        for split, rows in (("train", slice(32, None)), ("validation", slice(32))):
            file[f"{split}/image"], file[f"{split}/mask"] = images[rows], masks[rows]
