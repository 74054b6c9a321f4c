"""LlamaGen's generators, in files made here; models by name, from a cache or the Hub, and sharing.

No network is used.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from functools import reduce
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import typer
from huggingface_hub import ModelCard, SpaceCard
from safetensors.torch import save_file

import tokenizer as vq
from moveimg.checkpoint import load_model
from moveimg.commands import app
from moveimg.config import ModelConfig
from moveimg.files import write_json
from moveimg.model import Transformer
from moveimg.pipeline import Pipeline, resolve
from moveimg.pretrained import hub, llamagen, share
from tests.conftest import NAMES, random_inputs, random_model, tiny_config
from tests.reference import reference_logits
from tests.test_cli import run

LABELS = "cls_embedding.embedding_table.weight"
# LlamaGen's names of the tensors of a layer, and of our tensors that it calls otherwise.
LAYER = {"attention.wqkv", "attention.wo", "attention_norm", "ffn_norm"}
LAYER |= {f"feed_forward.w{i}" for i in (1, 2, 3)}
THEIRS = {"label_embedding": "cls_embedding.embedding_table", "code_embedding": "tok_embeddings",
          ".ffn.": ".feed_forward.", "head.": "output."}  # fmt: skip
CONFIG = tiny_config(grid=[3, 3], ffn={"kind": "swiglu", "hidden": 24})


def rename(weights):
    """A state dict under LlamaGen's names."""
    return {
        reduce(lambda key, ours: key.replace(ours, THEIRS[ours]), THEIRS, name): value
        for name, value in weights.items()
    }


def write(folder, container=None, name="gpt.pt", **changes):
    weights = rename(random_model(CONFIG, dtype=torch.float32).state_dict()) | changes
    weights = {key: value for key, value in weights.items() if value is not None}
    file = folder / name
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save({container: weights, "steps": 3} if container else weights, file)
    return file


def load(file, image_size=12, n_head=2):
    return llamagen.load_llamagen(file, 4, image_size, n_head)


@pytest.fixture(scope="module")
def vq_file(tmp_path_factory):
    """A small LlamaGen tokenizer (2 pixels per code)."""
    torch.manual_seed(0)
    config = vq.VQConfig(
        width=32, multipliers=(1, 2), n_res_blocks=1, z_channels=8,
        codebook_size=11, codebook_dim=4, attention=False,
    )  # fmt: skip
    used, file = {"quantize.codebook_used": torch.zeros(9)}, tmp_path_factory.mktemp("vq") / "vq.pt"
    torch.save({"model": vq.AutoencoderTokenizer(config).state_dict() | used}, file)
    return file


@pytest.mark.parametrize("container", ["model", "module", None])
def test_logits_equal_the_reference(tmp_path, container):
    plain = random_model(CONFIG, dtype=torch.float32)
    names = {name.removeprefix("layers.0.") for name in rename(plain.state_dict())}
    assert names >= {f"{name}.weight" for name in LAYER}
    model = load(write(tmp_path, container)).double()
    assert model.config == CONFIG
    codes, labels = random_inputs(CONFIG)
    for i, logits in enumerate(model(codes, labels)):
        expected = torch.from_numpy(reference_logits(plain.double(), codes[i], labels[i]))
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        assert logits.std() > 0.1
    half = {name: value.bfloat16() for name, value in rename(plain.state_dict()).items()}
    assert load(write(tmp_path, name="x.safetensors", **half)).head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("size", llamagen.PUBLISHED_CFG)
def test_named_sizes_need_no_heads_and_published_files_no_image_size(tmp_path, size):
    expected = ModelConfig.model_validate({"size": size, "grid": [24, 24]})
    with torch.device("meta"):
        state = Transformer(expected).state_dict()
    # expanded from one number: real sizes in a small file
    one = torch.zeros(1).bfloat16()
    weights = {key: one.expand(value.shape) for key, value in rename(state).items()}
    file = tmp_path / f"c2i_{size}_384.pt"
    torch.save({"model": weights, "freqs_cis": None}, file)
    assert llamagen.load_llamagen(file).config == expected


@pytest.mark.parametrize(
    ("changes", "arguments", "value"),
    [
        ({"norm.weight": None}, {}, "'norm.weight' is absent, expected [16]"),
        ({"extra.weight": torch.zeros(1)}, {}, "'extra.weight' is [1], expected absent"),
        ({"output.weight": torch.zeros(3, 16)}, {}, "is [3, 16], expected [11, 16]"),
        ({"norm.weight": torch.zeros(16, dtype=torch.int)}, {}, "torch.int32"),
        ({"norm.weight": torch.full((16,), torch.nan)}, {}, "NaN"),
        ({LABELS: None}, {}, "label_embedding"),
        ({"tok_embeddings.weight": torch.zeros(3)}, {}, "gpt.pt"),
        ({}, {"image_size": None}, "--image-size"),
        ({}, {"image_size": 13}, "image size 13"),
        ({}, {"n_head": None}, "--heads"),
        ({}, {"n_head": 3}, "width 16 over 3 heads"),
    ],
)
def test_other_files_are_refused_on_one_line(tmp_path, changes, arguments, value):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path, "model", **changes), **arguments)
    assert value in str(error.value) and "\n" not in str(error.value)


