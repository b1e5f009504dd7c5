"""Merges of one read that ask the same are answered by one kernel."""

import collections
import functools

import jax.numpy as jnp
import pytest

import mergekit_jax as mk
from mergekit_jax.streaming import programs
from tests import checkpoints, compare, models

SHAPES = {'layers/kernel': (300, 3, 97), 'odd': (7, 5)}
STACKED = {r'.*/layers/.*': 1}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  return checkpoints.save_set(
    tmp_path_factory.mktemp('sources'), SHAPES, experts=2
  )


@pytest.fixture
def boxes(monkeypatch):
  """Counts boxes whose partials are asked for, and found, by round."""
  counted = {'asked': collections.Counter(), 'found': collections.Counter()}
  for name, of in (('question', 'asked'), ('__call__', 'found')):
    method = getattr(programs.Round, name)

    def spy(ask, rule, block, answers, method=method, of=counted[of]):
      of[len(answers)] += 1
      return method(ask, rule, block, answers)

    monkeypatch.setattr(programs.Round, name, spy)
  return counted


@mk.rule
class Kept:
  """The mean, scaled, plus the share of elements that random bits keep."""

  rate: float
  scale: float

  def __call__(self, t: mk.Place):
    kept = t.random_bits(0) < self.rate * 2**16
    size, count = mk.count(jnp.ones_like(kept)), mk.count(kept)
    share = yield mk.Total(
      (size, count), lambda total, answers: total[1] / total[0]
    )
    return self.scale * sum(t.experts) + share


def assert_as_in_memory(saved, methods, seeds, **options):
  """Bitwise, where nothing is shared."""
  base, experts = saved
  swept = mk.sweep(
    methods,
    experts,
    base,
    models.unnest,
    seed=seeds,
    stacked_axes=STACKED,
    **options,
  )
  tree, others = models.trees(SHAPES, 'float32', 2)
  for name, method in methods.items():
    alone = mk.merge(
      method, others, tree, key=seeds[name], stacked_axes=STACKED
    )
    compare.same_bits(swept[name], models.unnest(alone))


def assert_found(boxes, of_merges):
  """How often each round was found, of as often as it was asked for."""
  asked, found = boxes['asked'], boxes['found']
  assert set(asked) == set(of_merges)
  for known, (times, merges) in of_merges.items():
    assert found[known] * merges == asked[known] * times


@pytest.mark.parametrize('budget', ['4GiB', '13MB'])
@pytest.mark.parametrize('scope', ['tensor', 'model'])
class TestOfTies:
  """Of leaves that fit, and of some that are cut."""

  def test_scales_share_both_rounds(self, saved, boxes, scope, budget):
    ties = functools.partial(mk.ties, density=0.3, scope=scope)
    methods = {str(scale): ties(scale=scale) for scale in (0.2, 0.7, 1.3)}
    seeds = {name: i for i, name in enumerate(methods)}
    assert_as_in_memory(saved, methods, seeds, memory_budget=budget)
    assert_found(boxes, {0: (1, 3), 1: (1, 3)})

  def test_densities_share_the_first(self, saved, boxes, scope, budget):
    """By whose answers the second one differs."""
    ties = functools.partial(mk.ties, scope=scope)
    methods = {str(density): ties(density) for density in (0.1, 0.8)}
    methods['0.1, scaled'] = ties(0.1, scale=0.5)
    seeds = dict.fromkeys(methods, 0)
    assert_as_in_memory(saved, methods, seeds, memory_budget=budget)
    assert_found(boxes, {0: (1, 3), 1: (2, 3)})

  def test_a_majority_hangs_on_weights(self, saved, boxes, scope, budget):
    """The trim before it does not."""
    ties = functools.partial(mk.ties, scope=scope, zero_mass='majority')
    methods = {
      'one': ties(weights=[0.5, 2.0]),
      'two': ties(weights=[2.0, 0.5]),
    }
    seeds = dict.fromkeys(methods, 0)
    assert_as_in_memory(saved, methods, seeds, memory_budget=budget)
    assert_found(boxes, {0: (1, 2), 1: (1, 2), 2: (2, 2)})


@pytest.mark.parametrize(
  ('methods', 'seeds', 'times'),
  [
    ((Kept(0.3, 1.0), Kept(0.3, 2.0)), (5, 5), 1),
    ((Kept(0.3, 1.0), Kept(0.3, 2.0)), (5, 6), 2),
    ((Kept(0.3, 1.0), Kept(0.4, 1.0)), (5, 5), 2),
    ((Kept(0.3, 1.0), Kept(0.3, 1)), (5, 5), 2),
  ],
  ids=['alike', 'other_key', 'other_number', 'other_type'],
)
def test_merges_share_what_hangs_on_the_same(
  saved, boxes, methods, seeds, times
):
  assert_as_in_memory(
    *(saved, dict(enumerate(methods)), dict(enumerate(seeds)))
  )
  assert_found(boxes, {0: (times, 2)})
