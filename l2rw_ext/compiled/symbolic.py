"""A step on stand-ins without values, whose batches have symbols for sizes.

Its trace serves all batches of whose sizes the conditions hold that the trace has met.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from l2rw_ext.data.batch import tensors
from l2rw_ext.task.task import Task

Sizes = tuple[int, ...]


def sizes(task: Task, given: Sequence[Tensor]) -> Sizes:
    """The sizes and strides of a step's batches, and of other tensors that it is given."""
    found: Sizes = _numbers([*tensors(_batches(task)), *given])
    return found


class Symbolic:
    """The stand-ins of a step.

    Args:
        task: the step, as it ran eagerly before.
        inputs: all tensors that it reads, each once.
        given: those that are neither the model's nor the batches'.

    Raises:
        NotCompilableError: symbols cannot stand for its sizes.
    """

    def __init__(self, task: Task, inputs: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        self._task = task
        # Two sizes that are equal today are one only if the trace asks whether they are.
        self._shapes = ShapeEnv(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._shapes)
        batch = tensors(_batches(task))
        found = {id(x): self._of_batch(k, x) for k, x in enumerate(batch)}
        for x in (*inputs, *task.parameters):  # some of which no forward may read
            if id(x) not in found:
                found[id(x)] = self._mode.from_tensor(x, static_shapes=True)
        self._found = found
        self._sized = [found[id(x)] for x in (*batch, *given)]
        self.inputs = [found[id(x)] for x in inputs]

    def _of_batch(self, k: int, x: Tensor) -> Tensor:
        """A stand-in for all of a tensor but where in its memory it begins."""
        from torch._dynamo.source import ConstantSource  # which loads the compiler, for seconds

        context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC] * x.dim())
        shape, strides, _ = self._shapes.create_symbolic_sizes_strides_storage_offset(
            x, ConstantSource(f"batch_{k}"), symbolic_context=context
        )
        with self._mode:
            return torch.empty_strided(
                shape, strides, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad
            )

    @contextlib.contextmanager
    def step(self) -> Iterator[Task]:
        """In the body, stand-ins take the place of the model's tensors; yields the step on them."""
        task, found = self._task, self._found
        with task.members.exchanged(lambda _, x: found.get(id(x))), self._mode:
            batches = pytree.tree_map(lambda x: found.get(id(x), x), _batches(task))
            inputs, targets, clean_inputs, clean_targets = batches
            clean_size = task.clean_size
            if clean_size is not None:
                clean_size = clean_size.like(clean_inputs, clean_targets)
            parameters: Any = [found[id(p)] for p in task.parameters]
            yield replace(
                task,
                inputs=inputs,
                targets=targets,
                clean_inputs=clean_inputs,
                clean_targets=clean_targets,
                size=task.size.like(inputs, targets),
                clean_size=clean_size,
                parameters=parameters,
                loss_scale=found.get(id(task.loss_scale)),
                concrete=task,
                stand_ins=found,
            )

    def conditions(self) -> Callable[[Sizes], bool]:
        """Whether the trace, and what was compiled of it, serves batches of other sizes."""
        shapes = self._shapes
        text = shapes.produce_guards_expression(_numbers(self._sized)) or "True"
        code: Any = compile(text, "<sizes>", "eval")
        return lambda sizes: bool(shapes.evaluate_guards_expression(code, sizes))


def _batches(task: Task) -> tuple[Any, ...]:
    return task.inputs, task.targets, task.clean_inputs, task.clean_targets


def _numbers(found: Sequence[Tensor]) -> Any:
    return tuple(number for x in found for number in (*x.shape, *x.stride()))
