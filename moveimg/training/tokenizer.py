"""Training a VQ tokenizer: reconstruction, perceptual, adversarial and quantizer losses."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import tokenizer as vq
from moveimg.checkpoint import load_tokenizer
from moveimg.config import TokenizerTrainConfig, as_pair
from moveimg.data import (
    ImageSource,
    code_grid,
    count_views,
    crop_choice,
    crop_views,
    epoch_order,
    open_images,
)
from moveimg.device import pick_dtype
from moveimg.dist import World, reduce_mean
from moveimg.images import UnreadableImageError, labelled_grid, to_pil, to_tensor
from moveimg.rng import InitialValues
from moveimg.training.loop import Task, fit
from moveimg.training.optimizer import learning_rate
from moveimg.training.parallel import Parallelism
from tokenizer import losses as vq_losses

PREVIEW_COLUMNS = 8
MAX_VALIDATION = 2048  # held-out images that a validation reconstructs
VALIDATION_BATCH = 32  # at least: without gradients images need less memory


class RandomViews(Dataset):
    """Views of images, (index, view) -> float32 [3, H, W] in [-1, 1]."""

    def __init__(self, source: ImageSource, config: TokenizerTrainConfig) -> None:
        self.source, self.images = source, config.images

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        (index, view), cut = key, self.images
        return to_tensor([crop_views(self.image(index), cut.size, cut.crops, cut.ranges)[view]])[0]

    def image(self, index: int) -> Image.Image:
        """An image, or in place of an unreadable one the next that can be read."""
        for other in (*range(index, len(self)), *range(index)):
            try:
                return self.source[other][0]
            except UnreadableImageError as error:
                warnings.warn(f"{error}; the next image replaces it", stacklevel=1)
        raise ValueError(f"{self.source.name}: none of its {len(self)} images can be read")


class Adversary:
    """A PatchGAN with an optimizer of its own (VQGAN, arXiv 2012.09841, section 3.1).

    With several processes its gradients are averaged, and its BatchNorms see a process's own
    images (as in LlamaGen and taming).
    """

    def __init__(self, config: TokenizerTrainConfig, channels: int, device: torch.device) -> None:
        assert config.adversarial is not None
        self.config, self.run = config.adversarial, config
        lr, n_layers, size = self.config.lr, self.config.n_layers, min(as_pair(config.images.size))
        if size < (least := vq_losses.min_side(n_layers)):
            raise ValueError(f"images.size {size}: n_layers {n_layers} needs at least {least}")
        made = vq_losses.make_discriminator(channels, self.config.width, n_layers)
        self.discriminator, betas = made.to(device), config.optimizer.betas
        self.optimizer = torch.optim.AdamW(made.parameters(), lr, betas, weight_decay=0.0)

    def train_step(self, step: int, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """Train the discriminator on images and reconstructions [B, C, H, W]; scalars to log."""
        run = self.run.optimizer
        for group in self.optimizer.param_groups:  # the run's schedule, scaled to its own rate
            group["lr"] = self.config.lr * learning_rate(run, step, self.run.steps) / run.lr
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
        loss = vq_losses.discriminator_loss(real, fake)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.discriminator.parameters():
            assert parameter.grad is not None
            parameter.grad = reduce_mean(parameter.grad)
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), run.clip)
        self.optimizer.step()
        return {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}

    def generator_loss(
        self, reconstruction: Tensor, losses: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted adversarial loss, and scalars to log.

        `losses` is the weighted sum of the losses of the reconstruction [B, C, H, W].
        """
        self.discriminator.requires_grad_(False)  # the gradient goes to the pixels alone
        loss = -self.discriminator(reconstruction).mean()
        weight = torch.tensor(self.config.weight, device=loss.device)
        if self.config.adaptive:
            weight = weight * vq_losses.adaptive_weight(losses, loss, last_layer)
        return weight * loss, {"adversarial": loss, "adversarial_weight": weight}


