"""The parts that methods on task vectors are made of.

A stage takes the task vectors τ of all experts (*deltas*) at one place and
returns them changed (a *sparsifier*) or returns one delta (a *consensus*, a
scale). `chain` strings stages together:

    ties = chain(trim(density), disjoint_mean(), scale(1.0), scope='model')
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp

from mergekit_jax import checks
from mergekit_jax.kernels.product import product
from mergekit_jax.kernels.select import kth_magnitude
from mergekit_jax.kernels.sums import count
from mergekit_jax.rule import (
  NEEDS,
  needs_of,
  Place,
  Report,
  rule,
  scope_of,
  SCOPES,
  together,
  Total,
)

Deltas = Sequence[jax.Array]
Weights = Sequence[jax.typing.ArrayLike] | jax.Array | None


def chain(*stages: Any, scope: str | None = None) -> Chain:
  """A merge rule from stages: base + stages(experts − base).

  Args:
    *stages: instances of `@rule` classes, called as `stage(t, deltas)`, which
      return deltas or one delta, and are generators if they ask for totals; the
      last must return one delta.
    scope: 'tensor' or 'model', the set over which their totals are taken; None
      means 'model' if that is the scope of one of the stages, else 'tensor'.

  Returns:
    A rule.

  Raises:
    ValueError: if there is no stage, one is no `@rule` or needs what nobody
      knows, or the scope is unknown.
  """
  if not stages:
    raise ValueError('chain() was given no stage; give at least a consensus.')
  for stage in stages:
    if not callable(stage) or jax.tree_util.all_leaves([stage]):
      raise ValueError(
        f'chain() was given {stage!r}; a stage is an instance of a class that '
        'is decorated with @mergekit_jax.rule, such as trim(0.2).'
      )
    name = type(stage).__name__
    checks.one_of(f'{name}.needs', needs_of(stage), NEEDS)
    checks.one_of(f'{name}.scope', scope_of(stage), SCOPES)
  if scope is None:
    scope = max(map(scope_of, stages), key=SCOPES.index)
  return Chain(stages, checks.one_of('scope', scope, SCOPES))


@rule
class Chain:
  """See `chain`."""

  stages: tuple
  scope: str

  @property
  def needs(self) -> str:
    """The most that one of the stages needs."""
    return max(map(needs_of, self.stages), key=NEEDS.index)

  def __call__(self, t: Place):
    deltas: Any = [expert - t.base for expert in t.experts]
    for stage in self.stages:
      deltas = stage(t, deltas)
      if inspect.isgenerator(deltas):
        deltas = yield from deltas
    if isinstance(deltas, (list, tuple)):
      raise ValueError(
        f'The stages of a chain end with {len(deltas)} task vectors; end with '
        'a consensus that makes one of them, such as weighted_sum().'
      )
    return t.base + deltas


def trim(density: jax.typing.ArrayLike) -> Trim:
  """Keeps the largest magnitudes of each task vector, drops the rest.

  A sparsifier of TIES (Yadav et al., 2023, arXiv 2306.01708).

  Args:
    density: the fraction kept, in (0, 1], rounded to millionths. Equal
      magnitudes at the cut are all kept; 1 keeps everything.

  Returns:
    A stage: deltas, float32 `[*shape]` each, to as many of these.

  Raises:
    ValueError: if the density is not in (0, 1].
  """
  return Trim(checks.within('density', density, 0, 1, closed=(False, True)))


@rule
class Trim:
  """See `trim`."""

  density: jax.typing.ArrayLike

  def __call__(self, t: Place, deltas: Deltas):
    del t
    _demand_several(self, deltas)
    density = checks.one('density', self.density)
    thresholds = yield from together(
      kth_magnitude(delta, density) for delta in deltas
    )
    # Where as many are NaN as are to be kept, these are.
    thresholds = [jnp.where(jnp.isnan(x), jnp.inf, x) for x in thresholds]
    trimmed = [
      jnp.where(jnp.abs(delta) < threshold, 0, delta)  # keeps NaN
      for delta, threshold in zip(deltas, thresholds, strict=True)
    ]
    yield Report(density=[delta != 0 for delta in trimmed])
    return trimmed


def drop(drop_rate: jax.typing.ArrayLike) -> Drop:
  """Drops each entry at random and rescales the others, unbiased.

  The sparsifier of DARE (Yu et al., 2023, arXiv 2311.03099).

  Args:
    drop_rate: probability p of dropping, in [0, 1), rounded to 1/65536;
      survivors are multiplied by 1 / (1 − p) with the rounded p.

  Returns:
    A stage: deltas, float32 `[*shape]` each, to as many of these.

  Raises:
    ValueError: if the drop rate is not in [0, 1).
  """
  return Drop(checks.within('drop_rate', drop_rate, 0, 1, (True, False)))


@rule
class Drop:
  """See `drop`."""

  drop_rate: jax.typing.ArrayLike

  def __call__(self, t: Place, deltas: Deltas):
    _demand_several(self, deltas)
    levels = 2**16
    drop_rate = checks.one('drop_rate', self.drop_rate)
    dropped = jnp.round(jnp.float32(levels) * drop_rate)
    dropped = jnp.minimum(dropped, levels - 1)
    rescale = levels / (levels - dropped)
    kept = [
      t.random_bits(i) >= dropped.astype(jnp.uint32) for i in range(len(deltas))
    ]
    yield Report(density=kept)
    return [
      jnp.where(mask, product(delta, rescale), 0)
      for mask, delta in zip(kept, deltas, strict=True)
    ]


def weighted_sum(weights: Weights = None) -> WeightedSum:
  """Consensus: Σ wi τi (Ilharco et al., 2022, arXiv 2212.04089).

  Args:
    weights: one finite number an expert; None means 1 each.

  Returns:
    A stage: deltas, float32 `[*shape]` each, to one of these.

  Raises:
    ValueError: if a weight is not finite or, as they are merged, there are not
      as many as experts.
  """
  return WeightedSum(checks.weights(weights))


@rule
class WeightedSum:
  """See `weighted_sum`."""

  weights: Weights

  def __call__(self, t: Place, deltas: Deltas):
    del t
    _demand_several(self, deltas)
    yield Report(sign_conflict=_sign_conflict(deltas))
    return sum(weigh(deltas, self.weights))


def disjoint_mean(
  weights: Weights = None,
  election: str = 'mass',
  zero_mass: str = 'positive',
  combine: str = 'mean',
) -> DisjointMean:
  """Consensus: elects a sign per entry, averages the experts that agree.

  As in TIES (Yadav et al., 2023, arXiv 2306.01708).

  Args:
    weights: one number ≥ 0 an expert; None means 1 each. The mean divides by
      the sum of the weights of the experts that agree.
    election: 'mass' elects the sign of the sum of the weighted deltas, 'count'
      the sign of the sum of their signs.
    zero_mass: what is elected where that sum is exactly 0: 'positive', or
      'majority', the majority of the elected signs over the scope, else
      positive, at the price of one more round.
    combine: 'mean', or 'sum', which does not divide.

  Returns:
    A stage: deltas, float32 `[*shape]` each, to one of these.

  Raises:
    ValueError: if a weight is negative, not finite, or neither 0 nor between
      1e-18 and 1e18, `election`, `zero_mass` or `combine` is unknown or, as
      they are merged, there are not as many weights as experts.
  """
  return DisjointMean(
    checks.weights(weights, at_least=0),
    checks.one_of('election', election, ('mass', 'count')),
    checks.one_of('zero_mass', zero_mass, ('positive', 'majority')),
    checks.one_of('combine', combine, ('mean', 'sum')),
  )


@rule
class DisjointMean:
  """See `disjoint_mean`."""

  weights: Weights
  election: str
  zero_mass: str
  combine: str

  def __call__(self, t: Place, deltas: Deltas):
    del t
    _demand_several(self, deltas)
    weighted = weigh(deltas, self.weights)
    votes = weighted if self.election == 'mass' else map(jnp.sign, weighted)
    elected = jnp.sign(sum(votes))
    tie = jnp.float32(1)
    if self.zero_mass == 'majority':
      positive, negative = count(elected > 0), count(elected < 0)
      tie = yield Total((positive, negative), _majority)
    elected = jnp.where(elected == 0, tie, elected)
    yield Report(sign_conflict=_sign_conflict(deltas))
    # By the deltas alone: no gradient could else tell an expert of weight 0
    # from one that disagrees.
    along = [delta * elected for delta in deltas]
    agree = [x > 0 for x in along]
    agreed = [jnp.where(x > 0, x, 0) for x in along]
    total = elected * sum(weigh(agreed, self.weights))
    if self.combine == 'mean':
      weight = sum(weigh(agree, self.weights))
      none = weight == 0
      total = jnp.where(none, 0, total / jnp.where(none, 1, weight))
    return jnp.where(jnp.isnan(elected), jnp.nan, total)


def _majority(total, answers):
  del answers
  positive, negative = total
  return jnp.where(negative > positive, -1.0, 1.0)


def scale(factor: jax.typing.ArrayLike) -> Scale:
  """Multiplies a delta by λ.

  Args:
    factor: λ, a finite number.

  Returns:
    A stage: one delta, float32 `[*shape]`, to one.

  Raises:
    ValueError: if λ is not finite.
  """
  return Scale(checks.finite('scale', factor))


@rule
class Scale:
  """See `scale`."""

  factor: jax.typing.ArrayLike

  def __call__(self, t: Place, delta: jax.Array) -> jax.Array:
    del t
    if isinstance(delta, (list, tuple)):
      raise ValueError(
        f'scale() was given {len(delta)} task vectors; put a consensus that '
        'makes one of them before it, such as weighted_sum().'
      )
    return product(checks.one('scale', self.factor), delta)


def _demand_several(stage: Any, deltas: Any) -> None:
  """Refuses one delta, along whose rows a stage would go as if experts."""
  if not isinstance(deltas, (list, tuple)):
    raise ValueError(
      f'{type(stage).__name__} takes the task vectors of all experts, but the '
      'stage before it in the chain makes one of them. Put it before the '
      'consensus, of which a chain has one.'
    )


def weigh(values: Sequence[jax.Array], weights: Weights) -> list[jax.Array]:
  """Each value times its expert's weight, float32.

  Args:
    values: one array an expert, `[*shape]`.
    weights: one number an expert, or None for 1 each.

  Raises:
    ValueError: if there are not as many weights as experts, or one is an
      array.
  """
  if weights is None:
    return [value.astype(jnp.float32) for value in values]
  if len(weights) != len(values):
    raise ValueError(
      f'{len(weights)} weights were given for {len(values)} experts; give '
      'one weight for each expert, in the same order.'
    )
  return [
    product(value, jnp.asarray(checks.one('weight', weight), jnp.float32))
    for value, weight in zip(values, weights, strict=True)
  ]


def _sign_conflict(deltas: Deltas) -> tuple[jax.Array, jax.Array]:
  """Entries that experts move in both directions, of those that any moves."""
  up = functools.reduce(jnp.logical_or, [delta > 0 for delta in deltas])
  down = functools.reduce(jnp.logical_or, [delta < 0 for delta in deltas])
  return up & down, up | down
