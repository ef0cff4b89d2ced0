import pytest

from stdit.parallel.processes.mesh import Mesh


@pytest.mark.parametrize("most", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("batch_size, ranks", [(1, 1), (5, 1), (3, 2), (4, 2), (5, 3), (7, 3)])
def test_all_ranks_make_as_many_passes(batch_size: int, ranks: int, most: int | None) -> None:
    """Ranks that gather sharded weights wait for each other in every pass."""
    counted = []
    for rank in range(ranks):
        mesh = Mesh(rank, ranks)
        passes = mesh.micro_batches(batch_size, most)
        assert len(passes) == len(Mesh(0, ranks).micro_batches(batch_size, most))
        for samples, counts in passes:
            rows = mesh.sample_range(batch_size)[samples]
            assert 0 < len(rows) <= (most or batch_size)
            counted += list(rows) if counts else []
    assert counted == list(range(batch_size))
