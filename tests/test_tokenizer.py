"""The VQ tokenizer: its arithmetic, its codebook, its contract and its files."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import tokenizer as tok
from tokenizer import quantizers
from tokenizer.base import fingerprint

TINY = tok.VQConfig(
    width=8,
    multipliers=(1, 2, 2),
    n_res_blocks=1,
    z_channels=6,
    codebook_size=24,
    codebook_dim=5,
    norm_groups=4,
)


def make(seed: int = 0, **changes) -> tok.VQTokenizer:
    """A tiny trainable tokenizer whose every parameter matters."""
    torch.manual_seed(seed)
    tokenizer = tok.VQTokenizer(TINY.model_copy(update=changes))
    for parameter in tokenizer.parameters():
        if parameter.ndim == 1:  # norms start at one and zero
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    with torch.no_grad():  # codes where vectors are, or one code would win everywhere
        z = tokenizer._encode(make_images(3, 16, 8, seed=2))
        tokenizer.quantize.embedding.weight.copy_(z.permute(0, 2, 3, 1).flatten(0, 2)[:24])
    return tokenizer


def make_images(batch: int = 2, height: int = 16, width: int = 8, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=rng) * 2 - 1


def one_line_error(kind: type[Exception], *parts: str):
    """Expect an error whose message is one line and holds every part in order."""
    return pytest.raises(kind, match=r"\A[^\n]*" + r"[^\n]*".join(map(re.escape, parts)))


# --- the arithmetic, against a reference that reads the state dict -------------------------------


class Reference:
    """VQGAN as LlamaGen lays it out, spelled out in float64."""

    def __init__(self, tokenizer: tok.VQTokenizer):
        self.config = tokenizer.config
        self.weights = {name: w.detach().double() for name, w in tokenizer.state_dict().items()}

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.weights

    def conv(self, name: str, x: Tensor, **settings) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **settings)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), self.config.norm_groups, -1)
        mean = groups.mean(2, keepdim=True)
        variance = ((groups - mean) ** 2).mean(2, keepdim=True)
        y = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return y * scale[:, None, None] + shift[:, None, None]

    def swish(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def res(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)), padding=1)
        y = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", y)), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return (self.conv(shortcut, x) if self.has(shortcut) else x) + y

    def attend(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")  # [B, C, T]
        out = torch.zeros_like(v)
        for image in range(len(x)):
            for query in range(q.shape[2]):
                scores = (q[image, :, query, None] * k[image]).sum(0) / x.shape[1] ** 0.5
                weights = torch.exp(scores) / torch.exp(scores).sum()
                out[image, :, query] = (v[image] * weights).sum(1)
        return x + self.conv(f"{name}.proj_out", out.reshape(x.shape))

    def level(self, name: str, x: Tensor) -> Tensor:
        block = 0
        while self.has(f"{name}.res.{block}.conv1"):
            x = self.res(f"{name}.res.{block}", x)
            if self.has(f"{name}.attn.{block}.q"):
                x = self.attend(f"{name}.attn.{block}", x)
            block += 1
        return x

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.res(f"{name}.0", x)
        if self.has(f"{name}.1.q"):
            x = self.attend(f"{name}.1", x)
        return self.res(f"{name}.2", x)

    def codebook(self) -> Tensor:
        codebook = self.weights["quantize.embedding.weight"]
        return (
            codebook / codebook.norm(dim=1, keepdim=True) if self.config.l2_normalize else codebook
        )

    def encode(self, images: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", images.double(), padding=1)
        for level in range(len(self.config.multipliers)):
            x = self.level(f"encoder.conv_blocks.{level}", x)
            down = f"encoder.conv_blocks.{level}.downsample.conv"
            if self.has(down):
                x = self.conv(down, F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.middle("encoder.mid", x)
        x = self.conv("encoder.conv_out", self.swish(self.norm("encoder.norm_out", x)), padding=1)
        z = self.conv("quant_conv", x)  # [B, D, h, w]
        codes = torch.zeros(len(z), z.shape[2] * z.shape[3], dtype=torch.int64)
        for image, vectors in enumerate(z.flatten(2).mT):
            for position, vector in enumerate(vectors):
                if self.config.l2_normalize:
                    vector = vector / vector.norm()
                codes[image, position] = ((self.codebook() - vector) ** 2).sum(1).argmin()
        return codes

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        z = self.codebook()[codes].mT.reshape(len(codes), -1, *grid)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1)
        x = self.middle("decoder.mid", x)
        for level in range(len(self.config.multipliers)):
            x = self.level(f"decoder.conv_blocks.{level}", x)
            up = f"decoder.conv_blocks.{level}.upsample.conv"
            if self.has(up):
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(up, x, padding=1)
        x = self.conv("decoder.conv_out", self.swish(self.norm("decoder.norm_out", x)), padding=1)
        return x.clamp(-1, 1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"l2_normalize": False}, {"attention": False}, {"n_res_blocks": 2, "multipliers": (2, 1)}],
    ids=str,
)
def test_matches_reference(changes):
    tokenizer = make(**changes).freeze().double()
    reference = Reference(tokenizer)
    images = make_images()
    codes = tokenizer.encode(images)
    f = tokenizer.downsample
    grid = (16 // f, 8 // f)
    assert codes.unique().numel() > 2, "the test must tell codes apart"
    assert torch.equal(codes, reference.encode(images))
    decoded = tokenizer.decode(codes, grid)
    assert decoded.dtype == torch.float64
    assert (decoded.abs() < 1).any(), "the test must see more than clamped pixels"
    torch.testing.assert_close(decoded, reference.decode(codes, grid), rtol=1e-10, atol=1e-10)


def test_float32_and_bfloat16_are_near_float64():
    images = make_images(4, 16, 16)
    exact = make().freeze().double()
    codes = exact.encode(images)
    pixels = exact.decode(codes)
    single = make().freeze()
    assert torch.equal(single.encode(images), codes)
    torch.testing.assert_close(single.decode(codes).double(), pixels, rtol=1e-4, atol=1e-5)
    half = make().freeze().bfloat16()
    assert (half.encode(images) == codes).float().mean() > 0.8
    decoded = half.decode(codes)
    assert decoded.dtype == torch.float32
    assert (decoded - pixels).abs().mean() < 0.05


# --- the contract --------------------------------------------------------------------------------


def test_shapes_and_ranges():
    tokenizer = make().freeze()
    assert isinstance(tokenizer, tok.Tokenizer)
    assert (tokenizer.codebook_size, tokenizer.downsample) == (24, 4)
    codes = tokenizer.encode(make_images(3, 16, 24))
    assert codes.shape == (3, 24) and codes.dtype == torch.int64
    images = tokenizer.decode(codes, (4, 6))
    assert images.shape == (3, 3, 16, 24) and images.dtype == torch.float32
    assert images.abs().max() <= 1
    square = torch.zeros(1, 9, dtype=torch.uint16)
    assert tokenizer.decode(square).shape == (1, 3, 12, 12)
    assert tokenizer.decode(codes[:0], (4, 6)).shape == (0, 3, 16, 24)


def test_raster_order():
    """A code's position says which pixels it came from."""
    tokenizer = make(attention=False).freeze()
    images = make_images(1, 32, 64)
    z = tokenizer.quantize.embed(tokenizer.encode(images))[0]
    grid = F.normalize(tokenizer.quant_conv(tokenizer.encoder(images)), dim=1)[0]
    nearest = (grid.permute(1, 2, 0)[:, :, None] - tokenizer.quantize.codebook()).norm(dim=3)
    assert torch.equal(z[1 * 16 + 5], tokenizer.quantize.codebook()[nearest.argmin(2)[1, 5]])


