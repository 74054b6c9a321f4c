"""The tokenizers' arithmetic against float64 references, and the contract of encode and decode."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tokenizer as tok

TINY = tok.VQConfig(
    width=8, multipliers=(1, 2, 2), n_res_blocks=1, z_channels=6, codebook_size=24, codebook_dim=5,
    norm_groups=4,
)  # fmt: skip


def make(config=TINY, seed=0, **changes) -> tok.AutoencoderTokenizer:
    """A tiny trainable tokenizer in which every parameter matters."""
    torch.manual_seed(seed)
    tokenizer = tok.AutoencoderTokenizer(config.model_copy(update=changes))
    for parameter in tokenizer.parameters():
        if parameter.ndim == 1:  # norms start at one and zero
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    with torch.no_grad():  # codes where vectors are, or one code would always win
        vectors = tokenizer._encode(make_images(3, seed=2)).permute(0, 2, 3, 1).flatten(0, 2)
        tokenizer.quantize.embedding.weight.copy_(vectors[: tokenizer.codebook_size])
    return tokenizer


def make_images(batch: int = 2, height: int = 16, width: int = 8, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, height, width, generator=rng) * 2 - 1


class Reference:
    """VQGAN in LlamaGen's layout, written out in float64."""

    def __init__(self, tokenizer: tok.AutoencoderTokenizer):
        self.config = tokenizer.config
        self.weights = {name: w.detach().double() for name, w in tokenizer.state_dict().items()}

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.weights

    def conv(self, name: str, x: Tensor, **settings) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **settings)

    def norm_swish(self, name: str, x: Tensor, swish: bool = True) -> Tensor:
        groups = x.reshape(len(x), self.config.norm_groups, -1)
        variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
        y = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
        w, b = (self.weights[f"{name}.{part}"][:, None, None] for part in ("weight", "bias"))
        y = y * w + b
        return y / (1 + torch.exp(-y)) if swish else y

    def res(self, name: str, x: Tensor) -> Tensor:
        y = self.conv(f"{name}.conv1", self.norm_swish(f"{name}.norm1", x), padding=1)
        y = self.conv(f"{name}.conv2", self.norm_swish(f"{name}.norm2", y), padding=1)
        shortcut = f"{name}.nin_shortcut"
        return (self.conv(shortcut, x) if self.has(shortcut) else x) + y

    def attend(self, name: str, x: Tensor) -> Tensor:
        if not self.has(f"{name}.q"):
            return x
        y = self.norm_swish(f"{name}.norm", x, swish=False)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")  # [B, C, T]
        weights = torch.exp(torch.einsum("bcq,bck->bqk", q, k) / x.shape[1] ** 0.5)
        out = torch.einsum("bqk,bck->bcq", weights / weights.sum(2, keepdim=True), v)
        return x + self.conv(f"{name}.proj_out", out.reshape(x.shape))

    def level(self, name: str, x: Tensor) -> Tensor:
        block = 0
        while self.has(f"{name}.res.{block}.conv1"):
            x = self.attend(f"{name}.attn.{block}", self.res(f"{name}.res.{block}", x))
            block += 1
        return x

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.res(f"{name}.2", self.attend(f"{name}.1", self.res(f"{name}.0", x)))

    def unit(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True) if self.config.l2_normalize else x

    def codebook(self) -> Tensor:
        return self.unit(self.weights["quantize.embedding.weight"])

    def encode(self, images: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", images.double(), padding=1)
        for level in range(len(self.config.multipliers)):
            x = self.level(f"encoder.conv_blocks.{level}", x)
            down = f"encoder.conv_blocks.{level}.downsample.conv"
            if self.has(down):
                x = self.conv(down, F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.norm_swish("encoder.norm_out", self.middle("encoder.mid", x))
        z = self.conv("quant_conv", self.conv("encoder.conv_out", x, padding=1))  # [B, D, h, w]
        return (self.unit(z.flatten(2).mT)[:, :, None] - self.codebook()).square().sum(3).argmin(2)

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        z = self.codebook()[codes].mT.reshape(len(codes), -1, *grid)
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1)
        x = self.middle("decoder.mid", x)
        for level in range(len(self.config.multipliers)):
            x = self.level(f"decoder.conv_blocks.{level}", x)
            up = f"decoder.conv_blocks.{level}.upsample.conv"
            if self.has(up):
                x = self.conv(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
        x = self.conv("decoder.conv_out", self.norm_swish("decoder.norm_out", x), padding=1)
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
    grid = (16 // tokenizer.downsample, 8 // tokenizer.downsample)
    assert codes.unique().numel() > 2, "the test must tell codes apart"
    assert torch.equal(codes, reference.encode(images))
    decoded = tokenizer.decode(codes, grid)
    assert decoded.dtype == torch.float64 and (decoded.abs() < 1).any()
    torch.testing.assert_close(decoded, reference.decode(codes, grid), rtol=1e-10, atol=1e-10)


def test_float32_and_bfloat16_are_near_float64():
    images = make_images(4, 16, 16)
    exact, single, half = make().freeze().double(), make().freeze(), make().freeze().bfloat16()
    codes = exact.encode(images)
    pixels = exact.decode(codes)
    assert torch.equal(single.encode(images), codes)
    decoded = single.decode(codes)
    torch.testing.assert_close(decoded.double(), pixels, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # a caller's autocast leaves pixels alone
        assert torch.equal(single.decode(codes), decoded)
    assert (half.encode(images) == codes).float().mean() > 0.8
    assert half.decode(codes).dtype == torch.float32
    assert (half.decode(codes) - pixels).abs().mean() < 0.05


def test_shapes_and_ranges():
    tokenizer = make().freeze()
    assert (tokenizer.codebook_size, tokenizer.downsample) == (24, 4)
    codes = tokenizer.encode(make_images(3, 16, 24))
    assert codes.shape == (3, 24) and codes.dtype == torch.int64
    images = tokenizer.decode(codes, (4, 6))
    assert images.shape == (3, 3, 16, 24) and images.dtype == torch.float32
    assert images.abs().max() == 1 < tokenizer.decode(codes, (4, 6), clip=False).abs().max()
    assert tokenizer.decode(torch.zeros(1, 9, dtype=torch.uint16)).shape == (1, 3, 12, 12)


@pytest.mark.parametrize(
    ("method", "tensor", "value"),
    [
        ("encode", torch.zeros(3, 16, 16), r"\[3, 16, 16\]"),
        ("encode", torch.zeros(1, 1, 16, 16), r"\[1, 1, 16, 16\]"),
        ("encode", torch.zeros(1, 3, 16, 18), r"\[1, 3, 16, 18\].* 4"),
        ("encode", torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
        ("decode", torch.zeros(16, dtype=torch.int64), r"\[16\]"),
        ("decode", torch.zeros(1, 12, dtype=torch.int64), r"\[1, 12\].* 3 x 3"),
        ("decode", torch.full((1, 4), 24), r"24\.\.24.* 0\.\.23"),
        ("decode", torch.full((1, 4), -1), r"-1\.\.-1"),
    ],
)
def test_bad_tensors_are_refused(method, tensor, value):
    with pytest.raises(ValueError, match=value):
        getattr(make(), method)(tensor)


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="this torch has no NNPACK")
@torch.no_grad()
def test_a_loaded_tokenizer_convolves_by_winograd_with_the_plain_values(monkeypatch, tmp_path):
    changes = {"width": 128, "multipliers": (1,), "attention": False, "codebook_size": 9}
    tokenizer, images = make(**changes).freeze(), make_images(1, 64, 64)
    tok.save(tokenizer, tmp_path)
    fast, kernel, calls = tok.load(tmp_path), torch._nnpack_spatial_convolution, []
    monkeypatch.setattr(
        torch, "_nnpack_spatial_convolution", lambda *args: (calls.append(1), kernel(*args))[1]
    )
    codes = fast.encode(images)
    assert calls and torch.equal(codes, tokenizer.encode(images))
    exact = tokenizer.double().decode(codes)
    torch.testing.assert_close(fast.decode(codes).double(), exact, atol=2e-4, rtol=0)
    torch.testing.assert_close(fast.double().decode(codes), exact, atol=1e-12, rtol=0)
