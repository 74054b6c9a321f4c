"""The class-conditional transformer (LlamaGen's decoder, arXiv 2406.06525) with value memory.

B batch   S positions in this call   T codes in an image   D width   V codebook size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moveimg.config.model import ModelConfig, SlotConfig
from moveimg.model.attention import ATTENTIONS, without_cudnn_sdpa
from moveimg.model.cross_entropy import linear_cross_entropy
from moveimg.model.feedforward import FEEDFORWARDS, FeedForward
from moveimg.model.memory import MEMORIES, Mixer, Rows
from moveimg.model.rope import rope_2d


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMS norm and added to the stream.

    Args:
        config: the transformer's config.
        ffn: settings of this layer's feed-forward.
        mixers: this layer's value memory, by the site in attention where it is mixed in.
    """

    def __init__(self, config: ModelConfig, ffn: SlotConfig, mixers: dict[str, Mixer]) -> None:
        super().__init__()
        attention = config.attention
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = ATTENTIONS[attention.kind](config, attention, mixers)
        self.resid_dropout = nn.Dropout(config.resid_dropout)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = FEEDFORWARDS[ffn.kind](config, ffn)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout)

    def forward(
        self, x: Tensor, rows: Rows, rope: Tensor, shared: nn.Module | None,
        cache: Any = None,
    ) -> Tensor:  # fmt: skip
        """x [B, S, D] -> [B, S, D]; `shared` is what the feed-forwards of all layers share."""
        attended = self.attention(self.attention_norm(x), rows, rope, cache)
        x = x + self.resid_dropout(attended)
        return x + self.ffn_dropout(self.ffn(self.ffn_norm(x), shared))


class Cache(nn.Module):
    """State of decoding: each layer's cache, the rotation table, and the position.

    A static cache has its position in a tensor [1], too, which the layers index with.
    """

    def __init__(self, model: Transformer, batch: int, static: bool = False) -> None:
        super().__init__()
        length = model.config.seq_len  # the class token and every code but the last
        self.batch, self.position = batch, 0
        like = model.norm.weight  # the residual stream has its dtype and device
        index = torch.zeros(1, dtype=torch.int64, device=like.device) if static else None
        self.index = None if index is None else nn.Buffer(index)
        self.layers = nn.ModuleList(
            layer.make_cache(batch, length, like, self.index) for layer in model.attentions()
        )
        self.rope = nn.Buffer(model.rope()[:length])

    def reset(self) -> None:
        """Empty the cache."""
        self.position = 0
        if self.index is not None:
            self.index.zero_()
        for layer in self.layers:
            layer.filled = 0  # type: ignore[assignment]


