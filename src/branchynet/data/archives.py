"""Find, download and read the published files of MNIST, Fashion-MNIST and CIFAR-10.

Only the structure of your own files is checked, so re-compressed copies and subsets are accepted; a download must also
have the published SHA-256. Nothing is unpickled, and no archive is unpacked to disk.
"""

import gzip
import importlib.util
import math
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..files import check_path

Bytes = NDArray[np.uint8]

VARIABLE = "BRANCHYNET_DATA"  # environment variable with the user's folder of data sets
CIFAR_BATCHES = (*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin")
CIFAR_RECORD = 1 + 3 * 32 * 32
MOST_BYTES = 1 << 29  # limit of unpacked images, three times the largest set; a small gz file may hold gigabytes


@dataclass(frozen=True)
class Archive:
    """The location and the file names of a data set."""

    classes: tuple[str, ...]  # in the order of the labels
    validation: float  # share of the published training set that is held out for validation
    folders: tuple[str, ...]  # subfolders of the user's folder that are searched, in this order
    urls: tuple[str, ...]  # prefixes of the download addresses, tried in this order
    sha256: Mapping[str, str]  # checksum of each published file
    opening: tuple[int, ...]  # first labels of the test set; they distinguish data sets with the same file names

    @property
    def forms(self) -> tuple[tuple[str, ...], ...]:
        """The names of the published files, and those of the unpacked files."""
        published = tuple(self.sha256)
        unpacked = CIFAR_BATCHES if len(published) == 1 else tuple(name.removesuffix(".gz") for name in published)
        return published, unpacked


ARCHIVES = {
    "mnist": Archive(
        classes=tuple("0123456789"),
        validation=1 / 6,
        folders=("mnist", "MNIST/raw", "MNIST", "."),
        urls=("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        sha256={
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
        opening=(7, 2, 1, 0, 4, 1, 4, 9, 5, 9),
    ),
    "fashion-mnist": Archive(
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        validation=1 / 6,
        folders=("fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "."),
        urls=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
        sha256={
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        opening=(9, 2, 1, 1, 6, 1, 4, 6, 5, 7),
    ),
    "cifar10": Archive(
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        validation=1 / 10,
        folders=("cifar-10-batches-bin", "cifar10", "cifar10/cifar-10-batches-bin", "."),
        urls=("https://www.cs.toronto.edu/~kriz/",),
        sha256={"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
        opening=(3, 8, 8, 0, 6, 6, 1, 6, 3, 1),
    ),
}


def read_archive(
    name: str, root: str | os.PathLike[str] | None, download: bool
) -> tuple[tuple[Bytes, Bytes], tuple[Bytes, Bytes]]:
    """Read the published training and test sets: for each, images `(S, C, H, W)` and labels `(S,)`, uint8.

    Raises `DataError` if the files are missing or malformed, or the download failed.
    """
    paths = _find(name, root) or (_download(name) if download else _downloaded(name, root))
    if name == "cifar10":
        batches = _cifar_batches(paths)
        train, test = tuple(map(np.concatenate, zip(*batches[:-1], strict=True))), batches[-1]
    else:
        images, labels, test_images, test_labels = paths
        train, test = _idx_pair(images, labels), _idx_pair(test_images, test_labels)
    last = len(ARCHIVES[name].classes) - 1
    for (_, labels), half in ((train, "training"), (test, "test")):
        if labels.max() > last:
            raise DataError(
                f"{name}: the {half} labels in {paths[-1].parent} reach {labels.max()}, but there are {last + 1} "
                f"classes (0..{last}); get the files again"
            )
    # MNIST and Fashion-MNIST files have the same names, sizes and labels; only their content differs.
    for other, known in ARCHIVES.items():
        if other != name and tuple(test[1][: len(known.opening)]) == known.opening:
            raise DataError(
                f"the files in {paths[-1].parent} are {other}, not {name}; keep each data set in a separate folder: "
                f"{ARCHIVES[name].folders[0]!r} for {name}, {known.folders[0]!r} for {other}"
            )
    return (train[0], train[1]), test


def _find(name: str, root: str | os.PathLike[str] | None) -> list[Path] | None:
    """Find the files of a data set in the user's folder; None if the folder holds none of them."""
    place, origin = (root, "root") if root is not None else (os.environ.get(VARIABLE), VARIABLE)
    if not place:
        return None
    check_path(place)
    base = Path(place).expanduser()
    if not base.is_dir():
        raise DataError(f"{origin}={str(place)!r} is not a folder; give the folder of the data sets, or leave it out")
    partial = []
    for folder in (base / sub for sub in ARCHIVES[name].folders):
        for form in ARCHIVES[name].forms:
            missing = [file for file in form if not (folder / file).is_file()]
            if not missing:
                return [folder / file for file in form]
            if len(missing) < len(form):
                partial.append(f"{folder} lacks {', '.join(missing)}")
    if partial:
        raise DataError(f"{name}: {partial[0]}; add them, or move the rest away")
    return None


def _cache(name: str) -> Path:
    import pooch

    return Path(pooch.os_cache("branchynet")) / name


def _downloaded(name: str, root: str | os.PathLike[str] | None) -> list[Path]:
    """The files of an earlier download. Raises `DataError` if one is missing."""
    paths = [_cache(name) / file for file in ARCHIVES[name].sha256]
    if not all(path.is_file() for path in paths):
        place = root or os.environ.get(VARIABLE)
        where = f"in {place}" if place else f"given (neither {VARIABLE} nor root is set)"
        raise DataError(
            f"{name} is not {where} and was not downloaded to {_cache(name)}; {_remedy(name)}, or allow the download"
        )
    return paths


def _remedy(name: str) -> str:
    first = ARCHIVES[name].forms[0]
    files = first[0] if len(first) == 1 else f"{first[0]} and its {len(first) - 1} companions"
    return f"set {VARIABLE} (or root) to a folder that holds {files}, there or in {ARCHIVES[name].folders[0]}/"


def _download(name: str) -> list[Path]:
    import pooch

    archive, paths = ARCHIVES[name], []
    progress = importlib.util.find_spec("tqdm") is not None  # pooch draws its progress bar with tqdm, but need not
    downloader: Any = pooch.HTTPDownloader(progressbar=progress, chunk_size=1 << 16)
    for file, sha256 in archive.sha256.items():
        failures = []
        for url in archive.urls:
            try:
                got = pooch.retrieve(
                    url + file, known_hash=f"sha256:{sha256}", fname=file, path=_cache(name), downloader=downloader
                )
                paths.append(Path(got))
                break
            except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong checksum is a ValueError
                failures.append(f"{url + file}: {error}")
        else:
            raise DataError(f"{name} could not be downloaded ({'; '.join(failures)}); try again, or {_remedy(name)}")
    return paths


def _idx_pair(images: Path, labels: Path) -> tuple[Bytes, Bytes]:
    pixels, classes = read_idx(images, (28, 28)), read_idx(labels, ())
    if len(pixels) != len(classes):
        raise DataError(f"{images} holds {len(pixels)} images but {labels} holds {len(classes)} labels; get both again")
    return pixels[:, None], classes


def read_idx(path: Path, shape: tuple[int, ...]) -> Bytes:
    """Read an IDX file, gzipped if its name ends in ``.gz``: `(S, *shape)` uint8. Raises `DataError`."""
    ndim = 1 + len(shape)
    body = bytearray()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim:
                raise EOFError(f"it ends after {len(header)} bytes, inside its header")
            magic, *dims = struct.unpack(f">{1 + ndim}I", header)
            count = math.prod(dims)
            if magic != 0x800 + ndim:
                raise DataError(f"{path} starts with {magic:#010x}, not {0x800 + ndim:#010x}: not the right IDX file")
            if dims[0] == 0 or tuple(dims[1:]) != shape:
                wanted = " x ".join(map(str, ("S", *shape)))
                raise DataError(f"{path} holds {' x '.join(map(str, dims))} bytes; it must hold {wanted}, S at least 1")
            if count > MOST_BYTES:
                raise DataError(f"{path} announces {count:,} bytes, more than {MOST_BYTES:,}: get it again")
            # In chunks, and no more than announced: a false header must not fill the memory.
            while len(body) <= count and (chunk := stream.read(1 << 20)):
                body += chunk
        if len(body) != count:
            raise EOFError(f"it announces {count} bytes and holds {'fewer' if len(body) < count else 'more'}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; the file is damaged or incomplete: get it again") from error
    return np.frombuffer(body, dtype=np.uint8).reshape(dims)


def _cifar_batches(paths: Sequence[Path]) -> list[tuple[Bytes, Bytes]]:
    """Images and labels of the five training batches and the test batch."""
    try:
        contents = dict(_tar_batches(paths[0]) if len(paths) == 1 else map(_plain_batch, paths))
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, tarfile.TarError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {paths[0]}: {error}; it is damaged or incomplete: get it again") from error
    batches = []
    for file in CIFAR_BATCHES:
        content = contents.get(file)
        if not content or len(content) % CIFAR_RECORD:
            what = "is missing" if content is None else f"has {len(content)} bytes"
            raise DataError(
                f"{paths[0].parent}: {file} must be a multiple of {CIFAR_RECORD} bytes long, but it {what}: "
                "get it again"
            )
        records = np.frombuffer(content, dtype=np.uint8).reshape(-1, CIFAR_RECORD)
        batches.append((records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]))
    return batches


def _plain_batch(path: Path) -> tuple[str, bytes]:
    _check_size(path, path.stat().st_size)
    return path.name, path.read_bytes()


def _check_size(path: Path, size: int) -> None:
    most = MOST_BYTES // len(CIFAR_BATCHES)
    if size > most:
        raise DataError(f"{path} holds {size:,} bytes, more than {most:,}: get it again")


def _tar_batches(path: Path) -> Iterator[tuple[str, bytes]]:
    with gzip.open(path) as stream:
        with tarfile.open(fileobj=stream) as tar:
            for member in tar:  # in the archive's order: seeking back in a gzip stream reads it again from the start
                file = PurePosixPath(member.name).name
                if file in CIFAR_BATCHES and member.isfile() and (content := tar.extractfile(member)):
                    _check_size(path / file, member.size)
                    yield file, content.read()
        while stream.read(1 << 20):  # up to the checksum at the stream's end, which detects damage
            pass
