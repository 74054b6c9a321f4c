"""The VQ tokenizer: its arithmetic and its contract."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer as tok
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
    pattern = r"[^\n]*".join(map(re.escape, parts))
    return pytest.raises(kind, match=rf"\A[^\n]*{pattern}[^\n]*\Z")


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


def test_kinds_are_built_from_their_config():
    assert isinstance(tok.build(TINY), tok.VQTokenizer)
    with pytest.raises(ValueError, match="frozen"):
        TINY.width = 3  # type: ignore[misc]
