"""The manifest: one door for folders, tables, parquet, NIfTI and DICOM; ids that are given win."""

import csv
import io
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from utils import experiment
from utils.cohort import build_cohort, read_cohort, read_raw
from utils.cohort.raw import RawImages
from utils.manifest import files
from utils.manifest.command import main
from utils.manifest.layout import in_order
from utils.manifest.sources import ids_in, manifest_of
from utils.manifest.table import COLUMNS, read_manifest
from utils.manifest.volumes import Slices, cut
from utils.phantom import write_phantom
from utils.utils_funcs import UserError

FOUR = ("Non_Demented", "Very_Mild_Demented", "Mild_Demented", "Moderate_Demented")


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("manifest") / "raw"
    return write_phantom(folder, patients=(4, 4, 3, 3), slices=(8, 10), size=64, seed=5)


def picture(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(value).integers(0, 200, (16, 16)).astype(np.uint8)
    Image.fromarray(image).save(path)
    return path


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- The contract ---


def test_a_manifest_has_the_columns_of_the_contract_and_reads_like_the_folder(phantom, tmp_path):
    out = tmp_path / "elsewhere" / "manifest.csv"
    main(phantom, out)
    assert out.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert COLUMNS == ("path", "label", "patient_id", "session", "slice_index", "split")
    folder, manifest = read_raw(phantom), read_raw(out)
    assert manifest.file_sha256 == folder.file_sha256
    assert manifest.label.tolist() == folder.label.tolist()
    assert manifest.source_split == folder.source_split and manifest.classes == folder.classes
    declared = json.loads(out.with_suffix(".json").read_text())
    assert declared["classes"] == list(FOUR) and declared["ordinal"] is True


def test_a_zip_is_read_through_its_manifest(phantom, tmp_path):
    archive = Path(shutil.make_archive(str(tmp_path / "set"), "zip", phantom))
    main(archive, tmp_path / "manifest.csv")
    assert rows_of(tmp_path / "manifest.csv")[0]["path"].startswith("set.zip/")
    assert read_raw(tmp_path / "manifest.csv").file_sha256 == read_raw(phantom).file_sha256


def test_hugging_faces_file_names_and_other_columns_are_accepted(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png", number)
    lines = [f"{n}.png,{name},x" for n, name in enumerate(FOUR)]
    write_csv(tmp_path / "metadata.csv", "\n".join(["file_name,label,note", *lines]))
    assert read_raw(tmp_path / "metadata.csv").label.tolist() == [0, 1, 2, 3]
    assert read_raw(tmp_path).label.tolist() == [0, 1, 2, 3], "found in its folder"


@pytest.mark.parametrize(
    "text, words",
    [
        ("name,class\n0.png,Non", "has the columns name, class"),
        ("path,label\n0.png,0", "number without a name"),
        ("path,label\n0.png,", "line 2 has no label"),
        ("path,label\n,Non", "line 2 has no path"),
        ("path,label\n0.png,Non\n0.png,Non", "0.png more than once"),
        ("path,label,split\n0.png,Non,third", "expected train, validation or test"),
        ("path,label,slice_index\n0.png,Non,top", "expected a whole number"),
        ("path,label\ngone.png,Non", "There is no .*gone.png"),
        ("path,label,split\n0.png", "fewer columns"),
        ("", "has the columns none"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_told_where(tmp_path, text, words):
    picture(tmp_path / "0.png", 0)
    with pytest.raises(UserError, match=words) as caught:
        read_raw(write_csv(tmp_path / "m.csv", text), any_classes=True)
    assert "\n" not in str(caught.value)


def test_numbers_stand_for_the_classes_that_are_declared_in_that_order(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png", number)
    names = ["Mild_Demented", "Moderate_Demented", "Non_Demented", "Very_Mild_Demented"]
    (tmp_path / "m.json").write_text(json.dumps({"classes": names}))
    write_csv(tmp_path / "m.csv", "path,label\n" + "\n".join(f"{n}.png,{n}" for n in range(4)))
    assert read_raw(tmp_path / "m.csv").label.tolist() == [2, 3, 0, 1]
    assert read_manifest(tmp_path / "m.csv").classes == tuple(names)
    write_csv(tmp_path / "m.csv", "path,label\n0.png,Severe")
    with pytest.raises(UserError, match="'Severe', which m.json does not declare"):
        read_manifest(tmp_path / "m.csv")


@pytest.mark.parametrize(
    "names, order",
    [
        (["AD", "CN", "EMCI", "LMCI", "MCI", "SMC"], ["CN", "SMC", "EMCI", "MCI", "LMCI", "AD"]),
        (["Demented", "Nondemented"], ["Nondemented", "Demented"]),
        (["Very mild Dementia", "Non Demented"], ["Non Demented", "Very mild Dementia"]),
    ],
)
def test_ratings_stand_in_their_order(names, order):
    assert in_order(names) == (tuple(order), True)
    assert in_order(["glioma", "b"]) == (("b", "glioma"), False)


# --- Tables of labels ---


def test_labels_in_a_table_of_numbers_find_their_images(tmp_path):
    for number in range(12):
        picture(tmp_path / "images" / f"{number:03d}.png", number)
    lines = [f"{number}; {'yes' if number % 2 else 'no'}" for number in range(12)]
    table = tmp_path / "labels.csv"
    table.write_bytes("\r".join(["id; bleeding", *lines]).encode())  # as an old spreadsheet does
    found = manifest_of(tmp_path / "images", labels=table)
    assert [row.label for row in found.rows] == ["no", "yes"] * 6
    main(tmp_path, tmp_path / "m.csv")  # the table beside the images is found
    assert [row["label"] for row in rows_of(tmp_path / "m.csv")] == ["no", "yes"] * 6


def test_labels_of_subjects_find_their_slices_and_choices_are_asked(tmp_path):
    for subject in ("S1", "S2"):
        for number in range(3):
            picture(tmp_path / "images" / f"{subject}_{number}.png", number)
    table = write_csv(tmp_path / "t.csv", "Subject ID,age,CDR\nS1,1,0.5\nS2,2,1\n")
    with pytest.raises(UserError, match="age, CDR: say with --label-column"):
        manifest_of(tmp_path / "images", labels=table)
    found = manifest_of(tmp_path / "images", labels=table, label_column="CDR", patient="^S[0-9]")
    assert [row.label for row in found.rows] == ["0.5"] * 3 + ["1"] * 3
    assert [row.patient_id for row in found.rows] == ["S1"] * 3 + ["S2"] * 3
    picture(tmp_path / "images" / "S3_0.png", 0)
    with pytest.raises(UserError, match="no label of 1 of 7 images, such as S3_0.png"):
        manifest_of(tmp_path / "images", labels=table, label_column="CDR")
    names = ["S1_0.png", "S2_0.png", "T3_0.png"]
    with pytest.raises(UserError, match="finds no patient_id in 1 of 3 paths, such as T3_0.png"):
        ids_in(names, "S[12]", "patient_id")
    with pytest.raises(UserError, match="no regular expression"):
        ids_in(names, "S[12", "patient_id")


@pytest.mark.parametrize(
    "line, words", [("0,,train", "no label of 1 of 2 images"), ("0,x,third", "split 'third'")]
)
def test_a_table_with_an_empty_label_or_an_unknown_part_is_refused(tmp_path, line, words):
    for number in range(2):
        picture(tmp_path / "images" / f"{number}.png", number)
    table = write_csv(tmp_path / "t.csv", f"id,label,split\n{line}\n1,y,Val\n")
    with pytest.raises(UserError, match=words):
        manifest_of(tmp_path / "images", labels=table)
    write_csv(table, "id,label,split\n0,x,TRAIN\n1,y,Val\n")
    found = manifest_of(tmp_path / "images", labels=table)
    assert [row.split for row in found.rows] == ["train", "validation"]


def test_an_archive_behind_a_manifest_is_opened_as_safely_as_one_named(tmp_path, monkeypatch):
    picture(tmp_path / "set" / "0.png", 0)
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    write_csv(tmp_path / "m.csv", "path,label\nset.zip/0.png,x\n")
    assert len(read_raw(tmp_path / "m.csv", any_classes=True)) == 1
    monkeypatch.setattr(files, "LARGEST_FILE", 10)
    with pytest.raises(UserError, match="unpacks to"):
        read_raw(tmp_path / "m.csv", any_classes=True)
    (tmp_path / "set.zip").write_bytes(b"PK, and no archive")
    with pytest.raises(UserError, match="no complete zip"):
        read_raw(tmp_path / "m.csv", any_classes=True)


def test_a_folder_without_classes_and_with_two_tables_asks_which(tmp_path):
    picture(tmp_path / "0.png", 0)
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name, "id,label\n0,x\n")
    with pytest.raises(UserError, match=r"a\.csv, b\.csv.*--labels"):
        manifest_of(tmp_path)


# --- Ids that are given win, and pixels check them ---


def with_ids(raw: RawImages, ids: list[str], **more) -> RawImages:
    return RawImages(
        raw.paths,
        raw.images,
        raw.file_sha256,
        raw.source_split,
        raw.label,
        raw.classes,
        patient=ids,
        **more,
    )


@pytest.fixture(scope="module")
def known(phantom):
    """Real images of the phantom, and the patient of each as an id."""
    raw = read_raw(phantom)
    cohort = build_cohort(raw)[0]
    rows = np.flatnonzero(cohort.kind == "real")
    part = RawImages(
        [raw.paths[row] for row in rows],
        [raw.images[row] for row in rows],
        [raw.file_sha256[row] for row in rows],
        [raw.source_split[row] for row in rows],
        raw.label[rows],
    )
    return part, [f"p{one}" for one in cohort.patient_id[rows]], cohort.slice_index[rows]


def test_given_ids_are_the_patients_and_agree_with_the_pixels(known):
    raw, ids, places = known
    cohort, recovery = build_cohort(with_ids(raw, ids))
    assert len(np.unique(cohort.patient_id)) == 14 and (cohort.kind == "real").all()
    assert recovery.given is not None
    assert (recovery.given.patients, recovery.given.recovered) == (14, 14)
    assert not recovery.given.alike and not recovery.given.divided
    assert (cohort.slice_index == places).mean() > 0.9


def test_two_ids_of_one_head_and_one_id_of_two_heads_are_reported(known):
    raw, ids, _ = known
    half = sum(one == "p0" for one in ids) // 2
    renamed, seen = [], 0
    for one in ids:
        if one == "p0":
            seen += 1
            renamed.append("p0" if seen <= half else "p0b")
        else:
            renamed.append("p1" if one == "p2" else one)
    given = build_cohort(with_ids(raw, renamed))[1].given
    assert given is not None and given.patients == 14
    assert given.alike == [("p0", "p0b")] and given.divided == ["p1"]


def test_an_image_under_two_ids_is_reported(known):
    raw, ids, _ = known
    copied = RawImages(
        [*raw.paths, "z"],
        [*raw.images, raw.images[0]],
        [*raw.file_sha256, "f"],
        [*raw.source_split, ""],
        np.append(raw.label, raw.label[0]),
        patient=[*ids, "other"],
    )
    cohort, recovery = build_cohort(copied)
    assert recovery.given is not None and recovery.given.copied == [("other", ids[0])]
    assert cohort.kind[-1] == "duplicate" and cohort.patient_id[-1] == cohort.patient_id[0]


def test_given_places_and_sessions_order_the_slices(known):
    raw, ids, places = known
    turned = [int(-place) for place in places]
    sessions = ["b" if place % 2 else "a" for place in places]
    cohort, _ = build_cohort(with_ids(raw, ids, session=sessions, slice_index=turned))
    first = np.flatnonzero(np.array(ids) == ids[0])
    order = first[np.argsort(cohort.slice_index[first])]
    assert [sessions[row] for row in order] == sorted(sessions[row] for row in order)
    for name in ("a", "b"):
        inside = [places[row] for row in order if sessions[row] == name]
        assert inside == sorted(inside, reverse=True)


def test_ids_of_some_images_only_are_refused(known):
    raw, ids, _ = known
    with pytest.raises(UserError, match="1 of .* images have no patient_id"):
        build_cohort(with_ids(raw, ["", *ids[1:]]))


def test_patients_of_a_manifest_are_kept_apart_all_the_way(known, tmp_path, monkeypatch):
    """Even where each has a single slice, from which no pixels could tell them apart."""
    raw, ids, places = known
    monkeypatch.setenv("ALZHEIMER_RUNS", str(tmp_path / "runs"))
    lines, number = ["path,label,patient_id"], 0
    for image, label, one, place in zip(raw.images, raw.label, ids, places, strict=True):
        if place in (2, 5):
            number += 1
            Image.fromarray(image).save(tmp_path / f"{number}.png")
            lines.append(f"{number}.png,{FOUR[label]},{one}_{place}")
    write_csv(tmp_path / "m.csv", "\n".join(lines))
    opened = experiment.open_workspace("demo", tmp_path / "m.csv")
    cohort = read_cohort(opened.sets / "cohort.csv")
    assert len(np.unique(cohort.patient_id)) == len(cohort) == 28


# --- Volumes and parquet ---


def head(shape: tuple[int, int, int] = (20, 24, 16)) -> np.ndarray:
    """A volume (right, anterior, superior) that says where it is: brighter towards the front, with
    a mark on the patient's right, and a hat on top."""
    voxels = np.zeros(shape, np.float32)
    voxels[3:-3, 3:-3, 1:-1] = np.linspace(100, 1000, shape[1] - 6)[None, :, None]
    voxels[-6:-3, 3:-3, 1:-1] += 400  # canonical axes count towards the right
    voxels[:, :, -3:] *= 0.5
    return voxels


def test_slices_are_seen_as_radiologists_see_them_and_counted_from_the_top():
    pictures, plane = cut(head(), Slices("axial", 0, 100))
    assert plane == "axial" and [number for number, _ in pictures] == list(range(1, 15))
    image = pictures[7][1].astype(float)
    assert image.shape == (24, 20)
    assert image[:12].mean() > image[12:].mean(), "anterior at the top"
    assert image[:, :10].mean() > image[:, 10:].mean(), "the right on the left"
    assert pictures[0][1].mean() < pictures[5][1].mean(), "the top first"
    assert cut(head(), Slices("coronal", 0, 100))[0][0][1].shape == (16, 20)
    assert cut(head(), Slices("sagittal", 0, 100))[0][0][1].shape == (16, 24)
    assert len(cut(head(), Slices("axial", 0, 100, 3))[0]) == 5


@pytest.mark.parametrize("values", [(50, 20, 1), (-1, 20, 1), (0, 101, 1), (10, 20, 0)])
def test_a_range_of_slices_that_makes_no_sense_is_refused(values):
    with pytest.raises(UserError, match="--slices"):
        Slices("axial", *values)


def test_bids_volumes_in_any_orientation_become_slices_with_ids_and_labels(tmp_path):
    canonical = head()
    for subject, flip in (("01", False), ("02", True)):
        folder = tmp_path / "bids" / f"sub-{subject}" / "ses-1" / "anat"
        folder.mkdir(parents=True)
        voxels, affine = canonical, np.eye(4)
        if flip:  # stored from left to right and front to back, as its affine says
            voxels, affine = canonical[::-1, ::-1], np.diag([-1.0, -1, 1, 1])
        image = nibabel.Nifti1Image(voxels, affine)
        nibabel.save(image, folder / f"sub-{subject}_ses-1_T1w.nii.gz")
    write_csv(
        tmp_path / "bids" / "participants.tsv",
        "participant_id\tage\tdiagnosis\nsub-01\t70\tCN\nsub-02\t71\tAD\n",
    )
    main(tmp_path / "bids", tmp_path / "m.csv", slices=(20, 60))
    rows = rows_of(tmp_path / "m.csv")
    assert {(row["patient_id"], row["session"], row["label"]) for row in rows} == {
        ("sub-01", "ses-1", "CN"),
        ("sub-02", "ses-1", "AD"),
    }
    raw = read_raw(tmp_path / "m.csv", any_classes=True)
    assert raw.classes == ("CN", "AD") and "percentile" in raw.intensity
    first, second = ([raw.images[k] for k in np.flatnonzero(raw.label == v)] for v in (0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(UserError, match=r"NIfTI files and no images.*utils\.manifest"):
        read_raw(tmp_path / "bids")


def test_volumes_without_any_label_and_damaged_ones_are_told(tmp_path):
    nibabel.save(nibabel.Nifti1Image(head(), np.eye(4)), tmp_path / "a_T1.nii.gz")
    with pytest.raises(UserError, match="--label"):
        main(tmp_path, tmp_path / "out" / "m.csv")
    main(tmp_path, tmp_path / "out" / "m.csv", label="healthy")
    assert {row["patient_id"] for row in rows_of(tmp_path / "out" / "m.csv")} == {"a_T1"}
    (tmp_path / "b_T1.nii.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"b_T1\.nii\.gz cannot be read as NIfTI"):
        main(tmp_path, tmp_path / "out" / "m.csv", label="healthy")


def test_a_volume_of_one_slice_is_that_slice(tmp_path):
    image = nibabel.Nifti1Image(head()[:, :, 8], np.eye(4))
    nibabel.save(image, tmp_path / "OAS2_0001_MR1_axl.nii.gz")
    main(tmp_path, tmp_path / "m.csv", label="x", patient="OAS2_[0-9]+", session="MR[0-9]")
    (row,) = rows_of(tmp_path / "m.csv")
    assert (row["patient_id"], row["session"], row["slice_index"]) == ("OAS2_0001", "MR1", "0")
    assert read_raw(tmp_path / "m.csv", any_classes=True).images[0].shape == (24, 20)


def test_a_dicom_series_is_stacked_by_place_and_turned(tmp_path):
    voxels, series = head(), generate_uid()
    for number in np.random.default_rng(0).permutation(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        file = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
        # Rows run to the back, columns to the patient's left: as a scanner writes axial slices.
        plane = voxels[::-1, ::-1, number].T.astype(np.uint16)
        file.SeriesInstanceUID, file.PatientID, file.StudyDate = series, "S7", "20200101"
        file.Rows, file.Columns = plane.shape
        file.PixelSpacing, file.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
        file.ImagePositionPatient = [0, 0, float(number)]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
        file.PixelRepresentation = 0
        file.PixelData = plane.tobytes()
        path = tmp_path / "AD" / "scan" / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        file.save_as(path, enforce_file_format=True)
    main(tmp_path, tmp_path / "m.csv", slices=(0, 100), label="AD")
    rows = rows_of(tmp_path / "m.csv")
    assert {(row["patient_id"], row["session"]) for row in rows} == {("S7", "20200101")}
    made = read_raw(tmp_path / "m.csv", any_classes=True).images
    whole = voxels.astype(np.uint16).astype(np.float32)
    expected = [image for _, image in cut(whole, Slices("axial", 0, 100))[0]]
    assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))


def test_parquet_as_hugging_face_writes_it_keeps_the_names_of_its_labels(tmp_path):
    names = ["Mild_Demented", "Moderate_Demented", "Non_Demented", "Very_Mild_Demented"]

    def content(value: int) -> dict:
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8), 40 * value, np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    def write(path: Path, described: dict) -> None:
        table = pyarrow.table({"image": [content(k) for k in range(4)], "label": [0, 1, 2, 3]})
        metadata = {b"huggingface": json.dumps(described).encode()}
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table.replace_schema_metadata(metadata), path)

    features = {"info": {"features": {"label": {"names": names}}}}
    for part in ("train", "test"):
        write(tmp_path / "hf" / "data" / f"{part}-00000-of-00001.parquet", features)
    main(tmp_path / "hf", tmp_path / "m.csv")
    raw = read_raw(tmp_path / "m.csv")
    assert sorted(raw.source_split) == ["test"] * 4 + ["train"] * 4
    assert raw.label.tolist() == [2, 3, 0, 1] * 2
    with pytest.raises(UserError, match="leave out --patient"):
        main(tmp_path / "hf", tmp_path / "m.csv", patient="x")
    write(tmp_path / "unnamed" / "a.parquet", {})
    with pytest.raises(UserError, match="numbers as labels and does not name them"):
        main(tmp_path / "unnamed", tmp_path / "n.csv")
