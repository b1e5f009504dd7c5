"""Every program of a merge is compiled once, before the box that needs it."""

import collections
import logging
import re
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mergekit_jax as mk
from mergekit_jax import sharding
from mergekit_jax.driving import measure, slices
from mergekit_jax.forecasting import compiled as compiling
from mergekit_jax.jobs import job as jobs
from mergekit_jax.kernels import sums
from mergekit_jax.streaming import programs
from tests import checkpoints
from tests.slerp import Slerp

# Two leaves are alike and one is their transpose; the last is not spread.
SHAPES = {
  'first': (1024, 264),
  'second': (1024, 264),
  'transposed': (264, 1024),
  'smaller': (512, 264),
  'vector': (40,),
}
_COMPILING = re.compile(r'Compiling jit\((partials|merge|_sums)\)')


@pytest.fixture
def compiled(caplog):
  """What is compiled of the stream's own functions, and in which thread."""
  jax.clear_caches()
  caplog.set_level(logging.WARNING, logger='jax')
  found = collections.Counter()

  def read():
    for record in caplog.records:
      if match := _COMPILING.match(record.getMessage()):
        own = record.thread == threading.main_thread().ident
        found[match[1], 'main' if own else 'ahead'] += 1
    return dict(found)

  # In all threads, which the context manager of that name is not.
  jax.config.update('jax_log_compiles', True)
  yield read
  jax.config.update('jax_log_compiles', False)


@pytest.mark.parametrize(
  ('method', 'rounds'),
  [
    (mk.average(), 0),
    (mk.dare_ties(), 0),
    (mk.ties(), 2),
    (mk.ties(scope='tensor'), 2),
  ],
  ids=['average', 'dare_ties', 'ties', 'ties_tensor'],
)
def test_each_is_compiled_once_and_ahead(tmp_path, compiled, method, rounds):
  base, experts = checkpoints.save_set(tmp_path, SHAPES, 'bfloat16', experts=2)
  mk.merge_checkpoints(
    method, experts=experts, base=base, output=tmp_path / 'out'
  )
  expected = {('merge', 'ahead'): 3, ('_sums', 'ahead'): 3}
  if rounds:
    expected['partials', 'ahead'] = 3 * rounds
  assert compiled() == expected


def test_in_a_context_of_64_bits(tmp_path, compiled):
  """Which is of the caller's thread alone."""
  base, experts = checkpoints.save_set(tmp_path, SHAPES, experts=2)
  with jax.enable_x64(True):
    mk.merge_checkpoints(
      mk.ties(), experts=experts, base=base, output=tmp_path / 'out'
    )
  assert compiled() == {
    ('partials', 'ahead'): 6,
    ('merge', 'ahead'): 3,
    ('_sums', 'ahead'): 3,
  }


def test_a_mesh_that_the_caller_has_set_changes_nothing(tmp_path, compiled):
  base, experts = checkpoints.save_set(tmp_path, SHAPES, 'bfloat16', experts=2)
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 8})
  columns = jax.P('data', 'fsdp')
  with jax.set_mesh(mesh):
    mk.merge_checkpoints(
      mk.ties(scope='tensor'),
      experts=experts,
      base=base,
      output=tmp_path / 'out',
      mesh=mesh,
      partition_rules={r'.*/(first|second|transposed|smaller)': columns},
    )
  # Columns on each device: a matrix and its transpose are not alike.
  assert compiled() == {
    ('partials', 'ahead'): 8,
    ('merge', 'ahead'): 4,
    ('_sums', 'ahead'): 4,
  }


def test_merges_that_differ_in_numbers_share_programs(tmp_path, compiled):
  base, experts = checkpoints.save_set(tmp_path, SHAPES, 'bfloat16', experts=2)
  scales = (0.3, 0.6, 1.0)
  mk.merge_checkpoints(
    {str(scale): mk.task_arithmetic(scale=scale) for scale in scales},
    experts=experts,
    base=base,
    output={str(scale): tmp_path / str(scale) for scale in scales},
  )
  assert compiled() == {('merge', 'ahead'): 3, ('_sums', 'ahead'): 3}


