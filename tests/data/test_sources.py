"""Sources: what was written comes back, and damage is named."""

import gzip
import json
import struct
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from trimtab.core.checks import InputError
from trimtab.data import sources


def pictures(n, h=9, w=10, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (n, h, w, channels), dtype=np.uint8)
    return pixels if channels == 3 else pixels[..., 0]


def encoded(array, kind="PNG"):
    file = BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def write_parquet(path, contents, labels, column="img", names=None, label="label"):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content, "path": None} for content in contents]
    table = pa.table({column: pa.array(rows, kind), label: pa.array(labels, pa.int64())})
    if names:
        features = {label: {"names": names, "_type": "ClassLabel"}, column: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def test_digits():
    data = sources.digits()
    assert len(data) == 1797
    assert data.classes == tuple("0123456789")
    assert int(data.images.min()) == 0
    assert int(data.images.max()) == 255
    assert data.labels.bincount().min() > 170
    x = data.tensor()
    assert x.shape == (1797, 1, 8, 8)
    assert float(x.max()) == 1.0


def test_images_select_and_pair():
    data = sources.digits()
    some = data[torch.tensor([5, 3])]
    assert torch.equal(some.images, data.images[[5, 3]])
    assert len(data[:10]) == 10
    image, label = some.dataset()[1]
    assert torch.equal(image, data.images[3] / 255)
    assert int(label) == int(data.labels[3])


def write_idx(folder, stem, images, labels):
    folder.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape)
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    head = struct.pack(">BBBBI", 0, 0, 8, 1, len(labels))
    (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + labels.tobytes()))


