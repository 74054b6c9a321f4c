"""Training a VQ tokenizer: reconstruction, perceptual, adversarial and quantizer losses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import tokenizer as vq
from moveimg.checkpoint import load_tokenizer
from moveimg.config import AdversarialConfig, TokenizerTrainConfig, as_pair
from moveimg.data import (
    ImageSource,
    code_grid,
    count_views,
    count_workers,
    crop_views,
    draw_views,
    evenly_spaced,
    open_images,
)
from moveimg.data.images import print_once
from moveimg.device import pick_dtype
from moveimg.dist import World, reduce_mean
from moveimg.files import fetch
from moveimg.images import UnreadableImageError, draw_grid, to_pil, to_tensor
from moveimg.rng import SeededInit
from moveimg.training.loop import Task, fit
from moveimg.training.optimizer import learning_rate
from moveimg.training.parallel import Parallelism

MAX_VALIDATION = 2048  # held-out images that a validation reconstructs
VGG_FILE, LPIPS_FILE = "vgg16-397923af.pth", "weights-vgg16-lpips.pth"
WEIGHTS = {
    VGG_FILE: f"https://download.pytorch.org/models/{VGG_FILE}",
    LPIPS_FILE: f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{LPIPS_FILE}",
}


def load_perceptual_loss(
    folder: Path | None, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (arXiv 1801.03924) by torch-fidelity: two [B, 3, H, W] in [-1, 1] -> scalar.

    The weights are in `checkpoints/` of a torch.hub folder (None: torch's default), or downloaded
    into it. Raises FileNotFoundError without a file or network, ValueError for a damaged file.
    """
    from torch_fidelity.sample_similarity_lpips import SampleSimilarityLPIPS

    before = torch.hub.get_dir()
    hub = Path(folder or before)
    for name, url in WEIGHTS.items():
        fetch(url, hub / "checkpoints" / name, "397923af" if name == VGG_FILE else None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # so that no code in a file is run
    torch.hub.set_dir(str(hub))
    try:
        model: nn.Module = SampleSimilarityLPIPS("lpips").to(device)
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"{hub}: damaged weights of LPIPS ({error!r:.200})") from None
    finally:
        torch.hub.set_dir(before)
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
    return lambda x, y: model((x + 1) * 127.5, (y + 1) * 127.5).mean()


class RandomViews(Dataset):
    """Views of images, (index, view) -> float32 [3, H, W] in [-1, 1]."""

    def __init__(self, source: ImageSource, config: TokenizerTrainConfig) -> None:
        self.source, self.images = source, config.images

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        (index, view), cut = key, self.images
        ratio, number = divmod(view, count_views(cut.crops, (1.0,)))
        ranges = cut.ranges[ratio : ratio + 1]
        return to_tensor([crop_views(self.image(index), cut.size, cut.crops, ranges)[number]])[0]

    def image(self, index: int) -> Image.Image:
        """The image at `index`, or the next readable image if it is unreadable."""
        n = len(self.source)
        for other in (*range(index, n), *range(index)):
            try:
                return self.source[other][0]
            except UnreadableImageError as error:
                print_once(f"warning: {error}; the next image replaces it")
        raise ValueError(f"{self.source.name}: none of its {n} images can be read")


