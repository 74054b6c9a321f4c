"""Sets on disk, what is looked for in them, and results."""

from __future__ import annotations

import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from moveimg.config import SamplingSettings
from moveimg.evaluation.results import read_results, results_table, write_results
from moveimg.evaluation.sample import class_labels
from moveimg.evaluation.scoring import (
    Guards,
    check_labels,
    check_metrics,
    check_pair,
    check_set,
    match_labels,
)
from moveimg.evaluation.sets import ImageSet, open_set, scan_image_set, write_npz
from tests.reference_metrics import array_set


def random_images(count: int = 7, size: tuple[int, int] = (6, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def read_all(images, batch: int = 3) -> np.ndarray:
    return np.concatenate(list(images.read(batch)))


def parts_of(images: np.ndarray, batch: int = 3):
    return (images[i : i + batch] for i in range(0, len(images), batch))


# --- files ---------------------------------------------------------------------------------


def test_an_npz_is_adms_and_its_bytes_follow_from_its_pixels(tmp_path):
    images, labels = random_images(), np.arange(7) % 3
    write_npz(tmp_path / "a.npz", parts_of(images), labels)
    write_npz(tmp_path / "b.npz", parts_of(images, 2), labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as stored:
        assert (stored["arr_0"] == images).all() and (stored["arr_1"] == labels).all()
    opened = open_set(tmp_path / "a.npz")
    assert opened.shape == (7, 6, 5) and (opened.labels == labels).all()
    assert (read_all(opened) == images).all()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # for more than 4 GB: zip64 from the start
        entry = archive.getinfo("arr_0.npy")
        assert entry.extract_version >= 45 and entry.compress_type == zipfile.ZIP_STORED


def test_a_compressed_npz_of_another_program_is_read(tmp_path):
    np.savez_compressed(tmp_path / "c.npz", random_images())
    opened = open_set(tmp_path / "c.npz")
    assert opened.labels is None and (read_all(opened) == random_images()).all()


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (random_images().astype(np.float32) / 255, "wrong-mode.*float32"),
        (random_images()[..., 0], r"wrong-mode.*\[7, 6, 5\]"),
        (random_images()[:0], r"wrong-mode.*\[0, "),
        (np.moveaxis(random_images(), 3, 1).copy(), "wrong-mode"),
    ],
)
def test_arrays_that_are_no_rgb_bytes_are_refused(tmp_path, array, part):
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match=part):
        open_set(tmp_path / "x.npz")


def test_damaged_and_missing_sets_are_named(tmp_path):
    write_npz(tmp_path / "a.npz", parts_of(random_images()), np.zeros(7))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut.npz"):
        open_set(tmp_path / "cut.npz")
    flipped = bytearray(whole)
    flipped[whole.index(random_images().tobytes()[:20])] ^= 1  # the archive's checksum notices
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(ValueError, match=r"flipped.npz: .*CRC"):
        scan_image_set(open_set(tmp_path / "flipped.npz"))
    np.savez(tmp_path / "none.npz", mu=np.zeros(2))
    with pytest.raises(ValueError, match="arr_0"):
        open_set(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_set(tmp_path / "nowhere.npz")


def damaged_npz(path, entry: bytes, name: str = "arr_0.npy") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, entry)


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"


@pytest.mark.parametrize(
    "entry",
    [
        b"", b"PK\x03\x04", b"\x93NUMPY\x09\x00",
        *(
            b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
            for text in ("{'descr': (", "x" * 9, HEADER % "-1, 4, 4, 3", HEADER % "10**30, 4, 4, 3",
                         HEADER % "9, 4, 4, 3")
        ),
    ],
)  # fmt: skip
def test_broken_headers_end_in_one_line(tmp_path, entry):
    damaged_npz(tmp_path / "x.npz", entry)
    with pytest.raises(ValueError, match=r"x.npz") as caught:
        read_all(open_set(tmp_path / "x.npz"))
    assert "\n" not in str(caught.value)


def test_archives_that_lie_about_their_entries_are_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, random_images())
    raw = bytearray(path.read_bytes())
    raw[-6:-2] = (int.from_bytes(raw[-6:-2], "little") + 1000).to_bytes(4, "little")
    path.write_bytes(raw)  # the directory's place: the entries come to lie before the file
    with pytest.raises(ValueError, match=r"x\.npz"):
        open_set(path)
    np.savez(path, random_images())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("arr_1.npy", b"{}")
    with pytest.raises(ValueError, match="arr_1"):
        open_set(path)


