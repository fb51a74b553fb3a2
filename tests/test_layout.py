"""What people have on disk: folders in any order, links, archives, depths of gray, damage."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.cohort import raw as raw_module
from utils.cohort.raw import find_raw, read_raw
from utils.manifest import files as files_module
from utils.manifest.files import EIGHT_BITS, decode, eight_bits
from utils.manifest.layout import places_of
from utils.utils_funcs import UserError, files_below

FOUR = ("Non_Demented", "Very_Mild_Demented", "Mild_Demented", "Moderate_Demented")


def write(folder: Path, name: str, value: int = 0, **options) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((8, 8), value, np.uint8)
    image[0, : len(name) % 8] = 7
    Image.fromarray(image).save(path, **options)
    return path


def read_places(names: list[str]) -> list[tuple[str, str, str]]:
    return [(place.split, place.folder, place.subject) for place in places_of(names)]


# --- What paths say ---


@pytest.mark.parametrize(
    "names, expected",
    [
        (["train/AD/a.png", "test/CN/b.png"], [("train", "AD", ""), ("test", "CN", "")]),
        (["AD/train/a.png", "CN/test/b.png"], [("train", "AD", ""), ("test", "CN", "")]),
        (
            ["set/val/AD/a.png", "set/dev/CN/b.png"],
            [("validation", "AD", ""), ("validation", "CN", "")],
        ),
        (
            ["train/AD/s1/a.png", "train/AD/s2/b.png", "test/CN/s3/c.png"],
            [("train", "AD", "s1"), ("train", "AD", "s2"), ("test", "CN", "s3")],
        ),
        (
            ["s1/AD/a.png", "s2/AD/b.png", "s3/CN/c.png"],
            [("", "AD", ""), ("", "AD", ""), ("", "CN", "")],
        ),
        (
            ["x/Data/Very mild Dementia/a.jpg", "x/Data/Non Demented/b.jpg"],
            [("", "Very mild Dementia", ""), ("", "Non Demented", "")],
        ),
        (
            ["Mild_Demented/test/p7/a.jpg", "Non_Demented/train/p8/b.jpg"],
            [("test", "Mild_Demented", "p7"), ("train", "Non_Demented", "p8")],
        ),
        (["only/a.png", "only/b.png"], [("", "only", ""), ("", "only", "")]),
        (["a.png", "b.png"], [("", "", ""), ("", "", "")]),
    ],
)
def test_split_class_and_subject_are_told_apart(names, expected):
    assert read_places(names) == expected


def test_where_subjects_and_classes_cannot_be_told_apart_the_choice_is_named():
    with pytest.raises(UserError, match=r"A, B and the folders x, y.*CSV"):
        places_of(["A/x/1.png", "B/y/2.png"])


def test_outer_folders_are_dropped_and_the_rest_is_kept():
    names = ["down/load/test/Mild_Demented/s/a.png", "down/load/train/Non_Demented/t/b.png"]
    found = [place.path for place in places_of(names)]
    assert found == ["test/Mild_Demented/s/a.png", "train/Non_Demented/t/b.png"]


@pytest.mark.parametrize("order", ["split first", "class first"])
def test_a_published_validation_folder_is_a_part_of_its_own(tmp_path, order):
    for value, name in enumerate(FOUR):
        for split in ("train", "valid", "test"):
            parts = (split, name) if order == "split first" else (name, split)
            write(tmp_path, f"{'/'.join(parts)}/{split}.png", value)
    raw = read_raw(tmp_path)
    assert sorted(raw.source_split) == ["test"] * 4 + ["train"] * 4 + ["validation"] * 4
    assert sorted(raw.label.tolist()) == sorted([0, 1, 2, 3] * 3)


# --- Links and archives ---


def test_linked_folders_are_read_and_a_link_that_leads_back_up_ends(tmp_path):
    for value, name in enumerate(FOUR):
        write(tmp_path / "disk", f"{name}/1.png", value)
        write(tmp_path / "set", f"train/{name}/1.png", value)
    (tmp_path / "set" / "test").symlink_to(tmp_path / "disk")
    (tmp_path / "set" / "train" / "up").symlink_to(tmp_path / "set")
    raw = read_raw(tmp_path / "set")
    assert sorted(raw.source_split) == ["test"] * 4 + ["train"] * 4
    assert len(list(files_below(tmp_path / "set"))) == 8


def test_a_link_that_leads_nowhere_is_no_file(tmp_path):
    for value, name in enumerate(FOUR):
        write(tmp_path, f"{name}/1.png", value)
    (tmp_path / FOUR[0] / "2.png").symlink_to(tmp_path / "gone.png")
    assert len(read_raw(tmp_path)) == len(list(files_below(tmp_path))) == 4


def test_an_archive_whose_paths_are_written_with_backslashes_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        for value, name in enumerate(FOUR):
            file = write(tmp_path / "set", f"{name}/1.png", value)
            info = zipfile.ZipInfo("x")
            info.filename = f"set\\{name}\\1.png"
            archive.writestr(info, file.read_bytes())
    assert read_raw(tmp_path / "windows.zip").label.tolist() == [2, 3, 0, 1]


def zipped(folder: Path, path: Path) -> Path:
    return Path(shutil.make_archive(str(path.with_suffix("")), "zip", folder))


def test_an_archive_put_into_raw_dataset_is_found(tmp_path, monkeypatch):
    monkeypatch.delenv("ALZHEIMER_RAW", raising=False)
    monkeypatch.setenv("ALZHEIMER_OFFLINE", "1")
    monkeypatch.setattr(raw_module, "ROOT", tmp_path)
    local = tmp_path / "dataset" / "raw_dataset"
    local.mkdir(parents=True)
    assert find_raw() is None
    for value, name in enumerate(FOUR):
        write(tmp_path / "set", f"{name}/1.png", value)
    archive = zipped(tmp_path / "set", local / "archive.zip")
    assert find_raw() == archive and len(read_raw(archive)) == 4
    shutil.copy(archive, local / "second.zip")
    with pytest.raises(UserError, match="2 archives.*--raw"):
        find_raw()


def test_an_entry_that_unpacks_to_more_than_an_image_is_refused_before_it_is_unpacked(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(files_module, "LARGEST_FILE", 1 << 16)
    with zipfile.ZipFile(tmp_path / "small.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("Mild_Demented/1.png", b"\0" * (1 << 17))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match=r"Mild_Demented/1\.png.*unpacks to"):
        read_raw(tmp_path / "small.zip")


@pytest.mark.parametrize("name", ["set.tar.gz", "image.png", "table.csv.gz"])
def test_what_is_neither_folder_nor_zip_is_named_as_such(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        read_raw(tmp_path / name)


# --- Depth of gray ---


def encoded(values: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


RAMP = np.linspace(0, 1, 63).reshape(7, 9)


@pytest.mark.parametrize(
    "values, kind, rule",
    [
        ((RAMP * 255).astype(np.uint8), "PNG", EIGHT_BITS),
        ((RAMP * 65535).astype(np.uint16), "PNG", "0 to 65535"),
        ((RAMP * 4095).astype(np.uint16), "PNG", "0 to 4095"),
        ((RAMP * 255).astype(np.uint16), "PNG", EIGHT_BITS),
        (RAMP.astype(np.float32), "TIFF", "0 to 1"),
        ((RAMP * 255).astype(np.float32), "TIFF", EIGHT_BITS),
        ((RAMP * 3000 - 1000).astype(np.int32), "TIFF", "-1000 to 2000"),
        ((RAMP * 900).astype(np.float32), "TIFF", "0 to 900"),
    ],
)
def test_every_depth_of_gray_becomes_the_same_8_bits(values, kind, rule):
    (image,), found = eight_bits([decode(encoded(values, kind))], ["one"])
    assert image.dtype == np.uint8 and np.abs(image - 255 * RAMP).max() <= 1
    assert found.startswith(rule)


def test_a_set_has_one_rule_so_that_a_dark_image_stays_dark(tmp_path):
    bright, dark = (np.full((4, 4), value, np.uint16) for value in (4000, 40))
    images, rule = eight_bits([bright, dark], ["bright", "dark"])
    assert [int(image[0, 0]) for image in images] == [249, 2] and rule.startswith("0 to 4095")


def test_files_of_two_depths_without_a_common_scale_are_refused():
    eight, twelve = np.full((4, 4), 200, np.uint8), np.full((4, 4), 3000, np.uint16)
    with pytest.raises(UserError, match=r"b\.png holds values from 3000 to 3000 and a\.png has 8"):
        eight_bits([eight, twelve], ["a.png", "b.png"])


def test_a_photographs_rotation_is_applied():
    shown = np.zeros((20, 30), np.uint8)
    shown[:5] = 255
    turned = Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert np.array_equal(decode(buffer.getvalue()), shown)


def test_several_pages_and_values_that_are_no_numbers_are_refused():
    pages = [Image.fromarray((RAMP * 255).astype(np.uint8)) for _ in range(3)]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="3 pages"):
        decode(buffer.getvalue())
    broken = RAMP.astype(np.float32)
    broken[2, 2] = np.nan
    with pytest.raises(ValueError, match="no numbers"):
        decode(encoded(broken, "TIFF"))


def test_the_published_set_is_of_8_bits_and_stays_as_it_is(phantom_raw):
    raw = read_raw(phantom_raw)
    assert raw.intensity == EIGHT_BITS
    path = phantom_raw / raw.paths[0]
    assert np.array_equal(raw.images[0], np.asarray(Image.open(path).convert("L")))
