"""Several processes make many merges from one read, as one process does."""

import json

import mergekit_jax as mk
from tests.launch import digest, report_of, run_merge
from tests.test_resume import assert_same, job, restored, sources

__all__ = ['sources']  # a fixture

METHODS = {
  'average': 'mk.average()',
  'ties': "mk.ties(density=0.3, scope='tensor')",
  'scaled': "mk.ties(density=0.3, scale=0.4, scope='tensor')",
  'dare': 'mk.dare(drop_rate=0.4, scale=0.8)',
}
ALL = '{' + ', '.join(f'{name!r}: {m}' for name, m in METHODS.items()) + '}'


def test_checkpoints(sources, tmp_path):
  """Each model is read once in all, not once a merge."""
  outputs = {name: str(tmp_path / name) for name in METHODS}
  arguments = job(sources, '', 'threshold', memory_budget='64MiB')
  arguments |= {'method': ALL, 'output': outputs}
  _, printed = run_merge(arguments, processes=2)
  size = sum(
    leaf.nbytes
    for name in ('base', 'one', 'two')
    for leaf in restored(sources / name)['params'].values()
  )
  # Vectors that are not divided are read by both.
  assert size <= sum(report_of(text)['read'] for text in printed) < 1.01 * size
  for name, method in METHODS.items():
    one = tmp_path / f'{name}_one'
    mk.merge_checkpoints(
      **{**arguments, 'method': eval(method), 'output': str(one)}
    )
    assert_same(tmp_path / name, restored(one))


def test_sweep(sources):
  """The merges lie on the devices of both."""
  arguments = job(sources, '', 'threshold', memory_budget='12MiB')
  del arguments['output']
  _, printed = run_merge({**arguments, 'method': ALL}, processes=2)
  experts, base = arguments.pop('experts'), arguments.pop('base')
  del arguments['method']
  expected = mk.sweep(
    {name: eval(method) for name, method in METHODS.items()},
    *(experts, base, digest),
    **arguments,
  )
  assert len({*expected.values()}) == len(METHODS)
  for text in printed:
    line = next(x for x in text.splitlines() if x.startswith('SWEPT '))
    assert json.loads(line.removeprefix('SWEPT ')) == expected
