"""The class-conditional transformer (LlamaGen's, arXiv 2406.06525) with value memory.

B batch   S positions in this call   T codes in an image   D width   V codebook size   N rows
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moveimg.config.model import ModelConfig, SlotConfig
from moveimg.model.attention import ATTENTIONS, Index, LayerCache, rope_2d
from moveimg.model.feedforward import FEEDFORWARDS
from moveimg.model.loss import linear_cross_entropy
from moveimg.model.memory import MEMORIES, Mixer, Rows
from moveimg.model.swiglu import FeedForward
from moveimg.rng import Dropout, rewind


class Block(nn.Module):
    """Attention and feed-forward, each after an RMS norm and added to the residual stream.

    ffn: settings of this layer's feed-forward. mixers: value memory mixers by site in attention.
    """

    def __init__(self, config: ModelConfig, ffn: SlotConfig, mixers: dict[str, Mixer]) -> None:
        super().__init__()
        attention = config.attention
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = ATTENTIONS[attention.kind](config, attention, mixers)
        self.resid_dropout = Dropout(config.resid_dropout)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = FEEDFORWARDS[ffn.kind](config, ffn)
        self.ffn_dropout = Dropout(config.ffn_dropout)

    def forward(
        self, x: Tensor, rows: Rows, rope: Tensor, shared: nn.Module | None,
        cache: LayerCache | None = None, index: Index = 0,
    ) -> Tensor:  # fmt: skip
        """x [B, S, D] -> [B, S, D]; `shared` is the transformer's shared_ffn."""
        attended = self.attention(self.attention_norm(x), rows, rope, cache, index)
        x = x + self.resid_dropout(attended)
        return x + self.ffn_dropout(self.ffn(self.ffn_norm(x), shared))


class Cache:
    """The state of decoding one batch: layer caches, rotation table and position.

    Attributes:
        length: T, the number of positions.
        position: position of the next decoding step, 0..T-1.
        index: `position` for the layer caches: a tensor [1] if the cache is static, else an int.
    """

    def __init__(self, model: Transformer, batch: int, static: bool = False) -> None:
        length = model.config.seq_len  # the class token and every code but the last
        like = model.norm.weight  # the residual stream has its dtype and device
        self.batch, self.length, self.position = batch, length, 0
        self.index: Index = torch.zeros(1, dtype=torch.int64, device=like.device) if static else 0
        self.layers = [layer.make_cache(batch, length, like) for layer in model.attentions()]
        self.rope = model.rope()[:length]
        self.codes: Tensor | None = None  # drawn so far, for a memory that reads pairs of them
        if model.memory.context is not None:
            self.codes = torch.zeros(batch, length, dtype=torch.int64, device=like.device)