def test_a_sweep_checks_all_its_merges_by_one_program(tmp_path, compiled):
  """What rules report, which differs, is for checkpoints alone."""
  base, experts = checkpoints.save_set(tmp_path, SHAPES, 'bfloat16', experts=2)
  methods = {
    'average': mk.average(),
    'task_arithmetic': mk.task_arithmetic(),
    'dare_ties': mk.dare_ties(),
  }
  mk.sweep(methods, experts, base, lambda merged: None)
  assert compiled() == {('merge', 'ahead'): 9, ('_sums', 'ahead'): 3}


@pytest.fixture
def narrow_devices(monkeypatch):
  """Devices that exchange numbers of 32 bits only, as TPUs do."""
  functions = (slices.partials, slices.merge, measure._sums_on_cpu)
  for function in functions:
    function.clear_cache()
  monkeypatch.setattr(sums, 'has_wide_collectives', lambda mesh: False)
  yield
  for function in functions:
    function.clear_cache()


@pytest.mark.parametrize(
  'rule',
  [
    mk.average(),
    mk.ties(),
    mk.dare_ties(0.5, 0.3, zero_mass='majority'),
    Slerp(0.3),
  ],
  ids=['average', 'ties', 'dare_ties', 'slerp'],
)
def test_programs_take_and_exchange_32_bits(tmp_path, narrow_devices, rule):
  """JAX narrows what it moves to a TPU, whose collectives have 32 bits."""
  base, experts = checkpoints.save_set(tmp_path, SHAPES, 'bfloat16', experts=2)
  plan = jobs.make_job([rule], experts, base).plan
  exchanged = 0
  for rule, rounds, seen, tensor, _ in compiling._largest_boxes(plan):
    for _, lowered in programs.steps(plan, rule, rounds, seen, tensor):
      head, *lines = (lowered.compile().as_text() or '').splitlines()
      arguments = re.search(r'entry_computation_layout={\((.*?)\)->', head)
      assert arguments and '64[' not in arguments[1]
      collectives = [line for line in lines if ' all-' in line]
      assert not [line for line in collectives if '64[' in line]
      exchanged += len(collectives)
  assert exchanged


def test_what_travels_in_halves_arrives_whole(tmp_path, request):
  base, experts = checkpoints.save_set(tmp_path, SHAPES, 'bfloat16', experts=2)
  rules = {'ties': mk.ties(0.3), 'slerp': Slerp(0.3)}

  def merged(where):
    reports = mk.merge_checkpoints(
      rules,
      experts=experts,
      base=base,
      output={name: tmp_path / f'{where}_{name}' for name in rules},
    )
    with ocp.StandardCheckpointer() as checkpointer:
      return reports, [
        jax.tree.leaves(checkpointer.restore(tmp_path / f'{where}_{name}'))
        for name in rules
      ]

  reports, expected = merged('wide')
  request.getfixturevalue('narrow_devices')
  others, got = merged('narrow')
  for one, other in zip(expected, got, strict=True):
    for x, y in zip(one, other, strict=True):
      np.testing.assert_array_equal(x, y)
  for name, report in reports.items():
    for one, other in zip(report.tensors, others[name].tensors, strict=True):
      # Roots of sums of eight float64, each of 48 bits where it travelled as
      # two float32: the sums differ by 2**-47 of themselves at most.
      np.testing.assert_allclose(
        one.task_vector_norms, other.task_vector_norms, rtol=2**-46
      )


def test_what_cannot_be_compiled_ends_the_merge(tmp_path, monkeypatch):
  base, experts = checkpoints.save_set(tmp_path, SHAPES, experts=2)

  def fail(*what):
    raise RuntimeError('no memory left to compile')

  monkeypatch.setattr(programs, 'steps', fail)
  with pytest.raises(RuntimeError, match='no memory left to compile'):
    mk.merge_checkpoints(
      mk.average(), experts=experts, base=base, output=tmp_path / 'out'
    )
  assert not (tmp_path / 'out').exists()
