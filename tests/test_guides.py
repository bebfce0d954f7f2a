"""What the guides say: every command, in a block or in the text, is run at a small size; every link leads somewhere."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from processes import Process

ROOT = Path(__file__).parents[1]
FIRST = ["pretrain/README.md", "scripts/README.md", "configs/README.md"]  # each uses what those before it have made
FOUND = sorted(str(path.relative_to(ROOT)) for folder in (".", "[!.]*") for path in ROOT.glob(f"{folder}/*.md"))
GUIDES = [*FIRST, *(guide for guide in FOUND if guide not in FIRST)]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))

SMALL = (
    "--model.n_layer 1 --model.n_embd 32 --model.n_head 2 --model.n_query_groups 1 --model.intermediate_size 64 "
    "--model.block_size 32 --model.vocab_size 400 --train.max_tokens null --train.max_epochs null --train.max_steps 4 "
    "--train.global_batch_size 8 --train.micro_batch_size 2 --train.precision fp32 --optim.warmup_steps 1 "
    "--checkpoint.interval 2 --eval.interval 2 --eval.max_samples 4 --log.interval 1"
)
# what mpirun would set, for one rank
MPI = "MASTER_ADDR=127.0.0.1 MASTER_PORT=0 " + " ".join(
    f"OMPI_COMM_WORLD_{name}" for name in ("RANK=0", "SIZE=1", "LOCAL_RANK=0", "LOCAL_SIZE=1")
)
# what stands in a guide, and what is run in its place
INSTEAD = [
    # what is started otherwise here
    (r"^srun --nodes 2 --ntasks-per-node 8 python ", "torchrun --nproc-per-node 2 "),
    (r"^torchrun (--nnodes 2 )?--nproc-per-node \d+ (--rdzv\S+ \S+ )*", "torchrun --nproc-per-node 2 "),
    (r"^sbatch scripts/slurm/pretrain.sbatch ", "bash -n scripts/slurm/pretrain.sbatch && python pretrain/train.py "),
    (r"^scripts/rehearse.sh .*", "bash -n scripts/rehearse.sh"),  # tests/slurm rehearses
    (r"^mpirun -np 16 .* bash -c '(.*)'$", rf"export {MPI}; \1"),
    (r"^sbatch (\S+/acceptance.sbatch) (.*)", r"bash -n \1 && python pretrain/train.py \2 --dry_run"),
    (r"^(scripts/)?(\w+\.py )", r"python scripts/\2"),
    (r"^\.venv/bin/", ""),
    (r"^pre-commit ", "python -m pre_commit "),
    # what takes minutes, and is run by .ci/run or on a GPU: that it exists
    (r"^make (.*)", r"make --dry-run MAKE=true \1"),
    (r"^\.ci/run$", "bash -n .ci/run"),
    (r"^pytest (.*)", r"pytest --collect-only --quiet \1"),
    (r"(-m gpu) -n 6$", r"\1 tests/test_gpu.py"),  # to import every test takes half a minute
    (r"^python -m venv$", "python -m venv --without-pip out/venv"),
    # the names of what is given
    (r"--source hf://\S+ --config_name \S+", "--source my_texts"),
    (r"step-00005000", "step-00000002"),
    (r"\bRUN\b", "out/tinyllama_1.1b"),
    (r"\bDIR\b", "data/slimpajama"),
    (r"--tokenizer FILE", "--tokenizer tokenizer.model"),
    (r"\bTEXTS\b", "my_texts"),
    (r"--benchmark FILE", "--config configs/pretrain/tinyllama_1.1b.yaml --gpus 8 --gpu h200 --benchmark steps.jsonl"),
    # sizes
    (r"(pretrain/train\.py [^;]*)", rf"\1 {SMALL}"),
    (r"(scripts/train_tokenizer\.py .*)", r"\1 --vocab_size 400"),  # there is one, which is left as it is
    (r"(scripts/generate\.py .*)", r"\1 --max_new_tokens 2"),
    (r"(scripts/benchmark_checkpoint\.py)", r"\1 --model quickstart --rounds 1"),
    (r"(scripts/benchmark_data\.py .*)--megabytes 58", r"\1--megabytes 1 --rounds 1"),
    # the number of GPUs in one command, the optimizers in another; on a CPU, bf16 takes ten times as long
    (r"(scripts/benchmark_step\.py) (--gpus 4 .*|--run ours --run ours:train\S+)", r"\1 --gpus 1,2"),
    (r"(scripts/benchmark_step\.py.*?) --steps \d", r"\1"),
    (r" --run ours (--run ours:optim.name=muon) .*", r" \1,train.precision=fp32"),
    (r"(scripts/benchmark_step\.py)(?!.*fp32)", r"\1 --run ours:train.precision=fp32"),
    (r"(scripts/benchmark_step\.py)", r"\1 --model quickstart --tokens 1024 --micro_batch_size 2 --steps 1"),
    (r" 2e-3 4e-3| out/sweep/(18|72)M_[24]e-3", ""),
    # what needs a GPU, or packages that are not ours
    (r" --peers litgpt,hf| --budget", ""),
    (r"(scripts/benchmark_ops\.py)", r"\1 --operation rms_norm --micro_batch_size 1 || [ $? = 2 ]"),
    (r"--tasks commonsense", "--perplexity data/slimpajama_validation"),
    (r"scripts/doctor\.py.*", "scripts/doctor.py --out_dir out || [ $? = 1 ]"),  # it may find something
]
RUN = re.compile(
    r"(python|torchrun|export MASTER_ADDR=.* exec python|bash -n|make --dry-run|pytest --collect-only|grep|tail"
    r"|mkdir|mv) .*"
    r"|for \w+ in .*; do python .*; done"
)
OF_LAUNCHERS = (
    *("--ntasks-per-node", "--cpus-per-task", "--account", "--partition", "--time", "--mail-type=FAIL,REQUEUE"),
    *("--rdzv-endpoint", "--include", "--revision"),
)
"""flags in the guides that are none of our scripts'"""
# what need not import torch anew: they ask the Hub for nothing, which HF_HUB_OFFLINE would have to forbid
WARM = ("pretrain/train.py", "scripts/report.py", "scripts/compare_runs.py")
# what is not run, and why
NOT_RUN = {
    r"pip install( .*)?": "from the network; .ci/run installs the package and its extras",
    r"apt install .*": "changes the machine",
    r"hf (download .*|auth login)": "a terabyte from the network, behind an account",
    r"apptainer exec --nv IMAGE": "needs an image",
    r"wandb sync": "sends to an account",
    r"scancel .*": "needs a job; tests/slurm signals one",
    r"vllm serve .*": "needs vLLM and a GPU",
}
MESSAGES = {"nothing is wrong"}  # between backticks, as a command is


