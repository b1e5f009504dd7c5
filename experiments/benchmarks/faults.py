"""Kills merges at random moments, resumes them, compares every bit.

    python -m experiments.benchmarks.faults --kills 20

Merges by a threshold method over the whole model and by a random method, in
one process and in two, are ended by SIGKILL at random moments, started again,
and killed again, until they finish. Every output must equal that of a merge
that nobody disturbed; no output may be visible before it is complete; and no
unit that the journal held may be done again. Where one of two processes was
killed, the other must end within 30 s of it, with a message.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

from experiments.benchmarks import measuring
from experiments.benchmarks.models import make_set
from mergekit_jax.verify import verify

METHODS = {
  'ties': ['--set', 'density=0.3', '--set', 'scope=model'],
  'dare_ties': ['--set', 'drop_rate=0.5'],
}
SECONDS_TO_END = 30  # of a process whose peer was killed


def start(folder, output, method, processes) -> list[subprocess.Popen]:
  """Starts a merge in that many processes of two devices each."""
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    port = listener.getsockname()[1]
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  command = [sys.executable, '-m', 'mergekit_jax', 'merge', '--devices=2']
  command += ['--method', method, *METHODS[method], '--memory_budget=48MiB']
  command += ['--stacked_axes', 'params/layers/.*=0', '--base', folder / 'base']
  command += ['--experts', folder / 'expert_1', folder / 'expert_2']
  command += ['--output', output]
  if processes > 1:
    command += ['--coordinator_address', f'127.0.0.1:{port}']
    command += ['--num_processes', str(processes)]
  merge = []
  for process in range(processes):
    number = ['--process_id', str(process)] if processes > 1 else []
    with log_of(output, process).open('w') as log:
      merge.append(
        subprocess.Popen(
          [*map(str, command), *number],
          env=environment,
          stdout=log,
          stderr=subprocess.STDOUT,
        )
      )
  return merge


def log_of(output: pathlib.Path, process: int) -> pathlib.Path:
  """Where a process of a merge prints to."""
  return output.parent / f'{output.name}.{process}.log'


def recorded(output: pathlib.Path, processes: int) -> int:
  """Units that the journals of all processes hold."""
  stage = output.parent / f'{output.name}.mergekit-tmp'
  units = []
  for process in range(processes):
    file = stage / f'journal.{process}.jsonl'
    lines = file.read_text().splitlines() if file.exists() else []
    units.append({line.split(',')[0] for line in lines if line.endswith('}')})
  return len(set.intersection(*units))


def finish(output, merge: list[subprocess.Popen]) -> tuple[int, int]:
  """Waits for a merge; returns the units it did and those it resumed."""
  codes = [process.wait() for process in merge]
  if any(codes):
    said = log_of(output, next(i for i, code in enumerate(codes) if code))
    raise SystemExit(
      f'A merge that was not killed ended with {codes}:\n{said.read_text()}'
    )
  report = report_of(output)
  return report['units_done'], report['units_resumed']


def report_of(output: pathlib.Path) -> dict:
  """The report beside an output."""
  return json.loads((output.parent / f'{output.name}.report.json').read_text())


def digest(output: pathlib.Path) -> dict:
  """The checksums of every part that was written."""
  checksums = report_of(output)['checksums']
  return {path: sorted(parts) for path, parts in checksums.items()}


def survive(output, merge, victim: int) -> tuple[float, str | None]:
  """Waits for the process whose peer was just killed.

  Returns:
    The seconds until it ended, and what it said.
  """
  killed = time.monotonic()
  try:
    merge[1 - victim].wait(10 * SECONDS_TO_END)
  except subprocess.TimeoutExpired:
    merge[1 - victim].kill()
    merge[1 - victim].wait()
  seconds = round(time.monotonic() - killed, 1)
  said = log_of(output, 1 - victim).read_text()
  # What JAX's coordination service, or a collective, says before it ends.
  found = re.search(r'(absl::Status|jax\.errors\.\w+): (.{0,90})', said, re.S)
  return seconds, ' '.join(found[2].split()) if found else None


def wait_for(output, merge, units: int) -> None:
  """Waits until so many units are recorded, and a random moment more."""
  while recorded(output, len(merge)) < units:
    if any(process.poll() is not None for process in merge):
      return
    time.sleep(0.005)
  time.sleep(random.uniform(0, 0.1))


def disturb(folder, output, method, processes, kills, units) -> dict:
  """One merge of so many units, killed `kills` times."""
  row: dict = {'killed_after_units': [], 'survivors': []}
  row['partial_outputs_visible'] = 0
  for _ in range(kills):
    merge = start(folder, output, method, processes)
    held = recorded(output, processes)
    wait_for(output, merge, random.randint(held, max(held, units - 2)))
    victim = random.randrange(processes)
    if merge[victim].poll():
      finish(output, merge)  # says why it ended
    if merge[victim].poll() is None:
      os.kill(merge[victim].pid, signal.SIGKILL)
    left = [survive(output, merge, victim)] if processes > 1 else []
    merge[victim].wait()
    if output.exists():  # it was done before it was killed
      row['partial_outputs_visible'] += bool(verify(output))
      return row | {'units': None, 'units_redone': 0}
    row['killed_after_units'].append(recorded(output, processes))
    row['survivors'] += left
  held = recorded(output, processes)
  done, resumed = finish(output, start(folder, output, method, processes))
  return row | {'units': done + resumed, 'units_redone': held - resumed}


def main() -> None:
  """Kills merges, finishes them, and compares them with undisturbed ones."""
  parser = measuring.parser(__doc__)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--gigabytes', type=float, default=0.12)
  parser.add_argument('--seed', type=int, default=0)
  arguments = parser.parse_args()
  random.seed(arguments.seed)
  faults: dict[str, int] = dict.fromkeys(
    ('differences', 'units_redone', 'partial_outputs_visible'), 0
  )
  rows = []
  with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
    folder = pathlib.Path(temporary)
    make_set(folder, arguments.gigabytes, 2)
    cases = [(m, p) for m in METHODS for p in (1, 2)]
    expected = {}
    for method, processes in cases:
      output = folder / f'undisturbed_{method}_{processes}'
      merge = start(folder, output, method, processes)
      units, _ = finish(output, merge)
      expected[method, processes] = digest(output), units
    number = 0
    while sum(len(row['killed_after_units']) for row in rows) < arguments.kills:
      method, processes = cases[number % len(cases)]
      reference, units = expected[method, processes]
      output = folder / f'disturbed_{number}'
      row = disturb(folder, output, method, processes, 2, units)
      options = METHODS[method][1::2]
      row |= {'method': ' '.join([method, *options]), 'processes': processes}
      row['differences'] = int(digest(output) != reference)
      rows.append(row)
      for name in faults:
        faults[name] += row[name]
      print(json.dumps(row), flush=True)
      number += 1
  survivors = [each for row in rows for each in row['survivors']]
  faults['survivors_late_or_silent'] = sum(
    seconds > SECONDS_TO_END or not said for seconds, said in survivors
  )
  measuring.publish(
    'faults',
    [
      {**row, 'survivors': [seconds for seconds, _ in row['survivors']]}
      for row in rows
    ],
    arguments.json,
    kills=sum(len(row['killed_after_units']) for row in rows),
    seconds_of_survivors=max((s for s, _ in survivors), default=None),
    what_survivors_said=sorted({said for _, said in survivors if said}),
    **faults,
  )
  if any(faults.values()):
    raise SystemExit('A merge was not what it is undisturbed.')


if __name__ == '__main__':
  main()