class TokenizerTask(Task):
    """loss = reconstruction (l1, l2, LPIPS) + quantizer's own + adversarial (VQGAN, eq. 6)."""

    def __init__(
        self, config: TokenizerTrainConfig, model: vq.AutoencoderTokenizer, plan: Parallelism
    ) -> None:
        self.config, self.model, self.forward, self.plan = config, model, model, plan
        self.device = device = plan.world.device
        cut, channels = config.images, 3
        with plan.world.first_alone():  # a named data set and LPIPS are downloaded once
            self.train, val = (
                RandomViews(open_images(cut.source, split, cut.val_fraction), config)
                for split in ("train", "val")
            )
            self.perceptual = (
                vq_losses.load_perceptual_loss(config.perceptual_folder, device)
                if config.perceptual_weight
                else None
            )
        images = map(val.image, spread_indices(len(val), MAX_VALIDATION))
        self.val = to_tensor([crop_views(i, cut.size, "center", cut.ranges[:1])[0] for i in images])
        self.reconstruction_weights = {"l1": config.l1_weight, "l2": config.l2_weight}
        if self.perceptual is not None:
            self.reconstruction_weights["perceptual"] = config.perceptual_weight
        self.weights = self.reconstruction_weights | dict(model.quantize.loss_weights)
        self.adversary = Adversary(config, channels, device) if config.adversarial else None
        self._batches: Iterator[Tensor] | None = None

    def loss(self, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self._batches is None:
            small = len(self.train) < MAX_VALIDATION
            loader = DataLoader(
                self.train,
                batch_sampler=self._keys(step),
                num_workers=0 if small else min(4, (os.cpu_count() or 1) - 1),
                generator=torch.Generator(),  # or it would draw from torch's default generator
            )
            self._batches = iter(loader)
        images = next(self._batches).to(self.device)
        low = self.plan.dtype == torch.bfloat16
        with torch.autocast(self.device.type, self.plan.dtype, enabled=low):
            out = self.forward(images)
            losses = dict(out.losses)
            if self.perceptual is not None:
                losses["perceptual"] = self.perceptual(out.reconstruction, images)
        loss = vq.total_loss(losses, self.weights)
        scalars = {**losses, **out.stats}
        if self.adversary is not None and step >= self.adversary.config.start:
            reconstruction = out.reconstruction.float()
            scalars |= self.adversary.train_step(step, images, reconstruction)
            weights = self.reconstruction_weights
            weighted = vq.total_loss({name: losses[name] for name in weights}, weights)
            adversarial, logged = self.adversary.generator_loss(
                reconstruction, weighted, self.model.decoder.get_parameter("conv_out.weight")
            )
            loss, scalars = loss + adversarial, scalars | logged
        return loss, {name: value.detach() for name, value in scalars.items()}

    @torch.no_grad()
    def validate(self, model: Any) -> dict[str, float]:
        """Mean squared error, on [-1, 1], and code usage of held-out images, over all processes."""
        world = self.plan.world
        error = torch.zeros(1).double()
        counts = torch.zeros(self.model.codebook_size).double()
        batches = self.val.split(max(VALIDATION_BATCH, self.config.batch_size))
        for images in batches[world.rank :: world.size]:
            codes, decoded = reconstruct(model, images)
            error += (decoded - images).square().double().mean() * len(images)
            counts += codes.flatten().bincount(minlength=len(counts)).cpu()
        error, counts = (world.mean(part) * world.size for part in (error, counts))
        stats = {key: value.item() for key, value in vq.code_statistics(counts).items()}
        return {"mse": error.item() / len(self.val), **stats}

    def preview(self, model: Any) -> Image.Image:
        """Held-out images above their reconstructions."""
        images = self.val[spread_indices(len(self.val), PREVIEW_COLUMNS)]
        rows = [to_pil(images), to_pil(reconstruct(model, images)[1])]
        return labelled_grid(rows, ["image", "decoded"])

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
        n, size, seed = len(self.train), self.config.batch_size, self.config.seed
        world, share = self.plan.world, size // self.plan.world.size
        n_views = count_views(self.config.images.crops, self.config.images.ranges)
        position = step * size
        while True:
            batch: list[tuple[int, int]] = []
            while len(batch) < size:
                epoch, start = divmod(position, n)
                order = epoch_order(n, seed, epoch)[start : start + size - len(batch)]
                choice = crop_choice(n, n_views, seed, epoch)
                batch += [(int(i), int(choice[i])) for i in order]
                position += len(order)
            yield batch[world.rank * share : (world.rank + 1) * share]


def spread_indices(n: int, count: int) -> list[int]:
    """At most `count` evenly spaced indices in 0..n-1: of a list sorted by class, all classes."""
    return torch.linspace(0, n - 1, min(n, count), dtype=torch.float64).round().long().tolist()


def reconstruct(model: vq.AutoencoderTokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """The codes [B, T] of images [B, C, H, W], and the images decoded from them, on the CPU."""
    codes = model.encode(images)
    h, w = (side // model.downsample for side in images.shape[2:])
    return codes, model.decode(codes, (h, w)).cpu()


def make_tokenizer(config: TokenizerTrainConfig) -> vq.AutoencoderTokenizer:
    """The tokenizer at step 0: new, or with the weights of `config.init_from`."""
    if config.init_from is None:
        return vq.build(vq.parse_config({"kind": "vq"} | config.tokenizer, "tokenizer"))
    source = load_tokenizer(config.init_from, torch.device("cpu"))
    settings = source.config.model_dump(mode="json") | config.tokenizer
    model = vq.build(vq.parse_config(settings, "tokenizer"))
    vq.load_weights(model, source.state_dict(), str(config.init_from))
    return model


def train_tokenizer(
    config: TokenizerTrainConfig, world: World | torch.device, restart: bool = False
) -> dict:
    """Train a tokenizer into the directory config.out; returns the held-out scalars.

    `world` is the processes, or the device of the only one; `restart` deletes an earlier run first.
    Raises ValueError or FileNotFoundError for missing images or weights, or sizes that do not fit.
    """
    world = World(device=world) if isinstance(world, torch.device) else world
    if config.batch_size % world.size:
        raise ValueError(f"batch_size {config.batch_size}: expected a multiple of {world.size}")
    plan = Parallelism(world, parts=world.size, dtype=pick_dtype(config.dtype, world.device))
    with InitialValues(config.seed):
        model = make_tokenizer(config).to(world.device)
        code_grid(config.images.size, model.downsample)  # refuses a size it does not divide
        task = TokenizerTask(config, model, plan)
    return fit(task, config, plan, restart)