def spans(guide: str) -> list[str]:
    """What stands between single backticks, in one line each; but a first cell of a table is what somebody sees."""
    text = re.sub(r"```.*?```|^\| `[^`]+` \|", "", (ROOT / guide).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def one_line(loop: re.Match[str]) -> str:
    """A loop of the shell, with a command a line, as one."""
    first, *others = loop[0].splitlines()
    return f"{first} {'; '.join(others)}"


def commands(guide: str) -> list[str]:
    """The commands in the guide's blocks, one a line or a loop, without their comments, then those in its text.

    In the text, two words or more are one, unless they are flags, a setting with its value, or a message.
    """
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", (ROOT / guide).read_text(), re.DOTALL)
    whole = [re.sub(r"^for .*?^done$", one_line, block.replace("\\\n", " "), flags=re.S | re.M) for block in blocks]
    lines = [line for block in whole for line in block.splitlines()]
    plain = [" ".join(re.sub(r"(^|\s)# .*|\s{2,}#.*", "", line).split()) for line in lines]
    named = [span for span in spans(guide) if re.match(r"[^-\s]\S*[^:\s] ", span) and span not in MESSAGES]
    return [line for line in plain if line] + named


def small(command: str) -> str | None:
    """What is run in place of ``command``; None: it is not run."""
    if any(re.fullmatch(pattern, command) for pattern in NOT_RUN):
        return None
    for pattern, instead in INSTEAD:
        command = re.sub(pattern, instead, command)
    return command


@pytest.fixture
def env() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return dict(os.environ, PATH=path, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TERM="dumb")


@pytest.fixture
def workspace(tmp_path: Path, tokenizer_file: Path) -> Path:
    """A folder that looks like the repository of somebody who has a little raw data."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    links = ("pretrain", "scripts", "configs", "tinyllama", "tests", "Makefile", "pyproject.toml", ".ci")
    for name in (*links, ".pre-commit-config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.model")
    rng = np.random.default_rng(0)
    words = ["the", "little", "llama", "walked", "along", "a", "river", "and", "others", "followed", "to", "town"]
    texts = [" ".join(rng.choice(words, 60)) for _ in range(40)]
    records = [{"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in texts]
    mirror, sorted_mirror = (tmp_path / "raw" / name for name in ("SlimPajama-627B", "SlimPajama-627B-DC"))
    (mirror / "data").mkdir(parents=True)
    for number in range(2):
        pq.write_table(pa.Table.from_pylist(records), mirror / "data" / f"train-{number:05d}-of-00250.parquet")
    folder = sorted_mirror / "validation" / "RedPajamaC4"
    folder.mkdir(parents=True)
    (folder / "chunk_0.jsonl.zst").write_bytes(zstandard.compress("\n".join(map(json.dumps, records * 2)).encode()))
    crawl = tmp_path / "raw" / "fineweb-edu" / "data" / "CC-MAIN-2024-10"
    crawl.mkdir(parents=True)
    for number in range(2):
        pq.write_table(pa.table({"text": texts * 5}), crawl / f"train-{number:05d}-of-00014.parquet")
    python = tmp_path / "raw" / "starcoderdata" / "python"
    python.mkdir(parents=True)
    pq.write_table(pa.table({"content": texts, "max_stars_count": [1] * 40}), python / "train-0.parquet")
    (tmp_path / "my_texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "my_texts" / f"{number}.txt").write_text(text)
    (tmp_path / "slurm-tinyllama-1.out").write_text("step 4/4  val_loss 5.0\n")
    measured = {"run": "ours", "model": "tinyllama_1.1b", "gpus": 1, "tokens_per_second": 61000, "precision": "bf16"}
    (tmp_path / "steps.jsonl").write_text(json.dumps(measured) + "\n")
    (tmp_path / "bin").mkdir()
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).symlink_to(Path(sys.executable).parent / name)
    return tmp_path


def run_warm(*words: object, env: dict[str, str], cwd: Path) -> tuple[int, str]:
    """Run a script with its flags in a process that need not import torch; return its exit code and what it printed."""
    process = Process(sys.executable, *words, warm=0, env=env, cwd=cwd)
    process.close()
    status, said, errors = process.end()
    return status, said + errors


def run(line: str, workspace: Path, env: dict[str, str]) -> tuple[int, str]:
    """Run a command as a shell would."""
    python, *words = shlex.split(line)
    if python == "python" and words[0] in WARM and not re.search(r"[|;&$<>*]", line):
        return run_warm(*words, env=env, cwd=workspace)
    ran = subprocess.run(["bash", "-c", line], cwd=workspace, env=env, capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


@pytest.mark.slow
def test_every_command_runs(workspace: Path, env: dict[str, str]) -> None:
    done: set[str] = set()
    for guide in GUIDES:
        for command in commands(guide):
            line = small(command)
            if line is None or line in done:
                continue
            status, said = run(line, workspace, env)
            assert status == 0, f"{guide}: {command}\nas: {line}\n{said}"
            done.add(line)
    assert len(done) > 50
    assert (workspace / "out" / "tinyllama_1.1b" / "report.html").exists()
    assert (workspace / "hf" / "model.safetensors").exists()


@pytest.mark.slow
def test_every_script_explains_the_flags_that_the_guides_name(env: dict[str, str]) -> None:
    scripts = [ROOT / "pretrain" / "train.py", *sorted((ROOT / "scripts").glob("*.py"))]
    helps = ""
    for path in scripts:
        status, said = run_warm(path, "--help", env=env, cwd=ROOT)
        assert status == 0, said
        helps += said
    for guide in [guide for guide in GUIDES if guide != "CHANGELOG.md"]:  # which names flags of the past
        for flag in [span.split()[0] for span in spans(guide) if span.startswith("--")]:
            assert re.search(rf"{re.escape(flag)}\b", helps) or flag in OF_LAUNCHERS, f"{guide}: {flag}"


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_is_one_that_is_run_or_says_why_not(guide: str) -> None:
    assert set(re.findall(r"^```(.*)$", (ROOT / guide).read_text(), re.MULTILINE)) <= {"bash", ""}
    for command in commands(guide):
        line = small(command)
        assert line is None or RUN.fullmatch(line), f"{command}: give INSTEAD or NOT_RUN of {__name__} a line for it"
        for path in re.findall(r"(?:pretrain|scripts|tests)/\S+\.(?:py|sbatch|sh)", line or ""):
            assert (ROOT / path).exists(), command


def test_what_is_not_run_stands_in_a_guide() -> None:
    said = [
        *(span for guide in GUIDES for span in spans(guide)),
        *(line for guide in GUIDES for line in commands(guide)),
    ]
    for pattern in [*NOT_RUN, *MESSAGES]:
        assert any(re.fullmatch(pattern, line) for line in said), pattern


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
    folders = [packed_folder([[list(range(3, 250)) * 40]], name) for name in ("one", "two")]
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
        flags += [
            "--data.sources",
            json.dumps([s | {"path": str(data)} for s, data in zip(sources, folders, strict=False)]),
        ]
        flags += ["--data.validation", json.dumps([{"path": str(folders[0])}])]
        lines.append(json.dumps(["train", flags]))
    command = [sys.executable, ROOT / "tests" / "helpers" / "rank.py"]
    rank = Process(*command, warm=0, env=env, cwd=ROOT)
    for line in lines:
        rank.tell(line)
    rank.close()
    _, said, errors = rank.end()
    answers = [json.loads(line) for line in said.splitlines()]
    assert [answer.get("result") for answer in answers] == [0] * len(RECIPES), (answers, errors)
    for path, answer in zip(RECIPES, answers, strict=True):
        assert "length   4 steps, 32 samples" in answer["said"], path
        assert not (tmp_path / path.stem).exists()
