"""Tables as others write them, and names that are no dataset: answered at once and in one line."""

import io
import socket
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from prunedm import hub
from prunedm.data import hub as image_hub
from prunedm.data.images import ImageSet, load_images
from prunedm.errors import UserError
from prunedm.evaluation.image_source import Images, open_side


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """What `datasets` writes is gone with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(value: int, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), value).save(file, form, **options)
    return file.getvalue()


def opened(name: Path | str, split: str = "train", **options) -> ImageSet:
    return load_images(str(name), split=split, size=8, channels=1, **options)


def greys(images: ImageSet | Images) -> list[int]:
    return [int(images[i].unique().item()) for i in range(len(images))]


def side(name: Path | str, **options) -> Images:
    found = open_side(str(name), **options)
    assert isinstance(found, Images)
    return found


CELLS: dict[str, Callable[[int], object]] = {
    "bytes": png,
    "bytes and path": lambda k: {"bytes": png(k), "path": f"{k}.png"},
    "bytes and no path": lambda k: {"bytes": png(k), "path": None},
    "only bytes": lambda k: {"bytes": png(k)},
    "TIFF": lambda k: png(k, "TIFF"),
}


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("column", ["image", "jpg"])
def test_parquet_of_pandas_is_read(tmp_path, kind, column):
    frame = pd.DataFrame({"id": range(30), column: [CELLS[kind](k) for k in range(30)]})
    frame.to_parquet(tmp_path / "all.parquet")
    for name in (tmp_path, tmp_path / "all.parquet"):
        assert greys(opened(name, "test")) == [19]
        assert greys(opened(name)) == [k for k in range(30) if k != 19]
        assert side(name).count == 30


def test_paths_in_a_table_are_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(png(7))
    cell = {"bytes": None, "path": str(tmp_path / "a.png")}
    (tmp_path / "set").mkdir()
    pd.DataFrame({"image": [cell, cell]}).to_parquet(tmp_path / "set" / "x.parquet")
    assert greys(opened(tmp_path / "set")) == [7, 7]


@pytest.mark.parametrize("turn", [1, 3, 6])
def test_images_of_tables_and_folders_are_turned_alike(tmp_path, turn):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x112] = turn
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    for name in ("folder", "pandas", "saved"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(file.getvalue())
    cells = {"image": [{"bytes": file.getvalue(), "path": None}]}
    pd.DataFrame(cells).to_parquet(tmp_path / "pandas" / "a.parquet")
    table = datasets.Dataset.from_dict(cells).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    seen = [opened(tmp_path / name)[0].numpy()[0] for name in ("folder", "pandas", "saved")]
    for one in seen:
        np.testing.assert_array_equal(one, np.rot90(pixels, {1: 0, 3: 2, 6: 3}[turn]))


def test_a_row_without_an_image_and_a_damaged_one_are_named(tmp_path):
    cells = [None, png(0), png(2)[:45], b"", png(4)]
    pd.DataFrame({"image": cells}).to_parquet(tmp_path / "x.parquet")
    images = opened(tmp_path)
    for index in (0, 2, 3):
        with pytest.raises(UserError, match=f"cannot read image {index} of .*") as error:
            images[index]
        assert "0x" not in str(error.value)  # nor an object's address
    assert len(next(side(tmp_path, skip_bad=True).batches(9))) == 2


def test_columns_of_images_are_chosen_by_the_usual_name_or_on_request(tmp_path):
    masks = {"mask": [png(9)] * 3, "image": [png(k) for k in range(3)]}
    pd.DataFrame(masks).to_parquet(tmp_path / "x.parquet")
    assert greys(opened(tmp_path)) == [0, 1, 2]
    assert greys(opened(tmp_path, image_column="mask")) == [9, 9, 9]
    with pytest.raises(UserError, match="--image-column: no column 'imag'; did you mean 'image'"):
        opened(tmp_path, image_column="imag")
    (tmp_path / "two").mkdir()
    pd.DataFrame({"left": [png(1)], "right": [png(2)]}).to_parquet(tmp_path / "two" / "x.parquet")
    with pytest.raises(UserError, match=r"images in left, right; name one with --image-column"):
        opened(tmp_path / "two")


@pytest.mark.parametrize(
    "files",
    [
        ("Train.parquet", "Test.parquet"), ("train-0.parquet", "validation-0.parquet"),
        ("x_train.parquet", "x_val.parquet"), ("train/0.parquet", "Valid/0.parquet"),
        ("data/train-00000-of-00001-a1.parquet", "data/dev-00000-of-00001-b2.parquet"),
        ("0.parquet", "eval.parquet"), ("TRAIN.PARQUET", "TEST.PARQUET"),
    ],
)  # fmt: skip
def test_splits_of_parquet_files_are_in_their_names(tmp_path, files):
    for value, name in enumerate(files):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"image": [png(value)] * 25}).to_parquet(tmp_path / name)
    (tmp_path / f"._{Path(files[0]).name}").write_bytes(b"\0\5")
    assert set(greys(opened(tmp_path))) == {0}
    assert set(greys(opened(tmp_path, "test"))) == {1}
    assert side(tmp_path).count == 50
    assert side(tmp_path, split="test").count == 25


def test_captions_in_a_table_do_not_hide_the_images_beside_it(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    pd.DataFrame({"file": ["a.png"], "text": ["grey"]}).to_parquet(tmp_path / "captions.parquet")
    assert greys(opened(tmp_path)) == [5]


@pytest.mark.parametrize(
    "rows",
    [
        {"file": ["a.png"], "text": [["grey", "dark"]]},
        {"file": ["a.png"], "embedding": [b"\0" * 64]},
        {"file": ["a.png"], "box": [{"x": 1, "y": 2}]},
    ],
    ids=["captions", "embeddings", "boxes"],
)
def test_a_table_about_the_images_beside_it_is_not_the_dataset(tmp_path, rows):
    (tmp_path / "a.png").write_bytes(png(5))
    pd.DataFrame(rows).to_parquet(tmp_path / "about.parquet")
    assert greys(opened(tmp_path)) == [5]
    assert greys(side(tmp_path)) == [5]


def test_a_table_of_images_beside_images_is_refused_and_elsewhere_said(tmp_path):
    """A stray one made the images beside it vanish."""
    (tmp_path / "a.png").write_bytes(png(5))
    pd.DataFrame({"image": [png(7)] * 3}).to_parquet(tmp_path / "thumbs.parquet")
    for read in (opened, side):
        with pytest.raises(
            UserError, match=r"holds 1 image files and thumbs\.parquet, a table of i"
        ):
            read(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "thumbs.parquet").rename(tmp_path / "data" / "train.parquet")
    for found in (opened(tmp_path), side(tmp_path)):
        assert (set(greys(found)), found.left_out) == ({7}, "1 image files")


README = "---\nconfigs:\n{}\n---\n# About\n"
ONE = "- config_name: {}\n  data_files:\n  - split: {}\n    path: {}"


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (
            README.format(
                ONE.format("a", "train", "data/x-*.parquet")
                + "\n  - {split: test, path: [data/y.parquet]}"
            ),
            (2, 3),
        ),
        (
            README.format(
                ONE.format("a", "train", "data/x-*.parquet")
                + "\n  default: true\n"
                + ONE.format("b", "train", "data/y.parquet")
            ),
            (2, 2),
        ),
        (README.format(ONE.format("a", "train", "hf://datasets/owner/name/x.parquet")), (5, 5)),
        ("# no head", (5, 5)),
        ("---\nlicense: mit\n---", (5, 5)),
    ],
)
def test_a_readme_names_splits_and_nothing_is_fetched(tmp_path, monkeypatch, text, sizes):
    (tmp_path / "data").mkdir()
    pd.DataFrame({"image": [png(7)] * 2}).to_parquet(tmp_path / "data" / "x-0.parquet")
    pd.DataFrame({"image": [png(8)] * 3}).to_parquet(tmp_path / "data" / "y.parquet")
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asks the network"))
    assert (len(opened(tmp_path)), len(opened(tmp_path, "test"))) == sizes


def test_a_readme_that_expands_or_leaves_a_choice_is_one_line(tmp_path):
    pd.DataFrame({"image": [png(7)] * 2}).to_parquet(tmp_path / "x.parquet")
    laughs = "a: &a0 [x]\n" + "".join(
        f"b{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 9)
    )
    two = "\n".join(ONE.format(name, "train", "x.parquet") for name in "ab")
    for text, line in (
        (f"---\n{laughs}---\n", "stand for more than"),
        (README.format(two), r"several configurations \(a, b\): write `default: true`"),
    ):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(UserError, match=line):
            opened(tmp_path)


def test_a_state_json_of_another_program_makes_no_dataset(tmp_path):
    (tmp_path / "a.png").write_bytes(png(5))
    (tmp_path / "state.json").write_text('{"window": [1, 2]}')
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert greys(opened(tmp_path)) == greys(side(tmp_path)) == [5]


@pytest.mark.parametrize("name", ["digits", "saved", "parquet"])
def test_what_is_counted_for_a_distance_is_all_of_a_folder(tmp_path, name):
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(3), "path": None}] * 30})
    table = table.cast_column("image", datasets.Image())
    if name == "saved":
        datasets.DatasetDict({"train": table, "val": table}).save_to_disk(tmp_path / "saved")
    if name == "parquet":
        (tmp_path / name).mkdir()
        table.to_parquet(tmp_path / name / "x.parquet")
    found = side("digits" if name == "digits" else tmp_path / name)
    expected = {"digits": (299, "1,498 of train"), "saved": (60, ""), "parquet": (30, "")}
    assert (found.count, found.left_out) == expected[name]


def damage(path: Path, name: str) -> None:
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[: len(raw) // 2], "noise": b"x" * 99, "empty": b""}[name])


@pytest.mark.parametrize("name", ["cut", "noise", "empty"])
@pytest.mark.parametrize("which", ["parquet", "arrow", "json"])
def test_damaged_tables_are_one_line(tmp_path, name, which):
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(3), "path": None}] * 30})
    table = table.cast_column("image", datasets.Image())
    if which == "parquet":
        table.to_parquet(tmp_path / "x.parquet")
    else:
        table.save_to_disk(tmp_path)
    file = tmp_path / {"parquet": "x.parquet", "json": "state.json"}.get(
        which, "data-00000-of-00001.arrow"
    )
    damage(file, name)
    with pytest.raises(UserError) as error:
        opened(tmp_path)[0]
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["x", "a/b", "data/flowrs", "owner/name", "owner/na.me-2_x"])
def test_hub_ids_are_asked_for_once_and_shortly(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "flowers").mkdir(parents=True)
    asked: list[object] = []
    monkeypatch.setattr(image_hub, "why_silent", lambda ask: asked.append(ask) or "no route")
    with pytest.raises(UserError, match=r"the hub cannot be reached \(no route\)") as error:
        opened(name)
    assert len(asked) == 1
    assert ("did you mean 'data/flowers'?" in str(error.value)) == (name == "data/flowrs")


@pytest.mark.parametrize(
    "name",
    ["", " ", "./x", "../x", "/x", "~/x", "~nobody-here/x", "a/b/c", "a//b", "a/", "x.zip", "a/x.npz",
     "train.parquet", "model.pt", "a b", "a\0b", "a\nb", "s3://bucket/x", "https://host/x/y", "C:\\x",
     "ü" * 300, "a" * 5000, "a/../b", "-x", "x.JPG"],
)  # fmt: skip
def test_what_cannot_be_a_hub_id_is_not_asked_for(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_hub, "why_silent", None)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(UserError, match=r"unknown dataset .*: no such folder") as error:
        opened(name)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("imgs.zip", "unpack it"), ("imgs.tar.gz", "unpack it"), ("a.7z", "unpack it"),
        ("train.npz", "only fid and stats"), ("a.png", "folder it is in"), ("model.pt", "give a"),
        ("model", "give a"), ("list.txt", "give a"),
    ],
)  # fmt: skip
def test_a_file_is_not_asked_of_the_hub(tmp_path, monkeypatch, name, way):
    monkeypatch.setattr(image_hub, "why_silent", None)
    (tmp_path / name).write_bytes(b"PK\5\6" + bytes(18))
    with pytest.raises(UserError, match=f"is a file, not a set of images; .*{way}"):
        opened(tmp_path / name)
    with pytest.raises(UserError, match=name):
        open_side(str(tmp_path / name))


def test_a_silent_hub_is_not_waited_for(monkeypatch):
    """A server that takes the connection and never answers; no name is looked up."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.HfApi, "endpoint", place, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
        start = time.monotonic()
        with pytest.raises(UserError, match=r"cannot be reached \(no answer in 0\.3 s\)"):
            opened("owner/name")
    assert time.monotonic() - start < 5
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_without_a_network_the_cache_is_asked(monkeypatch):
    table = datasets.Dataset.from_dict({"image": [{"bytes": png(3), "path": None}] * 30})
    seen: list[bool] = []

    def cached(_: str) -> datasets.DatasetDict:
        seen.append(datasets.config.HF_HUB_OFFLINE)
        return datasets.DatasetDict({"train": table.cast_column("image", datasets.Image())})

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(image_hub, "why_silent", lambda _: "no route")
    monkeypatch.setattr(datasets, "load_dataset", cached)
    assert len(opened("owner/name")) == 29
    assert seen == [True]
