"""Parts in processes of their own: their order, what they and failures say."""

import os
import re
import subprocess
import sys
import time

import pytest

from experiments.scale_study import progress, scheduler

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


def test_where_nobody_watches_a_bar_is_lines(capsys, monkeypatch):
  monkeypatch.setattr(progress, '_SECONDS', 0)
  with progress.bar(8, 'x/base', 'step', done=2) as trained:
    trained.set_postfix(loss='0.500', refresh=False)
    trained.update(3)
    trained.update(3)
  patterns = [
    r'x/base: 25 % \(2 of 8 steps, \? left\)',
    r'x/base: 62 % \(5 of 8 steps, \d+:\d\d left, loss=0\.500\)',
    r'x/base: 100 % \(8 of 8 steps, 00:00 left, loss=0\.500\)',
  ]
  lines = capsys.readouterr().err.splitlines()
  for line, pattern in zip(lines, patterns, strict=True):
    assert re.fullmatch(pattern, line)


# Says how far it is, and waits until that must have been seen.
SPEAKER = """
import sys, time
print('by the way', file=sys.stderr)
print(sys.argv[-1], 'is at 7 %' + 99 * '.', file=sys.stderr, flush=True)
time.sleep(1)
"""


def test_what_parts_print_last_is_shown(tmp_path, capsys):
  """And nothing that was printed by an earlier run of them."""
  (tmp_path / 'a.txt').write_text('from before\n')
  parts = {'a': (), 'b': ()}
  scheduler.run(parts, ['-c', SPEAKER], processes=2, logs=tmp_path)
  lines = capsys.readouterr().err.splitlines()
  assert {f'--part={part} is at 7 %{99 * "."}' for part in parts} < {*lines}
  assert not {'by the way', 'from before'} & {*lines}
  assert lines[0] == 'all: 0 % (0 of 2 parts, ? left)'
  assert lines[-1].startswith('all: 100 % (2 of 2 parts')
  assert (tmp_path / 'a.txt').read_text().startswith('from before\nby the way')


def test_a_terminal_shows_them_below_the_bar(tmp_path):
  """Also one that does not say how large it is, and so is taken for 80 × 24."""
  program = (
    'import pathlib\n'
    'from experiments.scale_study import scheduler\n'
    f'scheduler.run({{"a": ()}}, ["-c", {SPEAKER!r}], processes=1, '
    f'logs=pathlib.Path({str(tmp_path)!r}))'
  )
  unsized = os.environ.copy()
  unsized.pop('COLUMNS', None)
  unsized.pop('LINES', None)
  screen, terminal = os.openpty()
  ran = subprocess.run(
    [sys.executable, '-c', program],
    stdout=terminal,
    stderr=terminal,
    env=unsized,
    check=False,
  )
  os.close(terminal)
  shown = os.read(screen, 65536).decode()
  os.close(screen)
  assert ran.returncode == 0, shown
  below = '--part=a is at 7 %'.ljust(79, '.')
  assert f'\n\r{below}\x1b[A' in shown
  assert '1/1' in shown
