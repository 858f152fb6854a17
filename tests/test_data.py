"""Images come out as they went in, from every place; what cannot be read is named."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import noise_images
from PIL import Image
from sklearn.datasets import load_digits

from prunedm.data import content, hub
from prunedm.data.images import ImageSet, load_images, to_model_range, to_uint8
from prunedm.errors import UserError


def picture(value: int = 0, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    """Of one grey."""
    array = np.full((size[1], size[0]), value, np.uint8)
    return Image.fromarray(array).convert(mode)


def write(folder: Path, count: int, *, first: int = 0) -> None:
    """Pictures of the greys `first`, `first + 1`, ..., in their names' order."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in range(first, first + count):
        picture(value).save(folder / f"{value:03}.png")


def greys(images: ImageSet) -> list[int]:
    return [int(images[i].unique().item()) for i in range(len(images))]


def both(folder: Path, **options) -> tuple[list[int], list[int]]:
    options = {"size": 8, "channels": 3} | options
    train, test = (load_images(str(folder), split=s, **options) for s in ("train", "test"))
    return greys(train), greys(test)


def test_all_256_values_survive_the_models_range():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    ranged = to_model_range(values)
    assert (ranged.min(), ranged.max(), ranged.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(ranged), values)
    assert torch.equal(to_uint8(ranged.double()), values)


def test_to_uint8_rounds_and_clips():
    x = torch.tensor([-3.0, -1, -0.999, 0.0039, 0.9999, 1, 7])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255]


def test_digits_are_split_without_overlap_and_all_classes_are_in_both():
    sets = {s: load_images("digits", split=s, size=8, channels=1) for s in ("train", "test")}
    assert {s: len(images) for s, images in sets.items()} == {"train": 1498, "test": 299}
    for split, images in sets.items():
        chosen = [i for i in range(1797) if (i % 6 == 5) == (split == "test")]
        assert [images.label(i) for i in range(len(images))] == load_digits().target[
            chosen
        ].tolist()
        assert {images.label(i) for i in range(len(images))} == set(range(10))
        expected = np.round(load_digits().images[chosen] * 255 / 16)
        assert np.array_equal(np.stack([images[i][0] for i in range(len(images))]), expected)


def test_digits_take_the_models_size():
    image = load_images("digits", split="test", size=12, channels=1)[0]
    assert (image.shape, image.dtype) == ((1, 12, 12), torch.uint8)


