"""Small data sets in the published file formats, with images that encode their index."""

import gzip
import io
import os
import struct
import tarfile

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from branchynet import data
from branchynet.data import archives

IDX = tuple(archives.ARCHIVES["mnist"].sha256)
TAR = "cifar-10-binary.tar.gz"
PLACE = os.environ.get(archives.VARIABLE)  # before own_cache hides it
REAL = {"mnist": (50000, 10000, 10000), "fashion-mnist": (50000, 10000, 10000), "cifar10": (45000, 5000, 10000)}
SMALL = {"mnist": (50, 10, 20), "fashion-mnist": (50, 10, 20), "cifar10": (54, 6, 20)}  # of 60 images and 20
same_place = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=25
)


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def numbered(count, shape):
    """Images that encode their index in the first two bytes."""
    images = np.zeros((count, *shape), dtype=np.uint8)
    images.reshape(count, -1)[:, 0] = np.arange(count) // 256
    images.reshape(count, -1)[:, 1] = np.arange(count) % 256
    return images


def numbers(split):
    flat = split.images.flatten(1).int()
    return (flat[:, 0] * 256 + flat[:, 1]).tolist()


def write_idx(folder, train=60, test=20, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in zip(IDX, (train, train, test, test), strict=True):
        content = idx(numbered(count, (28, 28)) if "images" in name else np.arange(count, dtype=np.uint8) % 10)
        path = folder / (name if packed else name.removesuffix(".gz"))
        path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return folder


def cifar_files(count=12, test=20):
    train = numbered(5 * count, (3072,)).reshape(5, count, 3072)
    batches = [*train, numbered(test, (3072,))]
    return {
        file: np.hstack([np.arange(len(batch), dtype=np.uint8)[:, None] % 10, batch]).tobytes()
        for file, batch in zip(archives.CIFAR_BATCHES, batches, strict=True)
    }


def write_cifar(folder, packed=False, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    files = cifar_files() | {name + ".bin": content for name, content in changed.items()}
    files = {file: content for file, content in files.items() if content is not None}
    if not packed:
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder
    with tarfile.open(folder / TAR, "w:gz") as tar:
        for file, content in sorted(files.items(), reverse=True):  # the published archive is not sorted either
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


def write_images(base, classes=("ant", "bee"), count=10, size=(6, 5), mode="RGB", ending="png"):
    for c, name in enumerate(classes):
        (base / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            color = (20 * c, i, 200) if mode == "RGB" else 20 * c + i
            Image.new(mode, size[::-1], color).save(base / name / f"{i:02}.{ending}")
    return base


def small_split(count=37, shape=(1, 4, 5)):
    return data.Split(torch.from_numpy(numbered(count, shape)), torch.arange(count))


def noise(folder, count, seed, shape=(6, 5)):
    """Write images that are all different."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, shape, np.uint8)).save(folder / f"{i:03}.png")


def contents(split):
    return {image.numpy().tobytes() for image in split.images}
