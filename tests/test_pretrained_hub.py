"""Models by name, from a cache or the Hub, and sharing: no network is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moveimg.checkpoint import ModelParts, load_model, save_model
from moveimg.config import SIZES, SamplingSettings, TrainConfig
from moveimg.files import atomic_directory, write_json
from moveimg.pipeline import Pipeline, resolve
from moveimg.pretrained import hub, llamagen, share
from tests.conftest import lively, tiny_config
from tests.test_pipeline import NAMES, tiny_tokenizer


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """huggingface_hub with an empty cache, and told to stay off the network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model_directory(tmp_path):
    generator = lively(tiny_config(memory={"kind": "move", "slots": 2}), dtype=torch.float32)
    parts = ModelParts(generator, tiny_tokenizer(), NAMES, SamplingSettings(cfg_scale=1.5))
    about = {"step": 30, "val": {"loss": 1.23456, "accuracy": 0.5}}
    save_model(tmp_path / "model", parts, about)
    return tmp_path / "model"


def model_config(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.usefixtures("offline")
def test_offline_one_line_says_what_is_missing_and_how_to_bring_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        Pipeline.from_pretrained("llamagen-l-384")
    message = str(error.value)
    assert "c2i_L_384.pt and vq_ds16_c2i.pt of huggingface.co/FoundationVision/LlamaGen" in message
    command = "moveimg convert llamagen --gpt c2i_L_384.pt --vq vq_ds16_c2i.pt --image-size 384"
    assert f"`{command} --out {tmp_path / 'cache' / 'llamagen-l-384'}`" in message
    assert "\n" not in message
    with pytest.raises(FileNotFoundError, match=r"no model 'owner/name'.*cannot be downloaded"):
        resolve("owner/name")
    with pytest.raises(FileNotFoundError, match=r"llamagen-b-256, .* or a Hugging Face Hub id"):
        resolve("nothing")


def test_published_names_are_converted_once_and_kept(tmp_path, monkeypatch, model_directory):
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path / "cache"))
    for file in ("c2i_XL_384.pt", "vq_ds16_c2i.pt"):
        (tmp_path / file).write_text("")
    asked = []

    def convert(gpt, vq_file, out, image_size):
        asked.append((gpt.name, vq_file.name, image_size))
        with atomic_directory(out) as temporary:
            save_model(temporary, load_model(model_directory), {})

    monkeypatch.setattr(hub, "_snapshot", lambda repo, files: tmp_path)
    monkeypatch.setattr(hub, "convert_llamagen", convert)
    for _ in range(2):
        assert resolve("llamagen-xl-384") == tmp_path / "cache" / "llamagen-xl-384"
    assert asked == [("c2i_XL_384.pt", "vq_ds16_c2i.pt", 384)]


def test_every_published_name_has_a_size_with_settings():
    for name, entry in hub.PUBLISHED.items():
        size = entry.file.split("_")[1]
        assert size in SIZES and size in llamagen.PUBLISHED_CFG
        assert name == f"llamagen-{size.lower()}-{entry.image_size}"


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MOVEIMG_CACHE", str(tmp_path))
    assert hub.cache_directory() == tmp_path
    monkeypatch.delenv("MOVEIMG_CACHE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", "/elsewhere")
    assert hub.cache_directory() == Path("/elsewhere/moveimg")


