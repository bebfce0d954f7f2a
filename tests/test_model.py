import copy
import math

import pytest
import torch

from tinyllama.config.model import NAMED_CONFIGS, ModelConfig, named_config
from tinyllama.model import GPT, OPS, Block, from_weights, init_weights
from tinyllama.ops import attention
from tinyllama.ops.cross_entropy import IGNORE_INDEX

CONFIG = ModelConfig(
    "tiny", block_size=64, vocab_size=130, n_layer=3, n_head=8, n_query_groups=2, n_embd=64, intermediate_size=96
)


@pytest.fixture(scope="module")
def gpt():
    model = GPT(CONFIG)
    init_weights(model, seed=1)
    return model


def tokens(B, T, seed=0):
    return torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def on_meta(config):
    with torch.device("meta"):
        return GPT(config)


def test_tinyllama_has_as_many_parameters_as_the_original():
    assert sum(p.numel() for p in on_meta(named_config("tinyllama_1.1b")).parameters()) == 1_100_048_384


@pytest.mark.parametrize("name", NAMED_CONFIGS)
@pytest.mark.parametrize("vocab_size", [2048, 2049])
def test_config_counts_the_parameters_that_the_model_has(name, vocab_size):
    config = named_config(name, vocab_size=vocab_size)
    sizes = {name: p.numel() for name, p in on_meta(config).named_parameters()}
    assert config.num_params() == sum(sizes.values())
    assert config.num_params(embedding=False) == sum(sizes.values()) - sizes["transformer.wte.weight"]


def test_parameters_have_upstream_names(gpt):
    of_a_layer = ["norm_1", "attn.attn", "attn.proj", "norm_2", "mlp.swiglu.w1", "mlp.swiglu.w2", "mlp.swiglu.w3"]
    layers = [f"transformer.h.{i}.{name}.weight" for i in range(3) for name in of_a_layer]
    assert set(gpt.state_dict()) == {"lm_head.weight", "transformer.wte.weight", *layers, "transformer.ln_f.weight"}
    assert gpt.transformer.h[0].attn.attn.weight.shape == (96, 64)


@pytest.mark.parametrize("n_layer", [2, 5])
def test_start_weights_have_upstream_standard_deviations(n_layer):
    config = ModelConfig("wide", vocab_size=512, n_layer=n_layer, n_embd=512, n_head=8, intermediate_size=700)
    model = GPT(config)
    init_weights(model, seed=7)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm_1.weight", "norm_2.weight", "ln_f.weight")):
            assert parameter.eq(1).all(), name
            continue
        residual = name.endswith(("attn.proj.weight", "swiglu.w3.weight"))
        std = 1 / math.sqrt(512) / n_layer if residual else math.sqrt(2 / 5 / 512)
        # of n normal numbers, the sample's deviation is within 5 std / sqrt(2 n), its mean within 5 std / sqrt(n)
        assert parameter.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * parameter.numel())), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_start_weights_of_a_seed_never_change(gpt):
    # golden: another draw would be another model for the same seed
    first = {"lm_head.weight": 0.0272601731, "transformer.h.2.mlp.swiglu.w3.weight": 0.0246588588}
    state = gpt.state_dict()
    for name, value in first.items():
        assert state[name][0, 0].item() == pytest.approx(value, rel=1e-4), name


def test_start_weights_depend_on_the_seed_and_the_name_only(gpt):
    again, other = GPT(CONFIG), GPT(CONFIG)
    torch.manual_seed(123)
    init_weights(again, seed=1)
    init_weights(other, seed=2)
    matrices = {name: p for name, p in gpt.named_parameters() if p.ndim == 2}
    for name, parameter in matrices.items():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert not torch.equal(parameter, other.get_parameter(name)), name
    firsts = {p.flatten()[:4].div(p.std()).round(decimals=3).sum().item() for p in matrices.values()}
    assert len(firsts) == len(matrices)


def test_start_weights_are_the_same_from_meta_under_wrappers_and_in_bf16(gpt):
    wrapped = on_meta(CONFIG)
    for block in wrapped.transformer.h:
        block.forward = torch.compile(block.forward)  # as parallelize does it
    wrapped.to_empty(device="cpu")
    init_weights(wrapped, seed=1)
    half = GPT(CONFIG).bfloat16()
    init_weights(half, seed=1)
    for ours, theirs, rounded in zip(gpt.parameters(), wrapped.parameters(), half.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours.bfloat16(), rounded)
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in gpt.named_parameters()]


