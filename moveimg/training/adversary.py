"""The discriminator that a tokenizer is trained against: its steps, its pull, its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moveimg.config import TokenizerTrainConfig
from moveimg.training.optimizer import learning_rate
from tokenizer import adversarial
from tokenizer.processes import mean


class Adversary:
    """A PatchGAN with an optimizer of its own (VQGAN, arXiv 2012.09841, section 3.1).

    From step `start` on, each step first teaches it the step's images and reconstructions, then
    lets it judge the reconstructions. Before, it costs nothing and changes nothing. Where several
    processes train, its gradients are averaged over them; its BatchNorms see a process's own images
    (as LlamaGen's and taming's do).
    """

    def __init__(self, config: TokenizerTrainConfig, channels: int, device: torch.device) -> None:
        assert config.adversarial is not None
        self.config, self.run = config.adversarial, config
        width, n_layers = self.config.width, self.config.n_layers
        if config.images.size < (least := adversarial.least_side(n_layers)):
            raise ValueError(
                f"adversarial.n_layers {n_layers}: such a discriminator needs images of at least "
                f"{least} pixels a side, and images.size is {config.images.size}"
            )
        self.discriminator = adversarial.make_discriminator(channels, width, n_layers).to(device)
        self.optimizer = torch.optim.AdamW(
            self.discriminator.parameters(),
            lr=self.config.lr,
            betas=config.optimizer.betas,
            weight_decay=0.0,
        )

    def active(self, step: int) -> bool:
        return step >= self.config.start

    def learn(self, step: int, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """One step of the discriminator; images and reconstructions [B, C, H, W]."""
        run = self.run.optimizer
        for group in self.optimizer.param_groups:  # the run's schedule, at a rate of its own
            group["lr"] = self.config.lr * learning_rate(run, step, self.run.steps) / run.lr
        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(images), self.discriminator(reconstruction.detach())
        loss = adversarial.discriminator_loss(real, fake)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in self.discriminator.parameters():
            assert parameter.grad is not None
            parameter.grad = mean(parameter.grad)
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), run.clip)
        self.optimizer.step()
        return {
            "discriminator": loss.detach(),
            "logits_real": real.detach().mean(),
            "logits_fake": fake.detach().mean(),
        }

    def pull(
        self, reconstruction: Tensor, losses: Tensor, last_layer: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted adversarial loss of a reconstruction, and scalars to log.

        Args:
            reconstruction: [B, C, H, W] with its graph.
            losses: the reconstruction losses, weighed and added up, with their graph.
            last_layer: the decoder's last weight.
        """
        self.discriminator.requires_grad_(False)  # it judges; the gradient goes to the pixels
        loss = adversarial.generator_loss(self.discriminator(reconstruction))
        weight = torch.tensor(self.config.weight, device=loss.device)
        if self.config.adaptive:
            weight = weight * adversarial.adaptive_weight(losses, loss, last_layer)
        return weight * loss, {"adversarial": loss.detach(), "adversarial_weight": weight}

    def state(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["discriminator_optimizer"])
