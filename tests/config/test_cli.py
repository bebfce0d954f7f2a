import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from tinyllama import InputError, stdio
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs, Source, TrainArgs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def yaml_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        """
        data: {sources: [{path: a, weight: 0.25}, {path: b, weight: 0.75}]}
        optim: {lr: 4e-4, warmup_steps: 7}
        train: {max_steps: 10}
        parallel: {shard: 2}
        """
    )
    return str(path)


def parse(*argv: str) -> PretrainArgs:
    return cli.parse(PretrainArgs, argv)


def problems(*argv: str) -> tuple[str, ...]:
    with pytest.raises(InputError) as caught:
        parse(*argv)
    return caught.value.args


def test_flags_win_over_yaml_and_yaml_over_defaults(yaml_file: str) -> None:
    args = parse("--config", yaml_file, "--optim.warmup_steps", "3", "--parallel.shard=node")
    assert args.optim.lr == 4e-4
    assert args.optim.warmup_steps == 3
    assert args.optim.beta2 == 0.95
    assert args.parallel.shard == "node"
    assert parse("--config", yaml_file).parallel.shard == 2
    assert parse("--config", yaml_file).data.sources == [Source("a", 0.25), Source("b", 0.75)]


@pytest.mark.parametrize("flag", [["--data.sources", "{}"], ["--data.sources={}"]])
@pytest.mark.parametrize("paths", [["x"], ["x", "y"], ["x", "y", "z"]])
def test_a_list_given_as_a_flag_replaces_the_whole_list(yaml_file: str, flag: list[str], paths: list[str]) -> None:
    # two items are as many as the YAML has: none keeps the weight of the old one
    value = "[" + ", ".join(f'{{"path": "{path}"}}' for path in paths) + "]"
    args = parse("--config", yaml_file, *(word.replace("{}", value) for word in flag))
    assert args.data.sources == [Source(path, 1.0) for path in paths]


def test_an_error_names_the_script_that_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    for script in ("pretrain/one.py", "pretrain/other.py"):
        monkeypatch.setattr("sys.argv", [script])
        assert problems("--optim.lr")[0].endswith(f"; {Path(script).name} --help lists the flags")


