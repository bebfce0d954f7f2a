"""What the guides say: every command in a block of bash is run, at a small size, and every link leads somewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
GUIDES = [
    "README.md",
    "pretrain/README.md",
    "scripts/README.md",
    "configs/README.md",
    "docs/benchmarks.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))

SMALL = (
    "--model.n_layer 1 --model.n_embd 32 --model.n_head 2 --model.n_query_groups 1 --model.intermediate_size 64 "
    "--model.block_size 32 --model.vocab_size 400 --train.max_tokens null --train.max_steps 4 "
    "--train.global_batch_size 8 --train.micro_batch_size 2 --train.precision fp32 --optim.warmup_steps 1 "
    "--checkpoint.interval 2 --eval.interval 2 --eval.max_samples 4 --log.interval 1"
)
# what stands in a guide, and what is run in its place
SIZES = [
    (r"^srun --nodes 2 --ntasks-per-node 8 python ", "torchrun --nproc-per-node 2 "),
    (r"^torchrun (--nnodes 2 )?--nproc-per-node \d+ (--rdzv\S+ \S+ )*", "torchrun --nproc-per-node 2 "),
    (r"step-00005000", "step-00000002"),
    (r"^sbatch scripts/slurm/pretrain.sbatch ", "bash -n scripts/slurm/pretrain.sbatch && python pretrain/train.py "),
    (r"^sbatch (scripts/slurm/acceptance.sbatch) .*", r"bash -n \1"),  # tests/slurm runs it
    (r"(pretrain/train\.py .*)", rf"\1 {SMALL}"),
    (r"(scripts/train_tokenizer\.py .*)", r"\1 --vocab_size 400"),  # there is one, which is left as it is
    (r"(scripts/generate\.py .*)", r"\1 --max_new_tokens 2"),
    (r"scripts/doctor\.py(.*)", r"scripts/doctor.py\1 || [ $? = 1 ]"),  # it may find something
]
# these need a network or a real Slurm
NOT_RUN = ("pip install ", "hf download ", "scancel ")


def commands(guide: str) -> list[str]:
    """The commands in the guide's blocks of bash, one a line, without their comments."""
    text = (ROOT / guide).read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    plain = [" ".join(re.sub(r"(^|\s)# .*|\s{2,}#.*", "", line).split()) for line in joined]
    return [line for line in plain if line]


def small(command: str) -> str:
    for pattern, instead in SIZES:
        command = re.sub(pattern, instead, command)
    return command


@pytest.fixture
def workspace(tmp_path: Path, tokenizer_file: Path) -> Path:
    """A folder that looks like the repository of somebody who has a little raw data."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    for name in ("pretrain", "scripts", "configs", "tinyllama"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.model")
    rng = np.random.default_rng(0)
    words = ["the", "little", "llama", "walked", "along", "a", "river", "and", "others", "followed", "to", "town"]
    texts = [" ".join(rng.choice(words, 60)) for _ in range(40)]
    for split in ("train", "validation"):
        folder = tmp_path / "raw" / "SlimPajama-627B" / split / "chunk1"
        folder.mkdir(parents=True)
        for number in range(2):
            lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}) for text in texts]
            packed = zstandard.compress("\n".join(lines).encode())
            (folder / f"example_{split}_{number}.jsonl.zst").write_bytes(packed)
    python = tmp_path / "raw" / "starcoderdata" / "python"
    python.mkdir(parents=True)
    pq.write_table(pa.table({"content": texts, "max_stars_count": [1] * 40}), python / "train-0.parquet")
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "mine.txt").write_text("\n".join(texts))
    shutil.copytree(tmp_path / "my_texts", tmp_path / "my_held_out")
    (tmp_path / "slurm-tinyllama-1.out").write_text("step 4/4  val_loss 5.0\n")
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).symlink_to(Path(sys.executable).parent / name)
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(workspace: Path) -> None:
    env = dict(os.environ, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TERM="dumb")
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done: set[str] = set()
    for guide in ("pretrain/README.md", "scripts/README.md", "configs/README.md", "README.md"):
        for command in commands(guide):
            line = small(command)
            if line in done or line.startswith(NOT_RUN):
                continue
            ran = subprocess.run(["bash", "-c", line], cwd=workspace, env=env, capture_output=True, text=True)
            assert ran.returncode == 0, f"{guide}: {command}\nas: {line}\n{ran.stdout}{ran.stderr}"
            done.add(line)
    assert len(done) > 25
    assert (workspace / "out" / "tinyllama_1.1b" / "report.html").exists()
    assert (workspace / "hf" / "model.safetensors").exists()


@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_of_commands_is_one_that_is_run(guide: str) -> None:
    fences = re.findall(r"^```(.*)$", (ROOT / guide).read_text(), re.MULTILINE)
    allowed = {"bash", "text", ""} if guide == "README.md" else {"bash", ""}  # make's block is the quickstart's test
    assert set(fences) <= allowed
    for command in commands(guide):
        for script in re.findall(r"(?:pretrain|scripts)/\S+\.(?:py|sbatch|sh)", command):
            assert (ROOT / script).exists(), command


@pytest.mark.parametrize("guide", GUIDES)
def test_every_link_leads_somewhere(guide: str) -> None:
    text = (ROOT / guide).read_text()
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in [*re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text), *pictures]:
        assert ((ROOT / guide).parent / target).exists(), target


@pytest.mark.parametrize("guide", GUIDES)
def test_every_heading_that_is_linked_exists(guide: str) -> None:
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", (ROOT / guide).read_text()):
        file = (ROOT / guide).parent / target if target else ROOT / guide
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings]
        assert heading in anchors, f"{target}#{heading}"


def test_every_recipe_is_told_of() -> None:
    told = re.findall(r"\]\((pretrain/\w[\w.]*\.yaml)\)", (ROOT / "configs/README.md").read_text())
    assert sorted(told) == [str(path.relative_to(ROOT / "configs")) for path in RECIPES]


def test_every_recipe_passes_a_dry_run(packed_folder, tmp_path: Path) -> None:
    """With its own settings but for the sizes, and tiny data in place of its folders; one process for all."""
    data = packed_folder([[list(range(3, 250)) * 40]])
    env = dict(os.environ, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", TORCHELASTIC_RUN_ID="tests")
    env |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    lines = []
    for path in RECIPES:
        sources = yaml.safe_load(path.read_text())["data"]["sources"]
        flags = [
            "--config",
            str(path),
            "--out_dir",
            str(tmp_path / path.stem),
            "--dry_run",
            *SMALL.split(),
            "--train.init_from",
            "null",
        ]
        flags += ["--data.sources", json.dumps([source | {"path": str(data)} for source in sources])]
        flags += ["--data.validation", json.dumps([{"path": str(data)}])]
        lines.append(json.dumps(["train", flags]))
    command = [sys.executable, ROOT / "tests" / "helpers" / "rank.py"]
    ran = subprocess.run(command, input="\n".join(lines) + "\n", env=env, cwd=ROOT, capture_output=True, text=True)
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [answer.get("result") for answer in answers] == [0] * len(RECIPES), answers
    for path, answer in zip(RECIPES, answers, strict=True):
        assert "length   4 steps, 32 samples" in answer["said"], path
        assert not (tmp_path / path.stem).exists()
