"""What the recipe makes of data.*: the mixture, what is refused, and what a resumed run must have as it was."""

import json
import re
import shutil
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from orders import order_of

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.config import cli
from tinyllama.config.args import (
    DataArgs,
    ModelArgs,
    OpsArgs,
    OptimArgs,
    ParallelArgs,
    PretrainArgs,
    Source,
    TrainArgs,
    ValidationSource,
)
from tinyllama.config.bounds import bounds
from tinyllama.data import mixture
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.monitor.console import start_summary
from tinyllama.train.step import loss_function

T = 16  # block_size


@pytest.fixture
def pack(packed_folder):
    """A function that packs ``num_blocks`` blocks and some more tokens, of documents of 10."""

    def make(name: str, num_blocks: int, rest: int = 3, first: int = 5, **facts: Any) -> str:
        tokens = [2 if i % 10 == 9 else first + i % 300 for i in range(num_blocks * (T + 1) + rest)]
        return str(packed_folder([[tokens[i : i + 10] for i in range(0, len(tokens), 10)]], name, **facts))

    return make


@pytest.fixture
def settings(pack, tmp_path):
    """A run on 60 blocks of one source and 40 of another."""
    sources = [Source(pack("one", 60), 0.7), Source(pack("two", 40, first=6), 0.3)]
    return PretrainArgs(
        model=ModelArgs(name="quickstart", block_size=T, vocab_size=400, n_layer=1, n_embd=32, intermediate_size=32),
        data=DataArgs(sources=sources, validation=[ValidationSource(pack("held_out", 5, first=7))]),
        train=TrainArgs(max_steps=40, global_batch_size=8, micro_batch_size=2, precision="fp32"),
        optim=OptimArgs(warmup_steps=5),
        parallel=ParallelArgs(devices=1),
        out_dir=str(tmp_path / "run"),
    )


def data(args: PretrainArgs, **changes: Any) -> PretrainArgs:
    return replace(args, data=replace(args.data, **changes))


def ramped(args: PretrainArgs, tokens: int, final: tuple[float | None, float | None]) -> PretrainArgs:
    sources = [replace(source, final_weight=last) for source, last in zip(args.data.sources, final, strict=True)]
    return data(args, sources=sources, ramp_tokens=tokens)


def problems(recipe, args: PretrainArgs) -> tuple[str, ...]:
    with pytest.raises(InputError) as info:
        recipe.setup(args)
    return info.value.args


def lit(folder: Path, tokens: int) -> str:
    """Upstream's chunk files, which say nothing of bos and eos."""
    folder.mkdir()
    (folder / "a.bin").write_bytes(struct.pack("<7sQBQ", b"LITPKDS", 1, 8, tokens) + bytes(2 * tokens))
    return str(folder)


def test_the_mixture_is_of_the_blocks_weights_and_seed(recipe, settings) -> None:
    prints = [open_packed(source.path).fingerprint for source in settings.data.sources]
    run = recipe.setup(settings)
    assert order_of(run.mixture) == order_of(Mixture([60, 40], [0.7, 0.3], 3407, prints))
    assert [dataset.path.name for dataset in run.sources] == ["one", "two"]
    assert [dataset.path.name for dataset in run.validation] == ["held_out"]
    run = recipe.setup(data(settings, seed=5, sources=settings.data.sources[::-1]))
    assert order_of(run.mixture) == order_of(Mixture([40, 60], [0.3, 0.7], 5, prints[::-1]))


def test_a_ramp_in_tokens_is_one_in_samples(recipe, settings) -> None:
    prints = [open_packed(source.path).fingerprint for source in settings.data.sources]
    for tokens, samples in ((3073 * T, 3073), (3072 * T + 1, 3073), (3072 * T, 3072)):  # rounded up
        run = recipe.setup(ramped(settings, tokens, (0.2, 0.8)))
        expected = Mixture([60, 40], [0.7, 0.3], 3407, prints, [0.2, 0.8], samples)
        assert order_of(run.mixture) == order_of(expected)
        # the second one's share rises from 0.3 to 0.8, and stays
        assert run.mixture.samples_by_source(4096)[1] == pytest.approx(0.55 * samples + 0.8 * (4096 - samples), abs=2)
    run = recipe.setup(ramped(settings, 3073 * T, (None, 0.8)))  # the first one's weight stays 0.7
    expected = Mixture([60, 40], [0.7, 0.3], 3407, prints, [0.7, 0.8], 3073)
    assert order_of(run.mixture) == order_of(expected)


