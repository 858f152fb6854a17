"""Arrays of others: claims that the file does not bear out, damage, and what numpy would have run."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from prunedm.data.arrays import read_array
from prunedm.errors import UserError
from prunedm.evaluation.fid import Statistics, frechet_distance, load_statistics
from prunedm.evaluation.image_source import open_side

GIB = 1 << 30


def npy(shape: tuple[int, ...], dtype: str = "|u1", data: bytes = b"", **header) -> bytes:
    """An array file that claims `shape` and holds `data`."""
    file = io.BytesIO()
    claims = {"descr": dtype, "fortran_order": False, "shape": shape} | header
    np.lib.format.write_array_header_1_0(file, claims)
    return file.getvalue() + data


def pack(path: Path, *, level: int = zipfile.ZIP_STORED, **arrays: bytes) -> Path:
    with zipfile.ZipFile(path, "w", level) as archive:
        for key, content in arrays.items():
            archive.writestr(f"{key}.npy", content)
    return path


def flipped(path: Path, place: float) -> Path:
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * place)] ^= 1
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("level", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": npy((2**16, 2048, 2048, 3))}, "claims"),  # 768 GiB
        ({"images": npy((2**62, 4, 4, 3))}, "claims"),
        ({"images": npy((2, 4, 4, 3), data=bytes(95))}, "claims"),
        ({"images": npy((2, 4, 4, 3), data=bytes(97))}, "claims"),
        ({"images": npy((-2, 4, 4, 3), data=bytes(96))}, "images of"),
        ({"images": npy((1, 30_000, 30_000, 3))}, "claims"),
        ({"images": npy((4, 0, 4, 3))}, "0x4 pixels"),
        ({"images": npy((2, 4, 4, 3), data=bytes(96), fortran_order=True)}, "Fortran"),
        ({"images": npy((1,), "|O", b"cos\nsystem\n.")}, "images of"),
        ({"images": b"\x93NUMPY\x09\x00" + bytes(99)}, "images of"),
        ({"images": b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535}, "images of"),
        ({"images": b""}, "images of"),
        ({"mu": npy((300_000,), "<f8"), "sigma": npy((300_000, 300_000), "<f8")}, "claims"),
        ({"mu": npy((2,), "<f8", bytes(16)), "sigma": npy((2, 2), "|O", b"x" * 32)}, "not numbers"),
        ({"mu": npy((2,), "<c16", bytes(32)), "sigma": npy((2, 2), "<f8", bytes(32))}, "numbers"),
        ({"mu": npy((2,), "<U2", bytes(16)), "sigma": npy((2, 2), "<f8", bytes(32))}, "<U2"),
        ({"mu": npy((2,), "<f8", bytes(16)), "sigma": npy((3, 3), "<f8", bytes(72))}, r"\(D, D\)"),
        ({"mu": npy((0,), "<f8"), "sigma": npy((0, 0), "<f8")}, r"\(D, D\)"),
        ({"mu": npy((1,), "<f8", b"\xff" * 8), "sigma": npy((1, 1), "<f8", bytes(8))}, "NaN"),
    ],
)  # fmt: skip
def test_claims_are_compared_with_the_file(tmp_path, level, arrays, said):
    path = pack(tmp_path / "set.npz", level=level, **arrays)
    with pytest.raises(UserError, match=said) as error:
        open_side(str(path))
    assert "\n" not in str(error.value)
    assert "set.npz" in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("level", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_wrong_checksum_is_noticed_before_any_image_is_used(tmp_path, level, place):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    content = npy(images.shape, data=images.tobytes())
    path = flipped(pack(tmp_path / "set.npz", level=level, images=content), place)
    with pytest.raises(UserError, match=r"damaged|cannot read"):
        open_side(str(path))
    sigma = rng.normal(size=(30, 30))
    stats = {"mu": npy((30,), "<f8", bytes(240)), "sigma": npy((30, 30), "<f8", sigma.tobytes())}
    path = flipped(pack(tmp_path / "stats.npz", level=level, **stats), place)
    with pytest.raises(UserError, match=r"damaged|cannot read"):
        open_side(str(path))


def test_an_encrypted_file_is_refused(tmp_path):
    path = pack(tmp_path / "set.npz", images=npy((1, 2, 2), data=bytes(4)))
    raw = bytearray(path.read_bytes())
    raw[6] |= 1  # in the local header, and in the directory
    raw[raw.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="encrypted"):
        open_side(str(path))


def test_arrays_come_out_as_numpy_reads_them(tmp_path):
    wanted = {"a": np.arange(6.0).reshape(2, 3), "text": np.str_("FID"), "n": np.int64(7)}
    wanted["b"] = np.asfortranarray(wanted["a"])
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **wanted)
        for key, value in wanted.items():
            np.testing.assert_array_equal(read_array(tmp_path / "x.npz", key), value)


def test_a_directory_that_lies_about_sizes_is_not_believed(tmp_path):
    path = pack(tmp_path / "set.npz", images=npy((2**16, 1024, 1024, 3)))
    raw = bytearray(path.read_bytes())
    place = raw.index(b"PK\1\2")
    raw[place + 24 : place + 28] = (0xFFFFFF00).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(UserError, match="claims"):
        open_side(str(path))


def test_numbers_too_large_for_a_distance_are_an_error():
    huge = Statistics(np.full(3, 1e300), np.eye(3) * 1e300)
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(huge, Statistics(np.zeros(3), np.eye(3)))


def test_statistics_without_a_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="missing"):
        load_statistics(tmp_path / "none.npz")
