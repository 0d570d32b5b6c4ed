"""Labelled pictures: read from files, or drawn; a training part and a test part."""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vouch.data.readers import find_source
from vouch.errors import DataError, StorageError, did_you_mean


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures with a class each; the first `n_train` are for training.

    Attributes:
        name: of the collection.
        pixels: uint8 `(n, H, W, C)` with `C` 1 or 3.
        label: int64 `(n,)` in `[0, len(classes))`.
        classes: what the labels mean.
        n_train: how many of the first pictures are the training part.
    """

    name: str
    pixels: NDArray[np.uint8]
    label: NDArray[np.int64]
    classes: tuple[str, ...]
    n_train: int

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or len(self.pixels) != len(self.label):
            raise DataError(f"{self.name}: pictures {self.pixels.shape} do not fit labels {self.label.shape}")
        if len(self.label) == 0 or not 0 < self.n_train <= len(self.label):
            raise DataError(f"{self.name}: {len(self.label)} pictures, {self.n_train} of them for training")
        if self.label.min() < 0 or self.label.max() >= len(self.classes):
            raise DataError(f"{self.name}: labels outside 0..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def fingerprint(self) -> str:
        """A hash of pictures and labels."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.pixels).data)
        digest.update(np.ascontiguousarray(self.label).data)
        return digest.hexdigest()

    def rows(self, index: Any) -> Images:
        """Some of the pictures, all as a training part."""
        label = self.label[index]
        return replace(self, pixels=self.pixels[index], label=label, n_train=len(label))

    @property
    def train(self) -> Images:
        """The training part."""
        return self.rows(slice(0, self.n_train))

    @property
    def test(self) -> Images:
        """The test part."""
        if self.n_train == len(self):
            raise DataError(f"{self.name} has no test part")
        return self.rows(slice(self.n_train, None))

    def tensor(self, size: int | None = None, *, grey: bool = False) -> Any:
        """float32 `(n, C, H, W)` in [0, 1]; resized to `size` x `size`, and made grey, where asked."""
        import torch
        import torch.nn.functional as F

        x = torch.from_numpy(np.array(self.pixels)).permute(0, 3, 1, 2).float().div_(255)
        if grey and x.shape[1] == 3:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        if size is not None and tuple(x.shape[2:]) != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
        return x.contiguous()


def drawn(
    style: int = 0, *, n_train: int = 400, n_test: int = 200, classes: int = 4, size: int = 16, seed: int = 0
) -> Images:
    """Pictures that need no download: smooth patterns, one a class and style, shifted, scaled and with noise on them."""
    from scipy.ndimage import gaussian_filter, shift

    patterns = np.random.default_rng([71, style]).normal(size=(classes, size, size))
    patterns = np.stack([gaussian_filter(each, size / 8) for each in patterns])
    patterns /= np.abs(patterns).max((1, 2), keepdims=True)
    random, n = np.random.default_rng([seed, style]), n_train + n_test
    label = random.integers(0, classes, n)
    moved = np.stack([shift(patterns[c], random.uniform(-2, 2, 2), mode="wrap", order=1) for c in label])
    grey = 0.5 + 0.35 * moved * random.uniform(0.6, 1.2, (n, 1, 1)) + random.normal(0, 0.12, (n, size, size))
    pixels = (grey.clip(0, 1) * 255).astype(np.uint8)[..., None]
    return Images(
        f"drawn {style}", pixels, label.astype(np.int64), tuple(f"pattern {c}" for c in range(classes)), n_train
    )