@pytest.mark.parametrize(
    ("images", "parts"),
    [
        (torch.zeros(3, 16, 16), ["[B, 3, H, W]", "[3, 16, 16]"]),
        (torch.zeros(1, 1, 16, 16), ["[B, 3, H, W]", "[1, 1, 16, 16]"]),
        (torch.zeros(1, 3, 16, 18), ["multiples of 4", "H = 16 and W = 18"]),
        (torch.zeros(1, 3, 0, 16), ["multiples of 4", "H = 0"]),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), ["floating point", "uint8"]),
    ],
)
def test_bad_images(images, parts):
    with one_line_error(ValueError, *parts):
        make().freeze().encode(images)


@pytest.mark.parametrize(
    ("codes", "grid", "parts"),
    [
        (torch.zeros(16, dtype=torch.int64), None, ["[B, T]", "[16]"]),
        (torch.zeros(1, 0, dtype=torch.int64), None, ["[B, T]", "[1, 0]"]),
        (torch.zeros(1, 12, dtype=torch.int64), None, ["T = 12", "not a square"]),
        (torch.zeros(1, 12, dtype=torch.int64), (3, 3), ["grid 3 x 3", "T = 12"]),
        (torch.zeros(1, 12, dtype=torch.int64), (-3, -4), ["grid -3 x -4"]),
        (torch.full((1, 4), 24), None, ["0..23", "24..24"]),
        (torch.full((1, 4), -1), None, ["0..23", "-1..-1"]),
        (torch.zeros(1, 4), None, ["integers", "float32"]),
    ],
)
def test_bad_codes(codes, grid, parts):
    with one_line_error(ValueError, *parts):
        make().freeze().decode(codes, grid)


