import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from pyarrow import parquet

from tinyllama.prepare.inputs import Fields
from tinyllama.prepare.readers import DocumentReader

ROOT = Path(__file__).parents[2]
NOT_TAKEN = ["idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"]
TRAIN = [f"chunk{chunk}/example_train_{shard}.jsonl.zst" for chunk in (1, 2) for shard in (0, 1)]


def run(library: Path, output: Path) -> subprocess.CompletedProcess:
    call = [sys.executable, "scripts/quickstart_corpus.py", "--output", str(output), "--library", str(library)]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def module(number: int) -> str:
    words = " ".join(f"word{number}x{i}" for i in range(30))
    return f'"""Module.\n\n{words}"""\n\n\nclass A:\n    def f(self):\n        """Method{number}."""\n'


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """80 modules with docstrings, and what is no module of its own: a copy, tests, a template, an empty file."""
    folder = tmp_path_factory.mktemp("library") / "test"  # whatever the library itself is called
    for number in range(80):
        path = folder / f"package{number % 3}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module(number))
    (folder / "zcopy.py").write_text(module(7))
    for number, name in enumerate(NOT_TAKEN, start=1000):
        (folder / "package0" / name).mkdir()
        (folder / "package0" / name / "module.py").write_text(module(number))
    (folder / "template.py").write_text("def %s(): pass\n")
    (folder / "package0" / "__init__.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def corpus(library, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("corpus")
    done = run(library, output)
    assert done.returncode == 0, done.stderr
    return output


def rows(corpus: Path, *names: str) -> list[tuple[str, str]]:
    lines = [line for name in names for line in zstandard.open(corpus / "slimpajama" / name, "rt")]
    return [(row["meta"]["redpajama_set_name"], row["text"]) for row in map(json.loads, lines)]


def sides(corpus: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]], list[str], list[str]]:
    """Prose and code, each of training and of validation."""
    prose = rows(corpus, *(f"train/{name}" for name in TRAIN))
    held_prose = rows(corpus, "validation/chunk1/example_holdout_0.jsonl.zst")
    names = [f"starcoder/python/train-0000{i}-of-00002.parquet" for i in (0, 1)]
    code = [text for name in names for text in parquet.read_table(corpus / name)["content"].to_pylist()]
    held = parquet.read_table(corpus / "starcoder_validation/python/train-00000-of-00001.parquet")["content"]
    return prose, held_prose, code, held.to_pylist()


def numbers(texts: list[str]) -> set[int]:
    """The modules from which something is in ``texts``."""
    return {int(number) for text in texts for number in re.findall(r"word(\d+)x0\b", text)}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_code_is_each_module_once_without_tests(corpus):
    *_, code, held = sides(corpus)
    expected = [module(number) for number in range(80)] + ["def %s(): pass\n"]
    assert sorted(code + held) == sorted(expected)


def test_prose_is_pydoc_topics_and_docstrings(corpus):
    from pydoc_data.topics import topics

    prose, held_prose, *_ = sides(corpus)
    texts = {name: sorted(text for n, text in prose + held_prose if n == name) for name in dict(prose)}
    words = [" ".join(f"word{number}x{i}" for i in range(30)) for number in range(80)]
    assert texts["RedPajamaBook"] == sorted(topics.values())
    assert texts["RedPajamaC4"] == sorted(f"Module.\n\n{words[n]}\n\nMethod{n}." for n in range(80))
    assert set(texts) == {"RedPajamaBook", "RedPajamaC4", "RedPajamaGithub"}


def test_nothing_of_a_held_out_module_is_in_training(corpus):
    prose, held_prose, code, held = sides(corpus)
    held_numbers = numbers(held)
    assert 1 <= len(held_numbers) <= 15
    assert numbers([text for _, text in held_prose]) == held_numbers
    assert numbers(code) == numbers([text for _, text in prose]) == set(range(80)) - held_numbers
    assert not {text for _, text in prose} & {text for _, text in held_prose}


def is_held_out(text: str) -> bool:
    return hashlib.blake2b(text.encode()).digest()[0] % 16 == 0