def test_an_image_folder_of_all_sizes_and_modes_comes_out_alike(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    picture(10, "L", (8, 8)).save(tmp_path / "a.png")
    picture(20, "RGB", (16, 9)).save(tmp_path / "b.jpg", quality=95)
    picture(30, "RGBA", (5, 20)).save(tmp_path / "c.PNG")
    picture(40, "P", (8, 8)).save(tmp_path / "deep" / "d.png")
    picture(255, "1", (8, 8)).save(tmp_path / "deep" / "er" / "e.png")
    Image.fromarray(np.full((8, 8), 257 * 60, np.uint16)).save(tmp_path / "f.png")
    (tmp_path / "notes.txt").write_text("no image")
    for channels in (1, 3):
        options = {"split": "train", "size": 8, "channels": channels, "convert": True}
        images = load_images(str(tmp_path), **options)
        assert {images[i].shape for i in range(6)} == {(channels, 8, 8)}
        assert greys(images) == [10, 20, 30, 40, 255, 60]
        assert images.label(0) is None


def test_a_picture_keeps_its_orientation_and_channels():
    rng = np.random.default_rng(0)
    array_HWC = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = ImageSet([array_HWC], name="one", size=8, channels=3)[0]
    assert np.array_equal(image, array_HWC.transpose(2, 0, 1))


def test_pictures_are_cut_to_their_middle_square():
    array_HW = np.zeros((8, 16), np.uint8)
    array_HW[:, 4:12] = 200
    tall = np.ascontiguousarray(array_HW.T)
    images = ImageSet([array_HW, tall], name="wide", size=8, channels=1)
    assert greys(images) == [200, 200]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    image = Image.fromarray(np.full((8, 8), 70000, np.int32 if mode == "I" else np.float32))
    with pytest.raises(UserError, match=rf"image 0 of 'x' has {mode} pixels.* 8 bits"):
        ImageSet([image], name="x", size=8, channels=1)[0]


def test_train_and_test_subfolders_are_the_splits(tmp_path):
    write(tmp_path / "train", 30)
    write(tmp_path / "test", 25, first=100)
    assert both(tmp_path) == (list(range(30)), list(range(100, 125)))


def test_without_test_images_every_twentieth_is_held_out(tmp_path):
    write(tmp_path, 45)
    train, test = both(tmp_path)
    assert test == [19, 39]
    assert sorted(train + test) == list(range(45))


def test_images_are_held_out_of_a_train_subfolder_too(tmp_path):
    write(tmp_path / "train", 40)
    write(tmp_path / "train" / "zebras", 5, first=40)
    train, test = both(tmp_path)
    assert test == [19, 39]
    assert sorted(train + test) == list(range(45))


def test_images_beside_a_test_subfolder_are_for_training(tmp_path):
    write(tmp_path / "dogs", 30)
    write(tmp_path / "test" / "dogs", 3, first=100)
    assert both(tmp_path) == (list(range(30)), [100, 101, 102])


def test_a_folder_too_small_to_hold_out_from_serves_as_both(tmp_path):
    write(tmp_path, 19)
    assert both(tmp_path) == (list(range(19)), list(range(19)))


def test_folders_without_images_are_refused_by_name(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=rf"{tmp_path}.* holds no images \(\.png"):
        load_images(str(tmp_path), split="train", size=8, channels=3)
    with pytest.raises(UserError, match="'none' holds no images"):
        ImageSet([], name="none", size=8, channels=1)


@pytest.mark.parametrize("damage", ["noise", "truncated", "empty"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_corrupt_image_is_named(tmp_path, damage, suffix):
    path = tmp_path / f"broken.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    path.write_bytes(
        {"noise": b"x" * 99, "truncated": data[: len(data) // 2], "empty": b""}[damage]
    )
    images = load_images(str(tmp_path), split="train", size=8, channels=3)
    with pytest.raises(UserError, match=rf"cannot read .*broken\.{suffix}: "):
        images[0]


def test_wrong_channels_are_named_with_the_way_out(tmp_path):
    picture(7, "RGBA").save(tmp_path / "a.png")
    images = load_images(str(tmp_path), split="train", size=8, channels=3)
    with pytest.raises(
        UserError, match=r"image 0 of .* 4 channels \(RGBA\).*takes 3.*--convert-ch"
    ):
        images[0]
    grey = ImageSet([picture(7, "L")], name="x", size=8, channels=3)
    with pytest.raises(UserError, match=r"1 channels \(L\)"):
        grey[0]


def test_conversion_to_grey_weighs_the_colours():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    image = ImageSet([red], name="red", size=8, channels=1, convert=True)[0]
    assert image.unique().tolist() == [round(0.299 * 200)]  # ITU-R 601


@pytest.fixture
def table(tmp_path, monkeypatch) -> datasets.Dataset:
    """A table in the schema of the hub's cifar10; what `datasets` writes goes to `tmp_path`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", tmp_path / "modules")
    columns = {"img": [picture(v) for v in range(6)], "label": [0, 1, 2, 0, 1, 2]}
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])}
    )
    return datasets.Dataset.from_dict(columns).cast(features)


def test_parquet_files_of_the_hub_give_images_and_classes(tmp_path, table):
    folder = tmp_path / "cifar" / "plain_text"
    folder.mkdir(parents=True)
    table.to_parquet(folder / "train-00000-of-00001.parquet")
    table.select([4, 5]).to_parquet(folder / "test-00000-of-00001.parquet")
    assert both(tmp_path / "cifar") == ([0, 1, 2, 3, 4, 5], [4, 5])
    images = load_images(str(tmp_path / "cifar"), split="test", size=8, channels=3)
    assert [images.label(0), images.label(1)] == [1, 2]


@pytest.mark.parametrize("test_split", ["test", "validation"])
def test_a_saved_dataset_gives_its_splits(tmp_path, table, test_split):
    splits = {"train": table, test_split: table.select([3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert both(tmp_path / "saved") == ([0, 1, 2, 3, 4, 5], [3])


def test_images_are_held_out_of_a_saved_table_without_splits(tmp_path, table):
    forty = table.select([0] * 19 + [5] + [1] * 19 + [4])
    forty.save_to_disk(tmp_path / "saved")
    assert both(tmp_path / "saved") == ([0] * 19 + [1] * 19, [5, 4])
    images = load_images(str(tmp_path / "saved"), split="test", size=8, channels=3)
    assert [images.label(0), images.label(1)] == [2, 1]


def test_datasets_that_cannot_serve_are_refused(tmp_path, table):
    table.select_columns(["label"]).save_to_disk(tmp_path / "blind")
    datasets.DatasetDict({"test": table}).save_to_disk(tmp_path / "untrained")
    options = {"split": "train", "size": 8, "channels": 3}
    with pytest.raises(UserError, match=r"no image column; its columns are \['label'\]"):
        load_images(str(tmp_path / "blind"), **options)
    with pytest.raises(UserError, match=r"no split 'train'; its splits are \['test'\]"):
        load_images(str(tmp_path / "untrained"), **options)


def test_a_corrupt_image_of_a_table_is_named(tmp_path, table):
    broken = datasets.Dataset.from_dict({"img": [{"bytes": b"not an image", "path": None}]})
    broken.cast_column("img", datasets.Image()).save_to_disk(tmp_path / "saved")
    images = load_images(str(tmp_path / "saved"), split="train", size=8, channels=3)
    with pytest.raises(UserError, match=r"cannot read image 0 of '.*saved': "):
        images[0]


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c"])
def test_paths_that_are_not_there_are_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # calling it fails
    with pytest.raises(UserError, match=f"unknown dataset '{name}': no such folder"):
        load_images(name, split="train", size=8, channels=3)


@pytest.mark.parametrize(
    ("silence", "said"),
    [
        ("", "the hub says: Couldn't reach the Hub"),
        ("no route", r"the hub cannot be reached \(no route\)"),
        (None, "the hub has none of this name"),
    ],
)
def test_a_dataset_unknown_to_the_hub_is_named_in_one_line(monkeypatch, silence, said):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nwith a second line")

    monkeypatch.setattr(hub, "why_silent", lambda _: silence)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=rf"'someone/nothing'.*{said}") as error:
        load_images("someone/nothing", split="train", size=8, channels=3)
    assert "\n" not in str(error.value)


def test_the_fingerprint_is_of_the_content():
    same = noise_images(9)
    assert noise_images(9).fingerprint() == same.fingerprint()
    renamed = noise_images(9)
    renamed.name = "another"
    assert renamed.fingerprint() == same.fingerprint()
    changed = noise_images(9)
    changed.source[4] = changed.source[4].copy()
    changed.source[4][0, 0] ^= 1
    others = [changed, noise_images(8), noise_images(9, size=4), noise_images(9, channels=3)]
    assert len({images.fingerprint() for images in [same, *others]}) == 5


def test_one_replaced_image_of_hundreds_is_another_set(tmp_path):
    """The sample of 64 did not see 126 of 190."""
    write(tmp_path, 200)
    before = load_images(str(tmp_path), split="train", size=8, channels=3).fingerprint()
    sample, whole = before.split("-")
    array = np.asarray(Image.open(tmp_path / "001.png")).copy()
    array[0, 0] ^= 1
    Image.fromarray(array).save(tmp_path / "001.png")
    after = load_images(str(tmp_path), split="train", size=8, channels=3).fingerprint()
    assert after.split("-")[0] == sample
    assert after.split("-")[1] != whole


def _table(folder: Path, count: int, *, first: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    kinds = datasets.Features({"image": datasets.Image()})
    rows = {"image": [picture(first + value) for value in range(count)]}
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / "train.parquet")


@pytest.mark.parametrize("remembered", [2, 1000])
@pytest.mark.parametrize("make", [write, _table])
def test_a_hash_is_remembered_as_long_as_nothing_changes(tmp_path, monkeypatch, make, remembered):
    monkeypatch.setenv("PRUNEDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "REMEMBERED", remembered)
    real, read = content._hash, []
    monkeypatch.setattr(content, "_hash", lambda *a: read.append(1) or real(*a))

    def fingerprint() -> str:
        return load_images(str(tmp_path / "set"), split="train", size=8, channels=3).fingerprint()

    make(tmp_path / "set", 30)
    assert fingerprint() == fingerprint()
    assert len(read) == (1 if remembered == 2 else 2)
    before = fingerprint()
    make(tmp_path / "set", 30, first=100)
    assert fingerprint() != before


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "harm"),
    [("7.png", _cut), ("7.png", _flip), ("7.jpg", _cut), ("7.webp", _cut), ("7.bmp", _cut)],
)
def test_a_damaged_image_is_found_before_any_step(tmp_path, name, harm):
    """And not when it is its turn, after hours, in a run that then cannot be gone on with."""
    write(tmp_path, 100)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    images = load_images(str(tmp_path), split="train", size=8, channels=3)
    images.fingerprint()
    harm(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: .*; replace it by an intact one, or remove it"):
        images.fingerprint()


def test_an_image_that_does_not_fit_the_model_is_found_before_any_step(tmp_path):
    write(tmp_path, 100)
    picture(3, "RGBA").save(tmp_path / "7.png")
    picture(3, "CMYK").save(tmp_path / "8.jpg")  # a way to print colours, not a fourth channel
    images = load_images(str(tmp_path), split="train", size=8, channels=3)
    with pytest.raises(UserError, match=r"has 4 channels \(RGBA\), the model takes 3"):
        images.fingerprint()
    load_images(str(tmp_path), split="train", size=8, channels=3, convert=True).fingerprint()
    four = ImageSet([tmp_path / "8.jpg"], name="x", size=8, channels=4)
    with pytest.raises(UserError, match=r"has 3 channels \(RGB\), the model takes 4"):
        four.fingerprint()


def test_sixteen_bits_become_eight_rounded():
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    image = ImageSet([values], name="x", size=256, channels=1)[0]
    assert np.array_equal(image[0], np.round(values / 257))
