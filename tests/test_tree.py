"""Where parameters begin, and which axes are stacked, in small trees."""

from types import SimpleNamespace

import numpy as np

from mergekit_jax import roots, tree

FLOAT, INTEGER = (
  SimpleNamespace(dtype=np.dtype(n), shape=(2,)) for n in ('f4', 'i4')
)


def test_what_only_begins_like_a_root_is_not_below_it():
  assert roots.below('params', 'params/a') and roots.below('params', 'params')
  assert not roots.below('params', 'params_ema/a')


def test_numbers_beside_a_model_are_no_module():
  leaves = {'model/a': FLOAT, 'vocabulary/size': INTEGER}
  assert roots.parameter_root(leaves) == 'model'
  assert roots.parameter_root({**leaves, 'head/a': FLOAT}) == ''


def test_only_what_is_merged_is_missed_in_the_base():
  others = [{'a': FLOAT, 'b': FLOAT, 'count': INTEGER}]
  assert tree.only_in(others, {'a': FLOAT}) == ['b']


def test_stacked_axes_ascend_from_the_first_to_the_last():
  shapes = {'a': (2, 3, 4)}
  for given, axes in (-3, (0,)), ((2, 0, -1), (0, 2)), ((-1, 1), (1, 2)):
    assert tree.stacked_axes({'a': given}, shapes) == {'a': axes}
