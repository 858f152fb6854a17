"""Which files of a folder are its images, how they are turned, and what is refused before it hangs."""

import inspect
import os
import socket
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from prunedm.data import files
from prunedm.data.files import FORMATS, SUFFIXES, find_images
from prunedm.data.images import ImageSet, load_images
from prunedm.data.splits import split_of, split_of_file
from prunedm.errors import UserError
from prunedm.evaluation.image_source import Images, open_side

MARK = np.zeros((8, 8, 3), np.uint8)
MARK[:4, :4] = 255  # the upper left quarter


def write(path: Path, image: np.ndarray = MARK, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_images(folder).files]


def train(folder: Path, **options):
    return load_images(str(folder), split="train", size=8, channels=3, **options)


def side(folder: Path, **options) -> Images:
    found = open_side(str(folder), **options)
    assert isinstance(found, Images)
    return found


DROPPINGS = [
    "._a.png", ".hidden.jpg", ".DS_Store", ".ipynb_checkpoints/a.png", "__MACOSX/._a.png",
    "__MACOSX/a.png", "cats/.thumbnails/a.png", "cats/._b.png", "@eaDir/a.jpg", ".git/x/a.png",
]  # fmt: skip


@pytest.mark.parametrize("dropping", DROPPINGS)
def test_hidden_files_and_droppings_are_not_in_the_set(tmp_path, dropping):
    write(tmp_path / "a.png")
    write(tmp_path / "cats" / "b.png")
    place = tmp_path / dropping
    if place.suffix in SUFFIXES and not place.name.startswith("._"):
        write(place)
    else:  # macOS's droppings are not images
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"\0\5\x16\7")
    assert names(tmp_path) == ["a.png", "cats/b.png"]
    assert len(train(tmp_path)) == side(tmp_path).count == 2
    assert ("1 hidden" in side(tmp_path).left_out) == (dropping != ".DS_Store")


def test_a_hidden_folder_that_is_named_counts(tmp_path):
    write(tmp_path / ".cache" / "a.png")
    assert len(train(tmp_path / ".cache")) == 1


def test_links_are_followed_once_and_without_end(tmp_path):
    write(tmp_path / "elsewhere" / "a.png")
    folder = tmp_path / "set"
    write(folder / "own" / "b.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "own" / "up").symlink_to(folder)
    (folder / "a link to own").symlink_to(folder / "own")
    (folder / "self").symlink_to(folder / "self")
    (folder / "file.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert names(folder) == ["file.png", "linked/a.png", "own/b.png"]


def test_a_folder_may_be_nested_deeply(tmp_path):
    """No call within a call a level; deeper ones pytest itself could not remove."""
    folder = tmp_path.joinpath(*["d"] * 300)
    write(folder / "a.png")
    before = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(inspect.stack()) + 150)
        found = find_images(tmp_path).files
    finally:
        sys.setrecursionlimit(before)
    assert found == [folder / "a.png"]


WRITABLE = sorted({name: suffixes[0] for name, suffixes in FORMATS.items() if suffixes}.items())


@pytest.mark.parametrize(("form", "suffix"), WRITABLE)
def test_formats_that_pillow_reads_are_in_the_set(tmp_path, form, suffix):
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    try:
        write(tmp_path / f"a{suffix.upper()}", format=form, **options)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {form}")
    seen = train(tmp_path)[0].float()
    assert torch.allclose(seen, torch.from_numpy(MARK).permute(2, 0, 1).float(), atol=40)
    assert side(tmp_path).shape == (3, 8, 8)


def test_of_animations_and_pages_the_first_counts(tmp_path):
    other = Image.fromarray(255 - MARK)
    for suffix in (".gif", ".tif", ".webp", ".png"):
        write(tmp_path / f"a{suffix}", save_all=True, append_images=[other])
    images = train(tmp_path)
    assert all(images[i][:, :3, :3].float().mean() > 250 for i in range(4))


def test_what_is_no_image_is_counted(tmp_path):
    write(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "notes.txt", "metadata.csv", "record.json"):
        (tmp_path / name).write_text("file_name,text\n")
    write(tmp_path / "grid.png")  # of ours, beside a record
    assert find_images(tmp_path).rest() == "2 .heic files, 1 .txt files, 1 sheets"
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"holds no images.*but 2 \.heic files"):
        train(tmp_path)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_images_are_turned_as_their_exif_says(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x112] = turn
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:4, :8] = 255
    write(tmp_path / f"a{suffix}", wide, exif=exif, **({} if suffix == ".tif" else {"quality": 95}))
    # where the first quarter is, by the standard: rows and columns of the stored image's corner
    bottom, right = turn in (3, 4, 7, 8), turn in (2, 3, 6, 7)
    found = side(tmp_path)
    assert found.shape == ((3, 16, 8) if turn > 4 else (3, 8, 16))
    (image,) = next(found.batches(1))
    half_h, half_w = image.shape[1] // 2, image.shape[2] // 2
    quarter = image[:, bottom * half_h :, right * half_w :][:, :half_h, :half_w]
    assert quarter.float().mean() > 230
    assert image.float().mean() < 100


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    write(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\3", quality=95)
    assert train(tmp_path)[0][:, :4, :4].float().mean() > 240


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def lost_link(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def own_link(path: Path) -> None:
    path.symlink_to(path)


HANGING = [pipe, unix_socket, device, lost_link, own_link]


@pytest.mark.parametrize("make", HANGING)
@pytest.mark.parametrize("name", ["a.png", "set.npz", "a.parquet", "only"])
def test_what_could_hang_in_the_place_of_a_set_or_its_file_is_refused(
    tmp_path, monkeypatch, make, name
):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    make(tmp_path / name)
    named = tmp_path / name if name in ("set.npz", "only") else tmp_path
    for read in (lambda: train(named)[0], lambda: side(named)):
        with pytest.raises(UserError, match=r"not a regular file|missing|no such|neither") as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", HANGING)
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_what_could_hang_in_the_place_of_labels_is_refused(tmp_path, monkeypatch, make, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.png")
    make(tmp_path / name)
    with pytest.raises(UserError, match=name):
        train(tmp_path)
    assert len(train(tmp_path, labels="none")) == side(tmp_path).count == 1


@pytest.mark.parametrize("make", HANGING)
def test_what_could_hang_does_not_make_a_folder_a_dataset(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.png")
    make(tmp_path / "dataset_dict.json")
    assert len(train(tmp_path)) == side(tmp_path).count == 1


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG whose header claims so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


@pytest.mark.parametrize("side_of", [10_000, 14_000, 100_000])
def test_decompression_bombs_are_refused_before_they_are_decoded(
    tmp_path, monkeypatch, recwarn, side_of
):
    bomb(tmp_path / "a.png", side_of, side_of)
    monkeypatch.setattr(Image.Image, "load", None)
    for read in (lambda: train(tmp_path)[0], lambda: side(tmp_path)):
        with pytest.raises(UserError, match=r"a\.png: it has more than 89,478,485 pixels"):
            read()
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "HSV", "PA", "CMYK", "RGBa"])
def test_bands_of_other_meaning_do_not_pass_as_colours(mode):
    colour = Image.new("RGB", (8, 8), (200, 30, 10))
    image = colour.convert({"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")).convert(mode)
    if mode == "LAB":
        image = ImageCms.applyTransform(colour, _to_lab())
    seen = ImageSet([image], name="x", size=8, channels=3, convert=True)[0].float().mean((1, 2))
    assert torch.allclose(seen, torch.tensor([200.0, 30, 10]), atol=30)


def _to_lab():
    rgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.buildTransform(rgb, lab, "RGB", "LAB")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Training", "train"), ("train2017", "train"), ("images_train", "train"),
        ("TEST", "test"), ("Testing", "test"), ("eval", "test"), ("test-set", "test"),
        ("val", "validation"), ("valid", "validation"), ("Validation", "validation"),
        ("dev", "validation"), ("val_256", "validation"), ("val2017", "validation"),
        ("test tube", ""), ("trains", ""), ("cats", ""), ("value", ""), ("training grounds", ""),
    ],
)  # fmt: skip
def test_splits_are_known_by_the_usual_names(tmp_path, name, split):
    assert split_of(name) == split
    for k in range(3):
        write(tmp_path / name / f"{k}.png")
        write(tmp_path / "dogs" / f"{k}.png")
    sizes = [
        len(load_images(str(tmp_path), split=s, size=8, channels=3)) for s in ("train", "test")
    ]
    expected = {"train": [3, 3], "": [6, 6]}.get(split, [3, 3])
    assert sizes == expected
    if split:
        test = load_images(str(tmp_path), split="test", size=8, channels=3)
        assert name in test.source[0].parts


