"""Models by name, from a cache or the Hub, and sharing: no network is used."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
import torch
from huggingface_hub import ModelCard, SpaceCard

from moveimg.checkpoint import ModelParts, save_model
from moveimg.config import SamplingSettings
from moveimg.files import write_json
from moveimg.pipeline import Pipeline, resolve
from moveimg.pretrained import hub, share
from tests.conftest import lively, tiny_config
from tests.test_cli import ROOT, run
from tests.test_pipeline import NAMES, tiny_tokenizer


@pytest.fixture
def directory(tmp_path):
    generator = lively(tiny_config(memory={"kind": "move", "slots": 2}), dtype=torch.float32)
    parts = ModelParts(generator, tiny_tokenizer(), NAMES, SamplingSettings(cfg_scale=1.5))
    about = {"step": 30, "val": {"loss": 1.23456, "accuracy": 0.5}, "run": {"out": "/home/anna/x"}}
    save_model(tmp_path / "model", parts, about)
    return tmp_path / "model"


@pytest.fixture
def api(tmp_path, monkeypatch):
    """A Hub that copies what is uploaded into the folder `uploaded`."""

    class Api:
        def create_repo(self, repo_id, *, exist_ok, private, repo_type, space_sdk=None):
            Api.created = (repo_id, private, repo_type, space_sdk)

        def upload_folder(self, *, repo_id, folder_path, repo_type):
            shutil.copytree(folder_path, tmp_path / "uploaded")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return Api


def test_offline_one_line_names_the_files_and_the_command(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError) as error:
        Pipeline.from_pretrained("llamagen-l-384")
    command = "moveimg convert llamagen --gpt c2i_L_384.pt --vq vq_ds16_c2i.pt --image-size 384"
    assert f"`{command}" in str(error.value) and "\n" not in str(error.value)
    for name in ("owner/name", "nothing"):
        with pytest.raises(FileNotFoundError, match=name):
            resolve(name)


def test_published_names_are_converted_once(tmp_path, monkeypatch, directory):
    for file in ("c2i_XL_384.pt", "vq_ds16_c2i.pt"):
        (tmp_path / file).write_text("")
    convert = Mock(side_effect=lambda gpt, vq, out, *_: shutil.copytree(directory, out))
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    monkeypatch.setattr(hub, "convert_llamagen", convert)
    out = tmp_path / "cache/llamagen-xl-384"
    assert [resolve("llamagen-xl-384") for _ in range(2)] == [out, out]
    files = tmp_path / "c2i_XL_384.pt", tmp_path / "vq_ds16_c2i.pt"
    convert.assert_called_once_with(*files, out, 384, None)


def test_hub_ids_load_what_push_uploads(monkeypatch, directory, tmp_path, api):
    uploaded = tmp_path / "uploaded"
    address = run("push", directory, "owner/name", "--private", "--license", "mit").stdout
    assert address == "https://huggingface.co/owner/name\n"
    assert api.created == ("owner/name", True, "model", None)
    files = {str(p.relative_to(uploaded)) for p in uploaded.rglob("*") if p.is_file()}
    assert files == {*hub.MODEL_FILES, "README.md", "pipeline.py", "model_index.json"}
    assert ModelCard.load(uploaded / "README.md").data.license == "mit"
    about = json.loads((uploaded / "config.json").read_text())["about"]
    assert about.keys() == {"step", "val"}  # no folder of this machine
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: uploaded)
    images = [Pipeline.from_pretrained(where, device="cpu").sample([1], seed=4)[0].tobytes()
              for where in ("owner/name", directory)]  # fmt: skip
    assert images[0] == images[1]
    (uploaded / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"owner/name.*classes\.json"):
        resolve("owner/name")


def test_the_card_has_metadata_config_settings_classes_and_results(directory):
    results = {"metrics": {"fid": 5.62814, "by_class": [1.0], "kid": None}}
    results |= {"reference": {"name": "a/imagenet256"}}
    text = share.model_card(
        directory, "owner/name", results, license="mit", datasets=["ILSVRC/imagenet-1k"]
    )
    for part in (
        'Pipeline.from_pretrained("owner/name")', "'kind': 'move'", "'slots': 2", "goldfish",
        "| cfg_scale | 1.5 |", "## Classes (5)", "imagenet256: fid | 5.6281", "custom_pipeline",
    ):  # fmt: skip
        assert part in text, part
    data = ModelCard(text).data
    assert data.library_name == "moveimg" and {"move-memory", "diffusers"} <= {*data.tags}
    assert data.license == "mit" and data.datasets == ["ILSVRC/imagenet-1k"]
    assert data.pipeline_tag == share.TASK and data.base_model is None
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert scores == {
        ("held-out images", "loss"): 1.2346, ("held-out images", "accuracy"): 0.5,
        ("imagenet256", "fid"): 5.6281,
    }  # fmt: skip
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", config | {"about": {"source": "LlamaGen"}})
    assert ModelCard(share.model_card(directory, "a/b")).data.base_model == hub.REPO


def test_push_names_what_is_missing_or_refused(directory, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        share.write_model(tmp_path, tmp_path / "out", "owner/name")

    fail = Mock(side_effect=RuntimeError("no route\nto anywhere"))  # httpx's are no OSErrors
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    with pytest.raises(OSError, match=r"owner/name: .*no route to anywhere$"):
        share.upload(directory, "owner/name")


def test_a_space_serves_the_demo(directory, tmp_path, api):
    run("push", directory, "me/show", "--space")
    assert api.created == ("me/show", False, "space", "gradio")
    card = SpaceCard.load(tmp_path / "uploaded" / "README.md").data
    assert (card.title, card.sdk, card.app_file) == ("show", "gradio", "app.py")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    space = {"SPACE_HOST": "me-show.hf.space", "GRADIO_SERVER_PORT": port}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "uploaded" / "app.py"],
        env=os.environ | space | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout.readline()
        page = httpx.get(
            f"http://127.0.0.1:{port}", headers={"host": space["SPACE_HOST"]}, trust_env=False
        )
        assert page.status_code == 200
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def diffusion(directory, tmp_path):
    """The model as diffusers loads it from a directory that push wrote."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    path = str(tmp_path / "pushed")
    share.write_model(directory, Path(path), "owner/name")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        path, custom_pipeline=path, trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_diffusers_draws_what_moveimg_draws(diffusion, directory):
    seed = int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(3)))
    images = diffusion([1, "goldfish"], 2.0, 2, torch.Generator().manual_seed(3)).images
    expected = Pipeline.from_pretrained(directory, device="cpu").sample(1, seed=seed, cfg_scale=2.0)
    assert len(images) == 4 and images[0].tobytes() == expected[0].tobytes()
    again = diffusion(1, 2.0, generator=[torch.Generator().manual_seed(3)], output_type="np")
    assert (again.images[0] * 255).round().astype("uint8").tobytes() == images[0].tobytes()
    for wrong in ({"output_type": "jpg"}, {"generator": []}, {"guidance_scale": float("nan")}):
        with pytest.raises(ValueError):
            diffusion(1, **wrong)