@pytest.mark.parametrize("labels", [["a"] * 7, [0.5] * 7, [np.nan] * 7, [0] * 3, [-1] * 7])
def test_labels_that_are_not_seven_whole_numbers_are_refused(tmp_path, labels):
    np.savez(tmp_path / "x.npz", random_images(), labels)
    with pytest.raises(ValueError, match=r"x.npz: .*labels"):
        open_set(tmp_path / "x.npz")


def test_subfolders_are_classes_and_odd_images_are_refused(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.fromarray(random_images(1)[0]).save(tmp_path / name / "x.png")
    opened = open_set(tmp_path)
    assert opened.labels.tolist() == [0, 1] and opened.class_names == ("a", "b")
    assert (read_all(opened) == random_images(1)[[0, 0]]).all()
    Image.fromarray(random_images(1)[0]).convert("L").save(tmp_path / "b" / "y.png")
    with pytest.raises(ValueError, match=r"wrong-mode.*y.png is L: expected RGB"):
        read_all(open_set(tmp_path))
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "y.png")
    with pytest.raises(ValueError, match=r"wrong-size.*y.png is \(9, 9\)"):
        read_all(open_set(tmp_path))
    (tmp_path / "b" / "y.png").write_text("no image")
    with pytest.raises(ValueError, match=r"y.png: cannot be read"):
        read_all(open_set(tmp_path))


def test_a_look_counts_duplicates_and_blank_images():
    images = random_images()
    images[3], images[5] = images[0], 0
    images[6] = (10, 20, 30)
    content = scan_image_set(array_set("set", images))
    assert (content.duplicates, content.blank) == (1, 2)
    assert scan_image_set(array_set("again", images)).digest == content.digest
    assert scan_image_set(array_set("turned", images[::-1])).digest != content.digest
    assert scan_image_set(array_set("flat", images.reshape(7, 5, 6, 3))).digest != content.digest


# --- guards --------------------------------------------------------------------------------


def names(guards) -> list[str]:
    return [line.split(":")[0] for line in guards.lines]


def set_of(images: np.ndarray, labels=None, width=2, n_classes=None, allowed=()) -> list[str]:
    images_set, guards = array_set("set", images, labels), Guards(allowed)
    check_set(images_set, scan_image_set(images_set), width, n_classes, guards)
    return names(guards)


def test_each_fault_of_a_set_has_its_name():
    images, labels = random_images(40), class_labels(np.arange(40), 10)
    assert set_of(images, labels, n_classes=10) == []
    assert set_of(images, labels, width=40) == ["too-few-samples"]
    assert set_of(images, labels, width=2048) == ["too-few-samples"]
    assert set_of(images) == ["missing-labels"]
    assert set_of(images, np.sort(labels)) == ["sorted-labels"]
    assert set_of(images, np.where(labels == 9, 8, labels)) == ["unbalanced-labels"]
    assert set_of(images, labels, n_classes=11) == ["unbalanced-labels"]  # a class never drawn
    twice = np.concatenate([images[:20], images[:20]])
    twice[0] = 0
    assert set_of(twice, labels) == ["blank-images", "duplicate-images"]
    with pytest.raises(ValueError, match="narrow-range"):
        set_of(images % 2, labels)


def test_sets_that_are_broken_throughout_are_refused_unless_allowed():
    black, labels = np.zeros((40, 6, 5, 3), np.uint8), class_labels(np.arange(40), 10)
    with pytest.raises(ValueError, match="--allow blank-images"):
        set_of(black, labels)
    with pytest.raises(ValueError, match="--allow duplicate-images"):
        set_of(black, labels, allowed=["blank-images"])
    both = ["blank-images", "duplicate-images"]
    assert set_of(black, labels, allowed=both) == both


@pytest.mark.parametrize(
    ("size", "split", "wanted", "name"),
    [
        ((6, 5), "train", "train", None),
        (None, None, "val", None),
        ((5, 6), None, "train", "wrong-size"),
        ((6, 5), "val", "train", "validation-reference"),
        ((6, 5), "train", "val", "training-reference"),
    ],
)
def test_another_resolution_and_the_other_split_are_refused(size, split, wanted, name):
    reference, guards = SimpleNamespace(name="r", size=size, split=split), Guards([name])
    check_pair((6, 5), reference, guards, wanted)
    assert names(guards) == ([name] if name else [])
    if name:
        with pytest.raises(ValueError, match=f"^{name}: "):
            check_pair((6, 5), reference, Guards(), wanted)


