"""Ways in which a file or a value is damaged: each kind yields names, and functions of the file."""

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Damage = tuple[str, Callable[[Path], None]]

DEEP = 5000
MANY = "9" * 5000
# value -> its JSON
VALUES = {
    "null": "null",
    "true": "true",
    "-1": "-1",
    "0": "0",
    "0.5": "0.5",
    "1e9": "1000000000",
    "1e300": "1e300",
    "NaN": "NaN",
    "no text": '""',
    "a long text": json.dumps("x" * 10_000),
    "[]": "[]",
    "[[]]": "[[]]",
    "{}": "{}",
    "nested": "[" * DEEP + "]" * DEEP,
    "5,000 digits": MANY,
    "NUL": r'"\u0000"',
    "/dev/zero": '"/dev/zero"',
}
FEW = ("null", "-1", "a long text", "[[]]")
# part of a type's name -> wrong values of such an option
_NUMBERS = ["", "x", "nan", "inf", "-1", MANY]
OPTIONS = {
    "Literal|Choice": ["", "nonsense", "x" * 10_000, "\udcff"],
    "bool": ["maybe"],
    "tuple.*Float|tuple.*int|tuple.*Annotated": _NUMBERS,
    "tuple": ["nonsense", "(", "x" * 10_000],
    "float": [*_NUMBERS, "1e400", "1e30"],
    "int": [*_NUMBERS, "1.5", str(10**30)],
    "dict": ["x", "[]", "{"],
    "Options": ["x"],
    "str": ["", "nonsense", "x" * 10_000, "\0", "\udcff", "/dev/zero", "~nobody/x", "-"],
}
TEXT = b"this is a text and nothing else\n"


