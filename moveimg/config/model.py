"""Settings of the generator: its size, its codes and its three slots.

Each slot (attention, memory, feed-forward) is a union that pydantic resolves by `kind`. When a
config is read, each slot checks its settings against those of the model.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=1024)]  # layers, heads, experts
Width = Annotated[int, Field(ge=1, le=2**16)]
Side = Annotated[int, Field(ge=1, le=256)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Rows = Annotated[int, Field(ge=1, le=2**26)]
Logit = Annotated[float, Field(ge=-20, le=20)]
Layers = Literal["alternate", "all"] | tuple[Annotated[int, Field(ge=0, le=1023)], ...]


class Config(BaseModel):
    """A frozen group of settings without unknown keys or non-finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SlotConfig(Config):
    """Settings of one slot."""

    kind: str

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError, on one line, if these settings contradict those of the model."""

    def at(self, layer: int, n_layer: int) -> SlotConfig:
        """Return the settings of this slot in one layer."""
        return self


def pick_layers(layers: Layers, n_layer: int) -> tuple[int, ...]:
    """Return the sorted indices of layers. ValueError unless they are distinct and exist."""
    if layers == "all":
        return tuple(range(n_layer))
    if layers == "alternate":
        return tuple(layer for layer in range(n_layer) if (n_layer - layer) % 2)
    if not layers or max(layers) >= n_layer or len(set(layers)) != len(layers):
        raise ValueError(f"layers {list(layers)}: expected distinct indices in 0..{n_layer - 1}")
    return tuple(sorted(layers))


class MHAConfig(SlotConfig):
    """Multi-head attention, with a cache of every head's keys and values."""

    kind: Literal["mha"] = "mha"

    def check(self, model: ModelConfig) -> None:
        if model.head_dim % 4:
            raise ValueError(f"width per head {model.head_dim}: expected a multiple of 4 (2D RoPE)")


class MLAConfig(SlotConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), with a compressed cache."""

    kind: Literal["mla"] = "mla"
    kv_rank: Width = Field(description="d_c, width of the cached latent of keys and values")
    q_rank: Width | None = Field(None, description="width of the queries' latent; null: full rank")
    rope_dim: Width = Field(multiple_of=4, description="width of the rotary key that heads share")


class NoMemoryConfig(SlotConfig):
    """No value memory: the standard transformer."""

    kind: Literal["none"] = "none"


class GatedMemoryConfig(SlotConfig):
    """Settings of memories that weight their rows by gates 2 sigmoid(x W_G + b)."""

    gate_standard: bool
    class_rows: bool = Field(
        False, description="the class token has memory rows, too; false: zeros"
    )
    gate_bias: tuple[Logit, Logit] = Field(
        (0.0, 0.0), description="initial b of g_0 and of the slots' gates; zeros: no b (paper)"
    )
    router_std: float = Field(0.0, ge=0, le=10, description="std of initial W_G; 0 in the paper")


class LaVEConfig(GatedMemoryConfig):
    """Layer-wise value embeddings: each listed layer has a table with one slot."""

    kind: Literal["lave"] = "lave"
    layers: Layers = Field(
        "alternate", description="alternate (x1, the last included), all (x2), or a list"
    )
    gate_standard: bool = Field(False, description="also gate the standard path V by g_0")

    def check(self, model: ModelConfig) -> None:
        pick_layers(self.layers, model.n_layer)


class MoVEConfig(GatedMemoryConfig):
    """Mixture of Value Embeddings (arXiv 2601.22887): one bank shared by all layers."""

    kind: Literal["move"] = "move"
    slots: int = Field(ge=1, le=256, description="value embeddings per code; x1 is n_layer / 2")
    gate_standard: bool = Field(True, description="gate the standard path V by g_0")
    rows: Rows | None = Field(None, description="bank rows; similar codes share one; null: V")
    context: Literal["left", "above"] | None = Field(
        None, description="also add rows for each pair of a code and the code left of or above it"
    )
    context_rows: Rows | None = Field(None, description="rows of the hash table of pairs")
    bits: Literal[4, 8] | None = Field(
        None, description="bits per number after `moveimg convert quantize-bank`; null: float"
    )

    def check(self, model: ModelConfig) -> None:
        rank = model.attention.kv_rank if isinstance(model.attention, MLAConfig) else 0
        if rank % model.n_head:  # MoVE splits the latent into a chunk per head
            raise ValueError(f"kv_rank {rank} over {model.n_head} heads: expected a multiple")
        if (self.rows or 1) > model.codebook_size:
            raise ValueError(f"memory.rows {self.rows}: expected 1..{model.codebook_size} (codes)")
        if (self.context is None) != (self.context_rows is None):
            raise ValueError(
                f"memory.context {self.context} with context_rows {self.context_rows}: "
                "expected both or neither"
            )


class SwiGLUConfig(SlotConfig):
    """w2(silu(w1 x) * w3 x), as in Llama."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: Width | None = Field(None, description="hidden width; null: 8/3 width, rounded up")
    multiple_of: Width = Field(256, description="the default hidden width is rounded up to this")


