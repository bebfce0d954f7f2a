"""Which weights a run may start from, and which are refused before anything is started."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import CONFIG, METADATA, given, weights

from tinyllama import InputError
from tinyllama.checkpoint import hashes, reader
from tinyllama.checkpoint.resume import origin
from tinyllama.config.args import DataArgs, ModelArgs, PretrainArgs, Source, TrainArgs
from tinyllama.convert import hf_folder
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.tokenizer import Tokenizer
from tinyllama.train.init_from import initial_weights, with_sizes
from tinyllama.train.launch import World
from tinyllama.train.run import Run

SIZES = {key: value for key, value in dataclasses.asdict(CONFIG).items() if key != "name"}


@pytest.fixture
def make_run(packed_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    """A function that resolves a run from ``start`` on data of the tokenizer ``sha256``."""

    def make(start: Path | None, sha256: str | None = None, resume: Path | None = None, **changes: Any) -> Run:
        folder = tmp_path / f"packed_{sha256}"
        if not folder.exists():
            packed_folder([[[5, 6, 2]]], name=folder.name, tokenizer_sha256=sha256)
        args = PretrainArgs(
            out_dir=str(tmp_path / "out"),
            model=ModelArgs(name="quickstart", **SIZES | changes),
            data=DataArgs(sources=[Source(str(folder))]),
            train=TrainArgs(init_from=None if start is None else str(start)),
        )
        mixture = Mixture([1], [1.0], 0, ["x"])
        return Run(args, args.model.resolve(), World(1, 1, 1), [open_packed(folder)], [], mixture, 1, {}, resume)

    return make


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "hf"
    hf_folder.write(folder, given())
    return folder


def test_a_run_starts_from_the_weights_that_it_names(make_run, hf_dir: Path, step_dir: Path) -> None:
    state = weights()
    for start in (hf_dir, step_dir, step_dir.parents[1]):
        found = initial_weights(make_run(start))
        assert found is not None
        assert found.config == dataclasses.replace(CONFIG, name=found.config.name)
        assert all(torch.equal(found.read(name), tensor) for name, tensor in state.items())
    assert initial_weights(make_run(None)) is None


def test_weights_of_another_tokenizer_are_refused(make_run, step_dir: Path, hf_dir: Path, tokenizer_file: Path) -> None:
    sha256 = Tokenizer(tokenizer_file).sha256
    run = make_run(step_dir, "3" * 64)
    with pytest.raises(InputError) as caught:
        initial_weights(run)
    where = run.sources[0].path
    assert caught.value.args == (f"{step_dir} was trained with another tokenizer than {where} was prepared with",)
    assert initial_weights(make_run(step_dir, sha256)) is not None
    assert initial_weights(make_run(step_dir, None)) is not None  # what is not known cannot be compared
    assert initial_weights(make_run(hf_dir, "3" * 64)) is not None


def test_an_export_passes_its_tokenizer_on_to_the_run_that_starts_from_it(make_run, tmp_path: Path) -> None:
    hf_folder.write(tmp_path / "hf", given(metadata=METADATA | {"tokenizer_sha256": "4" * 64}))
    assert initial_weights(make_run(tmp_path / "hf", "4" * 64)) is not None
    with pytest.raises(InputError, match="was trained with another tokenizer"):
        initial_weights(make_run(tmp_path / "hf", "3" * 64))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("n_layer", 3), ("n_head", 4), ("n_query_groups", 4), ("n_embd", 128), ("intermediate_size", 97)],
        *[("norm_eps", 1e-5), ("tie_embeddings", True)],
    ],
)
def test_sizes_of_other_weights_are_refused_even_if_given(make_run, hf_dir: Path, name: str, value: Any) -> None:
    with pytest.raises(InputError) as caught:
        initial_weights(make_run(hf_dir, **{name: value}))
    there = getattr(CONFIG, name)
    assert caught.value.args == (f"model.{name} is {value} and in {hf_dir} {there}: set model.{name} to that",)


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [("block_size", 48, 256), ("rope_base", 7000, 10000), ("rope_condense_ratio", 2, None)],
)
def test_the_context_may_be_changed_by_who_says_so(make_run, hf_dir: Path, name: str, value: Any, default: Any) -> None:
    assert initial_weights(make_run(hf_dir, **{name: value})) is not None
    if default is None:
        return
    with pytest.raises(InputError) as caught:
        initial_weights(make_run(hf_dir, **{name: None}))
    problem = (
        f"model.{name} is {default} and in {hf_dir} {getattr(CONFIG, name)}: give model.{name} yourself to change it"
    )
    assert caught.value.args == (problem,)


def test_sizes_that_are_not_given_are_those_of_the_weights(hf_dir: Path, step_dir: Path, tmp_path: Path) -> None:
    def sizes(start: Path | None, resume: Path | None = None, **given: Any) -> Any:
        train = TrainArgs(init_from=None if start is None else str(start))
        return with_sizes(PretrainArgs(model=ModelArgs(**given), train=train), resume).model

    assert sizes(None) == ModelArgs()
    for start in (hf_dir, step_dir, step_dir.parents[1]):
        assert sizes(start).resolve() == CONFIG
        assert sizes(start, name="quickstart").resolve() == CONFIG  # a recipe's
        assert sizes(start, name="mine").resolve() == dataclasses.replace(CONFIG, name="mine")
        assert sizes(start, block_size=48, n_layer=3).resolve() == dataclasses.replace(CONFIG, block_size=48, n_layer=3)
    (tmp_path / "lit_model.pth").touch()  # does not say its sizes
    assert sizes(tmp_path / "lit_model.pth") == ModelArgs()
    with pytest.raises(InputError, match="holds no complete checkpoint"):
        sizes(tmp_path / "gone")
    assert sizes(tmp_path / "gone", step_dir).resolve() == CONFIG  # its own checkpoint has them


def test_the_rows_of_the_vocabulary_count_and_not_its_pieces(make_run, hf_dir: Path) -> None:
    assert initial_weights(make_run(hf_dir, vocab_size=448)) is not None  # 400 pieces have 448 rows, too
    with pytest.raises(InputError) as caught:
        initial_weights(make_run(hf_dir, vocab_size=449, n_layer=3))
    layers, rows = caught.value.args
    assert layers.startswith("model.n_layer is 3 and in ")
    problem = f"model.vocab_size 449 makes 512 rows and {hf_dir} has 448: "
    assert rows == problem + "set model.vocab_size and model.padding_multiple to fit"


def test_only_a_run_that_started_from_the_same_weights_goes_on(
    make_run, hf_dir: Path, step_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = shutil.copytree(step_dir, tmp_path / "out/checkpoints/step-00000012")
    settings = yaml.safe_load((resume / "config.yaml").read_text())
    with pytest.raises(
        InputError, match=f"is of a run that started from weights it drew, and train.init_from is {hf_dir}"
    ):
        initial_weights(make_run(hf_dir, resume=resume))
    (resume / "config.yaml").write_text(json.dumps(settings | {"train": {"init_from": "somewhere/else"}}))
    with pytest.raises(
        InputError, match=f"is of a run that started from {Path.cwd()}/somewhere/else, and train.init_from is"
    ):
        initial_weights(make_run(hf_dir, resume=resume))
    (resume / "config.yaml").write_text(json.dumps(settings | {"train": {"init_from": str(hf_dir)}}))
    monkeypatch.chdir(hf_dir.parent)
    for start in (hf_dir, Path("hf"), hf_dir / "../hf"):
        assert initial_weights(make_run(start, resume=resume)) is None  # its own checkpoint wins
    assert initial_weights(make_run(None, resume=resume)) is None


def test_what_a_run_started_from_is_that_of_its_first_start(
    make_run, hf_dir: Path, step_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(step_dir, tmp_path / "out/checkpoints/step-00000012")
    settings = yaml.safe_load((own / "config.yaml").read_text())
    state, hashed = reader.read_state(own), reader.read_hashes(own)
    assert hashed is not None
    monkeypatch.chdir(hf_dir.parent)
    began = origin(tmp_path / "out", None, {"resume": "auto", "init_from": "hf"})
    assert began == {"resume": None, "init_from": str(hf_dir.resolve())}
    (own / "state.json").write_bytes(hashes.seal(state | {"origin": began}, hashed))
    monkeypatch.chdir(tmp_path)
    for later in (None, "hf", "somewhere/else"):  # the settings of the last start do not count
        (own / "config.yaml").write_text(json.dumps(settings | {"train": {"resume": "auto", "init_from": later}}))
        assert initial_weights(make_run(hf_dir, resume=own)) is None
        with pytest.raises(InputError, match=f"is of a run that started from {hf_dir}, and train.init_from is other"):
            initial_weights(make_run(Path("other"), resume=own))
        assert origin(tmp_path / "out", own, {"resume": "auto", "init_from": later}) == began
        # a branch of it began from the same weights, and from the step
        branch = origin(tmp_path / "branch", own, {"resume": str(own.relative_to(tmp_path)), "init_from": None})
        assert branch == began | {"resume": str(own)}
