import pytest

from stdit.parallel.processes.mesh import Mesh


@pytest.mark.parametrize("max_size", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("batch_size, ranks", [(1, 1), (5, 1), (3, 2), (4, 2), (5, 3), (7, 3)])
def test_all_ranks_have_the_same_number_of_micro_batches(
    batch_size: int, ranks: int, max_size: int | None
) -> None:
    """Ranks that gather sharded weights wait for each other in every pass, so the numbers must agree."""
    counted = []
    for rank in range(ranks):
        mesh = Mesh(rank, ranks)
        found = mesh.micro_batches(batch_size, max_size)
        assert len(found) == len(Mesh(0, ranks).micro_batches(batch_size, max_size))
        for samples, counts in found:
            rows = mesh.sample_range(batch_size)[samples]
            assert 0 < len(rows) <= (max_size or batch_size)
            counted += list(rows) if counts else []
    assert counted == list(range(batch_size))