def test_one_text_in_sixteen_is_held_out_by_its_hash(corpus):
    from pydoc_data.topics import topics

    _, held_prose, _, held = sides(corpus)
    assert sorted(held) == sorted(text for text in {*map(module, range(80)), "def %s(): pass\n"} if is_held_out(text))
    books = sorted(text for name, text in held_prose if name == "RedPajamaBook")
    assert books == sorted(filter(is_held_out, topics.values()))


def test_texts_are_dealt_out_in_order(library, corpus):
    from pydoc_data.topics import topics

    paths = [path for path in sorted(library.rglob("*.py")) if not {*NOT_TAKEN} & {*path.relative_to(library).parts}]
    texts = dict.fromkeys(path.read_text() for path in paths if path.read_text())
    code = [text for text in texts if not is_held_out(text)]
    prose = [("RedPajamaBook", text) for _, text in sorted(topics.items()) if not is_held_out(text)]
    prose += [("RedPajamaC4", docstrings(text)) for text in code if "word" in text]
    prose += [("RedPajamaGithub", text) for text in code[:20]]
    for number, name in enumerate(TRAIN):
        assert rows(corpus, f"train/{name}") == prose[number::4]
    for number in (0, 1):
        table = parquet.read_table(corpus / f"starcoder/python/train-0000{number}-of-00002.parquet")
        assert table.to_pydict() == {"content": code[number::2]}


def docstrings(text: str) -> str:
    return "\n\n".join(part.strip() for part in re.findall('"""(.*?)"""', text, re.DOTALL))