def test_convert_makes_a_model_directory(tmp_path, vq_file):
    out, gpt = tmp_path / "model", write(tmp_path, "model")
    llamagen.convert_llamagen(gpt, vq_file, out, 6, 2)
    parts = load_model(out)
    assert parts.class_names == ["0", "1", "2", "3", "4"]
    assert parts.about["files"] == {"gpt": "gpt.pt", "vq": "vq.pt"}
    assert Pipeline.from_pretrained(out, device="cpu").sample([3])[0].size == (6, 6)
    with pytest.raises(FileExistsError, match="model"):
        llamagen.convert_llamagen(gpt, vq_file, out, 6, 2)
    assert llamagen.convert_llamagen(None, vq_file, tmp_path / "vq", None, None) is None
    assert vq.load(tmp_path / "vq").fingerprint == parts.tokenizer.fingerprint
    imagenet = write(tmp_path, name="imagenet.pt", **{LABELS: torch.zeros(1001, 16)})
    llamagen.convert_llamagen(imagenet, vq_file, tmp_path / "imagenet", 6, 2)
    names = load_model(tmp_path / "imagenet").class_names  # in WordNet-id order
    assert names[0] == "tench, Tinca tinca" and names[207] == "golden retriever"
    assert names[388].startswith("giant panda") and names[999].startswith("toilet tissue")
    larger = {"tok_embeddings.weight": torch.zeros(12, 16), "output.weight": torch.zeros(12, 16)}
    with pytest.raises(ValueError, match=r"gpt.pt has 12 codes, .*vq.pt 11"):
        llamagen.convert_llamagen(write(tmp_path, **larger), vq_file, tmp_path / "other", 6, 2)
    assert not (tmp_path / "other").exists()


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
    command = "`moveimg convert llamagen --gpt c2i_L_384.pt --vq vq_ds16_c2i.pt --image-size 384"
    for name, value in {"llamagen-l-384": command, "owner/name": "owner/name", "no": "no"}.items():
        with pytest.raises(FileNotFoundError, match=value) as error:
            resolve(name)
        assert "\n" not in str(error.value)


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
    pipelines = [Pipeline.from_pretrained(p, device="cpu") for p in ("owner/name", directory)]
    images = [pipeline.sample([1], seed=4)[0].tobytes() for pipeline in pipelines]
    assert images[0] == images[1]
    (uploaded / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"owner/name.*classes\.json"):
        resolve("owner/name")


def test_the_card_has_metadata_config_settings_classes_and_results(directory):
    results = {"metrics": {"fid": 5.62814, "by_class": [1.0], "kid": None}}
    results |= {"reference": {"name": "a/imagenet256"}}
    metadata = {"license": "mit", "datasets": ["ILSVRC/imagenet-1k"]}
    text = share.model_card(directory, "owner/name", results, **metadata)
    for part in (
        'Pipeline.from_pretrained("owner/name")', "'kind': 'move'", "'slots': 2", "goldfish",
        "| cfg_scale | 1.5 |", "## Classes (5)", "imagenet256: fid | 5.6281", "custom_pipeline",
    ):  # fmt: skip
        assert part in text, part
    data = ModelCard(text).data
    assert data.library_name == "moveimg" and {"move-memory", "diffusers"} <= {*data.tags}
    assert metadata.items() <= data.to_dict().items()
    assert data.pipeline_tag == share.TASK and data.base_model is None
    scores = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert scores[("held-out images", "loss")] == 1.2346 and len(scores) == 3
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


def test_a_space_runs_the_demo_of_its_model(directory, tmp_path, api, monkeypatch):
    run("push", directory, "me/show", "--space")
    assert api.created == ("me/show", False, "space", "gradio")
    card = SpaceCard.load(tmp_path / "uploaded" / "README.md").data
    assert (card.title, card.sdk, card.app_file) == ("show", "gradio", "app.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    monkeypatch.setattr("moveimg.cli.main", Mock())
    monkeypatch.setenv("SPACE_HOST", "me-show.hf.space")
    runpy.run_path("uploaded/app.py")
    _, name, *words = sys.argv
    command = typer.main.get_command(app).get_command(None, name)
    options = command.make_context(name, words).params
    wanted = {"host": "0.0.0.0", "port": 7860, "allow_host": ["*"], "trust_proxy": True}
    assert name == "demo" and options | wanted == options
    (model,) = options["model"]
    assert Pipeline.from_pretrained(model, device="cpu").class_names == NAMES


def test_diffusers_draws_what_moveimg_draws(directory, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    path = str(tmp_path / "pushed")
    share.write_model(directory, Path(path), "owner/name")
    diffusion = diffusers.DiffusionPipeline.from_pretrained(
        path, custom_pipeline=path, trust_remote_code=True
    )
    diffusion.set_progress_bar_config(disable=True)
    seed = int(torch.randint(2**32, (), generator=torch.Generator().manual_seed(3)))
    images = diffusion([1, "goldfish"], 2.0, 2, torch.Generator().manual_seed(3)).images
    expected = Pipeline.from_pretrained(directory, device="cpu").sample(1, seed=seed, cfg_scale=2.0)
    assert len(images) == 4 and images[0].tobytes() == expected[0].tobytes()
    again = diffusion(1, 2.0, generator=[torch.Generator().manual_seed(3)], output_type="np")
    assert (again.images[0] * 255).round().astype("uint8").tobytes() == images[0].tobytes()
    for wrong in ({"output_type": "jpg"}, {"generator": []}, {"guidance_scale": float("nan")}):
        with pytest.raises(ValueError):
            diffusion(1, **wrong)
