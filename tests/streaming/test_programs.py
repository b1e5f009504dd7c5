"""Every program of a merge is compiled once, before the box that needs it."""

import collections
import logging
import re
import threading

import jax
import pytest

import mergekit_jax as mk
from mergekit_jax import sharding
from mergekit_jax.forecasting import compiled as compiling
from mergekit_jax.jobs import job as jobs
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
def test_programs_take_32_bits(tmp_path, rule):
  """JAX narrows what it moves to a device of another kind than the host."""
  base, experts = checkpoints.save_set(tmp_path, SHAPES, 'bfloat16', experts=2)
  plan = jobs.make_job([rule], experts, base).plan
  for rule, rounds, seen, tensor, _ in compiling._largest_boxes(plan):
    for _, lowered in programs.steps(plan, rule, rounds, seen, tensor):
      head, _ = (lowered.compile().as_text() or '').split('\n', 1)
      arguments = re.search(r'entry_computation_layout={\((.*?)\)->', head)
      assert arguments and '64[' not in arguments[1]


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