def replaced(content: bytes | Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Other content; a function is of the sound one, and called when it is needed."""

    def damage(path: Path) -> None:
        new = content if isinstance(content, bytes) else content(path.read_bytes())
        path.unlink()
        path.write_bytes(new)

    return damage


def gone(then: Callable[[Path], None] = lambda path: None) -> Callable[[Path], None]:
    """The file goes, and something else comes into its place."""

    def damage(path: Path) -> None:
        path.unlink()
        then(path)

    return damage


def of_any(sound: Path) -> Iterator[Damage]:
    """What can stand in the place of any file."""
    yield "missing", gone()
    yield "empty", replaced(b"")
    yield "a text", replaced(TEXT)
    yield "zeros", replaced(bytes(4096))
    yield "noise", replaced(bytes((k * k + 7 * k) % 251 for k in range(4096)))
    yield "a folder", gone(Path.mkdir)
    yield "a pipe", gone(os.mkfifo)
    yield "a link to nowhere", gone(lambda path: path.symlink_to("nowhere"))
    yield "a link to itself", gone(lambda path: path.symlink_to(path.name))
    yield "/dev/zero", gone(lambda path: path.symlink_to("/dev/zero"))
    yield "half of it", replaced(lambda content: content[: len(content) // 2])


def of_torn(sound: Path) -> Iterator[Damage]:
    """A copy that stopped, or went wrong, at some place."""
    for size in (1, 4, 8, 12, 100, -8, -1):
        if size < sound.stat().st_size:
            yield f"only {size} bytes", replaced(lambda content, size=size: content[:size])


def of_json(sound: Path) -> Iterator[Damage]:
    """Another document in the place of one."""
    text = sound.read_text(encoding="utf-8")
    for name, value in VALUES.items():
        yield f"is {name}", replaced(value.encode())
    yield "nested tables", replaced(b'{"a":' * DEEP + b"1" + b"}" * DEEP)
    yield "not closed", replaced(text.rstrip().rstrip("}").encode())
    yield "UTF-16", replaced(text.encode("utf-16"))
    yield "Latin-1", replaced('{"ü": 1}'.encode("latin-1"))
    yield "with a mark at its start", replaced(b"\xef\xbb\xbf" + text.encode())
    yield "100 MB of blanks", replaced(lambda content: b" " * 100_000_000 + content)


def of_config(sound: Path, values: Iterable[str] = tuple(VALUES)) -> Iterator[Damage]:
    """A wrong value for every key."""
    config = json.loads(sound.read_text(encoding="utf-8"))
    for key in config:
        for name in values:
            text = json.dumps(config | {key: "@"}).replace('"@"', VALUES[name])
            yield f"{key} = {name}", replaced(text.encode())
        fewer = {k: v for k, v in config.items() if k != key}
        yield f"no {key}", replaced(json.dumps(fewer).encode())


def of_keys(sound: Path) -> Iterator[Damage]:
    """A few wrong values for every key, for a verb that reads what another is tried with."""
    yield from of_config(sound, FEW)


def _header(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def _file(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def headed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Another header before the same tensors."""

    def damage(content: bytes) -> bytes:
        header, body = _header(content)
        return _file(change(header), body)

    return replaced(damage)


def of_safetensors(sound: Path) -> Iterator[Damage]:
    """Headers that say what is not so."""
    header, _ = _header(sound.read_bytes())
    first = next(name for name in header if name != "__metadata__")
    for size in (0, 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
        length = struct.pack("<Q", size)
        yield f"header of {size:,} bytes", replaced(lambda content, n=length: n + content[8:])
    for name, text in {
        "not JSON": TEXT,
        "a list": b"[]",
        "nothing": b"{}",
        "nested": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    }.items():
        yield f"header is {name}", headed(lambda _, text=text: text)
    facts = header[first]
    for name, changed in {
        "offsets beyond the file": {"data_offsets": [0, 1 << 50]},
        "negative offsets": {"data_offsets": [-4, 4]},
        "offsets turned round": {"data_offsets": facts["data_offsets"][::-1]},
        "a negative shape": {"shape": [-1, 4]},
        "a shape of 2^62": {"shape": [1 << 62]},
        "a shape that overflows": {"shape": [1 << 40, 1 << 40]},
        "another shape": {"shape": [*facts["shape"], 1, 2]},
        "an unknown type": {"dtype": "F7"},
        "no type": {"dtype": None},
        "no shape": {"shape": None},
    }.items():
        wrong = {first: facts | changed}
        yield f"first tensor has {name}", headed(lambda header, wrong=wrong: header | wrong)
    yield "metadata is a list", headed(lambda header: header | {"__metadata__": []})
    yield "metadata holds numbers", headed(lambda header: header | {"__metadata__": {"a": 1}})


def of_metadata(sound: Path) -> Iterator[Damage]:
    """A wrong text for every fact in a header."""
    metadata = _header(sound.read_bytes())[0].get("__metadata__", {})

    def told(facts: dict[str, str] | None) -> Callable[[Path], None]:
        known = {} if facts is None else {"__metadata__": facts}
        return headed(lambda h: {n: v for n, v in h.items() if n != "__metadata__"} | known)

    yield "no metadata", told(None)
    for key, text in metadata.items():
        for name, value in VALUES.items():
            yield f"metadata {key} = {name}", told(metadata | {key: value})
        yield f"metadata without {key}", told({k: v for k, v in metadata.items() if k != key})
        for inner, changed in _inner(text):
            yield f"metadata {key}.{inner}", told(metadata | {key: changed})


def _inner(text: str) -> Iterator[tuple[str, str]]:
    """A table that is kept as a text, with a wrong value for one of its first keys."""
    try:
        table = json.loads(text)
    except ValueError:
        return
    for key in list(table)[:9] if isinstance(table, dict) else ():
        for name in FEW:
            yield f"{key} = {name}", json.dumps(table | {key: "@"}).replace('"@"', VALUES[name])


def of_tensors(sound: Path) -> Iterator[Damage]:
    """A file that can be read, and holds other tensors than it should."""
    import torch

    def changed(change: Callable[[dict[str, Any], str], object]) -> Callable[[Path], None]:
        def damage(path: Path) -> None:
            from safetensors import safe_open
            from safetensors.torch import save_file

            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            name = max(tensors, key=lambda n: tensors[n].numel())
            change(tensors, name)
            path.unlink()
            save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata=metadata)

        return damage

    def put(name: str, tensor: Callable[[Any], Any]) -> tuple[str, Callable[[Path], None]]:
        return name, changed(lambda tensors, n: tensors.update({n: tensor(tensors[n])}))

    yield put("NaN in a tensor", lambda t: torch.full(t.shape, float("nan")))
    yield put("infinity in a tensor", lambda t: torch.full(t.shape, float("inf")))
    yield put(
        "a tensor of text bytes", lambda t: torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    )
    yield put("a tensor without numbers", lambda t: t[:0])
    yield put("a tensor of one number", lambda t: torch.ones(()))
    yield put("a tensor of another shape", lambda t: torch.ones(*t.shape, 2))
    yield put("a complex tensor", lambda t: torch.full(t.shape, 1j))
    yield "a tensor is missing", changed(lambda tensors, name: tensors.pop(name))
    yield "a tensor too many", changed(lambda tensors, _: tensors.update(extra=torch.ones(3)))
    yield "a tensor renamed", changed(lambda tensors, n: tensors.update(renamed=tensors.pop(n)))
    yield "no tensors", changed(lambda tensors, _: tensors.clear())


def of_bin(sound: Path) -> Iterator[Damage]:
    """Old weight files, which could run what is written in them."""
    aside = "diffusion_pytorch_model.bin"
    evil = b"cposix\nsystem\n(S'touch pwned'\ntR."
    for name, content in {"a text": TEXT, "empty": b"", "a pickle that runs": evil}.items():
        yield (
            f"a .bin that is {name}",
            gone(lambda path, content=content: path.with_name(aside).write_bytes(content) and None),
        )


def of_image(sound: Path) -> Iterator[Damage]:
    """Pictures of other kinds, and what is called one."""
    import numpy as np
    from PIL import Image

    def saved(image: Any, form: str = "png", **more: Any) -> Callable[[Path], None]:
        buffer = io.BytesIO()
        image.save(buffer, form, **more)
        return replaced(buffer.getvalue())

    grey = Image.open(sound)
    for mode in ("1", "P", "LA", "RGB", "RGBA", "I", "I;16"):
        yield f"mode {mode}", saved(grey.convert("I") if mode == "I;16" else grey.convert(mode))
    yield "a JPEG called png", saved(grey, "jpeg")
    yield "a CMYK JPEG called png", saved(grey.convert("CMYK"), "jpeg")
    yield "a GIF called png", saved(grey, "gif")
    yield "a TIFF of floats", saved(grey.convert("F"), "tiff")
    yield "1x1", saved(Image.new("L", (1, 1)))
    yield "1x1000", saved(Image.new("L", (1, 1000)))

    def bomb(path: Path) -> None:  # made when it is needed: it fills the memory here too
        saved(Image.new("1", (20_000, 20_000)))(path)

    yield "a bomb of 20,000 x 20,000", bomb
    yield "16 bits", saved(Image.fromarray(np.full((16, 16), 40_000, np.uint16)))
    yield "many frames", saved(grey, "gif", save_all=True, append_images=[grey] * 3)
    content = sound.read_bytes()
    yield "a wrong checksum", replaced(content[:40] + bytes([content[40] ^ 255]) + content[41:])
    huge = content[:16] + struct.pack(">II", 1 << 30, 1 << 30) + content[24:]
    yield "a header of 2^30 x 2^30", replaced(huge)
    text = b"P5 99999999 99999999 255\n"
    yield "a PGM that claims much", replaced(text)
    yield "an SVG", replaced(b"<svg xmlns='http://www.w3.org/2000/svg'/>")


def of_npz(sound: Path) -> Iterator[Damage]:
    """Archives of arrays: claims, checksums, kinds, names."""
    import numpy as np

    with np.load(sound, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    first = max(arrays, key=lambda name: arrays[name].size)

    def saved(changed: dict[str, Any], *, pickled: bool = False) -> Callable[[Path], None]:
        buffer = io.BytesIO()
        if pickled:
            changed = {name: np.asarray(value, dtype=object) for name, value in changed.items()}
        np.savez(buffer, **changed)
        return replaced(buffer.getvalue())

    def claimed(shape: Any, kind: str = "|u1") -> Callable[[Path], None]:
        facts = {"descr": kind, "fortran_order": False, "shape": shape}
        text = repr(facts).encode()
        head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text
        return zipped({**{f"{n}.npy": _npy(a) for n, a in arrays.items()}, f"{first}.npy": head})

    def zipped(members: dict[str, bytes]) -> Callable[[Path], None]:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return replaced(buffer.getvalue())

    array = arrays[first]
    for name, value in {
        "no numbers": array[:0],
        "one number": np.float32(1),
        "text": np.array(["a", "b"]),
        "complex numbers": array.astype(complex),
        "NaN": np.full(array.shape, np.nan),
        "another shape": array[None],
        "booleans": array > 0,
        "dates": np.zeros(array.shape, "M8[s]"),
    }.items():
        yield f"an array of {name}", saved(arrays | {first: value})
    yield "other names", saved({f"other_{name}": value for name, value in arrays.items()})
    yield "no arrays", zipped({})
    yield "objects", saved(arrays, pickled=True)
    yield "a claim of 745 GiB", claimed((200_000, 2000, 2000))
    yield "a claim beyond numbers", claimed((1 << 62, 1 << 62))
    yield "a negative shape", claimed((-3, 8, 8))
    yield "a type of 10^9 bytes", claimed((3,), "|V1000000000")
    yield "members that are texts", zipped({f"{name}.npy": TEXT for name in arrays})

    def bomb(path: Path) -> None:
        zipped({f"{first}.npy": _npy(array) + bytes(300_000_000)})(path)

    yield "a bomb of 300 MB", bomb
    content = sound.read_bytes()
    middle = len(content) // 2
    for place in (middle, middle // 2, 200):
        flipped = content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
        yield f"a byte wrong at {place}", replaced(flipped)


def _npy(array: Any) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def of_parquet(sound: Path) -> Iterator[Damage]:
    """Tables without images, or with other columns."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    def written(table: Any) -> Callable[[Path], None]:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return replaced(buffer.getvalue())

    picture = pq.read_table(sound)["image"][0].as_py()
    bare = [{"image": picture, "label": 0}]
    yield "no images", written(pa.table({"text": ["a", "b"]}))
    yield "no rows", written(pq.read_table(sound)[:0])
    yield "no columns", written(pa.table({}))
    yield "images that are texts", written(
        datasets.Dataset.from_dict({"image": [{"bytes": TEXT, "path": None}] * 3})
        .cast_column("image", datasets.Image()).data.table
    )  # fmt: skip
    yield "images that are null", written(pa.Table.from_pylist([bare[0] | {"image": None}] * 3))
    yield "numbers as images", written(pa.table({"image": [1, 2], "label": [0, 1]}))
    yield "an image of another kind", written(pa.Table.from_pylist(bare * 3))


def of_yaml(sound: Path) -> Iterator[Damage]:
    """Documents that are no table of options, or are made to harm."""
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + k)}: &{chr(98 + k)} [{', '.join([f'*{chr(97 + k)}'] * 9)}]\n" for k in range(20)
    )
    for name, text in {
        "aliases that expand": bomb,
        "an alias of itself": "a: &a [*a]\n",
        "nested": "[" * DEEP + "]" * DEEP,
        "nested tables": "{a: " * DEEP + "1" + "}" * DEEP,
        "nested by lines": "".join("  " * k + "a:\n" for k in range(500)),
        "a tag that runs": "!!python/object/apply:os.system ['touch pwned']",
        "a tag of ours": "model: !!python/name:os.system",
        "an unknown tag": "model: !nothing x",
        "a list": "- a\n- b\n",
        "a number": "5",
        "a word": "nothing",
        "an unknown name": "nothing: 5\n",
        "a name that is a number": "5: 5\n",
        "a name that is a list": "[a, b]: 5\n",
        "a name that is nothing": "~: 5\n",
        "a name twice": "seed: 1\nseed: 2\n",
        "two documents": "seed: 1\n---\nseed: 2\n",
        "a tab": "seed:\n\t- 1\n",
        "not closed": "seed: [1\n",
        "5,000 digits": f"seed: {MANY}\n",
        "a date": "seed: 2020-01-01\n",
        "infinity": "seed: .inf\n",
        "a NUL": "seed: \0\n",
        "a merge of itself": "a: &a\n  <<: *a\n",
        "an unknown alias": "seed: *nothing\n",
        "a long name": f"{'x' * 10_000}: 5\n",
    }.items():
        yield name, replaced(text.encode())
    yield "Latin-1", replaced("seed: ü\n".encode("latin-1"))
    yield "10 MB", replaced(b"# " + b"x" * 10_000_000)


def of_recipe(sound: Path) -> Iterator[Damage]:
    """A wrong value for every option of a recipe and of its stages."""
    import yaml

    from prunedm.options import EvaluateOptions
    from prunedm.recipe import Recipe
    from prunedm.recipe_draft import FIELDS
    from prunedm.stages import STAGES

    recipe = yaml.safe_load(sound.read_text(encoding="utf-8"))
    for name in Recipe.model_fields:
        yield from (
            (f"{name} = {what}", _yaml(recipe | {name: "@"}, value))
            for what, value in VALUES.items()
            if what in (*FEW, "NaN", "{}", "5,000 digits", "NUL")
            and (name, what) != ("evaluate", "{}")  # sound: it measures in Inception's features
        )
    kinds = {name: STAGES[verb].options for name, (verb, _) in FIELDS.items()}
    for name, kind in (kinds | {"evaluate": EvaluateOptions}).items():
        for leaf in kind.leaves():
            table = {**recipe.get(name, {}), leaf.flag: "@"}
            yield f"{name}.{leaf.flag} = [[]]", _yaml(recipe | {name: table}, "[[]]")


def _yaml(table: dict[str, Any], value: str) -> Callable[[Path], None]:
    """JSON is YAML."""
    return replaced(json.dumps(table).replace('"@"', value).replace("NaN", ".nan").encode())


def of_sweep(sound: Path) -> Iterator[Damage]:
    """Sweeps that cannot be."""
    for name, text in {
        "an unknown field": "grid: {mask.patern: [2:4]}",
        "an unknown stage": "grid: {nothing.lr: [1]}",
        "a field of a stage that is not run": "grid: {learn.tau: [[1, 2]]}",
        "no values": "grid: {mask.pattern: []}",
        "a wrong value": "grid: {mask.pattern: [4:2]}",
        "values that are tables": "grid: {mask.pattern: {a: 1}}",
        "values that are a text": "grid: {mask.pattern: 2:4}",
        "two ways": "grid: {seed: [1]}\nsearch: {space: {seed: [1]}}",
        "an unknown objective": "grid: {seed: [1]}\nobjectives: {beauty: minimize}",
        "an unknown direction": "grid: {seed: [1]}\nobjectives: {loss: up}",
        "an unknown field to search": "search: {space: {mask.patern: [1]}}",
        "a range turned round": "search: {space: {finetune.lr: {low: 1, high: 0}}}",
        "a range of NaN": "search: {space: {finetune.lr: {low: .nan, high: 1}}}",
        "a range of texts": "search: {space: {finetune.lr: {low: a, high: b}}}",
        "no trials": "search: {trials: 0, space: {seed: [1]}}",
        "a storage that is none": "search: {storage: 'nothing://u:secret@h/x', space: {seed: [1]}}",
        "a recipe that is missing": "recipe: nowhere.yaml\ngrid: {seed: [1]}",
        "a recipe that is itself": "recipe: sweep.yaml\ngrid: {seed: [1]}",
        "a million runs": "grid: {" + ", ".join(
            f"{stage}.{name}: [{', '.join(map(str, range(1, 101)))}]"
            for stage, name in (("finetune", "steps"), ("finetune", "seed"), ("mask", "seed"))
        ) + "}",
    }.items():  # fmt: skip
        recipe = "" if "recipe:" in text else "recipe: recipe.yaml\n"
        yield name, replaced(f"{recipe}{text}\n".encode())


def of_unet(sound: Path) -> Iterator[Damage]:
    """A wrong value for every key of a network and of a scheduler that are to be trained."""
    import inspect

    import yaml
    from diffusers import DDPMScheduler, UNet2DModel

    table = yaml.safe_load(sound.read_text(encoding="utf-8"))
    for part, cls in (("unet", UNet2DModel), ("scheduler", DDPMScheduler)):
        for key in list(inspect.signature(cls.__init__).parameters)[1:]:
            for what in (*FEW, "1e9"):
                inner = {**table.get(part, {}), key: "@"}
                yield f"{part}.{key} = {what}", _yaml(table | {part: inner}, VALUES[what])
        yield f"{part}: unknown key", _yaml(table | {part: {"nothing": "@"}}, "1")
        yield f"{part}: a list", _yaml(table | {part: "@"}, "[1]")
    yield (
        "scheduler: unknown class",
        _yaml({**table, "scheduler": {"_class_name": "@"}}, '"Nothing"'),
    )


KINDS: dict[str, Callable[[Path], Iterator[Damage]]] = {
    "any": of_any,
    "torn": of_torn,
    "json": of_json,
    "config": of_config,
    "keys": of_keys,
    "safetensors": of_safetensors,
    "metadata": of_metadata,
    "tensors": of_tensors,
    "bin": of_bin,
    "image": of_image,
    "npz": of_npz,
    "parquet": of_parquet,
    "yaml": of_yaml,
    "recipe": of_recipe,
    "sweep": of_sweep,
    "unet": of_unet,
}
REFUSED = {"bin"}  # of these kinds no result can be right
