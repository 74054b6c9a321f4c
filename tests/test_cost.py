"""`moveimg info`: FLOPs against torch's counter, bytes against autograd's, budgets by hand.

And `moveimg bench`, which counts the right work; no test here looks at how long anything takes.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moveimg.config import ModelConfig, TrainConfig, load_config
from moveimg.model import GatedMixer, MoE, Transformer, model_cost, token_flops, train_budget
from moveimg.model.attention import MultiHeadLatentAttention
from moveimg.model.cost import active_parameters, block_activations, count_parameters
from moveimg.model.moe import choose_block_shape
from moveimg.model.product_keys import PEER, ProductKeyMemory
from moveimg.model.ultramem import UltraMem
from moveimg.training.generator import GeneratorTask
from tests.conftest import VARIANTS, VARIED, decode_all, random_inputs, tiny_config, tiny_model
from tests.test_cli import refused, run

OPTIONS = ("--repeats", 1, "--device", "cpu", "--batch-size")


@torch.no_grad()
@sdpa_kernel(SDPBackend.MATH)  # attention as matrix products, which all versions of torch count
def count_flops(call, *inputs):
    """FLOPs of a call by torch's counter."""
    with FlopCounterMode(display=False) as counter:
        call(*inputs)
    return counter.get_total_flops()


def countable(model, context, tokens, **options):
    """FLOPs of `tokens` tokens as torch's counter sees them."""
    total = tokens * token_flops(model, context, **options)
    for module in model.modules():
        if isinstance(module, GatedMixer):
            total -= tokens * module.own_flops(0)  # products by elements
        elif isinstance(module, ProductKeyMemory):
            total -= tokens * 2 * module.own_active()  # a weighted sum by embedding_bag
        elif isinstance(module, PEER):
            total -= tokens * module.own_active()  # the same for v, half of the numbers read
        elif isinstance(module, MoE):  # rows pad the experts' blocks
            rows = tokens * module.spec.top_k
            size, count = choose_block_shape(rows, module.spec.n_experts)
            total += (size * count - rows) * 6 * module.width * module.spec.hidden
        elif isinstance(module, UltraMem):
            total += 2 * module.lookup.core[0].numel() * (8 * module.spec.rank + 1)
    return total


@pytest.mark.parametrize("name", VARIED)
def test_flops_agree_with_torchs_counter(name):
    # a small grid, since counting a product takes milliseconds
    model = tiny_model(name, torch.float32, grid=[2, 2])
    inputs = random_inputs(model.config, batch=2)
    # the counter counts attention over all T positions for each of the T tokens
    assert count_flops(model, *inputs) == countable(model, 4, 2 * 4)
    counted = count_flops(decode_all, model, *inputs)
    expected = 4 * countable(model, (4 + 1) / 2, 2, decoding=True)
    # a sum over one position, the first, is a product by elements
    latent = [m for m in model.modules() if isinstance(m, MultiHeadLatentAttention)]
    first = [2 * (m.value_mixer.value_width or 2 * m.spec.kv_rank) for m in latent]
    assert counted == pytest.approx(expected - 2 * sum(first), rel=1e-12)


@pytest.mark.parametrize("name", VARIED)
def test_parameters_add_up(name):
    model = Transformer(tiny_config(**VARIANTS[name]))
    total = sum(p.numel() for p in model.parameters())
    assert sum(count_parameters(model).values()) == total
    tables = [model.code_embedding, model.label_embedding, model.memory, model.shared_ffn]
    active = total - sum(p.numel() for m in tables if m is not None for p in m.parameters())
    active += 16 + (model.memory.bank.embedding_dim if model.config.memory.kind != "none" else 0)
    for ffn in model.feedforwards():
        if isinstance(ffn, MoE):  # two of four experts are idle
            active -= 2 * 3 * 16 * 8
        elif isinstance(ffn, ProductKeyMemory):  # 2 look-ups of 3 values
            active += 2 * 3 * ffn.row_width
        elif isinstance(ffn, UltraMem):  # 2 look-ups of 3 values; 16 cells in 4 tables of 4 rows
            active += 2 * 3 * 6 - 4 * 6
        elif isinstance(ffn, PEER):  # of 16 experts
            active += (2 * 3 - 16) * 2 * 16
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


def kept_bytes(config: ModelConfig) -> float:
    """Bytes per token that the blocks keep in bfloat16 autocast, counted tensor by tensor."""
    model, kept = Transformer(config).train(), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # and their bfloat16 copies, which are counted with the model
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model.hidden(*random_inputs(config))
    return sum(storage.nbytes() for storage in kept.values()) / (3 * config.seq_len)