def test_frozen_stays_frozen():
    tokenizer = make(dropout=0.5).freeze()
    parent = torch.nn.Sequential(tokenizer).train()
    assert parent.training and not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    before = tokenizer.fingerprint
    assert "reseeded" not in tokenizer(make_images()).stats
    assert fingerprint(tokenizer.config, tokenizer.state_dict()) == before


def test_encoding_while_training_uses_no_dropout_and_leaves_the_mode():
    tokenizer = make(dropout=0.9).train()
    images = make_images()
    assert torch.equal(tokenizer.encode(images), tokenizer.encode(images))
    assert tokenizer.training and tokenizer.quantize.idle_steps is None
    assert not torch.equal(tokenizer(images).reconstruction, tokenizer(images).reconstruction)


def test_codes_may_index_a_trained_embedding():
    codes = make().freeze().encode(make_images())
    table = torch.nn.Embedding(24, 2)
    table(codes).sum().backward()
    assert table.weight.grad is not None


# --- the codebook --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40),
    size=st.integers(1, 30),
    dim=st.integers(1, 6),
    at_once=st.integers(1, 200),
    seed=st.integers(0, 2**20),
    whole=st.booleans(),
)
def test_nearest_codes_match_brute_force(n, size, dim, at_once, seed, whole):
    rng = torch.Generator().manual_seed(seed)
    vectors, codebook = (
        torch.randn(rows, dim, generator=rng, dtype=torch.float64) * 2 for rows in (n, size)
    )
    if whole:  # whole numbers have exact ties: the lowest index wins
        vectors, codebook = vectors.round(), codebook.round()
    distances = (vectors[:, None] - codebook[None]).square().sum(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizers, "_SCORES_AT_ONCE", at_once)
        assert torch.equal(quantizers.nearest_codes(vectors, codebook), distances.argmin(1))


def make_quantizer(size: int = 8, l2_normalize: bool = False, **settings):
    config = tok.VQQuantizerConfig(**{"init_from_data": False, **settings})
    return quantizers.VectorQuantizer(config, size, 2, l2_normalize)


def as_grid(vectors: Tensor) -> Tensor:
    """[n, D] -> [1, D, 1, n]."""
    return vectors.T[None, :, None]


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_straight_through_gradient(l2_normalize):
    torch.manual_seed(0)
    quantizer = make_quantizer(l2_normalize=l2_normalize)
    z = torch.randn(2, 2, 3, 3, requires_grad=True)
    out = quantizer(z)
    chosen = quantizer.embed(out.codes).mT.reshape(z.shape)
    torch.testing.assert_close(out.quantized, chosen)
    weight = torch.randn_like(z)
    (out.quantized * weight).sum().backward()
    copy = z.detach().requires_grad_()
    compared = F.normalize(copy, dim=1) if l2_normalize else copy
    (compared * weight).sum().backward()
    torch.testing.assert_close(z.grad, copy.grad)
    assert quantizer.embedding.weight.grad is None, "pixels move the encoder, not the codes"


def test_codebook_losses_move_their_own_side():
    quantizer = make_quantizer()
    z = torch.randn(1, 2, 2, 2, requires_grad=True)
    out = quantizer(z)
    chosen = quantizer.embed(out.codes).mT.reshape(z.shape)
    expected = (chosen - z).square().mean()
    torch.testing.assert_close(out.losses["codebook"], expected)
    torch.testing.assert_close(out.losses["commitment"], expected)
    out.losses["codebook"].backward(retain_graph=True)
    assert z.grad is None and quantizer.embedding.weight.grad is not None
    quantizer.embedding.weight.grad = None
    out.losses["commitment"].backward()
    assert z.grad is not None and quantizer.embedding.weight.grad is None