class Transformer(nn.Module):
    """logits = generator(codes, labels): the distribution of each code given all codes before it.

    The class token precedes the first code, so T inputs (label, codes 0..T-2) predict T codes.
    Train and eval mode differ in dropout alone.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block's activations in the backward pass
        sites = ATTENTIONS[config.attention.kind].sites(config)
        memory, ffn = MEMORIES[config.memory.kind], FEEDFORWARDS[config.ffn.kind]
        site = next(site for site in memory.sites if site in sites)
        self.label_embedding = nn.Embedding(config.n_classes + 1, config.width)
        self.code_embedding = nn.Embedding(config.codebook_size, config.width)
        self.token_dropout = Dropout(config.token_dropout)
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
        """Initialise as LlamaGen: matrices and tables N(0, 0.02), head zero; routers zero (MoVE).

        Modules with other initial values set them in `init_weights`.
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
        """The sum of the layers' auxiliary losses in the last forward pass in train mode, a scalar.

        Clears the layers' losses, so that no graph stays in the model.
        """
        total = torch.zeros((), device=self.norm.weight.device)
        for ffn in self.feedforwards():
            if ffn.auxiliary is not None:
                total, ffn.auxiliary = total + ffn.auxiliary, None
        return total

    def expert_load(self) -> Tensor | None:
        """Each expert's share of routing choices in the last training pass, [MoE layers, E]."""
        loads = [ffn.load for ffn in self.feedforwards() if ffn.load is not None]
        return torch.stack(loads) if loads else None

    @property
    def null_label(self) -> int:
        """The label of guidance's unconditional pass (C, after the classes 0..C-1)."""
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
        is not read. Raises ValueError for other shapes.

        With `loss`, returns two scalars instead, without all logits in memory at once: the mean
        cross-entropy in nats per code, and the top-1 accuracy. It is an option of `forward` because
        DDP and FSDP2 synchronize weights and gradients around `forward` alone.
        """
        if codes.shape != (len(labels), self.config.seq_len):
            raise ValueError(
                f"codes {tuple(codes.shape)}: expected [{len(labels)}, {self.config.seq_len}]"
            )
        x = self.hidden(codes, labels)
        if loss:
            return linear_cross_entropy(x.flatten(0, 1), self.head.weight, codes.flatten())
        return self.logits(x)

    def hidden(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The normalised residual stream before the output head, [B, T, D]."""
        before = codes[:, :-1]
        x = torch.cat([self.label_embedding(labels)[:, None], self.code_embedding(before)], dim=1)
        return self._blocks(x, self._rows(labels, before))

    def logits(self, x: Tensor) -> Tensor:
        """Normalised stream [B, S, D] -> logits [B, S, V], float32 (float64 in a float64 model)."""
        out = self.head(x)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def make_cache(self, batch: int) -> Cache:
        """An empty cache for decoding `batch` sequences together."""
        return Cache(self, batch)

    def prefill(self, labels: Tensor, cache: Cache, codes: Tensor | None = None) -> Tensor:
        """First decoding step: labels [B] -> logits of the first code [B, V].

        With the first P codes int64 [B, P] of each image, 0 <= P < T, the logits are those of the
        next code; all positions are computed in one pass (prefill). Raises ValueError for a cache
        that is not empty, or for other shapes.
        """
        x = self.label_embedding(labels)[:, None]
        if codes is not None:
            x = torch.cat([x, self.code_embedding(codes)], dim=1)
        if cache.position or cache.batch != len(x) or x.shape[1] > cache.length:
            raise ValueError(
                f"{len(x)} x {x.shape[1]} inputs for a cache of {cache.batch} x {cache.length} at "
                f"position {cache.position}: expected an empty cache of the same batch size"
            )
        if codes is not None and cache.codes is not None:
            cache.codes[:, : codes.shape[1]] = codes
        last = self._blocks(x, self._rows(labels, codes), cache)[:, -1:]
        cache.position += x.shape[1]
        cache.index += x.shape[1]  # in place if it is a tensor
        return self.logits(last)[:, 0]

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        """Next decoding step: the codes just drawn [B] -> logits of the next ones [B, V]."""
        if not 0 < cache.position < cache.length:
            raise ValueError(f"decode at position {cache.position}: expected 1..{cache.length - 1}")
        logits = self._step(codes, cache)
        cache.position += 1
        cache.index += 1
        return logits

    def _step(self, codes: Tensor, cache: Cache) -> Tensor:
        """`decode` without check and increment of the position: for torch.compile."""
        codes, neighbours = codes[:, None], None
        if cache.codes is not None:
            index = torch.as_tensor(cache.index, device=codes.device).view(1) - 1
            cache.codes.index_copy_(1, index, codes)
            neighbours = self.memory.neighbours(cache.codes, index)
        rows = self.memory.gather_rows(None, codes, neighbours)
        return self.logits(self._blocks(self.code_embedding(codes), rows, cache))[:, 0]

    def _rows(self, labels: Tensor, codes: Tensor | None) -> Rows:
        """The memory's rows for the class token and the first S codes [B, S]."""
        neighbours = None
        if codes is not None and self.memory.context is not None:
            indices = torch.arange(codes.shape[1], device=codes.device)
            neighbours = self.memory.neighbours(codes, indices)
        return self.memory.gather_rows(labels, codes, neighbours)

    def _blocks(self, x: Tensor, rows: Rows, cache: Cache | None = None) -> Tensor:
        """The normalised stream [B, S, D] after all blocks, from the embeddings x [B, S, D]."""
        length = x.shape[1]
        if cache is None:
            rope = self.rope()[:length]
        elif length == 1 and isinstance(cache.index, Tensor):
            rope = cache.rope.index_select(0, cache.index)
        else:
            rope = cache.rope[cache.position : cache.position + length]
        x = self.token_dropout(x)
        remembered: dict[int, Any] = {}  # by the layer after which the output enters the stream
        for layer, block in enumerate(self.layers):
            if cache is not None:
                x = block(x, rows, rope, self.shared_ffn, cache.layers[layer], cache.index)
            elif self.checkpointing and self.training:
                inputs = (x, rows, rope, self.shared_ffn)
                contexts = partial(_checkpoint_contexts, block)
                x = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x, rows, rope, self.shared_ffn)
            ffn: Any = block.ffn
            if ffn.delay is not None:
                later = layer + ffn.delay
                remembered[later] = remembered.get(later, 0) + ffn.delayed_output(x)
            if layer in remembered:
                x = x + remembered.pop(layer)
        return self.norm(x)


def _checkpoint_contexts(block: Any) -> tuple[Any, Any]:
    """The contexts of a checkpointed block's forward pass and of its recomputation.

    The recomputation draws the same dropout masks. Its auxiliary loss is dropped, because the
    loss's graph would keep the recomputed activations until the next step.
    """
    generator = block.resid_dropout.generator
    state = None if generator is None else generator.get_state()

    @contextmanager
    def recomputing() -> Iterator[None]:
        try:  # torch ends the recomputation early by an exception
            with nullcontext() if generator is None or state is None else rewind(generator, state):
                yield
        finally:
            block.ffn.auxiliary = None

    return nullcontext(), recomputing()