def test_a_sharded_model_starts_with_the_same_weights_and_keeps_fp32_rope_tables(gpt, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = on_meta(CONFIG)
        mesh = dist.init_device_mesh("cpu", (1,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        model.to_empty(device="cpu")
        init_weights(model, seed=1)
        seen = dtypes_inside_blocks(model)
        model(tokens(2, 5), tokens(2, 5, 1)).backward()
        assert seen == BF16_STREAM
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.full_tensor(), gpt.get_parameter(name)), name
            assert parameter.grad.dtype == torch.float32
    finally:
        dist.destroy_process_group()


# the residual stream, behind the first layer also what is to be added to it, and RoPE's tables
TABLES = (torch.float32, torch.float32)
BF16_STREAM = [(torch.bfloat16, *TABLES), *[(torch.bfloat16, torch.bfloat16, *TABLES)] * 2]


def dtypes_inside_blocks(model):
    seen = []
    for module in model.modules():
        if isinstance(module, Block):
            module.register_forward_pre_hook(lambda _, args: seen.append(tuple(x.dtype for x in args if x is not None)))
    return seen


def test_rope_tables_stay_fp32_when_the_model_becomes_bf16(gpt):
    model = copy.deepcopy(gpt)
    model(tokens(1, 3))
    model.bfloat16()
    seen = dtypes_inside_blocks(model)
    assert model(tokens(1, 3)).dtype == torch.bfloat16
    assert seen == BF16_STREAM


def test_training_after_a_first_forward_in_inference_mode():
    model = GPT(CONFIG)
    init_weights(model, seed=1)
    with torch.inference_mode():
        model(tokens(1, 4))
    model(tokens(1, 4), tokens(1, 4)).backward()
    assert model.transformer.wte.weight.grad.norm() > 0


def test_each_norm_adds_what_was_computed_from_the_one_before(gpt):
    model = copy.deepcopy(gpt)
    norms, results = [], []
    for name, module in model.named_modules():
        if name.endswith(("norm_1", "norm_2", "ln_f")):
            module.register_forward_hook(lambda _, inputs, output: norms.append((*inputs, *output)))
        elif name.endswith(("attn", "mlp")) and not name.endswith("attn.attn"):
            module.register_forward_hook(lambda _, inputs, output: results.append(output))
    with torch.no_grad():
        model(tokens(2, 5), tokens(2, 5))
    stream = model.transformer.wte(tokens(2, 5))
    assert len(norms) == 2 * CONFIG.n_layer + 1
    for (x, added, _, total), result in zip(norms, [None, *results], strict=True):
        assert torch.equal(x, stream)
        assert added is result
        stream = stream if added is None else stream + added
        assert torch.equal(total, stream)


def test_a_later_token_does_not_change_earlier_logits(gpt):
    a, b = tokens(2, 33), tokens(2, 33)
    b[:, 20] = (b[:, 20] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = gpt(a), gpt(b)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] - after[:, 20:]).abs().amax(-1).min() > 1e-4


def test_logits_of_a_prefix_are_those_of_the_whole(gpt):
    ids = tokens(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(gpt(ids[:, :13]), gpt(ids)[:, :13], atol=1e-6, rtol=0)


def test_loss_is_the_sum_over_targets_that_count(gpt):
    ids, targets = tokens(3, 17), tokens(3, 17, 1)
    targets[1, 4:9] = IGNORE_INDEX
    with torch.no_grad():
        loss, logits = gpt(ids, targets), gpt(ids)
    assert logits.shape == (3, 17, 192)
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 192), targets.view(-1), reduction="sum")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.item() == pytest.approx(46 * math.log(192), rel=0.05)


def test_from_weights_shares_the_tensors(gpt):
    state = gpt.state_dict()
    model = from_weights(CONFIG, state)
    assert model.lm_head.weight.data_ptr() == state["lm_head.weight"].data_ptr()
    assert torch.equal(model(tokens(1, 9)), gpt(tokens(1, 9)))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_packed_documents_do_not_see_each_other(backend):
    model = GPT(CONFIG, OPS | {"attention": backend})
    init_weights(model, seed=1)
    eos = 2
    documents = [[5, 9, 7, eos], [8, eos], [11, 12, 13, 14, 15, eos], [6, 7]]
    moved = [*documents[2::-1], documents[3]]
    packed = torch.tensor([sum(documents, []), sum(moved, [])])
    numbers = attention.documents(packed, eos)
    assert numbers[0].tolist() == [0] * 4 + [1] * 2 + [2] * 6 + [3] * 2
    with torch.no_grad():
        together = model(packed, documents=numbers, restart=True)
        apart, moved_apart = ([model(torch.tensor([one]))[0] for one in order] for order in (documents, moved))
        continued = model(packed, documents=numbers)
        mixed = model(packed)
    torch.testing.assert_close(together[0], torch.cat(apart), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1], torch.cat(moved_apart), atol=1e-5, rtol=0)
    # RoPE knows only differences of positions, so that where they begin makes no difference but rounding's
    torch.testing.assert_close(continued, together, atol=1e-4, rtol=0)
    assert (mixed[0, 4:] - together[0, 4:]).abs().max() > 1e-2
