"""Kills merges at random moments, resumes them, compares every bit.

    python -m experiments.benchmarks.faults --kills 20

Merges by a threshold method over the whole model and by a random method, in
one process and in two, are ended by SIGKILL at random moments, started again,
and killed again, until they finish. Every output must equal that of a merge
that nobody disturbed; no output may be visible before it is complete; and no
unit that the journal held may be done again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

from mergekit_jax.verify import verify

METHODS = {
  'ties': "mk.ties(density=0.3, scope='model')",
  'dare_ties': 'mk.dare_ties(drop_rate=0.5)',
}

MERGE = """
import json, sys
import jax
folder, output, method, port, processes, process = sys.argv[1:]
if int(processes) > 1:
  jax.distributed.initialize(
    f'127.0.0.1:{port}', int(processes), int(process),
    heartbeat_timeout_seconds=10)
import mergekit_jax as mk
report = mk.merge_checkpoints(
  eval(method), base=f'{folder}/base', output=output, memory_budget='48MiB',
  experts=[f'{folder}/expert_1', f'{folder}/expert_2'],
  stacked_axes={'params/layers/.*': 0})
print('UNITS', report.units_done, report.units_resumed)
"""


def start(folder, output, method, processes) -> list[subprocess.Popen]:
  """Starts a merge in that many processes of two devices each."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    port = listener.getsockname()[1]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  environment['JAX_NUM_CPU_DEVICES'] = '2'
  arguments = [str(folder), str(output), METHODS[method], str(port)]
  return [
    subprocess.Popen(
      [sys.executable, '-c', MERGE, *arguments, str(processes), str(process)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
    )
    for process in range(processes)
  ]


def recorded(output: pathlib.Path, processes: int) -> int:
  """Units that the journals of all processes hold."""
  stage = output.parent / f'{output.name}.mergekit-tmp'
  units = []
  for process in range(processes):
    file = stage / f'journal.{process}.jsonl'
    lines = file.read_text().splitlines() if file.exists() else []
    units.append({line.split(',')[0] for line in lines if line.endswith('}')})
  return len(set.intersection(*units))


def finish(merge: list[subprocess.Popen]) -> tuple[int, int]:
  """Waits for a merge; returns the units it did and those it resumed."""
  printed = [process.communicate()[0] for process in merge]
  codes = [process.returncode for process in merge]
  if any(codes):
    raise SystemExit(f'A merge that was not killed ended with {codes}.')
  done, resumed = printed[0].split('UNITS ')[1].split()[:2]
  return int(done), int(resumed)


def digest(output: pathlib.Path) -> dict:
  """The checksums of every part that was written."""
  report = output.parent / f'{output.name}.report.json'
  checksums = json.loads(report.read_text())['checksums']
  return {path: sorted(parts) for path, parts in checksums.items()}


def wait_for(output, merge, units: int) -> None:
  """Waits until so many units are recorded, and a random moment more."""
  while recorded(output, len(merge)) < units:
    if any(process.poll() is not None for process in merge):
      return
    time.sleep(0.005)
  time.sleep(random.uniform(0, 0.1))


def disturb(folder, output, method, processes, kills, units) -> dict:
  """One merge of so many units, killed `kills` times."""
  rows = {'killed_after_units': [], 'partial_outputs_visible': 0}
  for _ in range(kills):
    merge = start(folder, output, method, processes)
    held = recorded(output, processes)
    wait_for(output, merge, random.randint(held, max(held, units - 2)))
    victim = random.choice(merge)
    if victim.poll() is None:
      os.kill(victim.pid, signal.SIGKILL)
    for process in merge:
      process.communicate()
    if output.exists():  # it was done before it was killed
      rows['partial_outputs_visible'] += bool(verify(output))
      return rows | {'units': None, 'units_redone': 0}
    rows['killed_after_units'].append(recorded(output, processes))
  held = recorded(output, processes)
  done, resumed = finish(start(folder, output, method, processes))
  rows |= {'units': done + resumed, 'units_redone': held - resumed}
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--gigabytes', type=float, default=0.12)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--json', help='where to write the figures')
  arguments = parser.parse_args()
  random.seed(arguments.seed)
  from experiments.benchmarks.memory import make_set
  from experiments.benchmarks.models import command

  totals = {'kills': 0, 'differences': 0, 'units_redone': 0}
  totals['partial_outputs_visible'] = 0
  rows = []
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    make_set(folder, arguments.gigabytes, 2, False)
    cases = [(m, p) for m in METHODS for p in (1, 2)]
    expected = {}
    for method, processes in cases:
      output = folder / f'undisturbed_{method}_{processes}'
      units, _ = finish(start(folder, output, method, processes))
      expected[method, processes] = digest(output), units
    number = 0
    while totals['kills'] < arguments.kills:
      method, processes = cases[number % len(cases)]
      reference, units = expected[method, processes]
      output = folder / f'disturbed_{number}'
      row = disturb(folder, output, method, processes, 2, units)
      row |= {'method': METHODS[method], 'processes': processes}
      row['differences'] = int(digest(output) != reference)
      rows.append(row)
      totals['kills'] += len(row['killed_after_units'])
      for name in ('differences', 'units_redone', 'partial_outputs_visible'):
        totals[name] += row[name]
      print(json.dumps(row), flush=True)
      number += 1
  print(json.dumps(totals))
  if arguments.json:
    figures = {'command': command('faults'), **totals, 'rows': rows}
    pathlib.Path(arguments.json).write_text(
      json.dumps(figures, indent=1) + '\n'
    )
  if any(value for name, value in totals.items() if name != 'kills'):
    raise SystemExit('A merge was not what it is undisturbed.')


if __name__ == '__main__':
  main()
