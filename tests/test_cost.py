"""`moveimg info`: FLOPs against torch's counter, bytes against autograd's, budgets by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moveimg.config import SIZES, ModelConfig, TrainConfig, load_config
from moveimg.model import GatedMixer, MoE, Transformer, model_cost, token_flops, train_budget
from moveimg.model.attention import MultiHeadLatentAttention
from moveimg.model.cost import active_parameters, block_activations, count_parameters
from moveimg.model.moe import block_shape
from moveimg.model.product_keys import PEER, ProductKeyMemory
from moveimg.model.ultramem import UltraMem
from tests.conftest import MORE, PAIRED, VARIANTS, decode_all, lively, random_inputs, tiny_config

B_MOVE = "imagenet-b-256-move-x1"
by_name = pytest.mark.parametrize("name", [*PAIRED, *MORE])


@pytest.mark.parametrize(
    ("size", "millions"), [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3097)]
)
def test_dense_sizes_have_the_published_parameter_counts(size, millions):
    # arXiv 2406.06525, table 1: 111M, 343M, 775M, 1.4B, 3.1B
    cost = model_cost(ModelConfig.model_validate({"size": size}))
    assert size in SIZES and round(cost.parameters / 1e6) == millions


def test_router_overhead_is_the_papers_formula():
    config = ModelConfig.model_validate({"size": "B", "memory": {"kind": "move", "slots": 6}})
    assert round(model_cost(config).bank / 1e6, 1) == 75.5  # the paper's, too
    with torch.device("meta"):
        mixer = {type(m): m for m in Transformer(config).modules()}[GatedMixer]
    assert token_flops(mixer.router, 0) == 2 * config.width * config.n_head * 7  # 2 d H (M + 1)


def count_flops(call):
    """FLOPs of a call by torch, with attention as matrix products, which all its versions count."""
    math_attention = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math_attention, torch.no_grad():
        call()
    return counter.get_total_flops()


def countable(model, context, tokens, **options):
    """FLOPs of `tokens` tokens as torch's counter sees them."""
    total = tokens * token_flops(model, context, **options)
    for module in model.modules():
        if isinstance(module, GatedMixer):
            total -= tokens * module.own_flops(0)  # products by elements
        elif isinstance(module, ProductKeyMemory):
            total -= tokens * 2 * module.active_own()  # a weighted sum by embedding_bag
        elif isinstance(module, PEER):
            total -= tokens * module.active_own()  # the same for v, half of the numbers read
        elif isinstance(module, MoE):  # rows pad the experts' blocks
            rows = tokens * module.spec.top_k
            size, count = block_shape(rows, module.spec.n_experts)
            total += (size * count - rows) * 6 * module.width * module.spec.hidden
        elif isinstance(module, UltraMem):
            total += 2 * module.lookup.core[0].numel() * (8 * module.settings.rank + 1)
    return total


@by_name
def test_flops_agree_with_torchs_counter(name):
    model = lively(tiny_config(**VARIANTS[name]), dtype=torch.float32)
    length = model.config.seq_len
    counted = count_flops(lambda: model(*random_inputs(model.config, batch=2)))
    # the counter counts attention over all T positions for each of the T tokens
    assert counted == countable(model, length, 2 * length)
    # decoding, on a smaller grid, since counting a product takes milliseconds
    model = lively(tiny_config(**VARIANTS[name], grid=[2, 2]), dtype=torch.float32)
    counted = count_flops(lambda: decode_all(model, *random_inputs(model.config, batch=2)))
    expected = 4 * countable(model, (4 + 1) / 2, 2, decoding=True)
    # a sum over one position, the first, is a product by elements
    latent = [m for m in model.modules() if isinstance(m, MultiHeadLatentAttention)]
    first = [2 * (m.value_mixer.value_width or 2 * m.spec.kv_rank) for m in latent]
    assert counted == pytest.approx(expected - 2 * sum(first), rel=1e-12)


@by_name
def test_parameters_add_up(name):
    model = Transformer(tiny_config(**VARIANTS[name]))
    total = sum(p.numel() for p in model.parameters())
    assert sum(count_parameters(model).values()) == total
    tables = model.code_embedding.weight.numel() + model.label_embedding.weight.numel()
    memory = sum(p.numel() for p in model.memory.parameters())
    active = total - tables + 16 - memory
    active += model.memory.bank.embedding_dim if memory else 0
    for ffn in model.feedforwards():
        if isinstance(ffn, MoE):  # two of four experts are idle
            active -= 2 * 3 * 16 * 8
        elif isinstance(ffn, ProductKeyMemory):  # 2 look-ups of 3 values
            active += 2 * 3 * ffn.row_width
        elif isinstance(ffn, UltraMem):  # 2 look-ups of 3 values; 16 cells in 4 tables of 4 rows
            active += 2 * 3 * 6 - 4 * 6
        elif isinstance(ffn, PEER):  # of 16 experts
            active += (2 * 3 - 16) * 2 * 16
    if model.shared_ffn is not None:
        active -= model.shared_ffn.weight.numel()
    assert active_parameters(model) == active