def test_facts_of_the_data_and_the_tokenizer(recipe, settings, tmp_path) -> None:
    one, two = (open_packed(source.path).fingerprint for source in settings.data.sources)
    run = recipe.setup(settings)
    sources = [{"weight": 0.7, "fingerprint": one}, {"weight": 0.3, "fingerprint": two}]
    order = {"version": 1, "window": 1024}
    of_data = {"seed": 3407, "order": order, "sources": sources}
    assert run.fixed_metadata() == {"data": of_data, "model": asdict(run.config)}
    assert run.tokenizer_metadata() == {"tokenizer_sha256": "0" * 64, "bos": False, "bos_id": 1, "eos_id": 2}
    chunks = [ValidationSource(lit(tmp_path / "lit", 99))]  # which say nothing
    assert recipe.setup(data(settings, validation=chunks)).tokenizer_metadata() == run.tokenizer_metadata()
    mixed = recipe.setup(data(settings, sources=[Source(lit(tmp_path / "mixed", 99)), *settings.data.sources]))
    assert mixed.tokenizer_metadata() == run.tokenizer_metadata()
    alone = recipe.setup(data(settings, sources=[Source(lit(tmp_path / "alone", 999))]))
    assert alone.tokenizer_metadata() == dict.fromkeys(("tokenizer_sha256", "bos", "bos_id", "eos_id"))
    order_metadata = recipe.setup(ramped(settings, 999, (None, 0.8))).fixed_metadata()["data"]
    sources = [sources[0] | {"final_weight": None}, sources[1] | {"final_weight": 0.8}]
    assert order_metadata == {"seed": 3407, "order": order, "sources": sources, "ramp_tokens": 999}


def test_all_sources_together_must_fill_a_batch(recipe, settings) -> None:
    def batch(size: int) -> PretrainArgs:
        return replace(settings, train=replace(settings.train, global_batch_size=size))

    assert recipe.setup(batch(100)).accumulation == 50
    (problem,) = problems(recipe, batch(102))
    assert problem == (
        "data.sources hold 100 blocks of 17 tokens, fewer than one batch of train.global_batch_size 102: "
        "give more data or --train.global_batch_size 2"
    )
    assert recipe.setup(batch(2)).accumulation == 1


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("length", [{"max_epochs": 3.0}, {"max_tokens": 4000}, {"max_steps": 9}])
def test_the_defaults_on_little_data_name_flags_that_work(
    recipe, settings, monkeypatch: pytest.MonkeyPatch, ranks: int, length: dict[str, Any]
) -> None:
    little = replace(
        settings, optim=OptimArgs(), train=TrainArgs(**length), parallel=replace(settings.parallel, devices=ranks)
    )
    (problem,) = problems(recipe, little)
    flags = re.search(r"give more data or (--.*)", problem)
    assert flags is not None
    parser = cli.arguments("")
    cli.add_fields(parser, PretrainArgs)
    run = recipe.setup(cli.given(parser.parse_args(flags[1].split()), little))
    assert run.world.size == ranks
    assert 0 <= run.args.optim.warmup_steps < run.max_steps


def test_more_ranks_than_blocks_are_too_many(recipe, settings) -> None:
    many = replace(settings, parallel=replace(settings.parallel, devices=128))
    train = replace(settings.train, global_batch_size=128, micro_batch_size=1)
    (problem,) = problems(recipe, replace(many, train=train))
    assert problem.endswith("give more data or start at most 100 ranks")


def test_a_warm_up_that_is_too_long_names_one_that_fits(recipe, settings) -> None:
    long = replace(settings, optim=replace(settings.optim, warmup_steps=2000))
    (problem,) = problems(recipe, long)
    steps = settings.train.max_steps
    assert (
        f"does not end within the run's {steps} steps: lower it, as by --optim.warmup_steps {steps // 10}," in problem
    )