def test_unknown_keys_and_flags_are_answered_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {n_layers: 3}\ndata: {sources: [{pth: a}]}\nlr: 3\nzzzzzz: 1\ntrain: 3\n")
    assert problems("--config", str(path), "--train.max_step", "3") == (
        "unknown flag --train.max_step; did you mean train.max_steps?",
        f"{path}: unknown key model.n_layers; did you mean model.n_layer?",
        f"{path}: unknown key data.sources.pth; did you mean data.sources.path?",
        f"{path}: unknown key lr; did you mean optim.lr?",
        f"{path}: unknown key zzzzzz; --help lists the keys",
        f"{path}: train is not a group of keys but '3'; --help lists the keys",
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ops.attention: sdpa", "ops.attention is not nested: write {ops: {attention: ...}}, on two lines if you like"),
        ("data: {sources: null}", "data.sources cannot be 'null': expected [{path: ...}, ...]"),
        ("data: {sources: [{path: a, weight: null}]}", "data.sources.weight cannot be 'null': expected float"),
        ("optim: {lr: }", "optim.lr cannot be '': expected float"),
        ("data: {sources: [3]}", "data.sources cannot be ['3']: expected [{path: ...}, ...]"),
        (
            "data: {validation: [{path: a}, b]}",
            "data.validation cannot be [{'path': 'a'}, 'b']: expected [{path: ...}, ...]",
        ),
        ("log: {profile: 3}", "log.profile cannot be '3': expected [int, ...]"),
        ("data: {sources: [{weight: 1}]}", "data.sources.path is missing"),
    ],
)
def test_yaml_of_another_shape_is_told(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert problems("--config", str(path)) == (f"{path}: {problem}",)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {max_steps: 3}\ndata: {}\ntrain: {max_steps: 2}", "the key train is given twice"),
        ("optim: {lr: 1, lr: 2}", "the key lr is given twice"),
        ("[" * 3000, "maximum recursion depth exceeded"),
        ("model: &a {n_layer: 3}\ntrain: *a", "*a is an alias: write its value out"),
        ("optim: &a {lr: 3, <<: *a}", "*a is an alias: write its value out"),
    ],
)
def test_yaml_that_is_none_is_told(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    (said,) = problems("--config", str(path))
    assert said.startswith(f"{path} is not YAML: {problem}")


def test_no_arguments_are_all_defaults() -> None:
    assert parse() == PretrainArgs()


def test_a_switch_alone_is_true_and_one_with_a_value_is_that(yaml_file: str) -> None:
    assert parse("--dry_run").dry_run is True
    assert parse("--dry_run", "--optim.lr", "3").dry_run is True
    assert parse("--dry_run", "false", "--optim.lr", "3").dry_run is False
    assert parse("--dry_run=true", "--dry_run=false").dry_run is False
    assert parse("--data.document_mask", "--dry_run", "true").data.document_mask is True
    # the later one wins, be it a flag or a file
    assert parse("--optim.lr", "3", "--config", yaml_file).optim.lr == 4e-4
    assert parse(f"--config={yaml_file}", "--optim.lr=3", "--optim.lr", "2").optim.lr == 2


def test_flags_that_are_unknown(tmp_path: Path) -> None:
    assert problems("--optim.lrr=3", "--beta1", "3", "--qqqq") == (
        "unknown flag --optim.lrr; did you mean optim.lr?",
        "unknown flag --beta1; did you mean optim.beta1?",
        "unknown flag --qqqq; --help lists the keys",
    )
    assert problems("--optim", "{lr: 3}") == (
        "unknown flag --optim; it is a group: give its settings one by one, as in --optim.name",
    )
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert problems(f"--config={path}") == (
        f"cannot read the config {path}: it is not text; give --config a YAML file",
    )
    path.write_text("3")
    assert problems("--config", str(path)) == (f"{path}: it is not a group of keys but '3'; --help lists the keys",)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.precision", "fp16", "bf16 | fp32 | float8"),
        ("optim.lr", "fast", "float"),
        ("train.max_steps", "1.5", "int | null"),
        ("parallel.shard", "all", "full | node | none | int"),
        ("dry_run", "2", "bool"),
    ],
)
def test_values_that_are_none_of_the_choices(key: str, value: str, expected: str) -> None:
    assert problems(f"--{key}", value) == (f"{key} cannot be '{value}': expected {expected}",)


def test_a_value_is_what_its_setting_makes_of_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{out_dir: 2024-01-01, log: {wandb_project: 007, wandb_entity: ~}, dry_run: TRUE}")
    args = parse("--config", str(path), "--train.max_steps", "1_000", "--optim.lr", "4e-4")
    assert (args.out_dir, args.log.wandb_project, args.log.wandb_entity) == ("2024-01-01", "007", None)
    assert (args.dry_run, args.train.max_steps, args.optim.lr) == (True, 1000, 4e-4)
    assert parse("--train.max_time", "null", "--out_dir", "null") == PretrainArgs(out_dir="null")


def test_text_that_names_no_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(r'{out_dir: "r\0", data: {sources: [{path: "d\uD800"}]}, train: {init_from: "\uDFFF"}}')
    what = "it has a NUL or half of a surrogate pair"
    assert problems("--config", str(path), "--data.validation", r'[{path: "a\0b"}]') == (
        f"{path}: out_dir cannot be 'r\\x00': {what}",
        f"{path}: data.sources.path cannot be 'd\\ud800': {what}",
        f"{path}: train.init_from cannot be '\\udfff': {what}",
        f"data.validation.path cannot be 'a\\x00b': {what}",
    )
    assert parse("--out_dir", "d\udcff").out_dir == "d\udcff"  # the byte 0xff of a name that is not UTF-8