@pytest.fixture
def no_debian_package(monkeypatch, tmp_path):
    """A cache of our own, and no system folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "_FASHION_FOLDER", tmp_path / "absent")
    return tmp_path / "trimtab" / "fashion-mnist"


@pytest.mark.parametrize(("split", "stem"), [("train", "train"), ("test", "t10k")])
def test_fashion_mnist_from_the_cache(no_debian_package, split, stem):
    images, labels = pictures(4, 28, 28, 1), np.array([9, 0, 3, 3], np.uint8)
    write_idx(no_debian_package, stem, images, labels)
    data = sources.fashion_mnist(split)
    assert torch.equal(data.images[:, 0], torch.from_numpy(images))
    assert data.labels.tolist() == [9, 0, 3, 3]
    assert data.classes[9] == "Ankle boot"


@pytest.mark.bad_input
def test_fashion_mnist_says_how_to_get_it(no_debian_package):
    with pytest.raises(InputError, match="install Debian's package dataset-fashion-mnist, or put the four"):
        sources.fashion_mnist("train")
    with pytest.raises(InputError, match="split must be 'train' or 'test', got 'val'"):
        sources.fashion_mnist("val")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-20], "cannot be unpacked"),
        (lambda content: b"plain", "cannot be unpacked"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-5]), "must hold 3136 values, found 3131"),
        (lambda content: gzip.compress(b"\x01" + gzip.decompress(content)), "not an IDX file"),
    ],
)
def test_fashion_mnist_names_a_damaged_file(no_debian_package, damage, message):
    write_idx(no_debian_package, "t10k", pictures(4, 28, 28, 1), np.zeros(4, np.uint8))
    file = no_debian_package / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=f"t10k-images-idx3-ubyte.gz: {message}"):
        sources.fashion_mnist("test")


@pytest.mark.skipif(not sources._FASHION_FOLDER.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_the_debian_package():
    data = sources.fashion_mnist("test")
    assert data.images.shape == (10_000, 1, 28, 28)
    assert data.labels.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("column", ["img", "image"])
def test_parquet_round_trip(tmp_path, column, workers):
    pixels, labels = pictures(7), [0, 2, 1, 1, 0, 2, 2]
    names = ["cat", "dog", "owl"]
    file = write_parquet(tmp_path / "some.parquet", [encoded(p) for p in pixels], labels, column, names)
    data = sources.parquet_images(file, workers=workers)
    assert torch.equal(data.images, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert data.labels.tolist() == labels
    assert data.classes == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    "layout",
    [
        ("test-00000-of-00002.parquet", "test-00001-of-00002.parquet"),
        ("data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet"),
        ("test/0000.parquet", "test/0001.parquet"),
    ],
)
def test_parquet_folder_layouts(tmp_path, layout):
    pixels = pictures(4, channels=1)
    for name, part, labels in zip(layout, (pixels[:2], pixels[2:]), ([1, 0], [2, 3])):
        write_parquet(tmp_path / name, [encoded(p) for p in part], labels)
    data = sources.parquet_images(tmp_path, "test")
    assert torch.equal(data.images[:, 0], torch.from_numpy(pixels))
    assert data.labels.tolist() == [1, 0, 2, 3]
    assert data.classes == ("0", "1", "2", "3")


def test_parquet_other_label_column_and_one_file_a_split(tmp_path):
    write_parquet(tmp_path / "train.parquet", [encoded(p) for p in pictures(2)], [4, 1], label="fine_label")
    assert sources.parquet_images(tmp_path, "train", label="fine_label").labels.tolist() == [4, 1]


def test_grey_and_colour_together_become_colour(tmp_path):
    grey, colour = pictures(1, channels=1)[0], pictures(1)[0]
    file = write_parquet(tmp_path / "x.parquet", [encoded(grey), encoded(colour)], [0, 1])
    images = sources.parquet_images(file).images
    assert torch.equal(images[0], torch.from_numpy(grey).expand(3, -1, -1))
    assert torch.equal(images[1], torch.from_numpy(colour).permute(2, 0, 1))


def good(n=3):
    return [encoded(p) for p in pictures(n)]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("contents", "labels", "message"),
    [
        ([*good(2), b"not an image"], [0, 0, 0], "bad.parquet, row 2: the image cannot be decoded"),
        ([good(1)[0], good(1)[0][:60]], [0, 0], "row 1: the image cannot be decoded"),
        ([good(1)[0], None], [0, 0], "row 1: the image has no bytes"),
        ([*good(2), encoded(pictures(1, 12, 8)[0])], [0, 0, 0], "row 2: the image is 12 x 8, but .*row 0 is 9 x 10"),
        ([], [], "no images"),
        (good(3), [0, 1, -1], "column label must lie in .* found -1 at row 2"),
        (good(3), [0, None, 1], "column label must be integer class indices, got float64"),
    ],
)
def test_parquet_names_the_bad_row(tmp_path, contents, labels, message):
    file = write_parquet(tmp_path / "bad.parquet", contents, labels)
    for workers in (0, 2):
        with pytest.raises(InputError, match=message):
            sources.parquet_images(file, workers=workers)


@pytest.mark.bad_input
def test_parquet_refuses_labels_without_a_name(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", good(3), [0, 1, 2], names=["cat", "dog"])
    with pytest.raises(InputError, match=r"must lie in 0\.\.1, found 2 at row 2"):
        sources.parquet_images(file)


@pytest.mark.bad_input
def test_parquet_refuses_what_is_no_such_table(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        sources.parquet_images(tmp_path / "absent", "train")
    with pytest.raises(InputError, match=r"holds none of train-\*\.parquet"):
        sources.parquet_images(tmp_path, "train")
    with pytest.raises(InputError, match="split must be given for a folder"):
        sources.parquet_images(tmp_path)
    file = write_parquet(tmp_path / "x.parquet", good(), [0, 1, 2])
    with pytest.raises(InputError, match="split must be left out"):
        sources.parquet_images(file, "train")
    with pytest.raises(InputError, match=r"must have the columns img or image, and y; found \['img', 'label'\]"):
        sources.parquet_images(file, label="y")
    content = file.read_bytes()
    for damaged in (content[:-30], content[: len(content) // 2], b""):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"x\.parquet: cannot be read as Parquet"):
            sources.parquet_images(file)
    pq.write_table(pa.table({"img": [1, 2], "label": [0, 1]}), file)
    with pytest.raises(InputError, match=r"column img must be struct\(bytes, path\), found int64"):
        sources.parquet_images(file)


def write_folder(root, arrays, kind="png"):
    for name, images in arrays.items():
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i}.{kind}")


@pytest.mark.parametrize("workers", [0, 2])
def test_image_folder(tmp_path, workers):
    owls, cats = pictures(2, seed=1), pictures(3, seed=2)
    write_folder(tmp_path, {"owl": owls, "cat": cats})
    (tmp_path / "owl" / "notes.txt").write_text("ignored")
    (tmp_path / "README").write_text("ignored")
    data = sources.image_folder(tmp_path, workers=workers)
    assert data.classes == ("cat", "owl")
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(data.images, torch.from_numpy(np.concatenate((cats, owls))).permute(0, 3, 1, 2))


@pytest.mark.parametrize(("size", "shape"), [(8, (8, 8)), ((12, 6), (12, 6))])
def test_image_folder_resizes(tmp_path, size, shape):
    write_folder(tmp_path, {"a": pictures(1, 9, 10), "b": pictures(1, 20, 14)}, kind="jpg")
    assert sources.image_folder(tmp_path, size=size).images.shape == (2, 3, *shape)


def test_resizing_keeps_the_proportions(tmp_path):
    """A centred disk in a wide picture stays a disk."""
    y, x = np.mgrid[:40, :80]
    disk = ((y - 19.5) ** 2 + (x - 39.5) ** 2 < 15**2).astype(np.uint8) * 255
    write_folder(tmp_path, {"a": [disk]})
    small = sources.image_folder(tmp_path, size=20).images[0, 0].float() / 255
    assert torch.allclose(small.sum(0), small.sum(1), atol=0.05)
    assert abs(float(small.sum()) - np.pi * 7.5**2) < 5


@pytest.mark.bad_input
def test_image_folder_refuses(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        sources.image_folder(tmp_path / "absent")
    with pytest.raises(InputError, match="one sub-folder a class, found none"):
        sources.image_folder(tmp_path)
    write_folder(tmp_path, {"a": pictures(2), "b": pictures(1, 5, 5)})
    with pytest.raises(InputError, match=r"b/0\.png: the image is 5 x 5, but .*a/0\.png is 9 x 10; give a size"):
        sources.image_folder(tmp_path)
    with pytest.raises(InputError, match="size must be at least 1, got 0"):
        sources.image_folder(tmp_path, size=0)
    with pytest.raises(InputError, match="workers must be at least 0"):
        sources.image_folder(tmp_path, workers=-1)
    (tmp_path / "b" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"b/0\.png: the image cannot be decoded"):
        sources.image_folder(tmp_path)
    (tmp_path / "b" / "0.png").unlink()
    with pytest.raises(InputError, match="b: must hold PNG or JPEG images, found none"):
        sources.image_folder(tmp_path)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), "images must be bytes"),
        (torch.zeros(2, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), "images must be bytes of shape"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0).long(), "none of them 0"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 2]), r"must lie in 0\.\.1, found 2 at row 1"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0]), "labels must have 2 entries"),
    ],
)
def test_images_refuse(images, labels, message):
    with pytest.raises(InputError, match=message):
        sources.Images(images, labels, ("a", "b"))
