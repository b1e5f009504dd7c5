"""Parts in processes of their own: their order, and what a failure says."""

import os
import subprocess
import sys
import time

import pytest

from experiments.scale_study import scheduler

# Writes its part's name into the file, unless its part is to fail.
PROGRAM = """
import sys
part = sys.argv[-1].removeprefix('--part=')
if part == 'bad':
  sys.exit('it went wrong')
open(sys.argv[1], 'a').write(part + '\\n')
"""


def run(tmp_path, parts, processes=2):
  done = tmp_path / 'done'
  scheduler.run(
    parts, ['-c', PROGRAM, str(done)], processes=processes, logs=tmp_path
  )
  return done.read_text().split()


def test_a_part_waits_for_what_it_comes_after(tmp_path):
  parts = {'d': ('b', 'c'), 'c': ('a',), 'b': (), 'a': ()}
  order = run(tmp_path, parts)
  assert sorted(order) == ['a', 'b', 'c', 'd']
  assert order.index('a') < order.index('c') and order[-1] == 'd'
  assert run(tmp_path / 'x', {'2': ('1',), '1': ()}, 1) == ['1', '2']


def test_a_failure_shows_what_was_printed(tmp_path):
  with pytest.raises(scheduler.PartFailedError, match='bad failed') as error:
    run(tmp_path, {'bad': (), 'after': ('bad',), 'more': ('after',)})
  assert 'it went wrong' in str(error.value)
  assert not (tmp_path / 'done').exists()


def test_a_signal_to_end_ends_the_parts_too(tmp_path):
  started = tmp_path / 'started'
  sleeper = (
    'import os, pathlib, time\n'
    f'pathlib.Path({str(started)!r}).write_text(str(os.getpid()))\n'
    'time.sleep(60)'
  )
  program = (
    'import pathlib\n'
    'from experiments.scale_study import scheduler\n'
    f'scheduler.run({{"a": ()}}, ["-c", {sleeper!r}], processes=1, '
    f'logs=pathlib.Path({str(tmp_path)!r}))'
  )
  parent = subprocess.Popen([sys.executable, '-c', program])
  while not (started.exists() and started.read_text()):
    time.sleep(0.05)
  parent.terminate()
  assert parent.wait() == 1
  child = int(started.read_text())
  for _ in range(200):
    try:
      os.kill(child, 0)
    except ProcessLookupError:
      return
    time.sleep(0.05)
  pytest.fail('the part goes on')
