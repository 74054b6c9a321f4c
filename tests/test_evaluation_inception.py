"""Inception, with random weights in torch-fidelity's file layout: few images, for it is slow."""

from __future__ import annotations

from urllib.error import URLError

import numpy as np
import pytest
import torch
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

from moveimg.evaluation import inception
from moveimg.evaluation.features import extract
from moveimg.evaluation.inception import NAME, SPATIAL, load_inception
from moveimg.evaluation.reference import open_reference, write_reference
from moveimg.evaluation.scoring import Guards, score
from moveimg.evaluation.sets import scan_image_set
from tests import reference_metrics as plain
from tests.reference_metrics import array_set

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    plain.random_inception(path)
    return path


@pytest.fixture(scope="session")
def extractor(weights):
    return load_inception(weights, torch.device("cpu"))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def features(extractor, cache):
    images = array_set("images", IMAGES)
    return extract(images, scan_image_set(images).digest, extractor, cache, batch_size=4)


def test_the_spatial_layer_is_mixed_6_by_hand_and_channels_last(features, weights):
    network = FEATURE_EXTRACTORS_REGISTRY["inception-v3-compat"](
        "inception-v3-compat", ["2048", "logits_unbiased"], str(weights)
    )
    assert features["sfid"].shape == (6, 2023)
    with torch.inference_mode():
        by_hand = plain.spatial_features(network, IMAGES[:2])
        pool, logits = network(torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2))
    assert np.allclose(features["sfid"][:2], by_hand, atol=1e-5) and by_hand.std() > 0.1
    assert np.allclose(features["fid"][:2], pool, rtol=1e-4, atol=1e-5)
    assert np.allclose(features["logits"][:2], logits, rtol=1e-4, atol=1e-4)


def test_torch_fidelity_knows_the_layer_by_name(features, weights):
    """What torch_fidelity.calculate_metrics(feature_extractor=..., feature_layer_fid=...) runs."""
    found = extract_featuresdict_from_input_id(
        1, create_feature_extractor(NAME, [SPATIAL], cuda=False, verbose=False,
                                    feature_extractor_weights_path=str(weights)),
        input1=plain.Tensors(IMAGES[:2]), cuda=False, verbose=False, batch_size=2,
        save_cpu_ram=True,
    )  # fmt: skip
    assert np.allclose(found[SPATIAL], features["sfid"][:2], atol=1e-5)


def test_a_set_is_looked_at_once(extractor, cache, features, monkeypatch):
    def never(*_):
        raise AssertionError("the network was asked again")

    monkeypatch.setattr("moveimg.evaluation.features.run", never)
    images = array_set("the same pixels, another name", IMAGES)
    again = extract(images, scan_image_set(images).digest, extractor, cache)
    assert (again["fid"] == features["fid"]).all()
    with pytest.raises(AssertionError, match="asked again"):
        extract(images, "another content", extractor, cache)
    with pytest.raises(ValueError, match="too-few-samples"):
        extract(array_set("three", IMAGES[:3]), "three", extractor, cache)


def test_every_number_comes_from_a_set_and_a_reference_file(
    extractor, cache, features, tmp_path, monkeypatch
):
    monkeypatch.setattr("moveimg.evaluation.scoring.compute", lambda *_: {"fid": 1.0})
    made = write_reference(tmp_path / "r.npz", array_set("r", IMAGES), extractor, cache, "train")
    assert made["count"] == 6 and made["extractor"] == extractor.fingerprint
    with np.load(tmp_path / "r.npz") as stored:  # ADM's names, and its images
        assert set(stored) == {"mu", "sigma", "mu_s", "sigma_s", "arr_0", "about"}
        assert (stored["arr_0"] == IMAGES).all()
        assert np.allclose(stored["mu"], features["fid"].astype(np.float64).mean(0))
        assert stored["sigma_s"].shape == (2023, 2023)
    reference = open_reference(str(tmp_path / "r.npz"), (16, 16), extractor, cache)
    assert set(reference.statistics) == {"fid", "sfid"} and len(reference.features) == 6
    found = score(array_set("samples", IMAGES), reference, extractor, cache, Guards())
    assert found["reference"]["sha256"] == reference.digest
    assert [line.split(":")[0] for line in found["warnings"]] == [
        "too-few-samples", "missing-labels",
    ]  # fmt: skip


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_never_run_code(tmp_path):
    torch.save({"fc.weight": Marker(tmp_path / "marker")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad.pth") as caught:
        load_inception(tmp_path / "bad.pth", torch.device("cpu"))
    assert not (tmp_path / "marker").exists() and "weights_only" not in str(caught.value)


def test_weights_that_are_none_are_named(tmp_path):
    where = torch.device("cpu")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_inception(tmp_path / "nowhere.pth", where)
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name}.pth") as caught:
            load_inception(tmp_path / f"{name}.pth", where)
        assert "\n" not in str(caught.value)


def test_offline_one_line_says_what_to_bring(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match="weights-inception") as caught:
        load_inception(None, torch.device("cpu"))
    assert inception.URL_INCEPTION_V3 in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"VIRTUAL_imagenet256_labeled.npz") as caught:
        open_reference("imagenet256", (256, 256), None, tmp_path)
    assert str(tmp_path) in str(caught.value)
