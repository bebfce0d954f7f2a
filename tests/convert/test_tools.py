"""The exported folder in the tools that people take it to, as on PyPI; one that is not installed is skipped."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CONFIG, METADATA, given, weights

from tinyllama.convert import hf_folder
from tinyllama.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROMPT = "The little llama walked"
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    metadata = METADATA | {"tokenizer_sha256": Tokenizer(tokenizer_file).sha256}
    hf_folder.write(folder, given(metadata=metadata), Tokenizer(tokenizer_file))
    return folder


@pytest.fixture(scope="module")
def greedy(folder: Path) -> list[int]:
    """What transformers continues the prompt with, by the snippet that everybody writes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].tolist()
    return ids[inputs["input_ids"].shape[1] :]


def test_transformers_generates_up_to_the_context(folder: Path, greedy: list[int]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"))[0].tolist()
    assert len(ids) == CONFIG.block_size or ids[-1] == tokenizer.eos_token_id
    assert len(greedy) == NEW


def test_assisted_generation_gives_the_same(
    folder: Path, greedy: list[int], tokenizer_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf_folder.write(tmp_path / "draft", given(weights(seed=6)), Tokenizer(tokenizer_file))
    draft = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, assistant_model=draft, max_new_tokens=NEW, do_sample=False)[0].tolist()
    assert ids[inputs["input_ids"].shape[1] :] == greedy


def test_ctranslate2_generates_the_same(folder: Path, greedy: list[int], tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs ctranslate2")
    from transformers import AutoTokenizer

    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.convert_ids_to_tokens(tokenizer(PROMPT)["input_ids"])
    options = {"max_length": NEW, "sampling_topk": 1, "include_prompt_in_result": False}
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu")
    (found,) = generator.generate_batch([prompt], **options)
    assert found.sequences_ids[0] == greedy


def test_gguf_knows_every_tensor_and_token(folder: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf, llama.cpp's library")
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.n_layer)
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = [names.get_name(key, try_suffixes=(".weight",)) for key in file.keys()]  # noqa: SIM118
    assert None not in found
    assert len(set(found)) == len(found)
    pieces = list(gguf.vocab.SentencePieceVocab(folder).all_tokens())
    assert len(pieces) == CONFIG.vocab_size
    special = gguf.SpecialVocab(folder, load_merges=True)
    assert special.special_token_ids == {"bos": 1, "eos": 2, "pad": 0, "unk": 0} | special.special_token_ids
    assert special.special_token_ids["eos"] == 2


def test_trl_trains_a_chat_model(folder: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    turns = [{"role": "user", "content": "What is nothing?"}, {"role": "assistant", "content": "It is lost."}]
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "chat"),
        max_steps=2,
        per_device_train_batch_size=2,
        chat_template_path=str(template),
        max_length=CONFIG.block_size,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    data = datasets.Dataset.from_list([{"messages": turns}] * 8)
    trainer = trl.SFTTrainer(model=str(folder), args=config, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "chat")
    tokenizer, model = (kind.from_pretrained(tmp_path / "chat") for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert (len(tokenizer), tokenizer.pad_token_id) == (CONFIG.vocab_size, 0)
    assert model.config.vocab_size == CONFIG.padded_vocab_size
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**asked, max_new_tokens=4).shape[1] == asked["input_ids"].shape[1] + 4


def test_lm_eval_scores_the_folder(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    rows = [{"text": PROMPT, "end": " along the river", "other": " zzz qqq"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ends.yaml").write_text(f"""
task: ends
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{[end, other]}}}}"
doc_to_target: 0
""")
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype=float32",
    ]
    command += [
        "--include_path",
        str(tmp_path),
        "--tasks",
        "ends",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=300)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["ends"]["acc,none"] <= 1
    assert torch.isfinite(torch.tensor(json.loads(results.read_text())["results"]["ends"]["acc_norm,none"]))
