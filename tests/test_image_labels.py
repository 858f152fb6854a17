"""Classes of images, from wherever they are: folders, metadata files, columns of tables."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
from helpers import noise_images, tiny_model
from PIL import Image

from prunedm.data.images import ImageSet, load_images
from prunedm.errors import UserError
from prunedm.evaluation.image_source import Images, open_side
from prunedm.options import DataOptions
from prunedm.stages.inputs import data_for, data_source, images_for, problems_on


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """What `datasets` writes is gone with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(value: int = 0) -> Image.Image:
    return Image.new("L", (8, 8), value)


def png(value: int = 0) -> bytes:
    file = io.BytesIO()
    picture(value).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, *names: str) -> None:
    for value, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(path)


def opened(folder: Path, split: str = "train", **options) -> ImageSet:
    return load_images(str(folder), split=split, size=8, channels=1, **options)


def labels(folder: Path, split: str = "train", **options) -> list[int] | None:
    found = opened(folder, split, **options).labels
    return None if found is None else list(found)


FOUR = ("a.png", "b.png", "c.png", "d.png")
WANTED = [1, 0, 0, 2]


def class_folders(folder: Path) -> None:
    write(folder, "owl/0.png", "cat/0.png", "cat/1.png", "zebra/0.png")


def class_folders_in_train(folder: Path) -> None:
    class_folders(folder / "Train")


def class_folders_with_splits_inside(folder: Path) -> None:
    write(
        folder,
        *(
            f"{c}/train/{k}.png"
            for c, k in zip(("owl", "cat", "cat", "zebra"), "0012", strict=True)
        ),
    )


def class_folders_deeper(folder: Path) -> None:
    class_folders(folder / "data" / "images")