class Adversary:
    """taming's PatchGAN with a separate optimizer (VQGAN, arXiv 2012.09841, section 3.1).

    Gradients are averaged over processes; BatchNorm statistics are per process (as in LlamaGen and
    taming).
    """

    def __init__(
        self, config: AdversarialConfig, run: TokenizerTrainConfig, device: torch.device
    ) -> None:
        from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

        self.config, self.run, size = config, run, min(as_pair(run.images.size))
        # PatchGAN's last two 4 x 4 convolutions remove one position each
        if size < (least := 3 * 2**config.n_layers):
            raise ValueError(
                f"images.size {size}: expected at least {least} for n_layers {config.n_layers}"
            )
        made: nn.Module = NLayerDiscriminator(3, ndf=config.width, n_layers=config.n_layers)
        self.discriminator = made.apply(weights_init).to(device)
        betas = run.optimizer.betas
        self.optimizer = torch.optim.AdamW(made.parameters(), config.lr, betas, weight_decay=0.0)

    def train_step(self, step: int, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Train the discriminator on images and reconstructions [B, C, H, W]; scalars to log."""
        run, judge = self.run.optimizer, self.discriminator.requires_grad_(True)
        for group in self.optimizer.param_groups:  # the run's schedule, scaled to config.lr
            group["lr"] = self.config.lr * learning_rate(run, step, self.run.steps) / run.lr
        real, fake = judge(images), judge(reconstruction.detach())
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2  # hinge, arXiv 1705.02894
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in judge.parameters():
            assert parameter.grad is not None
            parameter.grad = reduce_mean(parameter.grad)
        nn.utils.clip_grad_norm_(judge.parameters(), run.clip)
        self.optimizer.step()
        return {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def generator_loss(
        self, reconstruction: Tensor, losses: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted adversarial loss, and scalars to log.

        `losses` is the weighted sum of the losses of the reconstruction [B, C, H, W], L the
        decoder's last weight. The adaptive weight (VQGAN, eq. 7), of the images of all processes,
        is |d losses / d L| / (|d adversarial / d L| + 1e-4), at most 1e4.
        """
        self.discriminator.requires_grad_(False)  # only the reconstruction needs a gradient
        adversarial = -self.discriminator(reconstruction).mean()
        weight = torch.tensor(self.config.weight, device=adversarial.device)
        if self.config.adaptive:
            norms = [
                reduce_mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
                for loss in (losses, adversarial)
            ]
            weight = weight * (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
        return weight * adversarial, {"adversarial": adversarial, "adversarial_weight": weight}


class TokenizerTask(Task):
    """loss = reconstruction (l1, l2, LPIPS) + quantizer + adversarial (VQGAN, eq. 6)."""

    def __init__(
        self, config: TokenizerTrainConfig, model: vq.AutoencoderTokenizer, parallel: Parallelism
    ) -> None:
        self.config, self.model, self.forward, self.parallel = config, model, model, parallel
        self.device = device = parallel.world.device
        cut, judge, self.perceptual = config.images, config.adversarial, None
        self.reconstruction_weights = {"l1": config.l1_weight, "l2": config.l2_weight}
        with parallel.world.rank0_first():  # a named data set and LPIPS are downloaded once
            self.train, val = (
                RandomViews(open_images(cut.source, split, cut.val_fraction), config)
                for split in ("train", "val")
            )
            if config.perceptual_weight:
                self.perceptual = load_perceptual_loss(config.perceptual_folder, device)
                self.reconstruction_weights["perceptual"] = config.perceptual_weight
        images = map(val.image, evenly_spaced(len(val.source), MAX_VALIDATION))
        self.val = to_tensor([crop_views(i, cut.size, "center", cut.ranges[:1])[0] for i in images])
        self.weights = self.reconstruction_weights | model.quantize.loss_weights
        self.adversary = Adversary(judge, config, device) if judge else None
        self._batches: Iterator[Tensor] | None = None

    def loss(self, step: int, micro_batch: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self._batches is None:
            loader = DataLoader(
                self.train,
                batch_sampler=self._keys(step),
                num_workers=max(0, min(4, count_workers(len(self.train.source)) - 1)),
                generator=torch.Generator(),  # or it would draw from torch's default generator
            )
            self._batches = iter(loader)
        images = next(self._batches).to(self.device)
        low = self.parallel.dtype == torch.bfloat16
        with torch.autocast(self.device.type, self.parallel.dtype, enabled=low):
            out = self.forward(images)
            losses = dict(out.losses)
            if self.perceptual is not None:
                losses["perceptual"] = self.perceptual(out.output, images)
        loss, scalars = sum_losses(losses, self.weights), {**losses, **out.stats}
        if self.adversary is not None and step >= self.adversary.config.start:
            reconstruction = out.output.float()
            scalars |= self.adversary.train_step(step, images, reconstruction)
            weighted = sum_losses(losses, self.reconstruction_weights)
            last_layer = self.model.decoder.get_parameter("conv_out.weight")
            extra, logged = self.adversary.generator_loss(reconstruction, weighted, last_layer)
            loss, scalars = loss + extra, scalars | logged
        return loss, {name: value.detach() for name, value in scalars.items()}

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """Mean squared error, on [-1, 1], and code usage of held-out images, over all processes."""
        world, error = self.parallel.world, torch.zeros(1).double()
        counts = torch.zeros(self.model.codebook_size).double()
        batches = self.val.split(max(32, self.config.batch_size))  # without gradients: less memory
        for images in batches[world.rank :: world.size]:
            codes, decoded = reconstruct(model, images)
            error += (decoded - images).square().double().mean() * len(images)
            counts += codes.flatten().bincount(minlength=len(counts)).cpu()
        error, counts = (world.mean(part) * world.size for part in (error, counts))
        stats = {key: value.item() for key, value in vq.code_statistics(counts).items()}
        return {"mse": error.item() / len(self.val), **stats}

    def preview(self, model: Any) -> Image.Image:
        """Held-out images above their reconstructions."""
        images = self.val[evenly_spaced(len(self.val), 8)]
        rows = [to_pil(images), to_pil(reconstruct(model, images)[1])]
        return draw_grid(rows, ["image", "decoded"])

    def export(self, model: Any, directory: Path, about: dict[str, Any]) -> None:
        vq.save(model, directory)

    def extra_state(self) -> dict[str, Any]:
        """The state of the quantizer's training, and of the discriminator with its optimizer."""
        state: dict[str, Any] = {"idle_steps": self.model.quantize.idle_steps}
        if self.adversary is not None:
            state["discriminator"] = self.adversary.discriminator.state_dict()
            state["discriminator_optimizer"] = self.adversary.optimizer.state_dict()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        idle = state.get("idle_steps")
        self.model.quantize.idle_steps = None if idle is None else idle.to(self.device)
        if self.adversary is not None:
            self.adversary.discriminator.load_state_dict(state["discriminator"])
            self.adversary.optimizer.load_state_dict(state["discriminator_optimizer"])

    def _keys(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """(image, view) keys of this process's part of each batch from `step` on, by the seed."""
        world, n, size = self.parallel.world, len(self.train.source), self.config.batch_size
        n_views = count_views(self.config.images.crops, self.config.images.ranges)
        share = size // world.size
        for start in count(step * size + world.rank * share, size):
            positions = np.arange(start, start + share)
            drawn = draw_views(positions, n, n, n_views, self.config.seed)
            yield list(zip(*(part.tolist() for part in drawn), strict=True))


def sum_losses(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum of the losses that have a weight."""
    return torch.stack([weight * losses[name] for name, weight in weights.items()]).sum()


def reconstruct(model: vq.AutoencoderTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [B, T] of images [B, C, H, W], and the images decoded from them, on the CPU."""
    codes = model.encode(images)
    h, w = (side // model.downsample for side in images.shape[2:])
    return codes, model.decode(codes, (h, w)).cpu()


def make_tokenizer(config: TokenizerTrainConfig) -> vq.AutoencoderTokenizer:
    """The tokenizer at step 0: new, or with the weights of `config.init_from`."""
    settings, source = {"kind": "vq"}, None
    if config.init_from is not None:
        source = load_tokenizer(config.init_from, torch.device("cpu"))
        settings = source.config.model_dump(mode="json")
    model = vq.AutoencoderTokenizer(vq.parse_config(settings | config.tokenizer, "tokenizer"))
    if source is not None:
        vq.load_weights(model, source.state_dict(), str(config.init_from))
    return model


def train_tokenizer(
    config: TokenizerTrainConfig, world: World | torch.device, restart: bool = False
) -> dict:
    """Train a tokenizer into the directory config.out; returns the held-out scalars.

    `world`: the processes, or the device of a single process. `restart` deletes an earlier run.
    Raises ValueError or FileNotFoundError for missing images or weights, or sizes that do not fit.
    """
    world = World(device=world) if isinstance(world, torch.device) else world
    if config.batch_size % world.size:
        raise ValueError(f"batch_size {config.batch_size}: expected a multiple of {world.size}")
    dtype = pick_dtype(config.dtype, world.device)
    parallel = Parallelism(world, micro_batches=world.size, dtype=dtype)
    with SeededInit(config.seed):
        model = make_tokenizer(config).to(world.device)
        code_grid(config.images.size, model.downsample)  # refuses a size it does not divide
        task = TokenizerTask(config, model, parallel)
    return fit(task, config, parallel, restart)
