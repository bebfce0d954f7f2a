import dataclasses
import json
import logging
import re
import warnings
from pathlib import Path

import pytest
import torch
from models import CONFIG, METADATA, difference, from_hf, generate, given, llama, to_hf, weights

from tinyllama import InputError
from tinyllama.convert import hf_folder, tokenizer_files, verify
from tinyllama.model import from_weights
from tinyllama.monitor.model_card import model_card
from tinyllama.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_file):
    folder = tmp_path_factory.mktemp("export") / "hf"
    hf_folder.write(folder, given(), Tokenizer(tokenizer_file))
    return folder


def test_the_snippet_of_the_model_card_runs_without_a_warning(
    exported: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    card = model_card(given(), "mine", str(exported))["README.md"]
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)  # it propagates nothing
    try:
        with warnings.catch_warnings(record=True) as warned:
            exec(snippet, {})
    finally:
        logger.removeHandler(caplog.handler)
    assert capsys.readouterr().out.removeprefix("<s> ").startswith("The capital of France is")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in warned if warning.category is UserWarning] == []


@pytest.mark.parametrize("vocab_size", [130, 192])
@pytest.mark.parametrize("n_query_groups", [1, 2, 8])
def test_logits_are_those_of_transformers_in_both_directions(n_query_groups, vocab_size):
    config = dataclasses.replace(CONFIG, n_query_groups=n_query_groups, vocab_size=vocab_size)
    state = weights(config)
    theirs = llama(config)
    theirs.load_state_dict(to_hf(state, config), strict=True)

    foreign = llama(config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in foreign.parameters():  # not ours in any way
            parameter.normal_(float(parameter.ndim == 1), 0.1, generator=generator)
    pairs = [
        (from_weights(config, state), theirs),
        (from_weights(config, from_hf(foreign.state_dict(), config)), foreign),
    ]
    for ours, theirs in pairs:
        for T in (1, 7, 33, 96):
            ids = torch.randint(vocab_size, (3, T), generator=torch.Generator().manual_seed(T))
            with torch.no_grad():
                difference = (ours(ids) - theirs(ids).logits).abs().max()
                assert theirs(ids).logits.std() > 0.3
            assert difference <= 1e-5


def test_there_and_back_is_the_same():
    state = weights()
    back = from_hf(to_hf(state, CONFIG), CONFIG)
    assert list(back) != []
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_fused_rows_are_query_heads_then_key_then_value_of_each_group():
    state = weights()
    state["transformer.h.1.attn.attn.weight"] = torch.arange(96.0)[:, None].expand(96, 64).contiguous()
    hf = to_hf(state, CONFIG)
    rows = {x: hf[f"model.layers.1.self_attn.{x}_proj.weight"][::8, 0].tolist() for x in "qkv"}
    assert rows == {"q": [0, 8, 16, 24, 48, 56, 64, 72], "k": [32, 80], "v": [40, 88]}


def test_the_folder_loads_with_transformers(exported):
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(model, LlamaForCausalLM)
    hf = to_hf(weights(), CONFIG)
    state = model.state_dict()
    assert state.keys() == hf.keys()
    assert all(torch.equal(state[name], hf[name]) for name in hf)
    config = model.config
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (448, 96, 1e-4)
    assert config.rope_parameters["rope_theta"] == 5000
    assert (config.bos_token_id, config.eos_token_id, config.dtype) == (1, 2, torch.float32)
    assert config.tie_word_embeddings is False
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.eos_token_id, generation.suppress_tokens) == (2, list(range(400, 448)))


def test_the_tokenizer_of_the_folder_is_ours(exported, tokenizer_file):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(tokenizer_file), AutoTokenizer.from_pretrained(exported)
    generator = torch.Generator().manual_seed(0)
    letters = list("abcdefghijklmnopqrstuvwxyz   \t\n▁0123456789.,é漢🦙'\"()\x00") + ["the ", "</s>", "<0x41>"]
    drawn = torch.randint(len(letters), (300, 40), generator=generator).tolist()
    for text in [
        *tokenizer_files.TEXTS,
        *("".join(letters[i] for i in row) for row in drawn),
        Path(__file__).read_text(),
    ]:
        ids = ours.encode(text)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)
        if "</s>" not in text:
            assert theirs(text)["input_ids"] == ids
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token, len(theirs)) == ("</s>", "</s>", "<unk>", 400)
    assert (theirs.eos_token_id, theirs.model_max_length) == (2, 96)
    assert theirs("a</s>")["input_ids"] == [*ours.encode("a"), 2]
    assert Tokenizer(exported).sha256 == ours.sha256