@pytest.mark.parametrize(
    "layout", ["{split}/{k}.png", "images/{split}/{k}.png", "cat/{split}/{k}.png"]
)
@pytest.mark.parametrize("held", ["test", "Val", "dev"])
def test_held_out_folders_are_never_trained_on_wherever_they_lie(tmp_path, layout, held):
    for split, count in (("train", 30), (held, 25)):
        for k in range(count):
            write(tmp_path / layout.format(split=split, k=k))
    sets = [load_images(str(tmp_path), split=s, size=8, channels=3) for s in ("train", "test")]
    assert [len(images) for images in sets] == [30, 25]
    assert not set(sets[0].source) & set(sets[1].source)
    assert side(tmp_path).count == 55


def test_test_comes_before_validation_and_neither_is_trained_on(tmp_path):
    for split, count in (("validation", 3), ("test", 2), ("train", 4)):
        for k in range(count):
            write(tmp_path / split / f"{k}.png")
    sizes = [
        len(load_images(str(tmp_path), split=s, size=8, channels=3)) for s in ("train", "test")
    ]
    assert sizes == [4, 2]


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train-00000-of-00001-abc", "train"),
        ("mnist_test", "test"),
        ("Val", "validation"),
        ("x", ""),
    ],
)
def test_a_tables_split_is_in_its_files_name(stem, split):
    assert split_of_file(stem) == split


def test_a_large_folder_is_quick(tmp_path, monkeypatch):
    """No file is opened, and none but folders is looked at twice, before an image is asked for."""
    small = write(tmp_path / "one.png").read_bytes()
    for k in range(1500):
        (tmp_path / f"{k}.png").write_bytes(small)
    monkeypatch.setattr(files, "open_lazily", None)
    looked: list[str] = []
    real = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **options: (looked.append(str(path)), real(path, **options))[1]
    )
    assert len(train(tmp_path)) == 1501 - 75
    assert len(looked) < 20


def test_messages_hide_passwords_and_stay_short():
    assert files.shown("s3://key:secret@host/x") == "s3://***@host/x"
    assert len(files.shown("a" * 9000)) < 130