def jsonl(folder: Path) -> None:
    write(folder, *FOUR)
    rows = [{"file_name": n, "label": v, "width": 8} for n, v in zip(FOUR, WANTED, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")


def jsonl_texts(folder: Path) -> None:
    write(folder, *FOUR)
    texts = ["owl", "cat", "cat", "zebra"]
    rows = [{"file_name": n, "class": t} for n, t in zip(FOUR, texts, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def csv(folder: Path) -> None:
    write(folder / "train", *FOUR)
    rows = [f"{n},{v},'a caption'" for n, v in zip(FOUR, WANTED, strict=True)]
    (folder / "train" / "metadata.csv").write_text("\n".join(["file_name,label,text", *rows]))


def csv_above(folder: Path) -> None:
    write(folder, *(f"{i}/{n}" for i, n in enumerate(FOUR)))
    rows = [f"{i}/{n},{v}" for i, (n, v) in enumerate(zip(FOUR, WANTED, strict=True))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))


def metadata_parquet(folder: Path) -> None:
    write(folder, *FOUR)
    pd.DataFrame({"file_name": FOUR, "label": WANTED}).to_parquet(folder / "metadata.parquet")


def captions_beside_class_folders(folder: Path) -> None:
    class_folders(folder)
    (folder / "metadata.csv").write_text("file_name,text\nowl/0.png,an owl\n")


def table(folder: Path, kind, values, column: str = "label", **others) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"image": [picture(k) for k in range(4)], column: values} | others
    features = {"image": datasets.Image(), column: kind}
    features |= {key: datasets.Value("int64") for key in others}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made.to_parquet(folder / "train.parquet")


def class_label(folder: Path) -> None:
    table(folder, datasets.ClassLabel(names=["x", "y", "z"]), WANTED, "kind", label_id=[9] * 4)


def integers(folder: Path) -> None:
    table(folder, datasets.Value("int64"), WANTED, width=[8] * 4)


def small_integers(folder: Path) -> None:
    table(folder, datasets.Value("uint8"), WANTED, "fine_label")


def texts(folder: Path) -> None:
    table(folder, datasets.Value("string"), ["owl", "cat", "cat", "zebra"], "class")


def whole_floats(folder: Path) -> None:
    table(folder, datasets.Value("float64"), [1.0, 0.0, 0.0, 2.0])


KINDS = [
    class_folders, class_folders_in_train, class_folders_with_splits_inside, class_folders_deeper,
    jsonl, jsonl_texts, csv, csv_above, metadata_parquet, captions_beside_class_folders,
    class_label, integers, small_integers, texts, whole_floats,
]  # fmt: skip


@pytest.mark.parametrize("make", KINDS)
def test_labels_reach_a_class_conditional_model(tmp_path, make):
    make(tmp_path)
    found = images_for(tiny_model(num_class_embeds=3), DataOptions(dataset=str(tmp_path)), "train")
    assert sorted(found.labels) == sorted(WANTED)
    if "folders" not in make.__name__:
        assert list(found.labels) == WANTED
    with pytest.raises(UserError, match="label 2, and the model 2 classes"):
        images_for(tiny_model(num_class_embeds=2), DataOptions(dataset=str(tmp_path)), "train")
    free = images_for(tiny_model(), DataOptions(dataset=str(tmp_path)), "train")
    assert free.labels is None  # a model without classes neither reads nor hashes them


def test_classes_are_numbered_in_the_sorted_order_of_their_names(tmp_path):
    class_folders(tmp_path)
    found = opened(tmp_path)
    assert [path.parent.name for path in found.source] == ["cat", "cat", "owl", "zebra"]
    assert list(found.labels) == [0, 0, 1, 2]


def test_a_test_split_counts_by_the_training_classes(tmp_path):
    class_folders(tmp_path / "train")
    write(tmp_path / "val", "zebra/0.png", "owl/3.png")
    assert labels(tmp_path, "test") == [1, 2]
    write(tmp_path / "val", "yak/0.png")
    found = opened(tmp_path, "test", labels="needed")
    assert found.labels is None
    assert found.unlabelled == "val/yak/0.png is of class 'yak', which no training image has"


def no_folders(folder: Path) -> str:
    write(folder, *FOUR)
    return "they lie in one folder"


def a_stray_image(folder: Path) -> str:
    write(folder, "stray.png", "cat/0.png", "owl/0.png")
    return r"stray\.png is not labelled"


def folders_of_folders(folder: Path) -> str:
    write(folder, "x/cat/0.png", "y/owl/0.png")
    return "classes are folders side by side"


def negative_json(folder: Path) -> str:
    write(folder, *FOUR[:2])
    lines = ['{"file_name": "a.png", "label": 1}', '{"file_name": "b.png", "label": -1}']
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return r"b\.png has label -1, and labels start at 0"


def negative_integers(folder: Path) -> str:
    table(folder, datasets.Value("int64"), [0, 1, -1, 2])
    return "image 2 has label -1"


def only_negative(folder: Path) -> str:
    table(folder, datasets.ClassLabel(names=["a"]), [-1] * 4)
    return "image 0 has label -1|image 0 is not labelled"


def gaps(folder: Path) -> str:
    table(folder, datasets.Value("int64"), [0, 1, None, 2])
    return "image 2 is not labelled"


def fractions(folder: Path) -> str:
    table(folder, datasets.Value("float64"), [0, 1, 0.5, 2])
    return "image 2 has a label that is neither an integer nor a text: 0.5"


def two_columns(folder: Path) -> str:
    table(folder, datasets.Value("int64"), WANTED, "fine_label", coarse_label=[0] * 4)
    return "fine_label, coarse_label could all be labels; name one with --label-column"


def two_columns_of_metadata(folder: Path) -> str:
    class_folders(folder)
    (folder / "metadata.csv").write_text("file_name,label,category\nowl/0.png,1,owl\n")
    return "label, category could all be labels; name one with --label-column"


def no_column(folder: Path) -> str:
    table(folder, datasets.Value("int64"), WANTED, "width")
    return "no label column among image, width; name one with --label-column"


WITHOUT = [
    no_folders, a_stray_image, folders_of_folders, negative_json, negative_integers, only_negative,
    gaps, fractions, two_columns, two_columns_of_metadata, no_column,
]  # fmt: skip


@pytest.mark.parametrize("make", WITHOUT)
def test_where_there_are_no_labels_one_line_says_why(tmp_path, make):
    said = make(tmp_path)
    options = DataOptions(dataset=str(tmp_path))
    with pytest.raises(
        UserError, match=f"class-conditional, and .* has no labels: .*({said})"
    ) as e:
        images_for(tiny_model(num_class_embeds=3), options, "train")
    assert "\n" not in str(e.value)
    assert images_for(tiny_model(), options, "train").labels is None
    assert open_side(str(tmp_path)).count > 1


@pytest.mark.parametrize("make", [two_columns, no_column])
def test_a_column_that_is_named_is_taken(tmp_path, make):
    make(tmp_path)
    column = "width" if make is no_column else "fine_label"
    options = DataOptions(dataset=str(tmp_path), label_column=column)
    assert list(images_for(tiny_model(num_class_embeds=3), options, "train").labels) == WANTED
    wrong = options.model_copy(update={"label_column": column[:-1]})
    with pytest.raises(UserError, match=f"--label-column: no column .*did you mean '{column}'"):
        images_for(tiny_model(num_class_embeds=3), wrong, "train")


def test_a_column_is_not_named_in_vain(tmp_path):
    write(tmp_path, *FOUR)
    for kind in ("label", "image", "caption"):
        with pytest.raises(UserError, match=f"--{kind}-column x: digits has no columns"):
            load_images("digits", split="train", size=8, channels=1, **{f"{kind}_column": "x"})
    with pytest.raises(UserError, match=r"--label-column x: .* has no metadata file"):
        opened(tmp_path, label_column="x")
    with pytest.raises(UserError, match=r"--image-column x: .* has no columns"):
        opened(tmp_path, image_column="x")


@pytest.mark.parametrize("damage", ["{", "[1]", '{"file_name": "a.png", "label": [1]}', "\xff\0"])
def test_damaged_metadata_is_named(tmp_path, damage):
    write(tmp_path, *FOUR)
    (tmp_path / "metadata.jsonl").write_text(damage, encoding="latin-1")
    options = DataOptions(dataset=str(tmp_path))
    with pytest.raises(UserError) as error:
        images_for(tiny_model(num_class_embeds=3), options, "train")
    assert "\n" not in str(error.value)
    assert len(images_for(tiny_model(), options, "train")) == 4


def unlabelled_test_folder(folder: Path) -> None:
    write(folder, *(f"train/{c}/{k}.png" for c in ("cat", "owl") for k in range(20)))
    write(folder, *(f"test/{k}.png" for k in range(3)))


def test_folder_of_one_unknown_class(folder: Path) -> None:
    write(folder, *(f"train/{c}/{k}.png" for c in ("cat", "owl") for k in range(20)))
    write(folder, *(f"test/unknown/{k}.png" for k in range(3)))


def tables(folder: Path, *test_columns: dict) -> None:
    kind = datasets.ClassLabel(names=["cat", "owl"])
    train = {"image": [picture(k) for k in range(40)], "label": [0, 1] * 20}
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    made = {"train": datasets.Dataset.from_dict(train, features=features)}
    test = {"image": [picture(100 + k) for k in range(3)]}
    made["test"] = datasets.Dataset.from_dict(test).cast_column("image", datasets.Image())
    for columns in test_columns:
        made["test"] = datasets.Dataset.from_dict(test | columns, features=features)
    datasets.DatasetDict(made).save_to_disk(folder / "saved")


def test_table_without_labels(folder: Path) -> None:
    tables(folder)


def test_table_of_unknown_labels(folder: Path) -> None:
    tables(folder, {"label": [-1, -1, -1]})


UNLABELLED_TEST = [
    unlabelled_test_folder, test_folder_of_one_unknown_class, test_table_without_labels,
    test_table_of_unknown_labels,
]  # fmt: skip
for made in UNLABELLED_TEST:
    made.__test__ = False


@pytest.mark.parametrize("make", UNLABELLED_TEST)
def test_a_test_split_without_labels_gives_way_to_held_out_training_images(tmp_path, make):
    make(tmp_path)
    place = tmp_path / "saved" if (tmp_path / "saved").exists() else tmp_path
    options = DataOptions(dataset=str(place))
    conditional, free = tiny_model(num_class_embeds=2), tiny_model()
    sets = {s: images_for(conditional, options, s) for s in ("train", "test")}
    assert {s: len(images) for s, images in sets.items()} == {"train": 38, "test": 2}
    assert sorted(sets["test"].labels) in ([0, 1], [1, 1])
    assert {len(images_for(free, options, s)) for s in ("train", "test")} == {40, 3}


def test_labels_are_part_of_the_fingerprint(tmp_path):
    one, other = noise_images(4, labels=[0, 1, 1, 0]), noise_images(4, labels=[0, 1, 1, 1])
    assert len({s.fingerprint() for s in (noise_images(4), one, other)}) == 3
    for folder in ("x", "y"):
        jsonl(tmp_path / folder)
    text = (tmp_path / "y" / "metadata.jsonl").read_text()
    (tmp_path / "y" / "metadata.jsonl").write_text(text.replace('"label": 2', '"label": 0'))
    for model, hashes in ((tiny_model(), 1), (tiny_model(num_class_embeds=3), 2)):
        sets = [images_for(model, DataOptions(dataset=str(tmp_path / f)), "train") for f in "xy"]
        assert len({data_source(images).hash for images in sets}) == hashes


def test_negative_labels_given_from_python_are_refused():
    wrong = noise_images(3, labels=np.array([0, 1, -2]))
    with pytest.raises(UserError, match="label -2"):
        problems_on(wrong, tiny_model(num_class_embeds=3), 0)


def test_train_among_classes_is_a_class(tmp_path):
    write(tmp_path, "airplane/0.png", "bus/0.png", "train/0.png", "train/1.png")
    assert labels(tmp_path) == [0, 1, 2, 2]


def test_train_beside_test_or_one_other_folder_is_a_split(tmp_path):
    write(tmp_path / "a", "cat/0.png", "dog/0.png", "train/cat/0.png", "test/cat/1.png")
    write(tmp_path / "b", "train/0.png", "extra/0.png", "0.png")
    for name, rest in (("a", "1 of test, 2 of others"), ("b", "2 of others")):
        found = opened(tmp_path / name)
        assert (len(found), found.left_out) == (1, rest)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,label\na.png,1\nb.png,\nc.png,0\nd.png,2\n"),
        ("metadata.jsonl", "".join(
            f'{{"file_name": "{file}", "label": {value}}}\n'
            for file, value in zip(FOUR, ("1", '""', "0", "2"), strict=True)
        )),
    ],
)  # fmt: skip
def test_an_empty_label_is_none_and_no_class(tmp_path, name, text):
    """It became class 0, and all others one more."""
    write(tmp_path, *FOUR)
    (tmp_path / name).write_text(text)
    found = opened(tmp_path)
    assert (found.labels, found.unlabelled) == (None, "b.png is not labelled")


