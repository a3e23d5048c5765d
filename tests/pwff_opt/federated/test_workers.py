"""Work on all cores: order, and that nobody waits for what has been given up."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from pwff_opt.errors import DecisionError
from pwff_opt.federated.model.workers import Workers, companies, go_on, out_of_memory


def test_results_are_in_order_and_each_is_told_when_it_ends() -> None:
    told: list[int] = []
    second_told = threading.Event()

    def tell(item: int) -> None:
        told.append(item)
        second_told.set()

    def work(item: int) -> int:
        assert item == 1 or second_told.wait(10)
        return 10 * item

    assert Workers(2).map(work, range(2), done=tell) == [0, 10]
    assert told == [1, 0]


def test_the_largest_are_begun_first() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return 10 * item

    sizes = [3.0, 1.0, 7.0, 3.0]
    assert Workers(1).map(work, range(4), size=sizes.__getitem__) == [0, 10, 20, 30]
    assert begun == [2, 0, 3, 1]


@pytest.mark.parametrize(
    ("sizes", "most", "cores", "expected"),
    [
        ([5, 3, 2, 6], 3, 2, [[2, 3], [0, 1]]),  # a core each, as even as can be
        ([5, 3, 2, 6], 3, 8, [[3], [0], [1], [2]]),  # more cores than items
        ([5, 3, 2, 6], 3, 1, [[2, 3], [0, 1]]),  # two turns
        ([5, 3, 2, 6], 4, 1, [[0, 1, 2, 3]]),
        (
            [1, 1, 1, 1, 1, 1],
            2,
            2,
            [[0, 4], [1, 5], [2], [3]],
        ),  # four and not three: two turns of both
        ([9, 1, 1, 1], 3, 2, [[0], [1, 2, 3]]),
        ([9, 1, 1, 1, 1], 3, 2, [[0, 4], [1, 2, 3]]),  # never more than three
        ([0, 0, 0, 0], 3, 4, [[0], [1], [2], [3]]),  # none stays empty
        ([], 3, 2, []),
    ],
)
def test_companies_are_even_and_occupy_all_cores(
    sizes: list[float], most: int, cores: int, expected: list[list[int]]
) -> None:
    assert companies(dict(enumerate(sizes)), most=most, cores=cores) == expected


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_long_item_ends_at_its_next_step_when_another_fails(
    error: type[BaseException], failing: int
) -> None:
    steps, begun = [], threading.Event()

    def work(item: int) -> None:
        if item == failing:
            begun.wait(10)
            raise error
        for number in range(1000):
            begun.set()
            go_on()
            steps.append(number)
            time.sleep(0.01)

    with pytest.raises(error):
        Workers(2).map(work, range(2))
    assert 0 < len(steps) < 500
    assert Workers(1).map(lambda _: go_on(), range(2)) == [None, None]  # the next map goes on


@pytest.mark.parametrize("count", [0, -3, "2", 1.5])
def test_a_number_of_workers_that_makes_no_sense(count: Any) -> None:
    with pytest.raises(DecisionError, match="workers must be a whole number of at least 1, got"):
        Workers(count)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:119] can't allocate memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_says_that_memory_ended(error: Exception, is_memory: bool) -> None:
    assert out_of_memory(error) is is_memory