def test_cache_and_table_bytes():
    def cost(name):
        return model_cost(tiny_config(**VARIANTS[name]), torch.bfloat16)

    mha, mla = cost("mha-none-swiglu"), cost("mla-move-3-class-rows-product_key")
    assert mha.cache_bytes_per_token == 2 * 2 * 16 * 2
    assert mla.cache_bytes_per_token == 2 * (12 + 4) * 2
    assert mla.bank_bytes_per_token == 3 * 12 * 2
    assert mla.table_bytes_per_token == 2 * 2 * 3 * 16 * 2  # 2 layers, 2 look-ups of 3 rows
    assert cost("mla-lave-x1-swiglu").bank_bytes_per_token == 16 * 2


def kept_bytes(n_layer: int, memory: dict) -> float:
    """Bytes per token that the blocks keep in bfloat16 autocast, counted tensor by tensor."""
    ffn = {"kind": "swiglu", "hidden": 96}
    config = tiny_config(n_layer=n_layer, n_head=4, width=64, grid=[7, 11], memory=memory, ffn=ffn)
    model, images = Transformer(config).train(), 3
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}  # and their bfloat16 copies, counted as `copies`
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tuple(tensor.shape) not in shapes:
            kept[storage.data_ptr()] = storage
        return tensor

    codes = torch.randint(config.codebook_size, (images, config.seq_len))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.hidden(codes, torch.zeros(images, dtype=torch.long))
    return sum(storage.nbytes() for storage in kept.values()) / (images * config.seq_len)


@pytest.mark.parametrize("name", ["none", "move", "ungated", "lave"])
def test_activations_are_those_that_autograd_keeps(name):
    memory = {
        "none": {"kind": "none"},
        "move": {"kind": "move", "slots": 6},
        "ungated": {"kind": "move", "slots": 1, "gate_standard": False},
        "lave": {"kind": "lave", "layers": "all"},
    }[name]
    # per block, by the difference of two depths: the rest of the model cancels out
    bytes_per_block = (kept_bytes(4, memory) - kept_bytes(2, memory)) / 2
    if name == "lave":  # whose gathered rows grow with the layers
        bytes_per_block -= 64 * 2
    ffn = {"kind": "swiglu", "hidden": 96}
    config = tiny_config(n_head=4, width=64, memory=memory, ffn=ffn)
    expected = block_activations(config, Transformer(config).layers[1])
    assert bytes_per_block == pytest.approx(expected, rel=3e-3)


def test_bytes_and_hours_of_a_run_by_hand():
    overrides = ["micro_batch=32", "distributed=ddp", "activation_checkpointing=false"]
    config = load_config(B_MOVE, TrainConfig, overrides)
    budget = train_budget(config, gpus=8, gpu="A100")
    d, layers, vocabulary = 768, 12, 16384
    block = 4 * d * d + 3 * d * 2048 + 2 * d + d * 12 * 7
    total = layers * block + 2 * vocabulary * d + 1001 * d + d + vocabulary * 6 * d
    assert budget["state"] == 20 * total
    linear = layers * (block - 2 * d) + vocabulary * d
    attention, mixing = 4 * layers * d * 257 / 2, 2 * layers * 6 * d
    assert budget["flops_per_step"] == 3 * (2 * linear + attention + mixing) * 256 * 256
    seconds = config.steps * budget["flops_per_step"] / 8 / 312e12
    assert budget["hours"] == pytest.approx([2 * seconds / 3600, 4 * seconds / 3600])
    assert budget["codes"] == 1_281_167 * (20 * 256 * 2 + 4)
    assert budget["checkpoints"] == total * (16 * (2 + 2) + 4)


def test_batches_that_gpus_cannot_share_and_unknown_gpus_are_refused():
    config = load_config(B_MOVE, TrainConfig)
    with pytest.raises(ValueError, match="3 GPUs"):
        train_budget(config, gpus=3)
    with pytest.raises(ValueError, match="'Z80'"):
        train_budget(config, gpu="Z80")


@pytest.mark.parametrize("size", [size for size in SIZES if size != "digits"])
def test_imagenet_recipes_of_one_scale_have_banks_of_one_size_and_fit_a_gpu(size):
    banks = {}
    for memory in ("standard", "lave-x1", "move-x1", "move-x2", "mla-lave-x1", "mla-move-x1"):
        config = load_config(f"imagenet-{size.lower()}-256-{memory}", TrainConfig)
        banks[memory] = model_cost(config.model).bank
        assert train_budget(config)["memory"] < 80e9
    x1 = banks["move-x1"]
    assert [*banks.values()] == [0, x1, x1, 2 * x1, x1, x1]