def test_a_file_of_excel_is_read(tmp_path):
    write(tmp_path, *FOUR)
    rows = "".join(f"{file},{value}\n" for file, value in zip(FOUR, WANTED, strict=True))
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}", encoding="utf-8-sig")
    assert labels(tmp_path) == WANTED


@pytest.mark.parametrize(
    ("column", "taken"),
    [("fine_label", True), ("Class ID", True), ("label_1", True), ("target_size", False),
     ("class_weight", False), ("labelled", False)],
)  # fmt: skip
def test_a_column_of_labels_is_known_by_its_last_word(tmp_path, column, taken):
    write(tmp_path, *FOUR)
    rows = "".join(f"{file},{value}\n" for file, value in zip(FOUR, WANTED, strict=True))
    (tmp_path / "metadata.csv").write_text(f"file_name,{column}\n{rows}")
    assert labels(tmp_path) == (WANTED if taken else None)


def test_two_rows_of_a_file_that_disagree_are_refused(tmp_path):
    write(tmp_path, *FOUR)
    rows = "".join(f"{file},{value}\n" for file, value in zip(FOUR, WANTED, strict=True))
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}a.png,1\n")
    assert labels(tmp_path) == WANTED
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}a.png,2\n")
    with pytest.raises(UserError, match=r"has two rows for a\.png that differ in label"):
        opened(tmp_path)


def test_what_was_counted_and_left_out_is_said(tmp_path):
    """A class called "valid" is held out; whoever reads that can rename it."""
    write(tmp_path, *(f"{name}/{k}.png" for name in ("valid", "invalid") for k in range(3)))
    said: list[str] = []
    listener = SimpleNamespace(say=said.append)
    options = DataOptions(dataset=str(tmp_path), convert_channels=True)
    data_for(tiny_model(), options, "train", listener)
    data_for(tiny_model(), options, "test", listener)
    data_for(tiny_model(), DataOptions(), "test", listener)  # the embedded ones are known
    assert said == [
        f"{tmp_path}: 3 images, to train on; not among them: 3 of validation",
        f"{tmp_path}: 3 images, held out; not among them: 3 of train",
    ]


def test_a_folder_called_digits_comes_before_the_embedded_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(opened(Path("digits"))) == 1498
    write(tmp_path / "digits", "a.png")
    assert len(opened(Path("digits"))) == 1
    found = open_side("digits")
    assert isinstance(found, Images)
    assert found.count == 1
    (tmp_path / "digits" / "model_index.json").write_text("{}")  # a model is not a dataset
    assert len(opened(Path("digits"))) == 1498
    assert open_side("digits").left_out == "1,498 of train"
