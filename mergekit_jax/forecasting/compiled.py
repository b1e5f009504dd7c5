"""The kernels of a plan, compiled before a byte of the models is read.

Neither the models nor the devices need be there: the compiler says what every
kernel needs on a device, and whether it gathers what is spread.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import concurrent.futures
import dataclasses
import math
import operator
import os
import re
from typing import Any

import jax
import numpy as np

from mergekit_jax import sharding
from mergekit_jax.planning.plan import Box, Plan, Tensor
from mergekit_jax.streaming.programs import steps
from mergekit_jax.streaming.views import View, view

_COLLECTIVE = re.compile(
  r' (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)'
  r'(?:-start)?\('
)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A compiled kernel of a merge.

  Attributes:
    path: a leaf that it merges.
    box: the box.
    step: 'round 1', ..., 'merge' or 'measure'.
    device_bytes: what it needs on a device: arguments, results and temporary
      arrays.
    collectives: how many operations of each kind move data between devices.
  """

  path: str
  box: Box
  step: str
  device_bytes: int
  collectives: dict[str, int]


def compile_kernels(plan: Plan) -> list[Kernel]:
  """Compiles the kernels that will need most memory on a device.

  Boxes that are spread alike differ in size alone. Of these, the one with the
  most elements on a device is compiled and the one with the most layers, whose
  totals are the largest: all rounds, the merge and its measurement.

  Args:
    plan: the plan. Its devices need not be free, nor real.

  Returns:
    The kernels.
  """
  options = None
  if plan.mesh.devices.flat[0].platform == 'cpu':
    # Machine code is not run: memory and collectives are settled before it.
    options = {'xla_backend_optimization_level': 0}

  def compiled(tensor: Tensor, box: Box, step: str, lowered: Any) -> Kernel:
    program = lowered.compile(compiler_options=options)
    memory = program.memory_analysis()
    return Kernel(
      tensor.path,
      box,
      step,
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes
      - memory.alias_size_in_bytes,
      dict(collections.Counter(_COLLECTIVE.findall(program.as_text()))),
    )

  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    compiling = [
      pool.submit(compiled, tensor, box, step, lowered)
      for rule, rounds, seen, tensor, box in _largest_boxes(plan)
      for step, lowered in steps(plan, rule, rounds, seen, tensor)
    ]
  return [kernel.result() for kernel in compiling]


def _largest_boxes(
  plan: Plan,
) -> Iterator[tuple[Any, int, View, Tensor, Box]]:
  """Rules, their rounds, and the boxes for which to compile them."""
  programs = collections.defaultdict(lambda: collections.defaultdict(dict))
  for scope in plan.scopes:
    # Many rules are compiled as one, and few boxes differ from all others.
    kinds = {}
    for rule, rounds in zip(scope.rules, scope.rounds, strict=True):
      numbers = tuple(map(np.shape, jax.tree.leaves(rule)))
      kinds.setdefault((jax.tree.structure(rule), numbers), (rule, rounds))
    for tensor in scope.tensors:
      stored = (tensor.sources, tensor.dtype, len(tensor.stacked))
      boxes = {}
      for box in tensor.boxes:
        boxes.setdefault((box.shape, box.spec), box)
      for (shape, spec), box in boxes.items():
        spread = any(spec) and (spec, tensor.stacked)
        shards = sharding.shards(spec, len(shape), plan.mesh)
        layers = math.prod(shape[axis] for axis in tensor.stacked)
        size = (layers, math.prod(shape) // math.prod(shards))
        for kind, (rule, rounds) in kinds.items():
          programs[kind, stored][spread].setdefault(
            size, (rule, rounds, scope.rules, tensor, box)
          )
  for spreads in programs.values():
    whole = _largest(spreads.pop(False, {}))
    chosen = [each for boxes in spreads.values() for each in _largest(boxes)]
    # A box that is not spread communicates nothing: only its size counts.
    chosen += [
      (size, box)
      for size, box in whole
      if not any(all(map(operator.le, size, other)) for other, _ in chosen)
    ]
    for _, (rule, rounds, rules, tensor, box) in chosen:
      seen = view(rules, tensor, box, plan.mesh)
      yield rule, rounds, seen, tensor, box


def _largest(
  boxes: dict[tuple[int, int], Any],
) -> list[tuple[tuple[int, int], Any]]:
  """Of boxes by layers and elements, those with the most of either."""
  sizes = {max(boxes), max(boxes, key=lambda size: size[1])} if boxes else ()
  return [(size, boxes[size]) for size in sizes]