def test_all_folders_that_are_missing_are_named_at_once(recipe, settings) -> None:
    sources = [Source("nowhere/a"), *settings.data.sources, Source("nowhere/b")]
    missing = data(settings, sources=sources, validation=[ValidationSource("nowhere/c"), ValidationSource("nowhere/a")])
    assert problems(recipe, missing) == tuple(
        f"nowhere/{name} is not a folder: give the --output of a prepare command" for name in "abc"
    )


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 12), (0.5, 6), (2.0, 25)])
def test_an_epoch_is_every_block_of_every_source(recipe, settings, epochs: float, steps: int) -> None:
    train = replace(settings.train, max_steps=None, max_epochs=epochs)
    assert recipe.setup(replace(settings, train=train)).max_steps == steps


@pytest.mark.parametrize("changes", [{"bos_id": 0}, {"eos_id": 3}, {"bos": True}, {"eos": False}])
def test_datasets_that_do_not_end_documents_alike_are_refused(recipe, settings, pack, changes: dict[str, Any]) -> None:
    other = pack("other", 20, **changes)
    (problem,) = problems(recipe, data(settings, sources=[settings.data.sources[0], Source(other)]))
    assert f"{other} with" in problem
    assert "prepare them alike" in problem
    (problem,) = problems(
        recipe, data(settings, validation=[ValidationSource(other)])
    )  # that is read as the sources are
    assert "prepare them alike" in problem
    (problem,) = problems(recipe, data(settings, sources=[Source(other)], validation=settings.data.validation))
    assert "prepare them alike" in problem


def test_datasets_of_other_tokenizers_are_refused(recipe, settings, pack) -> None:
    other = pack("other", 20, tokenizer_sha256="1" * 64)
    for changes in (
        {"sources": [settings.data.sources[0], Source(other)]},
        {"validation": [ValidationSource(other)]},
    ):
        (problem,) = problems(recipe, data(settings, **changes))
        assert "were made with different tokenizers" in problem
    small, large = pack("small", 20, vocab_size=399), pack("large", 20, vocab_size=401)
    args = data(settings, sources=[Source(small)], validation=[ValidationSource(large)])
    assert [problem.split(" was made with a vocabulary of ")[1][:3] for problem in problems(recipe, args)] == [
        "399",
        "401",
    ]
    (problem,) = problems(recipe, data(settings, validation=[ValidationSource(pack("tiny", 0, rest=T))]))
    assert "holds 16 tokens and a block takes 17" in problem


def test_a_document_mask_needs_eos_in_every_dataset(recipe, settings, pack, tmp_path) -> None:
    chunks = lit(tmp_path / "lit", 20 * (T + 1))
    assert recipe.setup(data(settings, document_mask=True)).ops["attention"]
    for changes in (
        {"validation": [*settings.data.validation, ValidationSource(chunks)]},
        {"sources": [*settings.data.sources, Source(chunks)]},
        {"sources": [Source(chunks)]},
    ):
        recipe.setup(data(settings, **changes))
        (problem,) = problems(recipe, data(settings, document_mask=True, **changes))
        assert problem == f"data.document_mask needs documents that end with eos: prepare {chunks} again so"
    bare = data(settings, sources=[Source(pack("bare", 20, eos=False))], validation=[])
    recipe.setup(bare)
    (problem,) = problems(recipe, data(bare, document_mask=True))
    assert "bare again so" in problem
    (problem,) = problems(recipe, data(replace(settings, ops=OpsArgs(attention="sdpa_cudnn")), document_mask=True))
    assert "ops.attention sdpa_cudnn takes no document mask" in problem
    (problem,) = problems(recipe, data(settings, restart_positions=True))
    assert "data.restart_positions is true and data.document_mask is not" in problem