def test_dead_codes_are_revived():
    torch.manual_seed(0)
    quantizer = make_quantizer(size=8, reseed_after=3)
    with torch.no_grad():
        quantizer.embedding.weight.fill_(100.0)
        quantizer.embedding.weight[5] = 0.0
    batch = torch.randn(20, 2)
    for _ in range(3):  # only code 5 is near
        out = quantizer(as_grid(batch))
        assert out.codes.unique().tolist() == [5] and out.stats["reseeded"] == 0
    out = quantizer(as_grid(batch))
    assert out.stats["reseeded"] == 7
    assert out.codes.unique().numel() >= 7, "revived codes stand on vectors and are chosen"
    assert (quantizer.embedding.weight < 50).all()
    assert torch.equal(quantizer.embedding.weight[5], torch.zeros(2)), "a living code stays"
    assert quantizer(as_grid(batch)).stats["reseeded"] == 0


def test_reseeding_takes_no_more_codes_than_vectors_and_can_be_off():
    torch.manual_seed(0)
    for reseed_after, expected in ((1, 2), (0, 0)):
        quantizer = make_quantizer(size=8, reseed_after=reseed_after)
        with torch.no_grad():
            quantizer.embedding.weight.fill_(100.0)
        moved = [int(quantizer(as_grid(torch.randn(2, 2))).stats["reseeded"]) for _ in range(3)]
        assert moved == [0, expected, expected]


def test_codebook_starts_at_the_first_batch_unless_it_was_loaded():
    torch.manual_seed(0)
    vectors = torch.randn(5, 2) + 50
    fresh = make_quantizer(init_from_data=True)
    stored = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    fresh(as_grid(vectors))
    assert (fresh.embedding.weight - 50).abs().max() < 10
    assert fresh.embedding.weight.unique(dim=0).shape[0] == 8, "no two codes are the same"
    before = fresh.embedding.weight.detach().clone()
    fresh(as_grid(vectors - 100))
    assert torch.equal(fresh.embedding.weight, before), "only the first batch"
    loaded = make_quantizer(init_from_data=True)
    loaded.load_state_dict(stored)
    loaded(as_grid(vectors))
    assert torch.equal(loaded.embedding.weight, stored["embedding.weight"])


def test_code_statistics():
    stats = tok.code_statistics(torch.tensor([2, 2, 0, 0]))
    assert stats["usage"] == 0.5 and stats["perplexity"] == pytest.approx(2)
    stats = tok.code_statistics(torch.ones(7, dtype=torch.int64))
    assert stats["usage"] == 1 and stats["perplexity"] == pytest.approx(7)


