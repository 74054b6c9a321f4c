"""Training a VQ tokenizer: reconstruction, perceptual, adversarial and quantizer losses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import tokenizer as vq
from moveimg.config import TokenizerTrainConfig
from moveimg.data import (
    ImageSource,
    count_views,
    crop_choice,
    crop_views,
    epoch_order,
    open_images,
    to_tensor,
)
from moveimg.device import pick_dtype
from moveimg.dist import World, print_rank0
from moveimg.images import UnreadableImageError, labelled_grid, to_pil
from moveimg.training.adversary import Adversary
from moveimg.training.loop import fit
from moveimg.training.parallel import Plan
from tokenizer.losses import ImageLoss
from tokenizer.perceptual import load_perceptual_loss

PREVIEW_COLUMNS = 8
MOST_VALIDATED = 2048  # held-out images that are reconstructed for a validation
VALIDATED_AT_ONCE = 32  # of those, at least; without gradients they take less room than a batch


class RandomViews(Dataset):
    """One view of an image, (index, view) -> float32 [3, H, W] in [-1, 1]."""

    def __init__(self, source: ImageSource, config: TokenizerTrainConfig) -> None:
        self.source, self.images = source, config.images
        self.told: set[int] = set()  # of the images that cannot be read

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        index, view = key
        views = crop_views(
            self.image(index), self.images.size, self.images.crops, self.images.ranges
        )
        return to_tensor([views[view]])[0]

    def image(self, index: int) -> Image.Image:
        """An image, or in the place of one that cannot be read the next one that can.

        So a broken file ends no run, and the others stand where they stood.
        """
        for other in (*range(index, len(self)), *range(index)):
            try:
                return self.source[other][0]
            except UnreadableImageError as error:
                if other not in self.told:
                    self.told.add(other)
                    print_rank0(f"warning: {error}; the next one takes its place")
        raise ValueError(f"{self.source.name}: none of its {len(self)} images can be read")


class TokenizerTask:
    """loss = reconstruction (l1, l2, LPIPS) + quantizer's own + adversarial (VQGAN, eq. 6)."""

    model: nn.Module

    def __init__(
        self, config: TokenizerTrainConfig, model: vq.AutoencoderTokenizer, plan: Plan
    ) -> None:
        self.config, self.model, self.plan = config, model, plan
        self.forward: nn.Module = model
        self.device = device = plan.world.device
        self.train = RandomViews(open_images(config.images.source, "train"), config)
        val = RandomViews(open_images(config.images.source, "val"), config)
        shown = range(min(len(val), MOST_VALIDATED))
        size, ranges = config.images.size, config.images.ranges[:1]
        views = [crop_views(val.image(i), size, "center", ranges)[0] for i in shown]
        self.val = to_tensor(views)
        self.reconstruction_weights = {"l1": config.l1_weight, "l2": config.l2_weight}
        self.perceptual: ImageLoss | None = None
        if config.perceptual_weight:
            self.reconstruction_weights["perceptual"] = config.perceptual_weight
            with plan.world.first_alone():
                self.perceptual = load_perceptual_loss(config.perceptual_folder, device)
        self.weights = self.reconstruction_weights | dict(model.quantize.loss_weights)
        self.adversary: Adversary | None = None
        if config.adversarial is not None:
            self.adversary = Adversary(config, self.val.shape[1], device)
        self._batches: Iterator[Tensor] | None = None

    def loss(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        step = index // self.plan.parts
        if self._batches is None:
            workers = 0 if len(self.train) < MOST_VALIDATED else 4
            loader = DataLoader(
                self.train,
                batch_sampler=self._keys(step),
                num_workers=workers,
                generator=torch.Generator(),  # or it would draw from the generator of the step
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
        if self.adversary is not None and self.adversary.active(step):
            pull, judged = self._adversarial(step, images, out.reconstruction.float(), losses)
            loss = loss + pull
            scalars |= judged
        return loss, {name: value.detach() for name, value in scalars.items()}

    def _adversarial(
        self, step: int, images: Tensor, reconstruction: Tensor, losses: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator learns, then judges: its loss, and scalars to log."""
        assert self.adversary is not None and isinstance(self.model, vq.AutoencoderTokenizer)
        learned = self.adversary.learn(step, images, reconstruction)
        weights = self.reconstruction_weights
        weighed = vq.total_loss({name: losses[name] for name in weights}, weights)
        pull, judged = self.adversary.pull(reconstruction, weighed, self.model.last_layer)
        return pull, learned | judged

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean squared error on [-1, 1] of held-out images as decoded, and their code usage.

        The processes share the batches; all get the same numbers.
        """
        assert isinstance(model, vq.AutoencoderTokenizer)
        world = self.plan.world
        error, counts = torch.zeros(1).double(), torch.zeros(model.codebook_size).double()
        batches = self.val.split(max(VALIDATED_AT_ONCE, self.config.batch_size))
        for images in batches[world.rank :: world.size]:
            codes = model.encode(images)
            grid = tuple(side // model.downsample for side in images.shape[2:])
            decoded = model.decode(codes, (grid[0], grid[1])).cpu()
            error += (decoded - images).square().double().mean() * len(images)
            counts += codes.flatten().bincount(minlength=model.codebook_size).cpu()
        error, counts = (world.mean(part) * world.size for part in (error, counts))
        stats = {key: value.item() for key, value in vq.code_statistics(counts).items()}
        return {"mse": error.item() / len(self.val), **stats}

    def preview(self, model: nn.Module) -> Image.Image:
        """Held-out images above their reconstructions."""
        assert isinstance(model, vq.AutoencoderTokenizer)
        n = len(self.val)  # from first to last, so that every class may come
        images = self.val[torch.linspace(0, n - 1, min(n, PREVIEW_COLUMNS)).round().long()]
        grid = tuple(side // model.downsample for side in images.shape[2:])
        decoded = model.decode(model.encode(images), (grid[0], grid[1]))
        return labelled_grid([to_pil(images), to_pil(decoded)], ["image", "decoded"])

    def export(self, model: nn.Module, directory: Path, about: dict[str, Any]) -> None:
        assert isinstance(model, vq.AutoencoderTokenizer)
        vq.save(model, directory)

    def extra_state(self) -> dict[str, Any]:
        """What the quantizer keeps while it trains, and the discriminator with its optimizer."""
        assert isinstance(self.model, vq.AutoencoderTokenizer)
        judge = {} if self.adversary is None else self.adversary.state()
        return self.model.quantize.training_state() | judge

    def load_extra_state(self, state: dict[str, Any]) -> None:
        assert isinstance(self.model, vq.AutoencoderTokenizer)
        self.model.quantize.load_training_state(state)
        if self.adversary is not None:
            self.adversary.load_state(state)

    def _keys(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """(image, view) keys of the batches from `step` on: functions of (seed, step) alone.

        Of each batch, those that this process is to take.
        """
        n, size, seed = len(self.train), self.config.batch_size, self.config.seed
        world, share = self.plan.world, size // self.plan.world.size
        n_views = count_views(self.config.images.crops, self.config.images.ranges)
        place = step * size
        while True:
            batch: list[tuple[int, int]] = []
            while len(batch) < size:
                epoch, start = divmod(place, n)
                order = epoch_order(n, seed, epoch)[start : start + size - len(batch)]
                choice = crop_choice(n, n_views, seed, epoch)
                batch += [(int(i), int(choice[i])) for i in order]
                place += len(order)
            yield batch[world.rank * share : (world.rank + 1) * share]


def train_tokenizer(
    config: TokenizerTrainConfig, world: World | torch.device, restart: bool = False
) -> dict:
    """`moveimg train-tokenizer`: make a tokenizer directory at config.out.

    Args:
        config: the run's settings.
        world: the processes that share it, or the device of the only one.
        restart: throw an earlier run in config.out away first.

    Returns:
        the held-out scalars.

    Raises ValueError or FileNotFoundError for images or weights that are missing, or for sizes
    that do not go together.
    """
    world = World(device=world) if isinstance(world, torch.device) else world
    if config.batch_size % world.size:
        raise ValueError(f"batch_size {config.batch_size}: {world.size} processes cannot share it")
    settings = vq.parse_config({"kind": "vq"} | config.tokenizer, "tokenizer")
    torch.manual_seed(config.seed)
    model = vq.build(settings).to(world.device)
    if config.images.size % model.downsample:
        raise ValueError(
            f"images.size {config.images.size}: expected a multiple of the tokenizer's "
            f"downsampling, {model.downsample}"
        )
    plan = Plan(world, parts=world.size, dtype=pick_dtype(config.dtype, world.device))
    return fit(TokenizerTask(config, model, plan), config, world.device, restart, plan)
