"""Dense models that get a memory, and runs that start from another model; on digits, tiny."""

from __future__ import annotations

import json

import pytest
import torch

from moveimg.checkpoint import ModelParts, load_generator, load_model, load_tokenizer, save_model
from moveimg.config import SamplingSettings
from moveimg.data.images import DIGITS as CLASS_NAMES
from moveimg.model import Transformer
from moveimg.model.memory import GatedMixer
from moveimg.pretrained.upcycle import upcycle
from moveimg.sampling import image_rngs, sample_codes
from moveimg.training.checkpoints import read_index
from moveimg.training.generator import train_generator
from moveimg.training.initial import break_symmetry, start_from
from tests import conftest
from tests.conftest import ATTENTIONS, FEEDFORWARDS, lively, random_inputs, tiny_config
from tests.test_model import decode_all
from tests.test_pipeline import tiny_tokenizer
from tests.test_pretrained import run
from tests.test_training import CPU, newest_state, train_config

MEMORIES = {name: m for name, m in conftest.MEMORIES.items() if m["kind"] != "none"}
MEMORIES |= {"lave-all": {"kind": "lave", "layers": "all"}}
SIZES = {"n_layer": 2, "n_head": 2, "width": 16}


@pytest.fixture(params=MEMORIES)
def memory(request):
    return MEMORIES[request.param]