def test_a_tokenizer_json_is_exported_without_what_adds_tokens(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors
    from transformers import AutoTokenizer

    byte_pieces = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    source = tokenizers.Tokenizer(models.BPE(byte_pieces, []))
    source.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source.decoder = tokenizers.decoders.ByteLevel()
    source.add_special_tokens(["<s>", "</s>"])
    source.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    source.enable_truncation(5)
    source.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path)
    hf_folder.write(tmp_path / "hf", given(), ours)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (257, 257)
    hf_folder.write(tmp_path / "bos", given(metadata=METADATA | {"bos": True}), ours)
    assert AutoTokenizer.from_pretrained(tmp_path / "bos").bos_token_id == 256
    for text in tokenizer_files.TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_a_batch_of_texts_is_padded_with_a_token_that_there_is(exported, tokenizer_file):
    from transformers import AutoTokenizer, LlamaForCausalLM

    theirs, model = AutoTokenizer.from_pretrained(exported), LlamaForCausalLM.from_pretrained(exported)
    ours = Tokenizer(tokenizer_file)
    assert (theirs.pad_token, theirs.pad_token_id, len(theirs)) == ("<unk>", 0, ours.vocab_size)
    assert (model.generation_config.pad_token_id, model.config.vocab_size) == (0, CONFIG.padded_vocab_size)
    texts = ["The llama", "a", "def read(path):\n    return path"]
    batch = theirs(texts, return_tensors="pt", padding=True)
    lengths = [len(ours.encode(text)) for text in texts]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"] == 0).sum(1).tolist() == [max(lengths) - length for length in lengths]
    together = model.generate(**batch, do_sample=False, max_new_tokens=20)[:, max(lengths) :].tolist()
    for text, new in zip(texts, together, strict=True):
        alone = generate(from_weights(CONFIG, weights()), [ours.encode(text)], 20, eos_ids=[2])[0]
        assert new == alone + [0] * (20 - len(alone))


@pytest.mark.parametrize(
    ("special", "unk", "pad"),
    [
        (["<s>", "</s>"], None, "</s>"),
        (["<s>"], None, "<s>"),
        (["<s>", "</s>", "<unk>"], "<unk>", "<unk>"),
        ([], None, None),
    ],
)
def test_a_tokenizer_without_unk_pads_with_what_else_it_has(special, unk, pad, tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers
    from transformers import AutoTokenizer

    pieces = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *special])}
    source = tokenizers.Tokenizer(models.BPE(pieces, [], unk_token=unk))
    source.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source.decoder = tokenizers.decoders.ByteLevel()
    source.save(str(tmp_path / "tokenizer.json"))
    hf_folder.write(tmp_path / "hf", given(), Tokenizer(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (theirs.pad_token, len(theirs)) == (pad, len(pieces))
    generation = json.loads((tmp_path / "hf/generation_config.json").read_text())
    assert generation["pad_token_id"] == (None if pad is None else pieces[pad])


def test_greedy_text_is_that_of_transformers(exported):
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(exported)
    ours = from_weights(CONFIG, weights())
    for ids in ([5], [300, 7, 7, 120, 31]):
        expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=50)[0, len(ids) :].tolist()
        assert generate(ours, [ids], 50, eos_ids=[2]) == [expected]
        assert len(set(expected)) > 5


def test_verify_measures_the_conversion_and_not_the_rounding(exported, tmp_path):
    assert difference(exported) <= 1e-5
    for groups in (1, 2):  # of one group, the parts of the fused tensor are views of it
        config = dataclasses.replace(CONFIG, n_query_groups=groups)
        hf_folder.write(tmp_path / "half", given(config=config).cast("bfloat16"))
        assert difference(tmp_path / "half", config=config) <= 1e-5
    assert (tmp_path / "half/model.safetensors").stat().st_size < 0.6 * (exported / "model.safetensors").stat().st_size


def test_verify_sees_what_is_wrong(exported, tmp_path, tokenizer_file):
    other = weights()
    other["transformer.h.1.norm_2.weight"] = other["transformer.h.1.norm_2.weight"] * 1.01
    assert difference(exported, other) > verify.TOLERANCE
    assert difference(exported, config=dataclasses.replace(CONFIG, norm_eps=1e-5)) > verify.TOLERANCE
    assert difference(exported, config=dataclasses.replace(CONFIG, rope_base=10000)) > verify.TOLERANCE
    hf_folder.write(tmp_path / "hf", given(), Tokenizer(tokenizer_file))
    file = tmp_path / "hf/tokenizer.json"
    content = json.loads(file.read_text())
    content["normalizer"] = None
    file.write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="AutoTokenizer does not encode"):
        difference(tmp_path / "hf")


