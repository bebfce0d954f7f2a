import math

import numpy as np
import pytest
import torch
from packed import change

from tinyllama.data.loader import Batch
from tinyllama.data.packed import open_packed
from tinyllama.train.evaluate import bits_per_byte, loss_sum, source_names

CPU = torch.device("cpu")


def batch(first: int, rows: int = 2, fill: int = 0) -> Batch:
    """Rows of three tokens and the next of each, the last ``fill`` of them no samples."""
    tokens = torch.arange(first, first + 4 * (rows + fill), dtype=torch.int32).view(rows + fill, 4)
    return Batch(tokens, np.array([*range(rows), *[-1] * fill]))


def test_small_losses_are_not_lost_in_a_large_sum() -> None:
    losses = iter([2.0**24, *[1.0] * 5, 0.25])  # 2^24 + 1 is 2^24 in fp32
    total = loss_sum(lambda ids, targets: torch.tensor(next(losses)), [batch(0)] * 7, CPU)
    assert total is not None
    assert total.dtype == torch.float64
    assert total.tolist() == [2.0**24 + 5.25, 7 * 6]


def test_losses_and_tokens_are_summed_and_rows_that_fill_up_count_nothing() -> None:
    seen = []

    def model(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append((ids.tolist(), targets.tolist()))
        return ids[targets != -100].sum().float()

    total = loss_sum(model, [batch(10), batch(30, rows=1, fill=1)], CPU)
    assert total is not None
    # a mean of means would be (13.5 + 31) / 2 = 22.25 a token
    assert total.tolist() == [10 + 11 + 12 + 14 + 15 + 16 + 30 + 31 + 32, 9]
    assert seen[0] == ([[10, 11, 12], [14, 15, 16]], [[11, 12, 13], [15, 16, 17]])
    assert seen[1][1] == [[31, 32, 33], [-100] * 3]


def test_no_graph_is_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    asked = []

    def model(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        asked.append((torch.is_grad_enabled(), (weight * 2).requires_grad))
        return weight * 2

    total = loss_sum(model, [batch(0), batch(0)], CPU)
    assert total is not None
    assert asked == [(False, False)] * 2
    assert not total.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("after", [0, 2])
def test_it_can_be_stopped_before_each_batch(after: int) -> None:
    asked, done = [], []

    def stop() -> bool:
        asked.append(len(done))
        return len(done) == after

    def model(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        done.append(ids)
        return torch.tensor(1.0)

    assert loss_sum(model, (batch(0) for _ in range(5)), CPU, stop) is None
    assert asked == list(range(after + 1))
    assert len(done) == after


def test_nothing_to_evaluate_is_nothing() -> None:
    total = loss_sum(lambda ids, targets: torch.tensor(1.0), [], CPU)
    assert total is not None
    assert total.tolist() == [0, 0]


def test_a_loss_that_is_no_number_makes_the_sum_none() -> None:
    total = loss_sum(lambda ids, targets: torch.tensor(torch.nan), [batch(0)], CPU)
    assert total is not None
    assert total.isnan().tolist() == [True, False]


def test_bits_per_byte_are_those_of_all_tokens_over_the_bytes_of_text(packed_folder) -> None:
    def held_out(name: str, documents: list[list[int]], **subsets: dict[str, int]):
        folder = packed_folder([documents], name=name)
        change(folder / "manifest.json", subsets=subsets)
        return open_packed(folder)

    loss = 2.5 * math.log(2)  # bits a token
    one = held_out("one", [[5, 6, 7, 2], [8, 2]], C4={"tokens": 4, "bytes": 9}, Book={"tokens": 2, "bytes": 3})
    assert one.num_bytes == 12
    assert bits_per_byte(loss, [one]) == pytest.approx(2.5 * 6 / 12)  # each eos is a token
    two = held_out("two", [[5, 2]], C4={"tokens": 2, "bytes": 8})
    assert bits_per_byte(loss, [one, two]) == pytest.approx(2.5 * 8 / 20)
    empty = held_out("empty", [[2]], C4={"tokens": 1, "bytes": 0})
    assert bits_per_byte(loss, [empty]) is None
    assert bits_per_byte(loss, [one, empty]) == pytest.approx(2.5 * 7 / 12)
    for name, subsets in (
        ("none", {}),
        ("no bytes", {"C4": {"tokens": 2}}),
        ("of some tokens", {"C4": {"tokens": 1, "bytes": 8}}),
        ("of one subset", {"C4": {"tokens": 1, "bytes": 8}, "Book": {"tokens": 1}}),
    ):
        unknown = held_out(name, [[5, 2]], **subsets)
        assert unknown.num_bytes is None, name
        assert bits_per_byte(loss, [one, unknown]) is None, name


def test_a_run_without_validation_data_has_no_bits_per_byte() -> None:
    assert bits_per_byte(1.0, []) is None


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/held_out"], ["held_out"]),
        (["data/web", "data/code/"], ["web", "code"]),
        (["data/web/val", "data/code/val", "wiki"], ["web/val", "code/val", "wiki"]),
        (["val", "data/val", "more/data/val"], ["val", "data/val", "more/data/val"]),
        (["a/x/val", "b/x/val"], ["a/x/val", "b/x/val"]),
        (["val", "./val", "data/../val"], ["val", "val_1", "val_2"]),  # one folder, given again
        (["/", "."], ["/", "."]),
        (["a,b", 'of "code"', "学习 7"], ["a,b", 'of "code"', "学习 7"]),
        (["a\nb", "a\x85b", "\udcff"], ["a\\nb", "a\\x85b", "\\udcff"]),
    ],
)
def test_a_source_has_the_shortest_name_that_tells_it_from_the_others(paths: list[str], names: list[str]) -> None:
    assert source_names(paths) == names
    assert sorted(source_names(paths[::-1])) == sorted(names)


def test_long_names_of_sources_are_told_apart() -> None:
    names = source_names(["x/" + "z" * 3000, "y/" + "z" * 1000 + "q" * 1000 + "z" * 1000])
    assert len(set(names)) == 2