def test_what_is_prose_of_a_module(tmp_path, script):
    long, short = "x" * 201, "y" * 200
    texts = {
        "long.py": f'"""{long}"""\n',
        "short.py": f'"""{short}"""\n',
        "parts.py": f'def f():\n    """{short}"""\n\nasync def g():\n    """"""\n    class A:\n        """B."""\n',
        "broken.py": f'"""{long}broken"""\ndef (:\n',
        "bytes.py": b"# \xff\na = 1\n",
        "blank.py": "\n \n",
    }
    (tmp_path / "in").mkdir()
    for name, text in texts.items():
        (tmp_path / "in" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    status, said, _ = script("quickstart_corpus", "--output", tmp_path / "out", "--library", tmp_path / "in")
    assert status == 0
    prose, held_prose, code, held = sides(tmp_path / "out")
    found = {text for name, text in prose + held_prose if name == "RedPajamaC4"}
    assert found == {long, f"{short}\n\nB."}
    whole = {text for name, text in texts.items() if name not in ("bytes.py", "blank.py")} | {"# \na = 1\n"}
    assert (set(code + held), len(code + held)) == (whole, 5)
    out = tmp_path / "out"
    counts = dict(line.rsplit(": ", 1) for line in said.splitlines())
    assert len(counts) == 8
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        path = out / "starcoder" / "python" / f"{name}.parquet"
        assert counts[str(path)] == f"{parquet.read_metadata(path).num_rows} documents"
    assert counts[f"{out}/starcoder_validation/python/train-00000-of-00001.parquet"] == f"{len(held)} documents"
    assert counts[f"{out}/slimpajama/train/{TRAIN[0]}"] == f"{len(rows(out, f'train/{TRAIN[0]}'))} documents"


def test_modules_that_cannot_be_read_or_parsed_have_no_docstrings(tmp_path, script):
    library, out = tmp_path / "in", tmp_path / "out"
    library.mkdir()
    doc = "x" * 201
    texts = [f'"""{doc}"""\n', f'"""{doc}deep"""\n' + "a" + "()" * 3000, f'"""{doc}sum"""\n' + "-" * 50000 + "1"]
    texts += [f'"""{doc}nul"""\n\0']
    texts += [f"a = {number}\n" for number in range(60)]  # of which some are held out
    for number, text in enumerate(texts):
        (library / f"{number}.py").write_text(text)
    (library / "link.py").symlink_to("nowhere.py")
    (library / "folder.py").mkdir()
    code, _, err = script("quickstart_corpus", "--output", out, "--library", library)
    assert (code, err) == (0, "")
    prose, held_prose, modules, held_modules = sides(out)
    assert [text for name, text in prose + held_prose if name == "RedPajamaC4"] == [doc]
    assert sorted(modules + held_modules) == sorted(texts)


def test_a_mark_that_is_not_text_is_that_of_another_corpus(tmp_path, script):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_text("a = 1\n")
    (tmp_path / "corpus.json").write_bytes(b"\xff")
    code, said, _ = script("quickstart_corpus", "--output", tmp_path, "--library", tmp_path / "in")
    assert (code, len(said.splitlines())) == (0, 8)
    assert json.loads((tmp_path / "corpus.json").read_bytes())["library"] == str(tmp_path / "in")


def test_another_python_or_library_makes_another_corpus(tmp_path, script):
    library, out = tmp_path / "in", tmp_path / "out"
    for folder in (library, out):
        folder.mkdir()
    (library / "a.py").write_text("a = 1\n")
    made_from = {"python": platform.python_version(), "library": str(library)}
    mark, arguments = out / "corpus.json", ("quickstart_corpus", "--output", out, "--library", library)
    mark.write_text(json.dumps(made_from))
    assert script(*arguments) == (0, f"{out} is whole\n", "")
    for other in ({"python": "3.0"}, {"library": "elsewhere"}):
        mark.write_text(json.dumps(made_from | other))
        code, said, _ = script(*arguments)
        assert (code, len(said.splitlines())) == (0, 8)
        assert json.loads(mark.read_bytes()) == made_from


def test_the_github_subset_is_there_to_be_left_out(corpus):
    path = corpus / "slimpajama" / "train" / TRAIN[0]
    reader = DocumentReader(path, Fields(subsets=True, leave_out=("RedPajamaGithub",)))
    read = list(reader)
    shard = rows(corpus, f"train/{TRAIN[0]}")
    assert reader.dropped == {"RedPajamaGithub": sum(name == "RedPajamaGithub" for name, _ in shard)}
    assert reader.dropped["RedPajamaGithub"] > 0
    assert read == [text for name, text in shard if name != "RedPajamaGithub"]


def test_the_same_bytes_again(library, corpus, tmp_path):
    assert run(library, tmp_path).returncode == 0
    assert files(tmp_path) == files(corpus)


def test_a_finished_corpus_is_left_alone_and_an_unfinished_one_finished(library, tmp_path):
    run(library, tmp_path)
    whole = files(tmp_path)
    shard = tmp_path / "slimpajama" / "train" / TRAIN[0]
    shard.write_bytes(b"")
    assert run(library, tmp_path).stdout == f"{tmp_path} is whole\n"
    assert shard.read_bytes() == b""
    (tmp_path / "corpus.json").write_text("{")
    assert run(library, tmp_path).returncode == 0
    assert files(tmp_path) == whole


def test_a_corpus_that_is_being_replaced_is_not_whole(library, tmp_path):
    run(library, tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps({"python": "3.0", "library": str(library)}))
    shard = tmp_path / "starcoder/python/train-00001-of-00002.parquet"
    shard.unlink()
    shard.mkdir()  # stops the run half-way
    done = run(library, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: cannot write {shard} (")
    assert not (tmp_path / "corpus.json").exists()


def test_an_output_that_is_a_file_is_an_error(library, tmp_path):
    (tmp_path / "file").touch()
    done = run(library, tmp_path / "file")
    assert (done.returncode, done.stderr) == (2, f"error: --output {tmp_path / 'file'} is a file: give a folder\n")


@pytest.mark.parametrize("output", ["/proc/x", "x" * 300])
def test_an_output_that_cannot_be_written_is_an_error(library, output):
    done = run(library, Path(output))
    assert done.returncode == 2
    assert re.fullmatch(rf"error: cannot write {output}.* \(.*\): make room or give another --output\n", done.stderr)


def test_a_folder_without_sources_is_an_error(tmp_path):
    done = run(tmp_path / "nowhere", tmp_path / "corpus")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*nowhere: no Python sources in it: give --library .*\n", done.stderr)
    assert not (tmp_path / "corpus").exists()
