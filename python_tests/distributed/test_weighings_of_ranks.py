"""A weighing sees the scores of the union of all ranks' batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from l2rw_ext import reference
from l2rw_ext.reference import relative_error
from support.models import cross_entropy
from support.oracle import EXACT, flat, truth, unchanged
from support.processes import Pool
from support.ranks import SIZES, WRAPPERS, Batches, Rank, Setup, draw, train, union
from support.weighings import WEIGHINGS


@pytest.mark.parametrize("name", WEIGHINGS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ranks_weigh_their_union(pool: Pool, wrapper: str, name: str) -> None:
    own, plain = WEIGHINGS[name]
    setup = Setup(options={"weighing": own}, wrapper=WRAPPERS[wrapper])
    batches = draw("mlp", SIZES["uneven"])
    found = pool.run(train, setup, batches, ranks=3)
    one = Rank(None, setup)
    batch, clean = union(batches[0])
    expected = truth(one.inner, cross_entropy, batch, clean)
    weights = plain(expected.scores)
    gradients = reference.weighted_gradient(one.inner, cross_entropy, batch, weights)
    assert relative_error(torch.cat([o[0].weights for o in found]), weights) < EXACT
    for outcome in found:
        assert relative_error(flat(outcome[0].gradients.values()), flat(gradients.values())) < 1e-11


def _failing(u: Tensor) -> Tensor:
    return u - 10


def _fails(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> None:
    for compile in (False, "eager"):
        own = Rank(group, replace(setup, options={**setup.options, "compile": compile}))
        message = "_failing returned weights that are negative"
        with unchanged(own.model), pytest.raises(ValueError, match=message):
            own.reweighter.backward(*batches[0][dist.get_rank(group)])


def test_weights_that_are_none_are_an_error_of_all(pool: Pool) -> None:
    setup = Setup(options={"weighing": _failing})
    pool.run(_fails, setup, draw("mlp", SIZES["even"]), ranks=3)


def _warns(group: dist.ProcessGroup, setup: Setup, batches: Batches) -> None:
    batch = batches[0][dist.get_rank(group)]
    with pytest.warns(UserWarning, match="its weighing needs the scores of all ranks"):
        Rank(group, setup).reweighter.backward(*batch)
    whole = {**setup.options, "compile_options": {"fullgraph": True}}
    with pytest.raises(RuntimeError, match="its weighing needs the scores of all ranks"):
        Rank(group, replace(setup, options=whole)).reweighter.backward(*batch)


def test_what_needs_all_scores_is_no_graph(pool: Pool) -> None:
    setup = Setup(options={"weighing": WEIGHINGS["top_k"][0], "compile": "eager"})
    pool.run(_warns, setup, draw("mlp", SIZES["even"]), ranks=2)