def test_training_learns():
    tokenizer = make()
    images = make_images(4, 8, 8)
    optimizer = torch.optim.Adam(tokenizer.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        out = tokenizer(images)
        loss = tok.total_loss(out.losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(out.losses["l2"].item())
    assert losses[-1] < 0.6 * losses[0]
    assert out.reconstruction.shape == images.shape and out.codes.shape == (4, 4)
    assert set(out.stats) == {"usage", "perplexity", "reseeded"}
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())


def test_total_loss_refuses_unmatched_names():
    terms = {"l1": torch.tensor(1.0), "l2": torch.tensor(2.0)}
    assert tok.total_loss(terms, {"l1": 3.0, "l2": 0.5}) == 4
    with one_line_error(ValueError, "differ in ['codebook', 'commitment']"):
        tok.total_loss(terms)


# --- files ---------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    tokenizer = make()
    tok.save(tokenizer, tmp_path / "a" / "tokenizer")
    loaded = tok.load(tmp_path / "a" / "tokenizer")
    assert isinstance(loaded, tok.VQTokenizer) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.config == tokenizer.config
    images = make_images()
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert loaded.fingerprint == tokenizer.fingerprint
    names = sorted(path.name for path in (tmp_path / "a" / "tokenizer").iterdir())
    assert names == ["config.json", "model.safetensors"], "nothing temporary is left"
    tok.save(loaded, tmp_path / "a" / "tokenizer")  # over the file its weights are mapped from
    assert tok.load(tmp_path / "a" / "tokenizer").fingerprint == tokenizer.fingerprint


def test_fingerprint_knows_config_and_weights_and_no_casts(tmp_path):
    base = make().fingerprint
    assert re.fullmatch(r"[0-9a-f]{64}", base)
    assert make().freeze().fingerprint == base
    assert make(seed=1).fingerprint != base
    assert make(dropout=0.1).fingerprint != base
    trained = make()
    assert trained.fingerprint == base
    with torch.no_grad():
        trained.last_layer.mul_(1.001)
    assert trained.fingerprint != base
    tok.save(make(), tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        loaded = tok.load(tmp_path, dtype=dtype)
        assert loaded.quant_conv.weight.dtype == dtype and loaded.fingerprint == base
    assert tok.load(tmp_path).bfloat16().fingerprint == base
    reloaded = tok.load(tmp_path)
    assert reloaded.fingerprint == base
    reloaded.load_state_dict(make(seed=1).state_dict())
    assert reloaded.fingerprint == make(seed=1).fingerprint


def test_saving_what_a_cast_has_changed_is_refused(tmp_path):
    with one_line_error(ValueError, "bfloat16"):
        tok.save(make().freeze().bfloat16(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    tok.save(make().freeze().double(), tmp_path / "new")  # float64 holds float32 exactly
    assert tok.load(tmp_path / "new").fingerprint == make().fingerprint


def test_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    tok.save(make(), tmp_path)
    before = make().fingerprint

    def fail(weights, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("tokenizer.io.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tok.save(make(seed=1), tmp_path)
    assert tok.load(tmp_path).fingerprint == before
    assert len(list(tmp_path.iterdir())) == 2


def change_config(directory, **changes):
    file = directory / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def change_weights(directory, **changes):
    file = directory / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in changes.items():
        weights[name.replace("__", ".")] = tensor
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda d: change_config(d, widht=4), ["config.json", "widht: unknown key"]),
        (lambda d: change_config(d, width=-3), ["config.json", "width: ", "greater than 0", "-3"]),
        (lambda d: change_config(d, kind="vqq"), ["config.json", "kind: ", "'vqq'"]),
        (lambda d: change_config(d, kind=None), ["config.json", "kind: missing"]),
        (lambda d: change_config(d, quantizer={"kind": "x"}), ["config.json", "quantizer.kind: "]),
        (lambda d: change_config(d, norm_groups=5), ["config.json", "norm_groups 5", "8"]),
        (lambda d: change_config(d, codebook_size=70_000), ["codebook_size: ", "65536", "70000"]),
        (lambda d: change_config(d, multipliers=[]), ["config.json", "multipliers: "]),
        (lambda d: (d / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), ["config.json", "JSON"]),
        (lambda d: (d / "config.json").write_text("[1]"), ["config.json", "dictionary"]),
        (
            lambda d: change_config(d, codebook_dim=4),
            ["model.safetensors", "quantize.embedding.weight", "[24, 5]", "[24, 4]"],
        ),
        (
            lambda d: change_weights(d, decoder__conv_in__bias=torch.zeros(7)),
            ["model.safetensors", "decoder.conv_in.bias", "[7]", "[16]"],
        ),
        (
            lambda d: change_weights(d, decoder__conv_in__bias=None, decoder__conv_in__weight=None),
            ["model.safetensors", "missing weight decoder.conv_in.bias", "1 more"],
        ),
        (
            lambda d: change_weights(d, extra=torch.zeros(1)),
            ["model.safetensors", "unexpected weight extra"],
        ),
        (
            lambda d: change_weights(d, quant_conv__bias=torch.zeros(5, dtype=torch.int64)),
            ["model.safetensors", "quant_conv.bias", "int64"],
        ),
    ],
)
def test_damaged_directory(tmp_path, damage, parts):
    tok.save(make(), tmp_path)
    damage(tmp_path)
    with one_line_error(ValueError, *parts) as caught:
        tok.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_weights(tmp_path, keep):
    tok.save(make(), tmp_path)
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size > keep
    file.write_bytes(file.read_bytes()[:keep])
    with one_line_error(ValueError, "model.safetensors", "damaged"):
        tok.load(tmp_path)


@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_missing_files(tmp_path, name):
    directory = tmp_path / "tokenizer"
    if name:
        tok.save(make(), directory)
        (directory / name).unlink()
    with one_line_error(FileNotFoundError, str(directory / name)):
        tok.load(directory)


def test_kinds_are_built_from_their_config():
    assert isinstance(tok.build(TINY), tok.VQTokenizer)
    with pytest.raises(ValueError, match="frozen"):
        TINY.width = 3  # type: ignore[misc]
