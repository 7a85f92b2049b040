import dataclasses
import functools
import gzip
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from branchynet import data
from branchynet.data import archives
from branchynet.errors import DataError
from helpers.image_files import (
    IDX,
    REAL,
    SMALL,
    TAR,
    idx,
    write_cifar,
    write_idx,
)

pytestmark = pytest.mark.usefixtures("own_cache")


class TestDownload:
    @pytest.fixture
    def serve(self, tmp_path, monkeypatch):
        """A real server on the loopback interface, the only source of the archives."""
        folder = tmp_path / "served"
        folder.mkdir()
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                asked.append(self.path)

        handler = functools.partial(Handler, directory=str(folder))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            url = f"http://127.0.0.1:{server.server_port}/"

            def announce(name, urls=(url,)):
                sums = {
                    file: hashlib.sha256((folder / file).read_bytes()).hexdigest()
                    for file in archives.ARCHIVES[name].sha256
                }
                changed = dataclasses.replace(archives.ARCHIVES[name], urls=urls, sha256=sums)
                monkeypatch.setitem(archives.ARCHIVES, name, changed)
                return url

            yield folder, announce, asked
            server.shutdown()
            thread.join()

    @pytest.mark.parametrize("name", REAL)
    def test_once(self, name, serve):
        folder, announce, asked = serve
        write_cifar(folder, packed=True) if name == "cifar10" else write_idx(folder)
        announce(name)
        first = data.load_data(name)
        assert (len(first.train), len(first.val), len(first.test)) == SMALL[name]
        files = len(archives.ARCHIVES[name].sha256)
        assert len(asked) == files
        for download in (True, False):
            assert torch.equal(data.load_data(name, download=download).train.images, first.train.images)
        assert len(asked) == files

    def test_damaged_in_the_cache(self, serve, own_cache):
        folder, announce, asked = serve
        write_idx(folder)
        announce("mnist")
        data.load_data("mnist")
        cached = archives._cache("mnist") / IDX[1]
        cached.write_bytes(cached.read_bytes()[:-9])
        with pytest.raises(DataError, match=r"damaged or incomplete"):
            data.load_data("mnist", download=False)
        assert len(data.load_data("mnist").train) == 50
        assert len(asked) == 5

    def test_wrong_checksum(self, serve):
        folder, announce, _ = serve
        write_idx(folder)
        announce("mnist")
        (folder / IDX[1]).write_bytes(gzip.compress(idx(np.zeros(60, np.uint8))))
        message = (
            rf"mnist could not be downloaded \(http://127.*/{IDX[1]}: SHA256 hash .*does not match.*BRANCHYNET_DATA"
        )
        with pytest.raises(DataError, match=message):
            data.load_data("mnist")
        assert not (archives._cache("mnist") / IDX[1]).exists()

    def test_removed_from_the_server(self, serve):
        folder, announce, _ = serve
        write_cifar(folder, packed=True)
        announce("cifar10")
        (folder / TAR).unlink()
        with pytest.raises(DataError, match=r"cifar10 could not be downloaded .*404"):
            data.load_data("cifar10")

    def test_second_address(self, serve):
        folder, announce, asked = serve
        write_idx(folder)
        url = announce("mnist")
        announce("mnist", urls=(url + "gone/", url))
        assert len(data.load_data("mnist").train) == 50
        assert len([path for path in asked if "gone" not in path]) >= 4

    def test_server_unreachable(self, serve):
        folder, announce, _ = serve
        write_idx(folder)
        announce("mnist", urls=("http://127.0.0.1:9/",))
        with pytest.raises(DataError, match=r"could not be downloaded \(http://127.0.0.1:9/.*set BRANCHYNET_DATA"):
            data.load_data("mnist")

    def test_published_checksums(self):
        for archive in archives.ARCHIVES.values():
            assert all(len(value) == 64 and int(value, 16) for value in archive.sha256.values())
            assert all(url.startswith("http") and url.endswith("/") for url in archive.urls)


class TestDigits:
    def test_digits(self):
        digits = data.load_data("digits")
        assert digits.shape == (1, 28, 28) and digits.classes == tuple("0123456789")
        assert (len(digits.train), len(digits.val), len(digits.test)) == (1197, 300, 300)
        every = torch.cat([s.labels for s in (digits.train, digits.val, digits.test)])
        assert torch.bincount(every).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
        assert digits.train.images.max() == 255 and digits.train.images.min() == 0
        assert digits.train.labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
        assert torch.equal(digits.test.images, data.load_data("digits").test.images)


def test_the_shipped_digits_are_those_of_scikit_learn():
    pixels, labels = load_digits(return_X_y=True)
    with np.load(Path(data.__file__).with_name("digits.npz")) as shipped:
        np.testing.assert_array_equal(shipped["pixels"].reshape(-1, 64), pixels)
        np.testing.assert_array_equal(shipped["labels"], labels)
