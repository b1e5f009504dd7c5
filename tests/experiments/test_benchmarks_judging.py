"""What the outputs of merges are held against, and how."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.benchmarks import judging, reference
import mergekit_jax as mk

SHAPE = (64, 1024)
EXPERTS = 4


class TestReference:
  """Worked by hand."""

  BASE = np.ones(5)
  DELTAS = np.array(
    [[0.5, -0.25, 0.125, 0, 0.5], [-0.25, -0.5, 0.125, 0.0625, -0.5]]
  )

  def test_task_vectors_are_rounded_to_float32(self):
    """2²⁴ + 1 is the first whole number that float32 has not."""
    base, expert = np.array([1.0, 1]), np.array([1.25, -(2**24)])
    (found,) = reference.task_vectors(base, [expert])
    assert found.dtype == np.float32
    assert found.tolist() == [0.25, -(2**24)]

  def test_average(self):
    found = reference.average(self.BASE + self.DELTAS)
    assert found.choices.tolist() == [[1.125, 0.625, 1.125, 1.03125, 1]]

  def test_task_arithmetic(self):
    found = reference.task_arithmetic(self.BASE, self.DELTAS, 0.5)
    assert found.choices.tolist() == [[1.125, 0.625, 1.125, 1.03125, 1]]
    assert found.terms.tolist() == [1.375, 1.375, 1.125, 1.03125, 1.5]

  def test_cut(self):
    """Of five entries 0.4 keeps two; a trim keeps one at least."""
    delta = np.array([0.5, -0.25, 0.125, 0, 0.0625])
    assert reference.cut(delta, 0.4) == 0.25
    assert reference.cut(delta, 0.1) == 0.5

  def test_disjoint_mean(self):
    """Either sign is right where both experts together are nothing."""
    found = reference.disjoint_mean(self.BASE, self.DELTAS)
    assert found.choices.tolist() == [
      [1.5, 0.625, 1.125, 1.0625, 1.5],
      [1.5, 0.625, 1.125, 1.0625, 0.5],
    ]
    assert found.terms.tolist() == [1.75, 1.75, 1.25, 1.0625, 2]

  def test_or_else(self):
    one = reference.average(self.BASE + self.DELTAS)
    two = reference.disjoint_mean(self.BASE[3:], self.DELTAS[:, 3:])
    both = one.or_else(np.array([3, 4]), two)
    assert both.choices.tolist() == [
      [1.125, 0.625, 1.125, 1.03125, 1],
      [1.125, 0.625, 1.125, 1.0625, 1.5],
      [1.125, 0.625, 1.125, 1.0625, 0.5],
    ]
    assert both.terms is one.terms

  def test_likely_kept(self):
    """What was free is found; what was not stays, however badly it fits."""
    deltas = np.array([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, -1.0]])
    kept = np.array([[1, 1, 1, 1], [0, 0, 0, 0]], bool)
    free = np.array([[0, 1, 1, 1], [0, 1, 1, 1]], bool)
    output = np.array([9, 1.375, 1.001, 0])
    found = reference.likely_kept(output, np.ones(4), deltas, kept, free)
    assert found.T.tolist() == [
      [True, False],
      [True, True],
      [False, False],
      [False, True],
    ]

  def test_judge(self):
    """Rightly rounded; rounded up where down is nearer; a zero."""
    merged = np.array([1 + 2**-10, 1 + 2**-9, 0])
    expected = reference.Expected(merged[None], np.abs(merged))
    output = np.array([1, 1 + 2**-7, 0])
    assert reference.judge(output, np.zeros(3), 2, expected) == {
      'elements': 3,
      'edge': 0,
      'outside': 1,
      'error': 2**-20 + (2**-7 - 2**-9) ** 2,
      'rounding': 2**-20 + 2**-18,
      'added': (1 + 2**-10) ** 2 + (1 + 2**-9) ** 2,
    }

  def test_judge_of_several_choices(self):
    """As the first; as the second alone; as neither, the second being nearer.

    Nothing is left out, not even what is at an edge.
    """
    choices = np.array([[1.0, 1, 1], [2.0, 2, 2]])
    expected = reference.Expected(choices, np.ones(3))
    output = np.array([1, 2, 1.75])
    assert reference.judge(output, np.zeros(3), 2, expected) == {
      'elements': 3,
      'edge': 1,
      'outside': 1,
      'error': 0.25**2,
      'rounding': 0,
      'added': 1 + 4 + 4,
    }


def save(folder, array):
  folder.mkdir()
  array = np.asarray(array).astype(ml_dtypes.bfloat16)
  save_file({'x': array}, folder / 'model.safetensors')
  return folder


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """(base, its experts) as arrays, and the directories they lie in."""
  random = np.random.default_rng(0)
  base = 0.02 * random.standard_normal(SHAPE)
  arrays = [base] + [
    base + 0.002 * random.standard_normal(SHAPE) for _ in range(EXPERTS)
  ]
  folder = tmp_path_factory.mktemp('models')
  arrays = [array.astype(ml_dtypes.bfloat16) for array in arrays]
  names = ['base', *(f'expert_{i}' for i in range(EXPERTS))]
  paths = [
    save(folder / name, array)
    for name, array in zip(names, arrays, strict=True)
  ]
  return arrays, paths


class TestJudging:
  """Bfloat16 models, of which each has many entries at its threshold."""

  def judged(self, name, models, tool, array, folder):
    output = save(folder / tool, array)
    return judging.compare_with_reference(
      name, models[1], {tool: output}, {'x': SHAPE}
    )[tool]

  def deltas(self, models):
    base, *experts = [array.astype(np.float32) for array in models[0]]
    return np.stack(experts) - base

  def merge(self, models, kept, divisor):
    """The disjoint mean of what is kept, times 1/divisor, in float64."""
    base = models[0][0].astype(np.float64)
    deltas = self.deltas(models).astype(np.float64) * kept / divisor
    sign = np.where(deltas.sum(axis=0) >= 0, 1, -1)
    agree = deltas * sign > 0
    count = np.maximum(agree.sum(axis=0), 1)
    return base + (deltas * agree).sum(axis=0) / count

  @pytest.mark.parametrize(
    'name,method',
    [
      ('average', mk.average()),
      ('task_arithmetic', mk.task_arithmetic(judging.SCALE)),
      ('ties tensor', mk.ties(judging.DENSITY, scope='tensor')),
      ('dare_ties', mk.dare_ties(judging.DROP_RATE)),
    ],
  )
  def test_all_of_what_we_merge_is_right(self, models, tmp_path, name, method):
    base, *experts = [{'x': array} for array in models[0]]
    key = 0 if name == 'dare_ties' else None
    base = None if name == 'average' else base
    merged = mk.merge(method, experts, base, key=key)['x']
    found = self.judged(name, models, judging.OURS, merged, tmp_path)
    assert (found['elements'], found['outside']) == (2**16, 0)
    assert found['at_an_edge'] <= 1e-5 * 2**16
    assert found['error_of_delta'] == pytest.approx(found['rounding_of_delta'])

  def at_the_cut(self, models):
    """What is kept for sure, and what is as large as the last one kept."""
    magnitudes = np.abs(self.deltas(models))
    kept = int(judging.DENSITY * 2**16)
    flat = np.sort(magnitudes.reshape(EXPERTS, -1), axis=1)
    cut = flat[:, -kept, None, None]
    return magnitudes > cut, magnitudes == cut

  def worse(self, found, exact):
    """How many values are stored further from others than these would be."""
    errors = [
      np.abs(values.astype(ml_dtypes.bfloat16).astype(np.float64) - exact)
      for values in (found, exact)
    ]
    return int(np.sum(errors[0] > errors[1]))

  def test_an_entry_at_the_threshold_is_not_left_out(self, models, tmp_path):
    """We keep all of them: where one was lost the output is wrong."""
    above, equal = self.at_the_cut(models)
    kept = above | equal
    lost = self.merge(models, above, 1)
    differ = self.worse(lost, self.merge(models, kept, 1))
    assert differ > 1000
    found = self.judged('ties tensor', models, judging.OURS, lost, tmp_path)
    assert (found['at_an_edge'], found['outside']) == (0, differ)

  def test_mergekit_chooses_of_what_is_equal(self, models, tmp_path):
    """As many as make up the number; but nothing above or below."""
    above, equal = self.at_the_cut(models)
    chosen = equal & (np.random.default_rng(1).random(equal.shape) < 0.5)
    merged = self.merge(models, above | chosen, 1)
    differ = self.worse(merged, self.merge(models, above | equal, 1))
    assert differ > 500
    found = self.judged('ties tensor', models, judging.THEIRS, merged, tmp_path)
    assert (found['at_an_edge'], found['outside']) == (differ, 0)

  def test_mergekit_draws_masks_of_its_own(self, models, tmp_path):
    random = np.random.default_rng(2).random((EXPERTS, *SHAPE))
    kept = random >= judging.DROP_RATE
    merged = self.merge(models, kept, 1 - judging.DROP_RATE)
    found = self.judged('dare_ties', models, judging.THEIRS, merged, tmp_path)
    assert (found['at_an_edge'], found['outside']) == (0, 0)
    other = tmp_path / 'other'
    other.mkdir()
    # A rescaling by another factor is not.
    merged = self.merge(models, kept, 0.12)
    found = self.judged('dare_ties', models, judging.THEIRS, merged, other)
    assert found['outside'] > 0.2 * 2**16
