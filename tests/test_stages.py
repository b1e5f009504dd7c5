"""Stages and methods on a few numbers, worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.rule import needs_of, Place, scope_of, step
from tests.test_rule import stage_from


def after(stage, *deltas, bits=None):
  """What a stage that asks for no totals makes of task vectors."""
  place = Place(None, [], 0, lambda _: jnp.array(bits, jnp.uint32))
  return step(stage(place, [jnp.array(d) for d in deltas]), []).returned


@pytest.mark.parametrize(
  'given, documented',
  [
    (mk.task_arithmetic(), mk.task_arithmetic(1.0, None)),
    (mk.dare(), mk.dare(0.9, 1.0, None)),
    (mk.ties(), mk.ties(0.2, 1.0, None, 'model', 'mass', 'positive', 'mean')),
    (
      mk.dare_ties(),
      mk.dare_ties(0.9, None, 1.0, None, 'model', 'mass', 'positive', 'mean'),
    ),
  ],
)
def test_defaults_are_those_of_the_papers(given, documented):
  assert given == documented


def test_a_chain_is_of_tensors_unless_it_says_more():
  assert scope_of(mk.chain(mk.trim(0.5), mk.weighted_sum())) == 'tensor'


def test_a_chain_needs_what_its_hungriest_stage_needs():
  row, matrix = (stage_from(needs=n) for n in ('row', 'matrix'))
  assert needs_of(mk.chain(row, matrix)) == 'matrix'
  assert needs_of(mk.chain(mk.trim(0.5), row)) == 'row'


def test_a_drop_rate_of_nearly_one_keeps_one_of_65536():
  (kept,) = after(mk.drop(1 - 1e-7), [1.0, 1.0], bits=[65534, 65535])
  np.testing.assert_array_equal(kept, [0, 65536])


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_what_is_dropped_does_not_count(value):
  """Nor a value that is not finite."""
  (kept,) = after(mk.drop(0.5), [value, 1.0], bits=[2**15 - 1, 2**15])
  np.testing.assert_array_equal(kept, [0, 2])


def test_an_expert_of_weight_zero_has_no_vote():
  consensus = mk.disjoint_mean([1, 0, 0], election='count')
  np.testing.assert_array_equal(after(consensus, [3.0], [-1.0], [-1.0]), [3])


def test_a_disjoint_sum():
  """Of the second entry none is left, of the third two disagree."""
  experts = [3.0, 0.0, -2.0], [1.0, 0.0, 5.0], [-1.0, 0.0, -1.0]
  consensus = mk.disjoint_mean([1, 2, 0.5], combine='sum')
  np.testing.assert_array_equal(after(consensus, *experts), [5, 0, 10])


def test_a_majority_of_neither_sign_is_positive():
  experts = [jnp.array([1.0, -1.0, 2.0]), jnp.array([1.0, -1.0, -2.0])]
  rule = mk.ties(1.0, zero_mass='majority')
  merged = mk.merge(rule, experts, jnp.zeros(3))
  np.testing.assert_array_equal(merged, [1, -1, 2])