# --- upcycling -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("awake", [False, True], ids=["zero router", "as training starts"])
def test_logits_do_not_change_in_any_bit(memory, dtype, awake):
    config = tiny_config(width=64, n_head=4)
    dense = lively(config, dtype=dtype)
    grown = upcycle(dense, memory)
    if awake:
        break_symmetry(grown)
    codes, labels = random_inputs(config)
    with torch.no_grad():
        assert torch.equal(grown(codes, labels), dense(codes, labels))
        assert torch.equal(decode_all(grown, codes, labels), decode_all(dense, codes, labels))
    settings = SamplingSettings(cfg_scale=1.5)
    drawn = [sample_codes(m, labels[1:], settings, image_rngs([0, 1])) for m in (dense, grown)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("ffn", FEEDFORWARDS)
def test_every_dense_variant_can_be_grown(memory, attention, ffn):
    config = tiny_config(attention=ATTENTIONS[attention], ffn=FEEDFORWARDS[ffn])
    dense = lively(config)
    grown = upcycle(dense, memory)
    codes, labels = random_inputs(config)
    with torch.no_grad():
        assert torch.equal(grown(codes, labels), dense(codes, labels))
        assert torch.equal(decode_all(grown, codes, labels), decode_all(dense, codes, labels))


def test_bank_and_router_are_zero_and_the_rest_is_shared(memory):
    dense = lively(tiny_config())
    grown = upcycle(dense, memory)
    assert grown.config.memory.kind == memory["kind"]
    before = dict(dense.named_parameters())
    for name, parameter in grown.named_parameters():
        if name in before:
            assert parameter.data_ptr() == before[name].data_ptr()
        else:
            assert name.startswith("memory.") or ".router." in name
            assert not parameter.any() and parameter.requires_grad


def test_slots_of_a_zero_memory_stay_equal_unless_set_apart():
    """Why start_from calls break_symmetry: without it M slots learn what one can."""
    config = tiny_config()
    codes, labels = random_inputs(config, batch=8)

    def spread(apart: bool) -> float:
        model = upcycle(lively(config), {"kind": "move", "slots": 3})
        if apart:
            break_symmetry(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            logits = model(codes, labels).flatten(0, 1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, codes.flatten()).backward()
            optimizer.step()
        slots = model.memory.bank.weight.unflatten(1, (3, -1))
        assert slots.std() > 1e-3
        return (slots[:, 0] - slots[:, 1]).abs().max().item()

    assert spread(apart=False) < 1e-9 and spread(apart=True) > 1e-3


def test_only_a_silent_memory_is_set_apart():
    model = upcycle(lively(tiny_config()), {"kind": "move", "slots": 3})
    break_symmetry(model)
    for mixer in (m for m in model.modules() if isinstance(m, GatedMixer)):
        rows = mixer.router.weight.unflatten(0, (mixer.n_head, -1))  # [H, 1 + M, D]
        assert not rows[:, 0].any() and (rows[:, 1:] != 0).all()
    trained = lively(tiny_config(memory={"kind": "move", "slots": 3}))
    before = [parameter.clone() for parameter in trained.parameters()]
    break_symmetry(trained)
    assert all(map(torch.equal, before, trained.parameters()))


def test_convert_upcycle_makes_a_model_directory(tmp_path):
    dense = lively(tiny_config(), dtype=torch.float32)
    parts = ModelParts(dense, tiny_tokenizer(), list("abcde"), SamplingSettings(top_k=3))
    save_model(tmp_path / "dense", parts, {"step": 7})
    for name, options, kind in (
        ("m", ["--slots", 3], "move"),
        ("l", ["--lave", "all"], "lave"),
        ("x", ["--memory", "{kind: lave, layers: [0], class_rows: true}"], "lave"),
    ):
        done = run("convert", "upcycle", tmp_path / "dense", *options, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        loaded = load_model(tmp_path / name)
        assert loaded.generator.config.memory.kind == kind
        assert loaded.class_names == list("abcde") and loaded.sampling.top_k == 3
        codes, labels = random_inputs(dense.config)
        with torch.no_grad():
            assert torch.equal(loaded.generator(codes, labels), dense(codes, labels))
        about = json.loads((tmp_path / name / "config.json").read_text())["about"]
        assert about == {"source": "upcycled", "from": "dense", "before": {"step": 7}}
    for options, message in (
        ([], "give one of --slots M"),
        (["--slots", 1, "--lave", "all"], "give one of --slots M"),
        (["--memory", "{kind: none}"], "memory is of kind none"),
        (["--memory", "{kind: mov}"], "'none', 'lave', 'move'"),
        (["--memory", "move"], "memory"),
        (["--memory", "{kind: move"], "--memory: not valid YAML"),
        (["--lave", "some"], "memory.lave.layers"),
    ):
        failed = run("convert", "upcycle", tmp_path / "dense", *options, "--out", tmp_path / "y")
        assert failed.exit_code == 2 and message in failed.output, failed.output
    again = run("convert", "upcycle", tmp_path / "m", "--slots", 2, "--out", tmp_path / "y")
    assert again.exit_code == 2 and "has a memory of kind 'move' already" in again.output
    assert not (tmp_path / "y").exists()


# --- starting from a model -----------------------------------------------------------------


def save_start(digits, folder, names=CLASS_NAMES, **changes):
    """A lively dense model for the digits' codes, as a directory."""
    settings = {**SIZES, "codebook_size": 16, "grid": [4, 4], "n_classes": len(names), **changes}
    model = lively(tiny_config(**settings), dtype=torch.float32)
    tokenizer = load_tokenizer(digits / "tokenizer", CPU)
    save_model(folder, ModelParts(model, tokenizer, list(names), SamplingSettings()), {})
    return model


def start_config(digits, out, start, model=None, **changes):
    changes = {"model": model or SIZES, "init_from": start, "steps": 4, **changes}
    return train_config(digits, out, **changes)


def test_memory_alone_learns_and_resumes(digits, tmp_path, memory):
    save_start(digits, tmp_path / "dense")
    done = run(
        "convert", "upcycle", tmp_path / "dense", "--out", tmp_path / "start",
        "--memory", json.dumps(memory),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    files = {p: p.read_bytes() for p in (tmp_path / "start").rglob("*") if p.is_file()}
    config = start_config(digits, tmp_path / "out", tmp_path / "start", train="memory")
    train_generator(config, CPU)
    before, after = (load_generator(tmp_path / d).state_dict() for d in ("start", "out"))
    for name, value in after.items():
        learns = name.startswith("memory.") or ".router." in name
        assert torch.equal(value, before[name]) != learns, name
    assert files == {p: p.read_bytes() for p in files}  # what was started from is left alone
    moments = [key for key in newest_state(tmp_path / "out") if key.endswith(".exp_avg")]
    assert len(moments) == sum(  # of what learns, and of no more
        name.startswith("memory.") or ".router." in name for name in after
    )
    seconds = read_index(tmp_path / "out/training/checkpoints/step-0000004")["seconds"]
    assert train_generator(config, CPU)["seconds"] == seconds  # nothing left to do


def test_everything_learns_by_default(digits, tmp_path):
    before = save_start(digits, tmp_path / "dense").state_dict()
    train_generator(start_config(digits, tmp_path / "out", tmp_path / "dense"), CPU)
    after = load_generator(tmp_path / "out").state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in after.items())


def test_a_run_starts_with_the_old_models_logits(digits, tmp_path):
    model = save_start(digits, tmp_path / "dense")
    settings = tiny_config(**SIZES, codebook_size=16, grid=[4, 4], n_classes=10)
    started = start_from(tmp_path / "dense", settings, CLASS_NAMES).eval()
    codes, labels = random_inputs(model.config)
    with torch.no_grad():
        assert torch.equal(started(codes, labels), model(codes, labels))


def test_other_classes_get_a_new_label_table(digits, tmp_path, capsys):
    memory = {"kind": "move", "slots": 2, "class_rows": True}
    before = save_start(digits, tmp_path / "m", names="abc", memory=memory).state_dict()
    settings = tiny_config(**SIZES, codebook_size=16, grid=[4, 4], n_classes=10, memory=memory)
    after = start_from(tmp_path / "m", settings, CLASS_NAMES).state_dict()
    assert "has 3 classes, the codes 10" in capsys.readouterr().err
    for name, value in after.items():
        if name in ("label_embedding.weight", "memory.class_bank.weight"):
            assert value.shape[0] == 11 and 0.01 < value[:-1].std() < 0.03
            assert torch.equal(value[-1], before[name][-1])  # the null label's
        else:
            assert torch.equal(value, before[name])
    train_generator(start_config(digits, tmp_path / "out", tmp_path / "m"), CPU)
    assert load_model(tmp_path / "out").class_names == CLASS_NAMES
    with pytest.raises(ValueError, match=r"have other classes than .*m, and their new label table"):
        train_generator(start_config(digits, tmp_path / "o", tmp_path / "m", train="memory"), CPU)


def test_other_names_of_as_many_classes_keep_the_table(digits, tmp_path, capsys):
    before = save_start(digits, tmp_path / "m", names="abcdefghij")
    settings = tiny_config(**SIZES, codebook_size=16, grid=[4, 4], n_classes=10)
    after = start_from(tmp_path / "m", settings, CLASS_NAMES)
    assert torch.equal(after.label_embedding.weight, before.label_embedding.weight)
    assert "classes of other names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({"width": 32}, {}, "model.width is 16, but .* has 32"),
        ({"n_layer": 3}, {}, "model.n_layer is 2, but .* has 3"),
        ({"codebook_size": 17}, {}, "model.codebook_size is 16, but .* has 17"),
        ({"grid": [2, 8]}, {}, r"model.grid is \(4, 4\), but .* has \(2, 8\)"),
        ({}, {"norm_eps": 1e-6}, "model.norm_eps is 1e-06, but .* has 1e-05"),
        ({}, {"ffn": {"kind": "swiglu", "hidden": 24}}, "model.ffn is .*24.* has .*None"),
        ({}, {"memory": {"kind": "move", "slots": 2}}, "has none: .*moveimg convert upcycle"),
        (
            {"memory": {"kind": "move", "slots": 3}},
            {"memory": {"kind": "move", "slots": 2}},
            "'slots': 2.* has .*'slots': 3",
        ),
        ({"memory": {"kind": "move", "slots": 3}}, {"memory": {"kind": "none"}}, "'none'.* has"),
    ],
)
def test_other_settings_are_refused_naming_both(digits, tmp_path, there, here, message):
    settings = {**SIZES, "codebook_size": 16, "grid": [4, 4], "n_classes": 10, **there}
    model = Transformer(tiny_config(**settings))
    parts = ModelParts(model, tiny_tokenizer(settings["codebook_size"]), CLASS_NAMES,
                       SamplingSettings())  # fmt: skip
    save_model(tmp_path / "m", parts, {})
    wanted = {**SIZES, "codebook_size": 16, "grid": [4, 4], "n_classes": 10, **here}
    with pytest.raises(ValueError, match=message) as error:
        start_from(tmp_path / "m", tiny_config(**wanted), CLASS_NAMES)
    assert "\n" not in str(error.value)


def test_refusals_of_a_run(digits, tmp_path):
    save_start(digits, tmp_path / "dense")
    config = start_config(digits, tmp_path / "out", tmp_path / "dense", train="memory")
    with pytest.raises(ValueError, match=r"dense has none: give it one by `moveimg convert upc"):
        train_generator(config, CPU)
    with pytest.raises(ValueError, match=r"out and init_from are both .*dense"):
        train_generator(start_config(digits, tmp_path / "dense", tmp_path / "dense"), CPU)
    with pytest.raises(FileNotFoundError, match=r"no model .*nowhere"):
        train_generator(start_config(digits, tmp_path / "out", tmp_path / "nowhere"), CPU)
    with pytest.raises(ValueError, match="train: memory needs `init_from`"):
        train_config(digits, tmp_path / "out", train="memory")
    parts = load_model(tmp_path / "dense")
    other = ModelParts(parts.generator, tiny_tokenizer(16), CLASS_NAMES, parts.sampling)
    save_model(tmp_path / "other", other, {})
    with pytest.raises(ValueError, match="was trained on codes of tokenizer"):
        train_generator(start_config(digits, tmp_path / "out", tmp_path / "other"), CPU)


def test_the_options_of_train_win_over_the_file(digits, tmp_path):
    save_start(digits, tmp_path / "dense", memory={"kind": "move", "slots": 1})
    config = start_config(digits, tmp_path / "out", tmp_path / "nowhere", steps=1)
    (tmp_path / "run.yaml").write_text(
        json.dumps(config.model_dump(mode="json", exclude={"model"}) | {"model": SIZES})
    )
    start = tmp_path / "dense"
    done = run("train", tmp_path / "run.yaml", "--init-from", start, "--train", "memory")
    assert done.exit_code == 0, done.output
    wrong = run("train", tmp_path / "run.yaml", "--init-from", start, "--train", "some")
    assert wrong.exit_code == 2 and "train: " in wrong.output