def test_a_key_without_a_value_is_null(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {init_from: , max_steps: }\nlog:\n  on_event:\neval:\n  tokenizer: # none yet\n")
    assert parse("--train.max_steps", "3", "--config", str(path)) == PretrainArgs()
    path.write_text("eval:\n  # samples: [a]\ntrain: {max_steps: 3}\n")
    assert parse("--config", str(path)) == PretrainArgs(train=TrainArgs(max_steps=3))
    path.write_text("out_dir:\ntrain: {precision: , seed: ''}\ndata: {sources: }\n")
    assert problems("--config", str(path)) == (
        f"{path}: out_dir cannot be '': expected str",
        f"{path}: train.precision cannot be '': expected bf16 | fp32 | float8",
        f"{path}: train.seed cannot be '': expected int",
        f"{path}: data.sources cannot be '': expected [{{path: ...}}, ...]",
    )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Flags of a script."""

    width: int = 3
    share: float | None = None
    deep: bool = False


def test_a_scripts_own_flags() -> None:
    parser = cli.arguments("A script.")
    parser.add_argument("--number", type=int, default=7)
    cli.add_fields(parser, Sizes, "size.")
    assert vars(parser.parse_args([])) == {"number": 7}

    def given(*words: str) -> Sizes:
        return cli.given(parser.parse_args(words), Sizes(), "size.")

    assert given() == Sizes()
    assert given("--size.share", "0.5", "--size.deep", "TRUE", "--number", "8") == Sizes(share=0.5, deep=True)
    assert given("--size.deep", "--size.deep", "false") == Sizes(deep=False)
    for words, problem in (
        (["--size.deep", "1"], "size.deep cannot be '1': expected bool"),
        (["--numb", "8"], "unrecognized arguments: --numb 8; "),  # no abbreviations
        (["--number", "x"], "argument --number: invalid int value: 'x'; "),
        (["--size.width", "x"], "size.width cannot be 'x': expected int"),
    ):
        with pytest.raises(InputError) as caught:
            given(*words)
        (said,) = caught.value.args
        assert said.startswith(problem)
        assert said.startswith("size.") or said.endswith("--help lists the flags")


@pytest.mark.parametrize("name", cli.UNUSABLE)
def test_a_path_that_cannot_be_used_is_the_users_to_mend(name: int, capsys: pytest.CaptureFixture[str]) -> None:
    for given, path in ([["some/path"], "some/path"], [[], "a file that was being written"]):
        error = OSError(name, os.strerror(name), *given)

        def fail(error: OSError = error) -> None:
            raise error

        with pytest.raises(SystemExit) as end:
            cli.run(fail)
        assert end.value.code == 2
        said = f"error: cannot use {path} ({os.strerror(name)}): fix it or choose another path\n"
        assert capsys.readouterr().err == said


def test_which_errors_of_a_path_are_the_users() -> None:
    names = "EACCES EPERM EROFS ENOSPC EDQUOT ENAMETOOLONG ELOOP ENOTDIR EISDIR EEXIST"
    assert {getattr(errno, name) for name in names.split()} == cli.UNUSABLE

    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error", "disk")

    with pytest.raises(OSError, match="Input/output error"):
        cli.run(fail)


def test_wrong_types_name_the_key(tmp_path: Path) -> None:
    assert problems("--model.n_layer", "x") == ("model.n_layer cannot be 'x': expected int | null",)
    path = tmp_path / "run.yaml"
    path.write_text("data: {sources: 3}")
    assert problems("--config", str(path)) == (f"{path}: data.sources cannot be '3': expected [{{path: ...}}, ...]",)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert problems("--config", str(missing)) == (
        f"cannot read the config {missing}: No such file or directory; give --config a YAML file",
    )
    missing.write_text("a: [")
    assert problems("--config", str(missing))[0].startswith(f"{missing} is not YAML: ")


def test_a_config_may_be_a_pipe_and_one_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"optim: {lr: 0.5}")
    os.close(writing)
    try:
        assert cli.parse(PretrainArgs, ["--config", f"/dev/fd/{reading}"]).optim.lr == 0.5  # a shell's <(...)
    finally:
        os.close(reading)
    os.mkfifo(pipe := tmp_path / "pipe")
    assert problems("--config", str(pipe)) == (f"{pipe}: it is not a group of keys but None; --help lists the keys",)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    (problem,) = problems("--config", str(tmp_path / "socket"))
    hint = "No such device or address; give --config a YAML file"
    assert problem == f"cannot read the config {tmp_path / 'socket'}: {hint}"
    hint = "has more than 1,000,000 characters: give the file that is meant"
    assert problems("--config", "/dev/zero") == (f"/dev/zero {hint}",)  # it has no end
    (large := tmp_path / "large.yaml").write_text("optim: {lr: 0.5}" + " " * 10**6)
    assert problems("--config", str(large)) == (f"{large} {hint}",)  # not cut


def test_every_field_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for group in fields(PretrainArgs):
        assert f"--{group.name}" in text
    # the string under the field, and its default
    assert "--optim.warmup_steps WARMUP_STEPS steps of linear warm-up (type: int, default: 2000)" in text


def test_print_config_can_be_read_back(tmp_path: Path, yaml_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("--config", yaml_file, "--print_config")
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse("--config", str(path)) == parse("--config", yaml_file)
    path.write_text(cli.dump(asdict(parse("--config", yaml_file))))
    assert parse("--config", str(path)) == parse("--config", yaml_file)


@pytest.mark.parametrize(
    ("body", "status", "stderr"),
    [
        ("return 75", 75, ""),
        ("return None", 0, ""),
        (
            "open('/proc/version/x')",
            2,
            "error: cannot use /proc/version/x (Not a directory): fix it or choose another path\n",
        ),
        ("raise InputError('a is wrong: mend it', 'b too')", 2, "error: a is wrong: mend it\nerror: b too\n"),
    ],
)
def test_exit_status(body: str, status: int, stderr: str) -> None:
    code = f"from tinyllama import InputError\nfrom tinyllama.config import cli\ndef main():\n    {body}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (status, stderr)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_no_defect_and_no_file_takes_their_number(closed: str, tmp_path: Path) -> None:
    body = "sys.stderr.isatty(); print(1, file=sys.stderr); print(1); open('file').fileno() > 2 or 1 / 0"
    (tmp_path / "file").touch()
    code = f"import sys\nfrom tinyllama.config import cli\ndef main():\n    {body}\n    return 75\ncli.run(main)"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 75


def test_defects_keep_their_traceback() -> None:
    code = "from tinyllama.config import cli\ncli.run(lambda: 1 / 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("words", [1, 100_000])
def test_output_that_nobody_reads_is_no_defect(words: int) -> None:
    code = f"from tinyllama.config import cli; cli.run(lambda: print('word ' * {words}))"
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" | true; echo ${PIPESTATUS[0]}', sys.executable, code],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("141\n", "")


@pytest.mark.parametrize(("encoding", "seen"), [("latin-1", b"\xe9 \\u6f22\n"), ("utf-8", "é 漢\n".encode())])
def test_a_letter_that_stdout_cannot_show_is_printed_as_its_number(encoding: str, seen: bytes) -> None:
    code = "from tinyllama.config import cli; cli.run(lambda: print('\\xe9 \\u6f22'))"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, seen, b"")


IN_A_FILE = """
import os, signal, sys
from pathlib import Path
from tinyllama import atomic
from tinyllama.config import cli
def main():
    with atomic.replacing(Path("weights")) as partial:
        partial.write_text("new")
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
cli.run(main)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_removes_what_is_half_written_and_leaves_what_was_there(name: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("old")
    how: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "text": True}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    done = subprocess.run([sys.executable, "-c", IN_A_FILE, name], capture_output=True, **how)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"ended by {name}\n")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("weights", "old")]