@pytest.mark.parametrize("name", ["none", "move-3-class-rows", "move-2-ungated"])
def test_activations_are_those_that_autograd_keeps(name):
    memory = {"memory": VARIANTS[f"mha-{name}-swiglu"]["memory"]}
    size = {"n_head": 4, "width": 64, "grid": [7, 11], "ffn": {"kind": "swiglu", "hidden": 96}}
    few, more = (tiny_config(n_layer=n, **size, **memory) for n in (2, 4))
    # per block, by the difference of two depths: the rest of the model cancels out
    bytes_per_block = (kept_bytes(more) - kept_bytes(few)) / 2
    expected = block_activations(few, Transformer(few).layers[1])
    assert bytes_per_block == pytest.approx(expected, rel=3e-3)


def test_bytes_and_hours_of_a_run_by_hand():
    overrides = ["micro_batch=32", "distributed=ddp", "activation_checkpointing=false"]
    config = load_config("imagenet-b-256-move-x1", TrainConfig, overrides)
    budget = train_budget(config, gpus=8, gpu="A100")
    d, layers, vocabulary = 768, 12, 16384
    block = 4 * d * d + 3 * d * 2048 + 2 * d + d * 12 * 7  # the router's: d H (M + 1)
    total = layers * block + 2 * vocabulary * d + 1001 * d + d + vocabulary * 6 * d
    assert budget["state"] == 20 * total
    linear = layers * (block - 2 * d) + vocabulary * d
    attention, mixing = 4 * layers * d * 257 / 2, 2 * layers * 6 * d
    assert budget["flops_per_step"] == 3 * (2 * linear + attention + mixing) * 256 * 256
    seconds = config.steps * budget["flops_per_step"] / 8 / 312e12
    assert budget["hours"] == pytest.approx([2 * seconds / 3600, 4 * seconds / 3600])
    assert budget["codes"] == 1_281_167 * (20 * 256 * 2 + 4)
    assert budget["checkpoints"] == total * (16 * (2 + 1) + 2 * 4)
    for wrong, value in (({"gpus": 3}, "3 GPUs"), ({"gpu": "Z80"}, "'Z80'")):
        with pytest.raises(ValueError, match=value):
            train_budget(config, **wrong)


# arXiv 2406.06525, table 1: 111M, 343M, 775M, 1.4B, 3.1B
@pytest.mark.parametrize(
    ("size", "millions"), [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3097)]
)
def test_imagenet_recipes_have_the_published_sizes_and_equal_banks_and_fit_a_gpu(size, millions):
    banks = {}
    for memory in ("standard", "lave-x1", "move-x1", "move-x2", "mla-lave-x1", "mla-move-x1"):
        config = load_config(f"imagenet-{size.lower()}-256-{memory}", TrainConfig)
        cost = model_cost(config.model)
        banks[memory] = cost.bank
        assert memory != "standard" or round(cost.parameters / 1e6) == millions
        assert memory != "move-x2" or train_budget(config)["memory"] < 80e9  # the largest
    x1 = banks["move-x1"]
    assert [*banks.values()] == [0, x1, x1, 2 * x1, x1, x1]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.yaml").write_text(
        "out: unused\ndata: {codes: c, tokenizer: t}\nsteps: 9\nmicro_batch: 4\nmodel: {n_layer: 1,"
        " n_head: 2, width: 16, codebook_size: 11, n_classes: 5, grid: [3, 4]}\n"
    )
    return tmp_path / "tiny.yaml"


@pytest.mark.parametrize(("batch_size", "passes"), [(8, 2), (6, 1)])  # micro_batch is 4
def test_training_is_measured_with_the_configs_passes(config, monkeypatch, batch_size, passes):
    made, loss = [], GeneratorTask.loss
    spy = lambda task, *index: made.append(task) or loss(task, *index)  # noqa: E731
    monkeypatch.setattr(GeneratorTask, "loss", spy)
    result = run("bench", "train", config, *OPTIONS, batch_size)
    assert len(made) == 2 * passes and "steps per second" in result.output
    assert made[0].model.head.weight.any()  # it really trains


def test_a_config_is_sampled_from_random_weights(config):
    done = run("bench", "sample", config, *OPTIONS, 1, "--quantize", "int8")
    assert "codes per second" in done.output
    assert "int8" in refused("bench", "sample", config, *OPTIONS, 1, "--quantize", "int3")