class Transformer(nn.Module):
    """logits = generator(codes, labels): the distribution of every code given those before it.

    The class token comes before the first code, so T inputs (label, codes 0..T-2) predict
    T codes. Dropout is all that differs between train and eval mode.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # training: blocks keep their input, not their activations
        sites = ATTENTIONS[config.attention.kind].sites(config)
        memory, ffn = MEMORIES[config.memory.kind], FEEDFORWARDS[config.ffn.kind]
        site = next(site for site in memory.sites if site in sites)
        self.label_embedding = nn.Embedding(config.n_classes + 1, config.width)
        self.code_embedding = nn.Embedding(config.codebook_size, config.width)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.memory = memory(config, config.memory, sites[site])
        self.layers = nn.ModuleList(
            Block(config, config.ffn.at(layer, config.n_layer), {site: self.memory.mixer(layer)})
            for layer in range(config.n_layer)
        )
        self.shared_ffn: nn.Module | None = ffn.shared(config, config.ffn)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.codebook_size, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """LlamaGen's initialisation: matrices and tables N(0, 0.02), head and routers zero.

        Modules with weights of another kind set them in `init_weights`.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        for module in self.modules():
            getattr(module, "init_weights", lambda: None)()

    def attentions(self) -> list[Any]:
        """The attention of each layer, first to last."""
        return [block.attention for block in self.layers]

    def feedforwards(self) -> list[FeedForward]:
        """The feed-forward of each layer, first to last."""
        return [block.ffn for block in self.layers]  # type: ignore[misc]

    def auxiliary_loss(self) -> Tensor:
        """The sum of the layers' auxiliary losses in the last pass in train mode, a scalar.

        Zero where no layer has one. It can be read once, so that the model keeps no graph.
        """
        total = torch.zeros((), device=self.norm.weight.device)
        for ffn in self.feedforwards():
            if ffn.auxiliary is not None:
                total, ffn.auxiliary = total + ffn.auxiliary, None
        return total

    def expert_load(self) -> Tensor | None:
        """Each expert's share of the choices in the last pass in train mode, [MoE layers, E]."""
        loads = [ffn.load for ffn in self.feedforwards() if ffn.load is not None]
        return torch.stack(loads) if loads else None

    @property
    def null_label(self) -> int:
        """The label of unconditional generation: C, after the classes 0..C-1."""
        return self.config.n_classes

    def rope(self) -> Tensor:
        """Rotation table of every position, [1 + T, pairs, 2], in float32 or better."""
        config = self.config
        dim = ATTENTIONS[config.attention.kind].rope_dim(config)
        like = self.norm.weight
        dtype = torch.promote_types(like.dtype, torch.float32)
        return rope_2d(config.grid, dim, config.rope_base, like.device, dtype)

    def forward(self, codes: Tensor, labels: Tensor, loss: bool = False) -> Any:
        """Teacher forcing: codes int64 [B, T], labels int64 [B] -> logits [B, T, V].

        `logits[:, t]` predicts `codes[:, t]` from the label and `codes[:, :t]`; the last code
        is not looked at. Raises ValueError for other shapes.

        With `loss`: (mean cross-entropy in nats a code, share of codes that are the likeliest),
        scalars, without ever holding all logits. It is here and not in a method of its own because
        DDP and FSDP2 gather weights and gradients around this call alone.
        """
        config = self.config
        if codes.shape != (len(labels), config.seq_len):
            raise ValueError(
                f"codes {tuple(codes.shape)} for {len(labels)} labels: expected "
                f"[{len(labels)}, {config.seq_len}] ({config.grid[0]} x {config.grid[1]} codes)"
            )
        x = self.hidden(codes, labels)
        if loss:
            return linear_cross_entropy(x.flatten(0, 1), self.head.weight, codes.flatten())
        return self.logits(x)

    def hidden(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The normed stream before the output head, [B, T, D] (arguments as of forward)."""
        before = codes[:, :-1]
        x = torch.cat([self.label_embedding(labels)[:, None], self.code_embedding(before)], dim=1)
        return self.blocks(x, self.memory.rows(labels, before), self.rope()[: x.shape[1]])

    def make_cache(self, batch: int) -> Cache:
        """An empty cache for decoding `batch` sequences at once."""
        return Cache(self, batch)

    def start(self, labels: Tensor, cache: Cache) -> Tensor:
        """First step of decoding: labels [B] -> logits of the first code [B, V]."""
        if cache.position or cache.batch != len(labels):
            raise ValueError(
                f"start takes an empty cache for {len(labels)} labels, got one for "
                f"{cache.batch} at position {cache.position}"
            )
        x = self.label_embedding(labels)[:, None]
        return self._step(x, self.memory.rows(labels, None), cache)

    def decode(self, codes: Tensor, cache: Cache) -> Tensor:
        """Next step of decoding: the codes just drawn [B] -> logits of the next ones [B, V]."""
        if not 0 < cache.position < self.config.seq_len:
            raise ValueError(
                f"decode at position {cache.position}: expected 1..{self.config.seq_len - 1}, "
                "after start and before the last code"
            )
        x = self.code_embedding(codes[:, None])
        return self._step(x, self.memory.rows(None, codes[:, None]), cache)

    def _step(self, x: Tensor, rows: Rows, cache: Cache) -> Tensor:
        rope = cache.rope[cache.position : cache.position + 1]
        with without_cudnn_sdpa(x.device):
            x = self.blocks(x, rows, rope, cache)
        cache.position += 1
        return self.logits(x)[:, 0]

    def blocks(self, x: Tensor, rows: Rows, rope: Tensor, cache: Cache | None = None) -> Tensor:
        """Embedded inputs x [B, S, D] -> the normed residual stream [B, S, D]."""
        x = self.token_dropout(x)
        for index, block in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            inputs = (x, rows, rope, self.shared_ffn, layer_cache)
            if self.checkpointing and self.training:
                context = _drop_recomputed_loss(block.ffn)
                x = checkpoint(block, *inputs, use_reentrant=False, context_fn=context)
            else:
                x = block(*inputs)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Normed stream [B, S, D] -> logits [B, S, V], float32 (float64 in a float64 model)."""
        out = self.head(x)
        return out.to(torch.promote_types(out.dtype, torch.float32))


def _drop_recomputed_loss(ffn: Any) -> Callable[[], tuple[Any, Any]]:
    """For checkpoint: discard the auxiliary loss that a recomputed block leaves behind.

    Its graph would keep the recomputed activations until the next step.
    """

    @contextmanager
    def recompute() -> Iterator[None]:
        try:
            yield
        finally:
            ffn.auxiliary = None

    return lambda: (nullcontext(), recompute())
