"""Sets of images by name: folders, arrays, datasets; sizes, colours, files of noise."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from prunedm.data.images import load_images
from prunedm.errors import UserError
from prunedm.evaluation.fid import Statistics, save_statistics
from prunedm.evaluation.image_source import Images, open_side


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(folder: Path, images: np.ndarray, suffix: str = ".png", start: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images, start):
        Image.fromarray(image).save(folder / f"{number:03d}{suffix}", lossless=True)
    return folder


def opened(name: str | Path, **options) -> Images:
    found = open_side(str(name), **options)
    assert isinstance(found, Images)
    return found


def whole(images: Images, size: int = 4) -> torch.Tensor:
    return torch.cat(list(images.batches(size)))


def nchw(images_NHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)


def test_a_folder_gives_all_its_images_in_order_of_their_paths(tmp_path: Path) -> None:
    colours = pixels(9, 6, 9, 3)  # not square
    write(tmp_path / "set", colours[4:7], ".webp", start=4)
    folder = write(tmp_path / "set", colours[:4])
    (folder / "notes.txt").write_text("no image")
    write(folder / "deeper", colours[7:])
    found = opened(folder)
    assert found.shape == (3, 6, 9)
    assert [len(batch) for batch in found.batches(3)] == [3, 3, 3]
    assert found.batch_count(3) == 3
    assert torch.equal(whole(found), nchw(colours))
    assert torch.equal(whole(found), nchw(colours))  # a second pass, too
    assert found.left_out == "1 .txt files"


def test_sheets_count_in_foreign_folders_and_not_in_ours(tmp_path: Path) -> None:
    folder = write(tmp_path / "samples", pixels(3, 4, 4))
    Image.fromarray(pixels(1, 4, 4)[0]).save(folder / "grid.png")
    assert len(whole(opened(folder))) == 4
    (folder / "record.json").write_text("{}")
    assert len(whole(opened(folder))) == 3
    np.savez(folder / "samples.npz", images=pixels(5, 4, 4, 1))
    assert len(whole(opened(folder))) == 5


def test_of_arrays_with_sheets_beside_them_one_has_to_be_named(tmp_path: Path) -> None:
    for name in ("dense", "final"):
        np.savez(tmp_path / f"{name}.npz", images=pixels(5, 4, 4))
        Image.fromarray(pixels(1, 4, 4)[0]).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"as dense\.npz, final\.npz; give one of these files"):
        opened(tmp_path)
    Image.fromarray(pixels(1, 4, 4)[0]).save(tmp_path / "other.png")
    assert len(whole(opened(tmp_path))) == 1


def test_a_sample_folder_as_the_stage_writes_it(tmp_path: Path) -> None:
    from helpers import tiny_folder

    from prunedm.options import SampleOptions
    from prunedm.stages import sample

    for form in ("png", "npz"):
        options = SampleOptions(count=3, sampling_steps=1, format=form, device="cpu")
        sample(tiny_folder(), tmp_path / form, options)
    assert opened(tmp_path / "png").shape == (1, 8, 8)
    assert torch.equal(whole(opened(tmp_path / "png")), whole(opened(tmp_path / "npz")))


@pytest.mark.parametrize("key", ["images", "arr_0"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_images(tmp_path: Path, key: str, save) -> None:
    colours = pixels(5, 6, 8, 3)
    save(tmp_path / "set.npz", **{key: colours})
    found = opened(tmp_path / "set.npz")
    assert torch.equal(whole(found), nchw(colours))
    assert torch.equal(whole(found, 2), nchw(colours))
    for grey in (pixels(5, 4, 4), pixels(5, 4, 4, 1)):
        save(tmp_path / "grey.npz", **{key: grey})
        expected = torch.from_numpy(grey.reshape(5, 1, 4, 4))
        assert torch.equal(whole(opened(tmp_path / "grey.npz")), expected)


def test_a_file_of_statistics(tmp_path: Path) -> None:
    save_statistics(Statistics(np.zeros(3), np.eye(3), 9, "FD (x)"), tmp_path / "stats.npz")
    found = open_side(str(tmp_path / "stats.npz"))
    assert isinstance(found, Statistics)
    assert (found.dim, found.count, found.features) == (3, 9, "FD (x)")


def test_digits_are_what_models_are_evaluated_on() -> None:
    expected = load_images("digits", split="test", size=16, channels=1)
    assert torch.equal(
        whole(opened("digits"), 100), torch.stack([expected[k] for k in range(len(expected))])
    )
    assert opened("digits", res=8).shape == (1, 8, 8)
    assert opened("digits", split="train").count == 1498


def test_splits_are_one_set_unless_one_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "test", pixels(2, 4, 4, 3))
    write(tmp_path / "train", pixels(3, 4, 4, 3))
    assert (opened(tmp_path).count, opened(tmp_path).left_out) == (5, "")
    train = opened(tmp_path, split="train")
    assert (train.count, train.left_out) == (3, "2 of test")
    assert opened(tmp_path, split="test").count == 2


def test_a_table_of_images_as_hub_datasets_are(tmp_path: Path) -> None:
    import datasets

    colours = pixels(40, 4, 4, 3)
    table = datasets.Dataset.from_dict({"img": [Image.fromarray(c) for c in colours]})
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "table"))
    assert torch.equal(whole(opened(tmp_path / "table", count=9)), nchw(colours[:9]))


def test_res_does_what_training_does(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", pixels(2, 30, 20, 3))
    Image.fromarray(pixels(1, 12, 12, 3)[0]).save(folder / "other.png")
    found = opened(folder, res=8)
    assert found.shape == (3, 8, 8)
    middle = Image.fromarray(pixels(2, 30, 20, 3)[1])
    expected = middle.resize((8, 8), Image.Resampling.LANCZOS, box=(0, 5, 20, 25))
    np.testing.assert_array_equal(whole(found)[1].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_images_of_several_sizes_need_res(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", pixels(2, 4, 4, 3))
    Image.fromarray(pixels(1, 5, 4, 3)[0]).save(folder / "odd.png")
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=r"000\.png has 4x4 .*odd\.png 4x5; --res N"):
            opened(folder, skip_bad=skip_bad)
    assert len(whole(opened(folder, count=2))) == 2


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_an_orientation_that_stands_in_xmp_alone_turns_the_size_too(tmp_path: Path, suffix) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    upright = Image.fromarray(pixels(1, 16, 8, 3)[0])
    upright.save(tmp_path / f"a{suffix}")
    upright.rotate(90, expand=True).save(tmp_path / f"b{suffix}", xmp=xmp)
    found = opened(tmp_path)
    assert found.shape == (3, 16, 8)
    assert whole(found).shape == (2, 3, 16, 8)


def test_grey_and_coloured_files_together_are_coloured(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", pixels(2, 4, 4))
    assert opened(folder).shape == (1, 4, 4)
    colour = pixels(1, 4, 4, 4)
    Image.fromarray(colour[0]).save(folder / "z.png")  # transparency goes
    found = whole(opened(folder))
    assert found.shape == (3, 3, 4, 4)
    assert torch.equal(found[0], torch.from_numpy(pixels(2, 4, 4)[0]).expand(3, 4, 4))
    assert torch.equal(found[2], nchw(colour)[0, :3])


def test_a_coloured_image_is_not_made_grey_in_silence() -> None:
    mixed = Images([pixels(1, 4, 4)[0], pixels(1, 4, 4, 3)[0]], name="mixed", skip_bad=True)
    with pytest.raises(UserError, match=r"image 1 of 'mixed' has colours"):
        whole(mixed)


def damaged(folder: Path) -> list[Path]:
    """A file that is no image, and one whose header is whole."""
    image = (folder / "001.png").read_bytes()
    (folder / "001.png").write_bytes(image[: len(image) // 2])
    (folder / "003.png").write_text("no image")
    return [folder / "001.png", folder / "003.png"]


def test_files_that_cannot_be_read_are_named_or_left_out_and_counted(tmp_path: Path) -> None:
    colours = pixels(6, 16, 16, 3)
    folder = write(tmp_path / "set", colours)
    bad = damaged(folder)
    with pytest.raises(UserError, match=r"003\.png.*--skip-bad"):
        opened(folder)  # before any work
    with pytest.raises(UserError, match=r"001\.png.*--skip-bad"):
        whole(opened(folder, count=3))
    found = opened(folder, skip_bad=True)
    kept = nchw(colours[[0, 2, 4, 5]])
    assert torch.equal(whole(found), kept)
    assert torch.equal(whole(found), kept)
    assert found.skipped == [str(path) for path in bad]
    first_three = opened(folder, skip_bad=True, count=3)
    assert torch.equal(whole(first_three), kept[:3])


def test_the_first_file_may_be_bad(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", pixels(3, 4, 4, 3))
    (folder / "000.png").write_text("no image")
    found = opened(folder, skip_bad=True)
    assert (found.shape, len(whole(found))) == ((3, 4, 4), 2)
    for path in folder.iterdir():
        path.write_text("no image")
    with pytest.raises(UserError, match=r"no image of .* can be read"):
        opened(folder, skip_bad=True)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_noise_in_files_never_gets_past(tmp_path: Path, suffix: str) -> None:
    """Whatever Pillow raises becomes one line, or an image."""
    folder = write(tmp_path / "set", pixels(1, 8, 8, 3), suffix)
    path = folder / f"000{suffix}"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(good)
        for place in rng.integers(0, len(bad), 4):
            bad[place] = rng.integers(256)
        path.write_bytes(bad[: rng.integers(1, len(bad) + 1)])
        try:
            assert whole(opened(folder, res=8)).shape == (1, 3, 8, 8)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017 - either is right


def test_more_images_than_there_are(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", pixels(3, 4, 4, 3))
    with pytest.raises(UserError, match="holds 3 images; 4 were asked for"):
        opened(folder, count=4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3))}, "float64"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, r"uint8 \(2, 3, 4, 4\)"),
        ({"images": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "uint8"),
        ({"images": np.array([None])}, "object"),
        ({"pictures": np.zeros((2, 4, 4, 3), np.uint8)}, "pictures"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
    ],
)
def test_arrays_of_something_else_are_refused(tmp_path: Path, arrays, message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "bad.npz")


def test_missing_damaged_and_empty_sets_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "good.npz", images=pixels(9, 16, 16, 3))
    raw = bytearray((tmp_path / "good.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "flipped.npz").write_bytes(raw)
    (tmp_path / "cut.npz").write_bytes(raw[:500])
    (tmp_path / "empty").mkdir()
    for name in ("none.npz", "cut.npz", "empty", "nowhere"):
        with pytest.raises(UserError, match=name):
            opened(tmp_path / name)
    with pytest.raises(UserError, match=r"flipped\.npz.* is damaged"):
        whole(opened(tmp_path / "flipped.npz", skip_bad=True))
