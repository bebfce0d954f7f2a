import dataclasses

import models
import pytest
import torch
from models import generate

from tinyllama import InputError
from tinyllama.config.model import ModelConfig
from tinyllama.eval.generate import Text, check, choose, stream
from tinyllama.model import GPT, from_weights, init_weights
from tinyllama.tokenizer import Tokenizer

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
        return gpt(torch.tensor([ids]))[0, -1, : gpt.config.vocab_size].argmax().item()


@pytest.mark.parametrize("changes", [{}, {"n_query_groups": 8}, {"tie_embeddings": True, "rope_condense_ratio": 4}])
def test_200_greedy_tokens_with_and_without_the_cache_are_those_of_transformers(changes):
    config = dataclasses.replace(models.CONFIG, block_size=256, **changes)
    state = models.weights(config)
    ours, theirs = from_weights(config, state), models.llama(config)
    theirs.load_state_dict(models.to_hf(state, config), strict=not config.tie_embeddings)
    ids = [300, 7, 7, 120, 31]
    new = generate(ours, [ids], 200)[0]
    allowed = {"suppress_tokens": list(range(config.vocab_size, config.padded_vocab_size)), "eos_token_id": None}
    expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=200, **allowed)[0, 5:].tolist()
    assert new == expected
    assert [likeliest(ours, ids + new[:i]) for i in range(200)] == new
    assert len(set(new)) >= 3


def test_prompts_of_unequal_lengths_get_what_each_gets_alone(gpt):
    prompts = [[5, 17, 80], [9], [1, 2, 3, 4, 5, 6, 7]]
    for how in ({}, {"temperature": 1.0, "top_k": 20, "top_p": 0.8, "seed": 4}):
        together = generate(gpt, prompts, 8, **how)
        assert together == [generate(gpt, [prompt], 8, **how)[0] for prompt in prompts]
        assert [len(new) for new in together] == [8, 8, 8]


def test_a_context_of_one_token_holds_the_last_one():
    model = GPT(dataclasses.replace(CONFIG, block_size=1))
    init_weights(model, seed=3)
    new = generate(model, [[5]], 6)[0]
    assert new == [likeliest(model, [token]) for token in [5, *new[:-1]]]


def test_past_the_context_it_goes_on_from_the_last_half(gpt):
    ids = [5, 17, 80]
    new = generate(gpt, [ids], 40)[0]
    begin = 0
    for i in range(40):
        position = len(ids) + i
        if position - begin > 16:
            begin = position - 8
        assert new[i] == likeliest(gpt, (ids + new)[begin:position])


@pytest.mark.parametrize("length", [15, 16, 17, 30, 100])
def test_of_a_prompt_beyond_the_context_the_last_whole_context_is_read(gpt, length):
    prompt = [(7 * i + 3) % 100 for i in range(length)]
    new = generate(gpt, [prompt], 4)[0]
    assert new == generate(gpt, [prompt[-16:]], 4)[0]
    ids, begin = prompt[-16:], 0
    for token in new:
        begin = len(ids) - 8 if len(ids) - begin > 16 else begin
        assert token == likeliest(gpt, ids[begin:])
        ids.append(token)


@pytest.mark.parametrize("lengths", [(3, 30), (30, 3, 16), (17, 16, 15), (40, 90), (1, 200)])
def test_rows_beyond_the_context_get_what_each_gets_alone(gpt, lengths):
    prompts = [[(11 * i + row) % 100 for i in range(length)] for row, length in enumerate(lengths)]
    for how in ({}, {"temperature": 1.0, "top_p": 0.9, "seed": 2}):
        assert generate(gpt, prompts, 40, **how) == [generate(gpt, [prompt], 40, **how)[0] for prompt in prompts]


def test_each_prompt_stops_at_its_own_eos(gpt):
    prompts = [[5, 17, 80], [9, 3]]
    free = generate(gpt, prompts, 12)
    eos = free[0][4]
    expected = [new[: new.index(eos) + 1] if eos in new else new for new in free]
    assert generate(gpt, prompts, 12, eos_ids=[eos]) == expected
    steps = list(stream(gpt, [[5, 17, 80]], 12, eos_ids=[eos]))
    assert steps == [[token] for token in free[0][: free[0].index(eos) + 1]]


