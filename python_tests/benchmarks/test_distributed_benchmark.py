"""What a step sends is counted, and computed for large models from their shapes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("rich", reason="the benchmarks print their tables with rich")

from benchmarks import communication
from benchmarks.__main__ import main
from benchmarks.communication import MODELS, WAYS, Collectives, Part, direction_bytes
from benchmarks.pages import COLLECTIVES, distributed_table
from support.processes import Pool
from support.ranks import SIZES, Batches, Rank, Setup, draw


def test_sizes_of_the_models() -> None:
    """The numbers of parameters that are printed wherever these models are."""
    found = [sum(part.parameters for part in model.parts()) for model in MODELS]
    assert found == [25_557_032, 124_439_808, 8_030_261_248]


def test_bytes_of_the_direction() -> None:
    parts = [Part(1000, 10), Part(1000, 900), Part(50, None)]
    ring = 2 * 3 / 4 * 4  # bytes that each of four ranks sends for a number that is added up
    found = {way: direction_bytes(parts, way, 4, clean=2, number=4) for way in WAYS}
    assert found == {
        "replicated": 0,
        "dense": ring * 2050,
        "factored": 3 * 2 * 4 * 910 + ring * 50,
        "the fewer of both": 3 * 2 * 4 * 10 + ring * 1050,
    }
    assert direction_bytes(parts, "dense", 1, clean=2, number=4) == 0


def test_parts_of_layers() -> None:
    assert communication.linear(3, 5, 7) == Part(20, 7 * 8)
    assert communication.convolution(3, 4, 5, before=8, after=6) == Part(300, 3 * 64 + 4 * 36)
    assert communication.tied(11, 3, 2) == Part(33, 2 * (3 + 11) + 2 * (1 + 3))


def _counted(
    group: dist.ProcessGroup, setup: Setup, batches: Batches
) -> dict[str, dict[str, float]]:
    own, rank = Rank(group, setup), dist.get_rank(group)
    for _ in range(2):
        own.train(*batches[0][rank])
    with Collectives(dist.get_world_size(group)) as collectives:
        own.train(*batches[0][rank])
    return collectives.counts


@pytest.mark.parametrize("wrapper", [{}, None])
@pytest.mark.parametrize("replicated", [False, True])
def test_a_step_sends_what_is_computed(replicated: bool, wrapper: dict[str, object] | None) -> None:
    """The gradient, the direction unless it is replicated, scores, and a few numbers."""
    setup = Setup(options={"replicated_clean": replicated}, wrapper=wrapper)
    batches = draw("mlp", SIZES["even"])
    batches = [[(batch, batches[0][0][1]) for batch, _ in batches[0]]]
    parameters = sum(p.numel() for p in Rank(None, setup).parameters())
    with Pool() as pool:
        for counts in pool.run(_counted, setup, batches, ranks=3):
            assert set(counts) <= set(COLLECTIVES)
            ring = 2 * 2 / 3 * 8 * parameters
            expected = ring * (1 if replicated else 2)
            assert expected <= counts["all-reduce"]["sent"] <= expected + 100
            # The scores, and at each meeting a few numbers.
            assert 2 * 4 * 8 <= counts["all-gather"]["sent"] <= 1000


def test_a_collective_of_another_kind_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="it is not known what alltoall_ sends"):
        Collectives(2)._count("alltoall_", ([torch.zeros(2)],))


def test_the_benchmark_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    path = tmp_path / "distributed.json"
    command = ["distributed", "--case", "tiny", "--repeats", "2", "--json", str(path)]
    assert main(command) == 0
    assert "clean sharded" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["complete"]
    (entry,) = report["cases"]
    rows = {row["name"]: row for row in entry["methods"]}
    for name in ("sharded", "replicated"):
        limits = entry["error_limits"][name]
        assert all(error <= limits[k] for k, error in rows[name]["errors"].items())
        assert rows[name]["yardstick"] == "plain_ddp"
    assert (
        rows["sharded"]["bytes"]["all-reduce"]["bytes"]
        > 1.9 * (rows["plain_ddp"]["bytes"]["all-reduce"]["bytes"])
    )
    assert distributed_table(report).count("\n") == 6


def test_the_computed_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distributed", "--computed"]) == 0
    assert "8B decoder" in capsys.readouterr().out