def test_without_a_tokenizer_the_ids_are_those_of_the_data(tmp_path):
    hf_folder.write(tmp_path / "hf", given(metadata=METADATA | {"eos_id": 7, "bos_id": None}))
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (7, None)
    names = {"config.json", "export.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "hf").iterdir()} == names


def test_an_export_replaces_an_export_whole(tmp_path, tokenizer_file):
    folder = tmp_path / "hf"
    folder.mkdir()
    hf_folder.write(folder, given(), Tokenizer(tokenizer_file))
    hf_folder.write(folder, given(weights(seed=6), metadata=METADATA | {"step": 13}))
    assert not (folder / "tokenizer.json").exists()
    assert json.loads((folder / "export.json").read_text())["step"] == 13
    assert difference(folder, weights(seed=6)) <= 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_no_export_wrote_is_left_alone(tmp_path):
    folder = tmp_path / "hf"
    hf_folder.write(folder, given())
    (folder / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    before = contents(tmp_path)
    for output, problem in [
        ("hf", "README.md, which no export wrote"),
        ("file", "is a file"),
        ("other", "config.json, which no export wrote"),
        ("file/hf", "cannot create .*file/hf: .*"),
    ]:
        with pytest.raises(InputError, match=problem):
            hf_folder.write(tmp_path / output, given())
    assert contents(tmp_path) == before


def test_an_export_that_fails_leaves_the_earlier_one(tmp_path):
    import sentencepiece

    hf_folder.write(tmp_path / "hf", given())
    before = contents(tmp_path)
    with (tmp_path / "unigram.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(Path(__file__).read_text().splitlines()),
            model_writer=file,
            model_type="unigram",
            vocab_size=200,
            minloglevel=2,
        )
    unigram = Tokenizer(tmp_path / "unigram.model")
    with pytest.raises(InputError, match="unigram.model cannot be written as a tokenizer.json"):
        hf_folder.write(tmp_path / "hf", given(), unigram)
    (tmp_path / "unigram.model").unlink()
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_that_is_not_the_models_is_refused(tokenizer_file):
    ours = Tokenizer(tokenizer_file)
    assert tokenizer_files.matching_tokenizer(tokenizer_file, None, CONFIG).sha256 == ours.sha256
    assert tokenizer_files.matching_tokenizer(tokenizer_file, ours.sha256, CONFIG).sha256 == ours.sha256
    with pytest.raises(InputError, match=f"{ours.sha256}, but the model was trained with {'0' * 64}"):
        tokenizer_files.matching_tokenizer(tokenizer_file, "0" * 64, CONFIG)
    with pytest.raises(InputError, match="has 400 pieces, but the model was trained with 399"):
        tokenizer_files.matching_tokenizer(tokenizer_file, None, dataclasses.replace(CONFIG, vocab_size=399))


def test_the_command_converts_a_checkpoint_and_verifies(script, step_dir, tmp_path, tokenizer_file):
    run = step_dir.parents[1]
    code, out, _ = script("convert_lit_checkpoint", run, tmp_path / "hf", "--tokenizer", tokenizer_file, "--verify")
    first, second = out.splitlines()
    assert code == 0
    assert first == f"{step_dir} -> {tmp_path / 'hf'}"
    assert second.startswith("verify: max |logit difference| to transformers ")
    assert json.loads((tmp_path / "hf/export.json").read_text())["step"] == 12
    assert difference(tmp_path / "hf") <= 1e-5


def test_the_command_ends_with_1_when_the_logits_differ(script, step_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "TOLERANCE", -1.0)
    code, out, _ = script("convert_lit_checkpoint", step_dir, tmp_path / "hf", "--dtype", "bfloat16", "--verify")
    assert code == 1
    assert "tolerance -1e+00" in out


def test_the_command_goes_on_with_a_text(script, step_dir, tokenizer_file):
    args = ("--tokenizer", tokenizer_file, "--prompt", "The llama", "--max_new_tokens", 9)
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode("The llama")
    new = generate(from_weights(CONFIG, weights()), [ids], 9, eos_ids=[2])[0]
    code, out, err = script("generate", step_dir, *args)
    assert (code, out) == (0, tokenizer.decode(ids + new) + "\n")
    assert re.fullmatch(r"9 tokens in [\d.]+ s, [\d.]+ tokens/s\n", err)


def test_the_command_says_what_it_cuts_from_a_prompt(script, step_dir, tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)
    long = "The llama walked along the river, and 1984 others followed her. " * 9
    ids = tokenizer.encode(long)
    assert len(ids) > 96
    args = ("--tokenizer", tokenizer_file, "--max_new_tokens", 5)
    code, out, err = script("generate", step_dir, *args, "--prompt", long)
    first, second = err.splitlines()
    assert (code, second[:8]) == (0, "5 tokens")
    assert first == f"--prompt has {len(ids):,} tokens: the model reads only its last 96, a whole context"
    new = generate(from_weights(CONFIG, weights()), [ids[-96:]], 5, eos_ids=[2])[0]
    assert out == tokenizer.decode(ids + new) + "\n"
    code, out, err = script("generate", step_dir, *args, "--prompt", "a", "--prompt", long)
    assert err.startswith(f"--prompt 2 has {len(ids):,} tokens: ")


def test_the_command_stops_at_every_end_that_a_folder_names(script, tmp_path, tokenizer_file):
    tokenizer = Tokenizer(tokenizer_file)
    ids = tokenizer.encode("The llama")
    free = generate(from_weights(CONFIG, weights()), [ids], 12)[0]
    hf_folder.write(tmp_path / "hf", given(), tokenizer)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"eos_token_id": [2, 399, free[3]]}))
    args = ("--tokenizer", tokenizer_file, "--prompt", "The llama", "--max_new_tokens", 12)
    code, out, err = script("generate", tmp_path / "hf", *args)
    expected = free[: free.index(free[3]) + 1]
    assert (code, out) == (0, tokenizer.decode(ids + expected) + "\n")
    assert err.startswith(f"{len(expected)} tokens in ")


def test_the_commands_name_what_is_wrong(script, step_dir, tmp_path, tokenizer_file):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    text = ("--prompt", "a", "--tokenizer", tokenizer_file)
    for name, args, problem in [
        ("convert_lit_checkpoint", (step_dir, tmp_path / "full"), "full holds file, which no export wrote"),
        ("convert_lit_checkpoint", (tmp_path, tmp_path / "new"), "holds no complete checkpoint"),
        ("convert_lit_checkpoint", (step_dir, tmp_path / "new", "--dtype", "float8"), "float8"),
        ("generate", (step_dir, *text, "--prompt", ""), "--prompt is empty"),
        ("generate", (step_dir, *text, "--temperature", "-1"), "--temperature is -1.0"),
        ("generate", (step_dir, *text, "--tokenizer", tmp_path), "no tokenizer at"),
    ]:
        code, out, err = script(name, *args)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert problem in err
    assert not (tmp_path / "new").exists()