def test_each_of_several_eos_ids_ends_a_text(gpt):
    prompts = [[5, 17, 80], [9, 3], [64]]
    free = generate(gpt, prompts, 12)
    ends = {free[0][4], free[1][2], free[2][7], 0}
    found = generate(gpt, prompts, 12, eos_ids=ends)
    for new, whole in zip(found, free, strict=True):
        assert new == whole[: len(new)]
        assert new[-1] in ends
        assert not ends & set(new[:-1])


def test_rows_beyond_the_vocabulary_are_never_chosen(gpt):
    model = GPT(CONFIG)
    model.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        model.lm_head.weight[100:] = 10 * model.lm_head.weight[:28]
    assert max(generate(model, [[5]], 14, temperature=5.0)[0]) < 100
    assert max(generate(model, [[5]], 14)[0]) < 100


def test_a_seed_draws_the_same_again(gpt):
    draws = [generate(gpt, [[5, 17]], 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_drawn_tokens_follow_the_probabilities():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    draw = torch.Generator().manual_seed(0)

    def shares(temperature, top_k, top_p):
        tokens = [choose(logits, temperature, top_k, top_p, draw) for _ in range(2000)]
        return torch.bincount(torch.tensor(tokens), minlength=4) / 2000

    for temperature, top_k, top_p, kept in [
        (1.0, None, 1.0, [0, 1, 2, 3]),
        (0.5, None, 1.0, [0, 1, 2, 3]),
        (1.0, 2, 1.0, [1, 2]),
        (1.0, 9, 0.5, [1]),  # its share is 0.64
        (1.0, None, 0.7, [1, 2]),
        (1.0, 1, 1.0, [1]),
    ]:
        expected = torch.zeros(4)
        expected[kept] = torch.softmax(logits[kept] / temperature, 0)
        found = shares(temperature, top_k, top_p)
        assert (found - expected).abs().max() < 4 * (0.25 / 2000) ** 0.5
        assert found[expected == 0].sum() == 0
    assert choose(logits, 0.0, None, 1.0, draw) == 1


def test_numbers_that_cannot_be_are_refused_together():
    with pytest.raises(InputError) as caught:
        check(CONFIG, max_new_tokens=0, temperature=-1, top_k=0, top_p=1.5, seed=-1)
    assert [problem.split()[0] for problem in caught.value.args] == [
        "--max_new_tokens",
        "--temperature",
        "--top_k",
        "--top_p",
        "--seed",
    ]
    for changed in ({"temperature": float("nan")}, {"max_new_tokens": 10**15}, {"seed": 2**63}):
        (key,) = changed
        with pytest.raises(InputError, match=f"--{key} is "):
            check(CONFIG, **{"max_new_tokens": 1, "temperature": 0, "top_k": None, "top_p": 1.0, "seed": 0} | changed)


def test_a_temperature_or_a_share_near_zero_leaves_the_likeliest(gpt):
    greedy = generate(gpt, [[5, 17]], 6)
    for how in ({"temperature": 1e-300}, {"temperature": 1e-45}, {"temperature": 1.0, "top_p": 1e-300}):
        assert generate(gpt, [[5, 17]], 6, **how) == greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_told_of(gpt, temperature, value):
    model = GPT(CONFIG)
    model.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        model.transformer["ln_f"].weight[3] = value
    with pytest.raises(InputError, match="^the model's logits are not finite: give another checkpoint$"):
        generate(model, [[5, 17]], 6, temperature=temperature)


def test_pieces_of_a_text_are_the_text_and_have_whole_characters(tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode("The llama says 漢字🦙 twice")
    text = Text(tokenizer, ids[:2])
    pieces = [text.add(token) for token in ids[2:]] + [text.rest()]
    assert "".join(pieces) == "The llama says 漢字🦙 twice" == text.text
    assert not any("\ufffd" in piece for piece in pieces)


def test_no_new_tokens(gpt):
    assert generate(gpt, [[5]], 0) == [[]]
