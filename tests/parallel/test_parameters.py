import pytest

from stdit.parallel.parameters import state_bytes


@pytest.mark.parametrize(
    "ranks, sharded, expected",
    [(1, False, 200), (4, False, 200), (1, True, 200), (5, True, 40), (4, True, 60)],
)
def test_state_is_whole_or_divided(ranks: int, sharded: bool, expected: int) -> None:
    assert state_bytes(10, ranks, sharded) == expected