def test_nohup_and_what_leaves_the_signals_alone_have_their_way(tmp_path: Path) -> None:
    how: dict[str, Any] = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    nohup = ["sh", "-c", 'trap "" HUP && exec "$@"', "sh", sys.executable, "-c", IN_A_FILE, "SIGHUP"]
    assert subprocess.run(nohup, **how).returncode == 0
    assert (tmp_path / "weights").read_text() == "new"
    code = "import os, signal; from tinyllama.config import cli\ndef main():\n    cli.leave_signals()\n    "
    code += "os.kill(os.getpid(), signal.SIGTERM)\ncli.run(main)"
    assert subprocess.run([sys.executable, "-c", code], **how).returncode == -signal.SIGTERM


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_what_a_full_disk_may_cost() -> None:
    """A result is missed, a line of a log is not, and neither are the last words of a process."""
    for body, expected in (
        ("print('a result')", 2),
        ("\n    with stdio.best_effort(): print('a line', flush=True)\n    stdio.drop_unprinted(); return 75", 75),
        ("stdio.write_stderr(b'all lost'); return 1", 1),
    ):
        code = f"from tinyllama import stdio\nfrom tinyllama.config import cli\ndef main(): {body}\ncli.run(main)"
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=full)
        assert done.returncode == expected, body
    with pytest.raises(BrokenPipeError), stdio.best_effort():
        raise BrokenPipeError


def test_ctrl_c_is_a_line_and_what_shells_expect() -> None:
    code = "import os, signal; from tinyllama.config import cli; cli.run(lambda: os.kill(os.getpid(), signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