@pytest.mark.parametrize("restart", [False, True])
def test_documents_and_positions_go_to_the_model(recipe, settings, restart: bool) -> None:
    def model(*args: Any) -> Any:
        return args

    run = recipe.setup(settings)
    assert loss_function(model, run.args.data, run.sources[0].eos_id) is model
    run = recipe.setup(data(settings, document_mask=True, restart_positions=restart))
    ids = torch.tensor([[5, 2, 6, 1, 2, 2, 8], [2, 0, 0, 3, 3, 4, 2]])
    targets = ids + 1
    given = loss_function(model, run.args.data, run.sources[0].eos_id)(ids, targets)
    assert given[0] is ids
    assert given[1] is targets
    # an eos, 2, is its document's last token
    assert given[2].tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert given[3:] == (restart,)


@pytest.fixture
def saved(recipe, settings, step_dir):
    """A function that puts a checkpoint of step 12 into out_dir, of a run with these facts of its data."""

    def save(**facts: Any) -> Path:
        target = Path(settings.out_dir) / "checkpoints" / "step-00000012"
        if target.exists():
            shutil.rmtree(target)
        model = asdict(recipe.setup(settings).config)
        shutil.copytree(step_dir, target)
        state = reader.read_state(target) | {"data": facts, "model": model}
        state["tokens"] = state["samples"] * model["block_size"]
        (target / "state.json").write_text(json.dumps(state))
        return target

    return save


def test_a_run_goes_on_with_the_data_it_had_and_no_other(recipe, settings, saved, pack, tmp_path) -> None:
    one, two = settings.data.sources
    prints = [open_packed(source.path).fingerprint for source in (one, two)]
    sources = [{"weight": source.weight, "fingerprint": name} for source, name in zip((one, two), prints, strict=True)]
    step = saved(seed=3407, sources=sources)
    assert recipe.setup(settings).resume == step
    moved = str(shutil.copytree(one.path, tmp_path / "moved"))
    recipe.setup(data(settings, sources=[replace(one, path=moved), two], validation=[]))
    third = Source(pack("three", 30, first=8))
    changes = {
        "data.seed was 3407 and is 3408": data(settings, seed=3408),
        "data.sources[1].weight was 0.3 and is 0.31": data(settings, sources=[one, replace(two, weight=0.31)]),
        f"data.sources[0].fingerprint was {prints[0]} and is {prints[1]}": data(settings, sources=[two, one]),
        "data.sources[2].weight was absent and is 1.0": data(settings, sources=[one, two, third]),
        "data.sources[1].weight was 0.3 and is absent": data(settings, sources=[one]),
        "data.ramp_tokens was absent and is 999": ramped(settings, 999, (None, 0.8)),
        "data.sources[1].final_weight was absent and is 0.8": ramped(settings, 999, (None, 0.8)),
        "model.block_size was 16 and is 8": replace(settings, model=replace(settings.model, block_size=8)),
        "model.n_layer was 1 and is 2": replace(settings, model=replace(settings.model, n_layer=2)),
    }
    for difference, args in changes.items():
        (problem,) = problems(recipe, args)
        assert problem.startswith(f"cannot resume from {step}: ")
        assert difference in problem


def test_a_run_resumes_in_the_order_it_had_and_no_other(recipe, settings, saved, monkeypatch) -> None:
    sources = recipe.setup(settings).fixed_metadata()["data"]["sources"]
    orders = {"none, as before it was recorded": {}, "today's": {"order": {"version": 1, "window": 1024}}}
    for order in orders.values():
        step = saved(seed=3407, sources=sources, **order)
        assert recipe.setup(settings).resume == step
        for name, now in (("ORDER_VERSION", 2), ("WINDOW", 512)):
            with monkeypatch.context() as patch:
                patch.setattr(mixture, name, now)
                (problem,) = problems(recipe, settings)
            was = f"data.order.{name.lower().removeprefix('order_')} was {1 if now == 2 else 1024} and is {now}"
            assert problem.startswith(f"cannot resume from {step}: {was}; ")
    step = saved(seed=3407, sources=sources, order={"version": 2, "window": 2048})  # of a later release
    (problem,) = problems(recipe, settings)
    assert "data.order.version was 2 and is 1; data.order.window was 2048 and is 1024" in problem