@pytest.mark.parametrize("n_classes", [1, 2, 10, 1000])
def test_labels_are_balanced_mixed_and_of_the_index_alone(n_classes):
    count = 5 * n_classes + n_classes // 2
    labels = class_labels(np.arange(count), n_classes)
    counts = np.bincount(labels, minlength=n_classes)
    guards = Guards()
    check_labels(labels, n_classes, guards)
    assert counts.max() - counts.min() <= 1 and not guards.lines
    some = np.array([count - 1, 3 % count, 0])
    assert (class_labels(some, n_classes) == labels[some]).all()
    assert np.bincount(labels[n_classes : 2 * n_classes], minlength=n_classes).tolist() == (
        [1] * n_classes
    )


# --- results -------------------------------------------------------------------------------


def result(name: str, space: str = "Inception", **metrics: float) -> dict:
    return {
        "name": name, "metrics": metrics, "samples": {"count": 50000},
        "reference": {"name": "some/where/imagenet256", "sha256": "r"},
        "extractor": {"space": space, "sha256": "e"},
        "warnings": [],
    }  # fmt: skip


def test_rows_lie_side_by_side_with_published_ones_marked(tmp_path):
    write_results(tmp_path / "r.json", result("mine", fid=3.456, sfid=5.0, precision=0.8123))
    table = results_table([read_results(tmp_path / "r.json")], published=True).splitlines()
    assert table[0].startswith("|  | images | FID | sFID | IS (ADM) | precision | recall |")
    assert table[2] == "| mine | 50,000 | 3.456 | 5.000 |  | 0.812 |  | imagenet256 |"
    rows = [row for row in table if "LlamaGen-L, 384" in row]
    assert rows == [
        "| LlamaGen-L, 384 (published) | 50,000 | 3.07 |  | 256.1 | 0.83 | 0.52 | imagenet256 |"
    ]
    columns = {row.count("|") for row in table if row.startswith("|")}
    assert columns == {9}


def test_published_rows_stay_away_from_other_feature_spaces():
    table = results_table([result("small", "a classifier", fid=1.0, accuracy=0.5)], published=True)
    assert "published" not in table and "Feature space: a classifier." in table
    mixed = results_table([result("a", "one", fid=1.0), result("b", "two", fid=1.0)])
    assert "feature space" in mixed and "| one |" in mixed and "| two |" in mixed


def test_a_row_names_the_guidance_it_was_drawn_with():
    sampling = SamplingSettings(cfg_scale=1.75, top_k=50).model_dump()
    drawn = result("mine", fid=1.0, sfid=2.0) | {"plan": {"sampling": sampling}}
    table = results_table([drawn, result("theirs", fid=1.0)], published=True)
    assert "| cfg_scale 1.75, top_k 50 | imagenet256 |" in table
    assert "| theirs | 50,000 | 1.000 |  |  |  |  |  | imagenet256 |" in table
    assert len({row.count("|") for row in table.splitlines() if row.startswith("|")}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"format": 9, "metrics": {}}', '{"format": 1}',
        json.dumps({"format": 1} | result("mine", fid=1.0) | {"samples": 3}),
    ],
)  # fmt: skip
def test_files_that_are_no_results_are_named(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r.json"):
        read_results(tmp_path / "r.json")


def classifier(names):
    return SimpleNamespace(class_names=names)


def named_set(labels, class_names=None):
    labels = np.asarray(labels)
    return ImageSet("x", (len(labels), 8, 8), labels, iter, class_names)


@pytest.mark.parametrize(
    ("labels", "folders", "expected"),
    [
        ([0, 1, 1], ("bag", "dress"), [1, 0, 0]),
        ([0, 1], ("0", "2"), [0, 2]),
        ([0, 1, 2], None, [0, 1, 2]),
        ([0, 1], ("bag", "hat"), "hat"),
        ([1, 2, 3], None, "3"),  # counted from one
    ],
)
def test_labels_meet_the_classifiers_classes(labels, folders, expected):
    guards, ours = Guards(), SimpleNamespace(class_names=("dress", "Bag", "coat"))
    images = ImageSet("x", (len(labels), 8, 8), np.asarray(labels), iter, folders)
    found = match_labels(images, ours, guards)
    if isinstance(expected, str):
        assert found is None and expected in guards.lines[0]
    else:
        assert found.tolist() == expected and not guards.lines


def test_numbers_that_mislead_are_named():
    guards = Guards()
    check_metrics({"precision": 0.86, "recall": 0.5}, guards)
    assert not guards.lines
    check_metrics({"precision": 0.86, "recall": 0.009}, guards)
    assert names(guards) == ["low-recall"]
    with pytest.raises(ValueError, match="fid is nan"):
        check_metrics({"fid": float("nan")}, guards)