class SparseConfig(SlotConfig):
    """Settings of feed-forwards that use a part of their weights per token, in some layers."""

    layers: Layers = Field("all", description="all, alternate (the last included), or a list")
    elsewhere: SwiGLUConfig = Field(SwiGLUConfig(), description="feed-forward of other layers")
    top_k: Count
    choices: ClassVar[str] = "n_keys"  # the key whose value limits top_k

    def at(self, layer: int, n_layer: int) -> SlotConfig:
        """Return the settings of the feed-forward in one layer."""
        return self if layer in pick_layers(self.layers, n_layer) else self.elsewhere

    def check(self, model: ModelConfig) -> None:
        pick_layers(self.layers, model.n_layer)
        if self.top_k > (choices := getattr(self, self.choices)):
            raise ValueError(f"ffn.top_k {self.top_k}: expected 1..{self.choices} ({choices})")


class MoEConfig(SparseConfig):
    """A mixture of SwiGLU experts: the top k per token and a shared expert."""

    choices: ClassVar[str] = "n_experts"
    kind: Literal["moe"] = "moe"
    n_experts: Count = Field(description="routed experts")
    top_k: int = Field(2, ge=2, le=1024, description="experts per token; one would train no router")
    hidden: Width = Field(description="hidden width of an expert")
    shared_hidden: Width = Field(description="hidden width of the shared expert")
    balance: float = Field(0.01, ge=0, le=100, description="weight of the load-balancing loss")


class ProductKeyLookup(SparseConfig):
    """Settings of product keys: two searches in n_keys find the top k of n_keys^2 rows."""

    n_keys: int = Field(1024, ge=1, le=4096, description="keys per half of a query")
    key_heads: Count = Field(4, description="look-ups per token, each with its own query")
    top_k: Count = Field(32, description="rows per look-up")
    key_width: Width = Field(512, multiple_of=2, description="width of a query, of both halves")


class ProductKeyConfig(ProductKeyLookup):
    """Product-key memory, Memory+ (arXiv 2412.09764): a value table that layers share."""

    kind: Literal["product_key"] = "product_key"
    value_width: Width | None = Field(None, description="width of a value; null: the model's")


class PEERConfig(ProductKeyLookup):
    """PEER (arXiv 2407.04153): product keys that choose experts of one neuron each."""

    kind: Literal["peer"] = "peer"
    top_k: Count = Field(16, description="experts per look-up")


