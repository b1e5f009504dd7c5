"""Runs a plan: read ahead → kernel → write behind.

One thread drives. Reads and writes are futures of the checkpoint formats, so
while the devices merge one unit, the next is read and the last one written; the
order of everything else, collectives included, is the plan's.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Container, Mapping, Sequence
import dataclasses
import functools
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from mergekit_jax import processes, sharding
from mergekit_jax.driving import drive, widths
from mergekit_jax.driving.block import Block
from mergekit_jax.driving.reported import Flags
from mergekit_jax.planning import plan as plans
from mergekit_jax.rule import scope_of
from mergekit_jax.streaming.programs import ahead, Programs, Round
from mergekit_jax.streaming.reading import Loading, Model, read_ahead
from mergekit_jax.streaming.views import block_of, view


class Sink(Protocol):
  """Where one merge goes, unit by unit.

  Attributes:
    keys: the random key of every merged leaf, uint32 `[2]`.
    done: numbers of units that are there already.
  """

  keys: Mapping[str, np.ndarray]
  done: Collection[int]

  def take(
    self, loading: Loading, merged: jax.Array, facts: Mapping[str, Any]
  ) -> None:
    """Takes a merged box: its bits in row-major order, the sums of `measure`.

    The buffers of the unit are read into again once this returns.
    """

  def copy(self, loading: Loading) -> None:
    """Takes a box as the first model has it; the same holds."""

  def finish(self) -> None:
    """Returns when everything taken is where it belongs."""

  def settle(self) -> None:
    """After an error: keeps what can be kept."""


# Compiled programs refuse to run where jit is off, and answers would have other
# bits.
@jax.disable_jit(False)
def run(
  plan: plans.Plan,
  models: Sequence[Model],
  sinks: Sequence[Sink],
  *,
  done: Container[int],
  allow_nonfinite: bool,
  report: bool,
  advanced: Callable[[plans.Unit], None],
) -> None:
  """Merges every unit of a plan.

  Args:
    plan: the plan.
    models: the sources, the base first if there is one.
    sinks: where the merges go, in the order of the rules of the plan's scopes.
    done: numbers of units that are in all sinks already.
    allow_nonfinite: whether NaN and Inf may pass.
    report: whether the sinks want to know what the rules report.
    advanced: called after every unit.

  Raises:
    FloatingPointError: if a model holds NaN or Inf or the merge overflows, and
      these are not allowed.
    OSError: if a model cannot be read or the output not written.
  """
  try:
    merging = [*map(_Merging, sinks)]
    with ahead(plan, report, done) as programs_of:
      for loading in read_ahead(plan, models, done):
        programs = programs_of(loading.unit)
        _merge_unit(
          *(loading, plan, models, merging, programs),
          allow_nonfinite=allow_nonfinite,
        )
        advanced(loading.unit)
    for sink in sinks:
      sink.finish()
  except BaseException:
    for sink in sinks:
      sink.settle()
    raise


def _merge_unit(
  loading: Loading,
  plan: plans.Plan,
  models: Sequence[Model],
  merging: Sequence[_Merging],
  programs: Sequence[Programs],
  *,
  allow_nonfinite: bool,
) -> None:
  """Takes every merge one unit further."""
  unit = loading.unit
  scope = plan.scopes[unit.scope]
  wanting = [
    i
    for i, merge in enumerate(merging)
    if not (unit.written and unit.number in merge.sink.done)
  ]
  if not scope.rules:
    for i in wanting:
      merging[i].sink.copy(loading)
    return
  block = _block(loading, scope.rules, plan)
  partials = _Partials(plan.mesh)
  for i in wanting:
    sink = merging[i].sink
    own = dataclasses.replace(block, key=sink.keys[unit.tensor.path])
    reached = merging[i].advance(
      *(scope.rules[i], programs[i], unit, own, partials)
    )
    if reached is None:
      continue
    merged, flags = reached
    measured = programs[i].measure(own, merged, flags)
    sums = jax.tree.map(
      lambda x: np.asarray(x).tolist(), _everywhere(measured, plan.mesh)
    )
    if not allow_nonfinite:
      _demand_finite(loading, models, merged, sums)
    sink.take(loading, merged, {'sums': sums})


class _Partials:
  """The partials of one box, found once for all merges that ask the same."""

  def __init__(self, mesh: Mesh):
    self._mesh = mesh
    self._found: dict[Any, Any] = {}

  def of(
    self, ask: Round, rule: Any, block: Block, known: Sequence[Any]
  ) -> Any:
    """The partials of a round, on the host, in 64 bits."""
    given = (rule, block, _narrowed(known))
    question = (ask, ask.question(*given))
    if question not in self._found:
      self._found[question] = jax.tree.map(
        lambda x: np.asarray(x).astype(widths.wide_dtype(x.dtype)),
        _everywhere(ask(*given), self._mesh),
      )
    return self._found[question]


class _Merging:
  """One merge under way: the totals of the open round, the answers so far."""

  def __init__(self, sink: Sink):
    self.sink = sink
    self._totals: Any = None
    self._answers: dict[Any, list[Any]] = collections.defaultdict(list)

  def advance(
    self,
    rule: Any,
    programs: Programs,
    unit: plans.Unit,
    block: Block,
    partials: _Partials,
  ) -> tuple[jax.Array, Flags] | None:
    """Takes a rule one read further; gives merge and flags at the last one."""
    if plans.answered_at_once(rule, unit.tensor.whole_layers):
      if not unit.written:
        return None
      known = _answered(rule, programs, block, partials)
      return programs.merge(rule, block, _narrowed(known))
    if unit.rounds_left > len(programs.partials):
      return None
    of_model = scope_of(rule) == 'model'
    known = self._answers[
      ('scope', unit.scope) if of_model else ('tiling', unit.tiling)
    ]
    if unit.written:
      return programs.merge(rule, block, _narrowed(known))
    found = partials.of(programs.partials[len(known)], rule, block, known)
    if self._totals is not None:
      found = jax.tree.map(np.add, self._totals, found)
    self._totals = found
    if unit.ends_scope if of_model else unit.ends_tiling:
      known.append(_answer(rule, block, self._totals, known))
      self._totals = None
    return None


def _answered(
  rule: Any, programs: Programs, block: Block, partials: _Partials
) -> list[Any]:
  """All answers to a rule on a block that holds all its totals are about."""
  known: list[Any] = []
  for ask in programs.partials:
    totals = partials.of(ask, rule, block, known)
    known.append(_answer(rule, block, totals, known))
  return known


def _block(loading: Loading, rules: Sequence[Any], plan: plans.Plan) -> Block:
  """The unit as arrays on the mesh; the key is still to be put in."""
  unit = loading.unit
  seen = view(rules, unit.tensor, unit.box, plan.mesh)
  placed = NamedSharding(plan.mesh, seen.spec)
  arrays = [
    loading.array(model, placed, seen.shape)
    for model in range(len(loading.buffers))
  ]
  return block_of(unit.tensor, seen, arrays, plan.has_base, key=None)


def _answer(rule: Any, block: Block, totals: Any, known: Sequence[Any]) -> Any:
  """An answer computed on the host, in 64 bits."""
  with jax.default_device(sharding.host_device()):
    answer = drive.answer(rule, block, totals, known)
  return jax.tree.map(np.asarray, answer)


def _narrowed(known: Sequence[Any]) -> list[Any]:
  """Answers as programs take them.

  JAX moves a 64-bit array to devices of another kind as one of 32 bits, which
  is none that a program with 64-bit arguments could take.
  """
  return jax.tree.map(widths.narrow, list(known))


def _everywhere(tree: Any, mesh: Mesh) -> Any:
  """Small arrays of a mesh of several processes, made readable on each."""
  replicated = (leaf.is_fully_replicated for leaf in jax.tree.leaves(tree))
  if jax.process_count() == 1 or all(replicated):
    return tree
  with jax.enable_x64(True):
    return _replicate_on(mesh)(tree)


@functools.cache
def _replicate_on(mesh: Mesh) -> Any:
  """Kept, because JAX compiles anew for every new function that it is given."""

  def replicate(tree: Any) -> Any:
    return tree

  return jax.jit(replicate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def are_finite(sums: Mapping[str, Any]) -> bool:
  """Whether sums of `measure` show neither NaN nor Inf."""
  return bool(np.isfinite([sums['merged'], *sums['experts']]).all())


def _demand_finite(
  loading: Loading,
  models: Sequence[Model],
  merged: jax.Array,
  sums: Mapping[str, Any],
) -> None:
  """Names the model and tensor that hold NaN or Inf, if any does.

  Squares of large values overflow in the sums, so they alone tell nothing, and
  a process sees its own elements only. All count, and all raise or none does.

  Args:
    loading: the unit.
    models: the sources.
    merged: the bits of its merge.
    sums: from `measure`, the same on all processes; any non-finite value shows
      in them.
  """
  if are_finite(sums):
    return
  path, dtype = loading.unit.tensor.path, loading.unit.tensor.dtype
  blocks = [
    [b for p, b in zip(loading.parts, buffers, strict=True) if p.is_first]
    for buffers in loading.buffers
  ]
  blocks.append(
    [
      np.asarray(shard.data).view(dtype)
      for shard in merged.addressable_shards
      if shard.replica_id == 0
    ]
  )
  *of_models, of_merge = processes.all_gathered(
    [sum(map(_count_nonfinite, each)) for each in blocks]
  ).T
  for model, bad in zip(models, of_models, strict=True):
    if bad.any():
      raise FloatingPointError(
        f'{model.name}: {model.paths[path]} in {model.checkpoint.path} holds '
        f'{bad.sum()} non-finite values (NaN or Inf) in '
        f'{_where(loading, bad)}. Repair the checkpoint, leave it out, or pass '
        'allow_nonfinite=True (--allow_nonfinite) to let them through.'
      )
  if of_merge.any():
    raise FloatingPointError(
      f'{path}: merging finite models gave {of_merge.sum()} non-finite values '
      f'in {_where(loading, of_merge)}: float32, in which rules compute, or '
      f'{dtype}, in which the merge is stored, overflows. Use a smaller scale, '
      'a dtype with more range, or allow_nonfinite=True (--allow_nonfinite).'
    )


def _where(loading: Loading, bad: np.ndarray) -> str:
  """The box of a unit, and the processes that hold its bad elements."""
  box = f'the box at {loading.unit.box.origin}'
  if len(bad) == 1:
    return box
  holders = ', '.join(f'process {number}' for number in np.flatnonzero(bad))
  return f'{box} on {holders}'


def _count_nonfinite(block: np.ndarray) -> int:
  return int(np.sum(~np.isfinite(block.astype(np.float64))))