def test_a_run_goes_on_with_the_ramp_it_had_and_no_other(recipe, settings, saved) -> None:
    prints = [open_packed(source.path).fingerprint for source in settings.data.sources]
    ends = zip((0.7, 0.3), (None, 0.8), prints, strict=True)
    sources = [{"weight": first, "final_weight": last, "fingerprint": name} for first, last, name in ends]
    step = saved(seed=3407, sources=sources, ramp_tokens=999)
    assert recipe.setup(ramped(settings, 999, (None, 0.8))).resume == step
    changes = {
        "data.ramp_tokens was 999 and is 1000": ramped(settings, 1000, (None, 0.8)),
        "data.sources[1].final_weight was 0.8 and is 0.7": ramped(settings, 999, (None, 0.7)),
        "data.sources[0].final_weight was None and is 0.2": ramped(settings, 999, (0.2, 0.8)),
        "data.ramp_tokens was 999 and is absent": settings,
    }
    for difference, args in changes.items():
        (problem,) = problems(recipe, args)
        assert difference in problem


def test_a_checkpoint_beyond_the_last_step_is_refused(recipe, settings, saved) -> None:
    sources = [
        {"weight": source.weight, "fingerprint": open_packed(source.path).fingerprint}
        for source in settings.data.sources
    ]
    step = saved(seed=3407, sources=sources)
    assert recipe.setup(replace(settings, train=replace(settings.train, max_steps=12))).resume == step
    (problem,) = problems(recipe, replace(settings, train=replace(settings.train, max_steps=11)))
    assert problem == f"{step} is beyond the run's 11 steps: raise train.max_steps"


def test_a_run_with_checkpoints_keeps_its_folder_and_packed_data_leave_it(recipe, settings, saved, tmp_path) -> None:
    sources = [
        {"weight": source.weight, "fingerprint": open_packed(source.path).fingerprint}
        for source in settings.data.sources
    ]
    step = saved(seed=3407, sources=sources)
    (step.parents[1] / "manifest.json").write_text("")
    (problem,) = problems(recipe, settings)
    assert problem == (
        f"out_dir {step.parents[1]} holds packed data: move its manifest.json and its shards (.bin, .idx.npy and "
        ".json) to another"
    )


@pytest.mark.parametrize("file", ["manifest.json", "chunk.bin"])
def test_a_folder_of_packed_data_is_no_folder_for_a_run(recipe, settings, tmp_path, file: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    recipe.setup(replace(settings, out_dir=str(folder)))  # an empty folder is fine
    (folder / file).write_text("")
    (problem,) = problems(recipe, replace(settings, out_dir=str(folder)))
    assert problem == f"out_dir {folder} holds packed data: give the run a folder of its own"
    (problem,) = problems(recipe, replace(settings, out_dir=settings.data.sources[0].path))
    assert "/one holds packed data" in problem
    for empty in ("", "  "):
        (problem,) = problems(recipe, replace(settings, out_dir=empty))
        assert problem == "out_dir is empty: give a folder for the run"


GROUPS = ("model", "data", "optim", "train", "parallel", "eval", "checkpoint", "log")
NUMBERS = [f"{group}.{name}" for group in GROUPS for name, *_ in bounds(type(getattr(PretrainArgs(), group)))]


@pytest.mark.parametrize("key", NUMBERS)
def test_the_largest_numbers_make_a_run_or_a_line(recipe, settings, key: str) -> None:
    group, name = key.split(".")
    args = ramped(settings, 1, (0.2, 0.8)) if name == "ramp_tokens" else settings
    if name in ("max_tokens", "max_epochs"):
        args = replace(args, train=replace(args.train, max_steps=None))
    for value in (1, 1000, 2**24, 10**9, 10**15, 2**63):
        try:
            run = recipe.setup(replace(args, **{group: replace(getattr(args, group), **{name: value})}))
            assert run.lr_at(run.max_steps - 1) >= 0
            lines = [text for _, text in start_summary(run, "", [])]
        except InputError as error:
            lines = list(error.args)
        assert all("\n" not in line and len(line) < 400 for line in lines)


def test_a_ramp_whose_table_would_take_hours_is_refused(recipe, settings) -> None:
    (problem,) = problems(recipe, ramped(settings, 10**15, (0.2, 0.8)))
    assert problem == "data.ramp_tokens 1000000000000000 is 62,500,000,000,000 samples: lower it below 2,147,483,648"
