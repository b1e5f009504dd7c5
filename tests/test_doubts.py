"""Leaves that need not be alike, and warnings of those that are no weights."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.jobs import outputs
from tests import checkpoints

ONES = np.ones((3, 4), np.float32)


@pytest.fixture(params=['in memory', 'streamed'])
def average(request, tmp_path, recwarn):
  """Averages trees; gives the merge and what was warned of."""

  def in_memory(*experts, **arguments):
    merged = mk.merge(mk.average(), experts, **arguments)
    return merged, [str(warning.message) for warning in recwarn]

  def streamed(*experts, **arguments):
    paths = [
      checkpoints.save(tmp_path / f'expert_{i}', tree)
      for i, tree in enumerate(experts)
    ]
    report = mk.merge_checkpoints(
      mk.average(), experts=paths, output=tmp_path / 'out', **arguments
    )
    return checkpoints.load(report.output), report.warnings

  return in_memory if request.param == 'in memory' else streamed


@pytest.mark.parametrize(
  'other',
  [{}, {'ids': np.arange(9)}, {'ids': np.arange(7), 'mask': np.ones(2, bool)}],
  ids=['missing', 'longer', 'more'],
)
def test_leaves_that_are_copied_may_differ(average, other):
  """Such as the positions that some exports hold and others do not."""
  first = {'w': ONES, 'ids': np.arange(7)}
  merged, _ = average(first, {'w': 3 * ONES, **other})
  assert merged.keys() == {'w', 'ids'}
  np.testing.assert_array_equal(merged['w'], 2 * ONES)
  np.testing.assert_array_equal(merged['ids'], np.arange(7))


def test_a_leaf_that_is_floating_in_one_model_only(average):
  with pytest.raises(ValueError, match='w: int32.* expected'):
    average({'w': ONES}, {'w': ONES.astype(np.int32)})


@pytest.mark.parametrize(
  'names,warned',
  [
    (('bn/mean/value', 'bn/var/value'), True),
    (('bn/mean', 'bn/var'), True),
    (('bn.running_mean', 'bn.running_var'), True),
    (('mean', 'var'), True),
    (('bn/scale', 'bn/var'), False),
    (('bn/mean', 'bn/ivar'), False),
  ],
)
def test_running_variances(average, names, warned):
  tree = {'w': ONES, **{name: np.ones(4, np.float32) for name in names}}
  _, warnings = average(tree, tree | {'w': 2 * ONES})
  found = [w for w in warnings if 'like running variances' in w]
  assert len(found) == warned
  assert all(w.startswith('1 leaf looks') and names[1] in w for w in found)


@pytest.mark.parametrize('is_wide', [True, False])
def test_float64_in_memory(is_wide, recwarn):
  """Numbers are lost where the merge could have held them."""
  tree = {'w': np.ones(3), 'kept': np.ones(2), 'narrow': ONES}
  with jax.enable_x64(is_wide):
    merged = mk.merge(mk.average(), [tree], tree, overrides={'kept': 'base'})
  assert merged['w'].dtype == ('float64' if is_wide else 'float32')
  said = [str(warning.message) for warning in recwarn]
  assert len(said) == is_wide
  assert all(s.startswith('1 leaf is stored in float64: w.') for s in said)


def test_codes_and_complex_numbers(average):
  tree = {
    'w': ONES,
    'codes': np.zeros((64, 64), np.int8),
    'filter': np.ones((2, 3), np.complex64),
  }
  _, warnings = average(tree, tree | {'w': 2 * ONES})
  assert any(w.startswith('1 leaf of whole numbers is') for w in warnings)
  assert any(w.startswith('1 leaf of complex numbers is') for w in warnings)


def test_nothing_is_merged(tmp_path):
  path = checkpoints.save(tmp_path / 'one', {'w': ONES})
  report = mk.merge_checkpoints(
    mk.average(),
    experts=[path],
    output=tmp_path / 'out',
    overrides={'.*': 'base'},
  )
  assert 'Nothing is merged: all is as the base has it.' in report.warnings


def test_floats_of_less_than_a_byte(tmp_path):
  path = checkpoints.save(tmp_path / 'one', {'w': ONES})
  with pytest.raises(ValueError, match='floats of less than 8 bits are not'):
    mk.merge_checkpoints(
      mk.average(),
      experts=[path],
      output=tmp_path / 'out',
      dtype=jnp.float4_e2m1fn,
    )


def test_a_source_that_is_written_to_while_the_merge_is_planned(
  tmp_path, monkeypatch
):
  """What its header says is not true any more."""
  tree = {'a': ONES, 'b': 2 * ONES}
  path = checkpoints.save_safetensors(tmp_path / 'one.safetensors', tree)
  demand_possible = outputs.Output.demand_possible

  def replaced(output, *arguments):
    demand_possible(output, *arguments)
    checkpoints.save_safetensors(path, dict(reversed(tree.items())))

  monkeypatch.setattr(outputs.Output, 'demand_possible', replaced)
  with pytest.raises(ValueError, match='changed while it was read'):
    mk.merge_checkpoints(mk.average(), experts=[path], output=tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_names_as_long_as_they_can_be(tmp_path):
  path = checkpoints.save(tmp_path / 'one', {'w': ONES})
  longest = os.pathconf(tmp_path, 'PC_NAME_MAX') - len('.mergekit-tmp')
  merge = lambda length: mk.merge_checkpoints(
    mk.average(), experts=[path], output=tmp_path / ('x' * length)
  )
  np.testing.assert_array_equal(checkpoints.load(merge(longest).output)['w'], 1)
  before = sorted(tmp_path.iterdir())
  with pytest.raises(OSError, match=re.escape(os.strerror(36))):
    merge(longest + 1)
  assert sorted(tmp_path.iterdir()) == before


def test_a_report_is_short_where_it_is_shown(tmp_path):
  tree = {f'leaf_{i}': ONES for i in range(50)}
  path = checkpoints.save(tmp_path / 'one', tree)
  report = mk.merge_checkpoints(
    mk.average(), experts=[path], output=tmp_path / 'out'
  )
  assert len(report.tensors) == 50
  assert len(repr(report)) < 2000 and 'units_done=' in repr(report)


def test_a_file_beside_the_weights_whose_name_is_no_text(tmp_path):
  """Names are bytes, and a merge must not end on one when all is written."""
  base, output = tmp_path / 'base', tmp_path / 'out'
  base.mkdir()
  checkpoints.save_safetensors(base / 'model.safetensors', {'w': ONES})
  name = b'tokenizer_caf\xe9.json'
  with open(os.fsencode(base) + b'/' + name, 'w', encoding='utf-8') as file:
    file.write('{}')
  mk.merge_checkpoints(mk.average(), experts=[base], output=output)
  assert name in os.listdir(os.fsencode(output))