def test_hub_ids_load_what_push_uploads(monkeypatch, model_directory, tmp_path):
    from huggingface_hub import CommitOperationAdd

    uploaded = tmp_path / "uploaded"

    class Api:
        def create_repo(self, repo_id, *, exist_ok, private):
            assert (repo_id, exist_ok, private) == ("owner/name", True, True)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            assert repo_id == "owner/name"
            for path in sorted(p for p in folder_path.rglob("*") if p.is_file()):
                file = str(path.relative_to(folder_path))
                operation = CommitOperationAdd(path_in_repo=file, path_or_fileobj=path)
                (uploaded / file).parent.mkdir(parents=True, exist_ok=True)
                with operation.as_file() as content:
                    (uploaded / file).write_bytes(content.read())

    url = share.push(model_directory, "owner/name", private=True, api=Api())
    assert url == "https://huggingface.co/owner/name"
    files = {str(p.relative_to(uploaded)) for p in uploaded.rglob("*") if p.is_file()}
    assert files == {*hub.MODEL_FILES, "README.md"}
    assert not (model_directory / "README.md").exists()
    monkeypatch.setattr(hub, "_snapshot", lambda repo, wanted: uploaded)
    pictures = [Pipeline.from_pretrained(where, device="cpu").sample([1], seed=4)[0].tobytes()
                for where in ("owner/name", model_directory)]  # fmt: skip
    assert pictures[0] == pictures[1]
    (uploaded / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"is no moveimg model.*lacks classes\.json"):
        resolve("owner/name")


def test_push_publishes_no_folder_of_this_machine(model_directory, tmp_path):
    run = {
        "out": "/home/anna/out", "steps": 30, "init_from": "llamagen-b-256", "dtype": "auto",
        "data": {"codes": None, "images": {"source": "/home/anna/photos", "size": 8,
                 "crops": "ten", "ranges": [1.0]}, "tokenizer": "/home/anna/vq"},
        "model": {"n_layer": 1, "n_head": 1, "width": 8},
        "evaluation": {"every": 5, "reference": "/home/anna/r.npz", "extractor": "/home/anna/e",
                       "inception_weights": "/home/anna/w"},
    }  # fmt: skip
    config = model_config(model_directory)
    before = {"step": 30, "run": TrainConfig.model_validate(run).model_dump(mode="json")}
    config["about"] = {"source": "upcycled", "from": "anna", "before": before}
    write_json(model_directory / "config.json", config)
    uploaded = {}

    class Api:
        def create_repo(self, *_, **__):
            pass

        def upload_folder(self, *, folder_path, **_):
            uploaded.update(model_config(folder_path))

    share.push(model_directory, "owner/name", api=Api())
    assert "anna" not in json.dumps(uploaded)
    assert uploaded["model"] == config["model"] and uploaded["about"]["source"] == "upcycled"
    kept = uploaded["about"]["before"]["run"]
    assert kept["steps"] == 30 and kept["init_from"] == "llamagen-b-256"
    assert kept["data"] == {"codes": None, "images": {"size": 8, "crops": "ten", "ranges": [1.0]}}
    assert model_config(model_directory) == config  # what lies here keeps them


def test_every_setting_that_is_a_path_is_known_as_local():
    schema = TrainConfig.model_json_schema()
    parts = [schema, *schema["$defs"].values()]
    paths = {
        name for part in parts for name, field in part.get("properties", {}).items()
        if '"format": "path"' in json.dumps(field)
    }  # fmt: skip
    assert paths and paths <= share.LOCAL


def test_the_card_tells_config_settings_classes_and_results(model_directory):
    card = share.model_card(model_directory, "owner/name")
    for part in (
        'Pipeline.from_pretrained("owner/name")', "kind move, slots 2", "| cfg_scale | 1.5 |",
        "goldfish", "## Classes (5)", "3 x 4 out of 11", "| loss | 1.2346 |", "after 30 steps",
    ):  # fmt: skip
        assert part in card, part
    assert card.startswith("---\nlibrary_name: moveimg\n")


def test_push_refuses_what_is_no_model_or_no_name(model_directory, tmp_path):
    with pytest.raises(ValueError, match="'name': expected the Hub's owner/name"):
        share.push(model_directory, "name")
    with pytest.raises(FileNotFoundError, match=r"no whole model here \(it lacks config\.json\)"):
        share.push(tmp_path, "owner/name")

    class Closed:
        def create_repo(self, *_, **__):
            raise RuntimeError("no route\nto anywhere")  # httpx's errors are no OSErrors

    with pytest.raises(OSError, match=r"owner/name: not uploaded: no route$"):
        share.push(model_directory, "owner/name", api=Closed())