def read_images(source: str) -> Images:
    """Labelled pictures by name or path.

    `drawn`, `drawn-1`, ... are drawn. Otherwise a folder, or the name of one below `$VOUCH_DATA`, with
    - `*.npz`: `images`, `labels`, or `train_images`, `train_labels`, `test_images`, `test_labels`;
    - `*-images-idx3-ubyte.gz` and `*-labels-idx1-ubyte.gz`;
    - `*train*.zip` and `*test*.zip` of `SPLIT/CLASS/NAME`;
    - or a folder `CLASS` for each class, perhaps below `train` and `test`.
    Where nothing says which part is for testing, it is the last third.

    Raises:
        StorageError: there is nothing of that name. DataError: it is not such a collection, or is damaged.
    """
    if source == "drawn" or source.startswith("drawn-"):
        return drawn(int(source[6:] or 0))
    folder = Path(find_source(source))
    name = folder.name
    try:
        if archives := sorted(folder.glob("*.npz")):
            return _from_npz(name, archives[0])
        if idx := sorted(folder.glob("*images-idx3-ubyte.gz")):
            return _from_idx(name, idx[0])
        if zips := sorted(folder.glob("*.zip")):
            return _from_zips(name, zips)
        return _from_folders(name, folder)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} cannot be read as labelled pictures: {error}", where=str(folder)) from error


def _shaped(pixels: Any) -> NDArray[np.uint8]:
    pixels = np.asarray(pixels, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 3 else pixels


def _from_npz(name: str, path: Path) -> Images:
    with np.load(path, allow_pickle=False) as file:
        parts = {key: file[key] for key in file.files}
    if "train_images" in parts:
        pixels = np.concatenate([parts["train_images"], parts["test_images"]])
        label, n_train = np.concatenate([parts["train_labels"], parts["test_labels"]]), len(parts["train_labels"])
    elif "images" in parts:
        pixels, label = parts["images"], parts["labels"]
        n_train = 2943 if name == "fashion_mnist_4443" else len(label) - len(label) // 3
    else:
        raise KeyError(f"no array 'images' in {path.name}; {did_you_mean('images', parts)}")
    classes = tuple(str(c) for c in range(int(label.max()) + 1))
    return Images(name, _shaped(pixels), label.astype(np.int64), classes, n_train)


def _from_idx(name: str, path: Path) -> Images:
    found = []
    for each, head in ((path, 16), (path.with_name(path.name.replace("images-idx3", "labels-idx1")), 8)):
        with gzip.open(each) as file:
            raw = np.frombuffer(file.read(), dtype=np.uint8)
        sizes = [int.from_bytes(raw[at : at + 4].tobytes(), "big") for at in range(4, head, 4)]
        found.append(raw[head:].reshape(sizes))
    pixels, label = found
    n_train = len(label) // 2 if name == "mnist_t10k" else len(label) - len(label) // 3
    classes = tuple(str(c) for c in range(int(label.max()) + 1))
    return Images(name, _shaped(pixels), label.astype(np.int64), classes, n_train)


def _from_zips(name: str, zips: list[Path]) -> Images:
    files: list[tuple[bool, str, Any]] = []
    for path in zips:
        with zipfile.ZipFile(path) as archive:
            files += [
                ("test" in m.split("/")[0], m.split("/")[-2], archive.read(m))
                for m in archive.namelist()
                if m[-1] != "/"
            ]
    return _decoded(name, files)


def _from_folders(name: str, folder: Path) -> Images:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg"})
    if not paths:
        raise StorageError(f"there are no pictures in {name}", where=str(folder))
    return _decoded(name, [("test" in p.relative_to(folder).parts[:-2], p.parent.name, p.read_bytes()) for p in paths])


def _decoded(name: str, files: list[tuple[bool, str, Any]]) -> Images:
    from PIL import Image

    classes = tuple(sorted({kind for _, kind, _ in files}))
    files.sort(key=lambda each: each[0])  # training first; the sort is stable
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")) for _, _, raw in files])
    label = np.array([classes.index(kind) for _, kind, _ in files], dtype=np.int64)
    n_test = sum(test for test, _, _ in files)
    if not n_test:
        order = np.random.default_rng(0).permutation(len(label))
        pixels, label, n_test = pixels[order], label[order], len(label) // 3
    return Images(name, pixels, label, classes, len(label) - n_test)
