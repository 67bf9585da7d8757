"""Compiled models run eagerly in a step; scripted ones are left to double backward."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.utils import counters

from l2rw_ext import NotExactError, Reweighter
from support.models import CLASSES, ENGINES, cross_entropy, mlp, model_of, vectors
from support.oracle import assert_matches, truth, unchanged


@pytest.fixture(autouse=True)
def _stance() -> Iterator[None]:
    """Whatever a test does, torch compiles again afterwards."""
    torch._dynamo.reset()
    yield
    assert eval_frame._stance.stance == "default"
    torch._dynamo.reset()


def _layers() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES)
    ).double()


def _compiled(how: str) -> tuple[nn.Module, nn.Module]:
    """A model and its plain twin, which share parameters."""
    plain = _layers()
    if how == "whole":
        return torch.compile(plain, backend="aot_eager"), plain  # type: ignore[return-value]
    if how == "method":
        model = nn.Sequential(*plain)
        model.compile(backend="aot_eager")
        return model, plain
    if how == "submodule":
        return nn.Sequential(torch.compile(plain[:2], backend="aot_eager"), *plain[2:]), plain
    function = torch.compile(lambda f, x: f(x) * 1.0, backend="aot_eager")
    return nn.Sequential(model_of(lambda s, x: function(s.inner, x), inner=plain)), plain


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("how", ["whole", "method", "submodule", "function"])
@pytest.mark.parametrize("called", [False, True])
def test_exact(engine: Any, how: str, called: bool) -> None:
    """Whether or not it has been compiled before the first step."""
    model, plain = _compiled(how)
    batch, clean = vectors(6), vectors(4)
    if called:
        model(batch[0])
    expected = truth(plain, cross_entropy, batch, clean)
    reweighter = Reweighter(model, cross_entropy, engine=engine)
    for _ in range(2):
        model.zero_grad()
        step = reweighter.backward(batch, clean)
        names = dict(zip(expected.gradients, dict(model.named_parameters()), strict=True))
        gradients = {names[k]: g for k, g in expected.gradients.items()}
        assert_matches(step, model, dataclasses.replace(expected, gradients=gradients))
        assert step.engine == ("layerwise" if engine == "auto" else engine)


def test_between_steps_the_compiled_code_is_kept() -> None:
    model, plain = _compiled("whole")
    batch, clean = vectors(6), vectors(4)
    before = model(batch[0])
    frames = counters["frames"]["total"]
    assert frames > 0
    reweighter = Reweighter(model, cross_entropy)
    for _ in range(2):
        reweighter.backward(batch, clean)
        assert torch.equal(model(batch[0]), before)
    assert counters["frames"]["total"] == frames
    assert torch.allclose(before, plain(batch[0]))


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_loss_function(engine: Any) -> None:
    model = mlp()
    batch, clean = vectors(6), vectors(4)
    expected = truth(model, cross_entropy, batch, clean)
    loss = torch.compile(cross_entropy, backend="aot_eager")
    step = Reweighter(model, loss, engine=engine).backward(batch, clean)
    assert_matches(step, model, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_restored_after_an_error(engine: Any) -> None:
    model, _ = _compiled("whole")
    batch, clean = vectors(6), vectors(4)

    def interrupt(out: Tensor, y: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        Reweighter(model, interrupt, engine=engine).backward(batch, clean)


def test_the_callers_stance_is_kept() -> None:
    model, _ = _compiled("whole")
    with torch.compiler.set_stance("eager_on_recompile"):
        Reweighter(model, cross_entropy).backward(vectors(6), vectors(4))
        assert eval_frame._stance.stance == "eager_on_recompile"


def test_a_compiled_step_is_one_sentence() -> None:
    model = mlp()
    reweighter = Reweighter(model, cross_entropy)
    step = torch.compile(reweighter.backward, backend="eager")
    with pytest.raises(RuntimeError, match=r"a step cannot run inside torch\.compile"):
        step(vectors(6), vectors(4))
    assert all(p.grad is None for p in model.parameters())
    reweighter.backward(vectors(6), vectors(4))


def test_a_step_does_not_load_the_compiler() -> None:
    code = """
        import sys
        import torch
        import l2rw_ext
        from torch.nn import functional as F
        model = torch.nn.Linear(4, 3)
        loss = lambda out, y: F.cross_entropy(out, y, reduction="none")
        x, y = torch.randn(6, 4), torch.randint(3, (6,))
        l2rw_ext.Reweighter(model, loss).backward((x[:4], y[:4]), (x[4:], y[4:]))
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "part"])
def test_scripted(how: str) -> None:
    """No torch function is seen inside; double backward sees a graph as any other."""
    plain = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    batch, clean = vectors(6), vectors(4)
    expected = truth(plain, cross_entropy, batch, clean)
    if how == "part":
        model: nn.Module = nn.Sequential(torch.jit.script(plain[0]), *plain[1:])
    else:
        model = torch.jit.script(plain) if how == "script" else torch.jit.trace(plain, batch[0])
    for _ in range(3):  # the executor optimises at the second call
        for engine in ("layerwise", "forward"):
            reweighter = Reweighter(model, cross_entropy, engine=engine)  # type: ignore[arg-type]
            with pytest.raises(NotExactError, match="scripted"), unchanged(model):
                reweighter.backward(batch, clean)
        for engine in ("auto", "double_backward"):
            model.zero_grad()
            reweighter = Reweighter(model, cross_entropy, engine=engine)  # type: ignore[arg-type]
            if engine == "auto":
                with pytest.warns(UserWarning, match="scripted"):
                    step = reweighter.backward(batch, clean)
            else:
                step = reweighter.backward(batch, clean)
            assert step.engine == "double_backward"
            assert_matches(step, model, expected)
