import pytest
import torch

from tinyllama.config import ModelConfig
from tinyllama.generate import generate
from tinyllama.model import GPT, init_weights

# 100 pieces in 128 rows: 28 rows are no tokens
CONFIG = ModelConfig(
    "tiny", block_size=16, vocab_size=100, n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48
)


@pytest.fixture(scope="module")
def gpt():
    model = GPT(CONFIG)
    init_weights(model, seed=3)
    return model


def likeliest(gpt, ids):
    with torch.no_grad():
        return gpt(torch.tensor([ids[-16:]]))[0, -1, :100].argmax().item()


def test_greedy_takes_the_likeliest_token_and_sees_the_last_block(gpt):
    ids = [5, 17, 80]
    new = generate(gpt, ids, 30)
    for i in range(30):
        assert new[i] == likeliest(gpt, ids + new[:i])


def test_greedy_stops_with_eos(gpt):
    new = generate(gpt, [5, 17, 80], 30)
    eos = new[4]
    assert generate(gpt, [5, 17, 80], 30, eos_id=eos) == new[: new.index(eos) + 1]


def test_rows_beyond_the_vocabulary_are_never_chosen(gpt):
    model = GPT(CONFIG)
    model.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        model.lm_head.weight[100:] = 10 * model.lm_head.weight[:28]
    assert max(generate(model, [5], 14, temperature=5.0)) < 100
    assert max(generate(model, [5], 14)) < 100


def test_a_seed_draws_the_same_again(gpt):
    draws = [generate(gpt, [5, 17], 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_drawn_tokens_follow_the_probabilities_at_the_temperature(gpt):
    with torch.no_grad():
        logits = gpt(torch.tensor([[5, 17]]))[0, -1, :100]
    temperature = (logits.topk(2).values @ torch.tensor([1.0, -1.0])).item()  # the first is e times the second
    expected = torch.softmax(logits / temperature, dim=0)
    draws = [generate(gpt, [5, 17], 1, temperature, seed=seed)[0] for seed in range(100)]
    for token in expected.topk(2).indices.tolist():
        p = expected[token].item()
        assert abs(draws.count(token) - 100 * p) < 4 * (100 * p * (1 - p)) ** 0.5
        assert p > 0.05


def test_no_new_tokens(gpt):
    assert generate(gpt, [5], 0) == []