class UltraMemConfig(ProductKeyLookup):
    """UltraMem (arXiv 2411.12364): product keys scored by Tucker cores, added to a SwiGLU."""

    kind: Literal["ultramem"] = "ultramem"
    top_k: Count = Field(16, description="cells per look-up")
    rank: int = Field(2, ge=1, le=16, description="r, scores per key; cores are r x r")
    cores: int = Field(2, ge=1, le=16, description="Tucker cores, one per segment of a value")
    expansion: int = Field(4, ge=1, le=64, description="virtual tables per physical table")
    value_width: Width | None = Field(None, description="width of a value; null: half the model's")
    delay: int = Field(1, ge=0, le=64, description="layers between a look-up and adding its values")
    margin: float = Field(0.15, ge=0, le=10, description="largest unpenalised singular value")
    penalty: float = Field(0.001, ge=0, le=100, description="weight of the singular-value loss")

    def check(self, model: ModelConfig) -> None:
        super().check(model)
        last = max(pick_layers(self.layers, model.n_layer))
        if last + self.delay >= model.n_layer:
            raise ValueError(
                f"ffn.delay {self.delay} after layer {last}: expected a sum below {model.n_layer}"
            )
        width = self.value_width or model.width // 2
        if width % self.cores or self.n_keys**2 % self.expansion:
            raise ValueError(
                f"value width {width} and {self.n_keys**2} cells: expected multiples of ffn.cores "
                f"{self.cores} and ffn.expansion {self.expansion}"
            )


AnyFeedForward = SwiGLUConfig | MoEConfig | ProductKeyConfig | PEERConfig | UltraMemConfig
# LlamaGen's named sizes (arXiv 2406.06525, table 1), and a size for the digits.
SIZES: dict[str, dict[str, int]] = {
    "digits": {"n_layer": 6, "n_head": 4, "width": 96},
    "B": {"n_layer": 12, "n_head": 12, "width": 768},
    "L": {"n_layer": 24, "n_head": 16, "width": 1024},
    "XL": {"n_layer": 36, "n_head": 20, "width": 1280},
    "XXL": {"n_layer": 48, "n_head": 24, "width": 1536},
    "3B": {"n_layer": 24, "n_head": 32, "width": 3200},
}


class ModelConfig(Config):
    """Settings of the class-conditional transformer."""

    n_layer: Count = Field(description="transformer blocks")
    n_head: Count = Field(description="attention heads")
    width: Width = Field(description="width of the residual stream")
    codebook_size: int = Field(16384, ge=1, le=2**20, description="V, size of the codebook")
    n_classes: int = Field(1000, ge=1, le=10**6, description="classes; the null label is n_classes")
    grid: tuple[Side, Side] = Field((16, 16), description="rows and columns of codes in an image")
    attention: MHAConfig | MLAConfig = Field(MHAConfig(), discriminator="kind")
    memory: NoMemoryConfig | LaVEConfig | MoVEConfig = Field(NoMemoryConfig(), discriminator="kind")
    ffn: AnyFeedForward = Field(SwiGLUConfig(), discriminator="kind")
    token_dropout: Rate = Field(0.1, description="dropout on the embedded label and codes")
    resid_dropout: Rate = Field(0.1, description="dropout on the output of attention")
    ffn_dropout: Rate = Field(0.1, description="dropout on the output of the feed-forward")
    rope_base: float = Field(10000.0, gt=0, le=1e9, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-5, gt=0, le=1, description="epsilon of the RMS norms")

    @model_validator(mode="before")
    @classmethod
    def _expand_named_size(cls, data: Any) -> Any:
        """Expand `size: B` to n_layer, n_head and width, which explicit keys override."""
        if not isinstance(data, dict) or "size" not in data:
            return data
        if (size := str(data["size"])) not in SIZES:
            raise ValueError(f"unknown size {size[:60]!r}: expected {', '.join(SIZES)}")
        return SIZES[size] | {key: value for key, value in data.items() if key != "size"}

    @model_validator(mode="after")
    def _check_consistency(self) -> ModelConfig:
        if self.width % self.n_head:
            raise ValueError(f"width {self.width} over {self.n_head} heads: expected a multiple")
        if self.seq_len > 2**14:
            raise ValueError(f"grid {list(self.grid)}: expected at most {2**14} codes")
        for slot in (self.attention, self.memory, self.ffn):
            slot.check(self)
        return self

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.width // self.n_head

    @property
    def seq_len(self) -> int:
        """T, the number of codes in an image."""
        return self.grid[0] * self.grid[1]
