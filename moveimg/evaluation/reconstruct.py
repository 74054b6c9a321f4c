"""Images through a tokenizer and back: the error, rFID, and how evenly the codes are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

import tokenizer as vq
from moveimg.config import Size, as_pair
from moveimg.data import ImageSource, code_grid, crop_views, default_batch_size, to_tensor
from moveimg.errors import list_names
from moveimg.evaluation.features import Extractor, run
from moveimg.evaluation.metrics import WINDOW, frechet_distance, psnr, ssim, statistics_of
from moveimg.evaluation.reference import Reference
from moveimg.evaluation.scoring import check_pair
from moveimg.images import UnreadableImageError, labelled_grid, to_pil, to_uint8
from moveimg.progress import progress_bar

SHOWN = 10


@dataclass(frozen=True)
class Reconstruction:
    """How well a tokenizer reproduces images.

    Attributes:
        images: number of images read.
        mse: mean squared error, pixels in [-1, 1].
        psnr: 10 log10(2^2 / mse), in dB, of the mean error over all images.
        psnr_of_images: the mean of the images' PSNR, of pixels rounded to 0..255, in dB; images
            reconstructed without any error are left out.
        ssim: structural similarity, a mean over the images; None below 11 x 11 pixels.
        usage: share of the codebook that occurred.
        perplexity: exp of the entropy of the codes' frequencies, 1 to codebook_size.
        rfid: Fréchet distance between reconstructions and the reference; None without extractor.
        rfid_space: the feature space of rfid.
        rfid_reference: name of the reference: the images themselves by default.
        warnings: guards that were overruled, and images left out.
    """

    images: int
    mse: float
    psnr: float
    psnr_of_images: float
    ssim: float | None
    usage: float
    perplexity: float
    rfid: float | None = None
    rfid_space: str | None = None
    rfid_reference: str | None = None
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def reconstruct(
    source: ImageSource,
    tokenizer: vq.AutoencoderTokenizer,
    size: Size,
    ratio: float = 1.0,
    extractor: Extractor | None = None,
    reference: Reference | None = None,
    allowed: Sequence[str] = (),
) -> tuple[Reconstruction, Image.Image]:
    """Encode and decode the centre `size` pixels of every image of `source`.

    Args:
        source: the images: validation images for a number to publish.
        tokenizer: the tokenizer to measure.
        size, ratio: the crop: `size` pixels (of a square's side, or height and width) of an image
            resized to size * ratio.
        extractor: for rFID; None leaves it out.
        reference: of rFID; None: the images themselves.
        allowed: guards that may be overruled, by name.

    Returns the figures, and a grid of images, spread over the source, above their reconstructions.
    Raises ValueError for a reference of training images or of another size.
    """
    lines: list[str] = []
    if reference is not None:
        lines = check_pair(as_pair(size), reference, allowed, wanted="val")
    measured = _Measured(tokenizer.codebook_size)
    shown: list[list[Image.Image]] = [[], []]
    unreadable: list[str] = []
    spread = set(np.linspace(0, len(source) - 1, SHOWN).round().astype(int).tolist())
    step = default_batch_size(size, next(tokenizer.parameters()).device)
    grid = code_grid(size, tokenizer.downsample)
    with progress_bar(len(source), "reconstruct", "image") as bar:
        for start in range(0, len(source), step):
            rows = range(start, min(start + step, len(source)))
            views, readable = _read_views(source, rows, size, ratio, unreadable)
            bar.update(len(rows))
            if not views:
                continue
            images = to_tensor(views)
            codes = tokenizer.encode(images)
            decoded = tokenizer.decode(codes, grid).float().cpu()
            if not torch.isfinite(decoded).all():
                raise ValueError(f"non-finite: reconstructions of images {start}.. are not finite")
            measured.add(images, decoded, codes, extractor, reference is None)
            # one at least, where none of the spread ones can be read
            chosen = [i for i, row in enumerate(readable) if row in spread] or [0][len(shown[0]) :]
            for row, batch in zip(shown, (images, decoded), strict=True):
                row += to_pil(batch[chosen])
    if unreadable:
        lines.append(f"unreadable: {len(unreadable)} images are left out: {list_names(unreadable)}")
    if not measured.errors:
        raise ValueError(f"{source.name}: none of {len(source)} images could be read")
    figures = measured.figures()
    if extractor is not None:
        figures |= _rfid(measured, extractor, reference, source.name)
    count = len(source) - len(unreadable)
    result = Reconstruction(images=count, warnings=lines, **figures)
    return result, labelled_grid(shown, ["image", "decoded"])


def _read_views(
    source: ImageSource, rows: range, size: Size, ratio: float, unreadable: list[str]
) -> tuple[list[Image.Image], list[int]]:
    """Centre crops of the rows that can be read, and those rows; the others are noted."""
    views, readable = [], []
    for row in rows:
        try:
            views.append(crop_views(source[row][0], size, "center", (ratio,))[0])
            readable.append(row)
        except UnreadableImageError as error:
            unreadable.append(error.identifier)
    return views, readable


class _Measured:
    """Sums and features, collected image by image."""

    def __init__(self, codebook_size: int) -> None:
        self.counts = torch.zeros(codebook_size, dtype=torch.int64)
        self.errors: list[torch.Tensor] = []
        self.psnr: list[torch.Tensor] = []
        self.ssim: list[torch.Tensor] = []
        self.features: dict[str, list[np.ndarray]] = {"image": [], "decoded": []}

    def add(
        self,
        images: torch.Tensor,
        decoded: torch.Tensor,
        codes: torch.Tensor,
        extractor: Extractor | None,
        see_originals: bool,
    ) -> None:
        """images, decoded float [B, 3, H, W] in [-1, 1]; codes int64 [B, T]."""
        self.errors.append((decoded - images).square().flatten(1).mean(1))
        self.counts += codes.flatten().bincount(minlength=len(self.counts)).cpu()
        pixels = {"image": to_uint8(images), "decoded": to_uint8(decoded)}
        pair = [torch.from_numpy(p).permute(0, 3, 1, 2).double() / 255 for p in pixels.values()]
        self.psnr.append(psnr(pair[0], pair[1]))
        if min(images.shape[-2:]) >= WINDOW:
            self.ssim.append(ssim(pair[0], pair[1]))
        for name in self.features if extractor is not None else ():
            if name == "decoded" or see_originals:
                self.features[name].append(run(extractor, pixels[name])["fid"])  # type: ignore[arg-type]

    def figures(self) -> dict[str, Any]:
        mse = torch.cat(self.errors).double().mean().item()
        own = torch.cat(self.psnr)
        finite = own[torch.isfinite(own)]
        stats = {key: value.item() for key, value in vq.code_statistics(self.counts).items()}
        return {
            "mse": mse,
            "psnr": 10 * math.log10(4 / mse) if mse else math.inf,
            "psnr_of_images": finite.mean().item() if len(finite) else math.inf,
            "ssim": torch.cat(self.ssim).mean().item() if self.ssim else None,
            **stats,
        }


def _rfid(
    measured: _Measured, extractor: Extractor, reference: Reference | None, source: str
) -> dict[str, Any]:
    ours = statistics_of(np.concatenate(measured.features["decoded"]))
    if reference is None:
        theirs = statistics_of(np.concatenate(measured.features["image"]))
    else:
        theirs = reference.statistics["fid"]
    return {
        "rfid": frechet_distance(ours, theirs),
        "rfid_space": extractor.space,
        "rfid_reference": source if reference is None else reference.name,
    }
