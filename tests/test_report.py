"""The numbers of a report, from sums that are worked out by hand."""

import dataclasses

import pytest

from mergekit_jax import report
from mergekit_jax.jobs import summary


def tensor(path='a', norms=(3.0, 4.0), merge=5.0, rounding=(0.0, 0.0)):
  return report.TensorReport(path, (2,), 9.0, [*norms], merge, [*rounding], {})


def merged(*tensors, sources=('base', 'experts[0]'), **ratios):
  return report.MergeReport(
    output='out',
    restore='',
    tensors=[*tensors],
    copied=[],
    ratios=ratios,
    warnings=[],
    rounds=0,
    units_done=2,
    units_resumed=0,
    bytes_read=0,
    bytes_written=0,
    seconds=1.0,
    peak_memory=0,
    provenance={'sources': dict.fromkeys(sources)},
    checksums={},
    companions={},
  )


def sums(**changes):
  flags = {'density': [2.0, 8.0], 'sign_conflict': {'part': 1.0, 'whole': 4.0}}
  return {
    'base': 36.0,
    'experts': [16.0, 0.0],
    'rounding': [4.0, 0.0],
    'merged': 25.0,
    'flags': flags,
    **changes,
  }


def test_a_tensor():
  """Norms are roots of sums of squares; a task vector of 0 has no rounding."""
  found = summary.tensor_report('a', (4, 2), sums())
  assert found.base_norm == 6
  assert found.task_vector_norms == [4, 0] and found.merge_norm == 5
  assert found.rounding == [0.5, 0]
  # Of 8 elements, or of those that count.
  assert found.ratios == {'density': [0.25, 1.0], 'sign_conflict': 0.25}
  # Without a task vector all of 0 / 0 is nothing.
  nothing = sums(flags={'sign_conflict': {'part': 0.0, 'whole': 0.0}})
  empty = summary.tensor_report('a', (0,), nothing)
  assert empty.ratios == {'sign_conflict': 0}


def test_units_add_up():
  records = [
    {'path': 'a', 'sums': {'merged': 1.0, 'experts': [1.0, 2.0]}},
    {'path': 'b'},
    {'path': 'a', 'sums': {'merged': 2.0, 'experts': [3.0, 4.0]}},
  ]
  found = summary.add_sums(records)
  assert [*found] == ['a'] and found['a']['merged'] == 3
  assert found['a']['experts'][0] == 4 and found['a']['experts'][1] == 6


def test_ratios_of_a_model_are_of_all_entries():
  """Not means over tensors: a large one counts for more."""
  small = {
    'flags': {'density': [1.0, 1.0], 'conflict': {'part': 1, 'whole': 1}}
  }
  large = {
    'flags': {'density': [0.0, 3.0], 'conflict': {'part': 0, 'whole': 3}}
  }
  found = summary.model_ratios(
    {'a': (1,), 'b': (3, 3)}, {'a': small, 'b': large}
  )
  # (1 + 1 + 0 + 3) of two experts' 10 elements.
  assert found == {'density': 5 / 20, 'conflict': 1 / 4}


def test_norms_of_a_model():
  found = merged(tensor(), tensor(norms=(4.0, 3.0), merge=12.0), density=0.5)
  assert (found.task_vector_norms, found.merge_norm) == ([5, 5], 13)
  assert found.overall() == {
    'norms of the task vectors': '5 5',
    'norm of the merged task vector': '13',
    'density': '0.5000',
  }
  alone = merged(tensor(), sources=('experts[0]', 'experts[1]')).overall()
  assert [*alone] == ['norms of the experts', 'norm of the merge']
  assert merged().overall() == {}


def test_merges_from_one_read_are_told_a_line_each():
  one = merged(tensor(), tensor(norms=(4.0, 3.0), merge=12.0))
  one = dataclasses.replace(one, restore="orbax.restore('out')")
  two = merged(tensor(), tensor(norms=(4.0, 3.0), merge=0.0), density=0.5)
  one.warnings.append('both')
  two.warnings.extend(['both', 'the second'])
  of_two = dataclasses.replace(
    two, bytes_read=2**20, bytes_written=2**21, seconds=2.0, units_resumed=1
  )
  said = report.comparison({'average': one, 'ties-scale=1': of_two})
  assert said.splitlines() == [
    '2 merges of 2 tensors, 0 copied, resumed boxes: 1',
    'read 1.0 MiB, wrote 2.0 MiB in 2.0 s; peak memory 0 B',
    'norms of the task vectors: 5 5',
    'merge         norm of the merged task vector  density',
    'average       13',
    'ties-scale=1  5                               0.5000',
    "restore average: orbax.restore('out')",
    '2 warnings: in the log, and in the reports',
  ]


def test_an_expert_that_is_the_base_is_named():
  tensors = [tensor(norms=(0.0, 0.0)), tensor(norms=(0.0, 2.0))]
  (warning,) = summary.unmoved_warnings(tensors, ['one', 'two'], [])
  assert warning.startswith('one is the base in every merged tensor')
  assert summary.unmoved_warnings([], ['one', 'two'], []) == []


def test_rounding_of_more_than_half_is_named_where_it_is_worst():
  tensors = [
    tensor('fine', rounding=(0.5, 0.1)),
    tensor('bad', rounding=(0.51, 0.1)),
    tensor('worst', rounding=(0.9, 0.1)),
  ]
  (warning,) = summary.rounding_warnings(
    tensors, ['one', 'two'], ['bfloat16', 'float32']
  )
  assert warning.startswith('one: in 2 of 3 tensors the rounding of bfloat16')
  assert 'most in worst: 90%' in warning


@pytest.mark.parametrize(
  'count, text',
  [
    (0, '0 B'),
    (1023, '1023 B'),
    (1024, '1.0 KiB'),
    (3 * 2**19, '1.5 MiB'),
    (2**30, '1.0 GiB'),
    (5 * 2**40, '5.0 TiB'),
  ],
)
def test_bytes_for_people(count, text):
  assert report.readable(count) == text
