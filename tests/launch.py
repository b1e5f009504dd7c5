"""Runs merges in processes of their own, to kill them or to have several."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types

ROOT = pathlib.Path(__file__).parent.parent
# A process of which a peer has died must end by itself within this.
SECONDS_TO_END = 30


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def run_merge(job: dict, *, processes=1, devices=2, timeout=120, check=True):
  """Merges in `processes` processes; returns exit codes and outputs.

  Args:
    job: arguments of `merge_checkpoints`, with `method` as Python text, and
      `kill: [process, units]` to end a process after it has recorded so many,
      `first: [changes]` to merge something else before, `refused: [changes]` of
      merges before that must fail, whose errors are printed, `apart: [names]`
      of arguments that are lists with a value for each process, and `touched:
      process` to let the sources of a process seem to change. Without an
      `output` the methods are swept and a digest of each merge is printed. Or
      `command`, which is given to the command line, and `unreadable: [process,
      reads]` to let the reads of a process fail after so many, and
      `shutdown_timeout: seconds` in place of those of the command line.
    processes: how many.
    devices: CPU devices of each.
    timeout: seconds; once a process has failed, `SECONDS_TO_END` for the rest.
    check: whether every process must end well.
  """
  port = free_port()
  files, running = [], []
  for process in range(processes):
    files.append(tempfile.TemporaryFile('w+'))
    setting = {'process': process, 'processes': processes, 'port': port}
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    environment |= {'JAX_NUM_CPU_DEVICES': str(devices)}
    running.append(
      subprocess.Popen(
        [sys.executable, '-m', 'tests.launch', json.dumps(job | setting)],
        cwd=ROOT,
        env=environment,
        stdout=files[-1],
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  end = time.monotonic() + timeout
  one_failed = False
  while time.monotonic() < end and any(p.poll() is None for p in running):
    time.sleep(0.05)
    if not one_failed and any(p.poll() for p in running):
      one_failed, end = True, time.monotonic() + SECONDS_TO_END
  hung = [p.poll() is None for p in running]
  for process in running:
    process.kill()
  outputs = []
  for process, file in zip(running, files, strict=True):
    process.wait()
    file.seek(0)
    outputs.append(file.read())
  codes = [process.returncode for process in running]
  described = '\n'.join(text[-3000:] for text in outputs)
  limit = f'{SECONDS_TO_END} s after a peer' if one_failed else f'{timeout} s'
  assert not any(hung), f'still running {limit}:\n{described}'
  if check:
    assert not any(codes), f'exit codes {codes}:\n{described}'
  return codes, outputs


def main(job: dict) -> None:
  failing, reads = job.get('unreadable', [None, 0])
  read = count_preadv(reads if failing == job['process'] else math.inf)
  keep_compiled()
  if 'command' in job:
    run_command(job)
    return
  import jax

  if job['processes'] > 1:
    jax.distributed.initialize(
      f'127.0.0.1:{job["port"]}',
      job['processes'],
      job['process'],
      heartbeat_timeout_seconds=10,
    )
  import mergekit_jax as mk
  from mergekit_jax.checkpoint.stage import Stage

  victim, units = job.get('kill', [None, 0])
  if victim == job['process']:
    record = Stage.record

    def record_and_die(self, unit, facts):
      nonlocal units
      if units == 0:
        os.kill(os.getpid(), signal.SIGKILL)
      units -= 1
      record(self, unit, facts)

    Stage.record = record_and_die

  names = (
    *('experts', 'base', 'output', 'memory_budget', 'stacked_axes', 'seed'),
    *('allow_nonfinite', 'overwrite', 'resume'),
  )
  names += ('format',)

  def merge(changes):
    told = job | changes
    told |= {name: told[name][job['process']] for name in told.get('apart', [])}
    arguments = {name: told[name] for name in names if name in told}
    if 'partition_rules' in told:
      rules = told['partition_rules'].items()
      arguments['partition_rules'] = {
        path: jax.P(*axis) for path, axis in rules
      }
    method = eval(told['method'], {'mk': mk})
    if 'output' not in told:
      experts, base = arguments.pop('experts'), arguments.pop('base')
      return mk.sweep(method, experts, base, digest, **arguments)
    touched = told.get('touched') == job['process']
    with touched_sources() if touched else contextlib.nullcontext():
      return mk.merge_checkpoints(method, **arguments)

  for changes in job.get('refused', []):
    try:
      merge(changes)
    except (ArithmeticError, OSError, ValueError) as error:
      print(f'\n{type(error).__name__}: {error}', flush=True)
    else:
      raise AssertionError(f'not refused: {changes}')
  peaks = []
  for changes in [*job.get('first', []), {}]:
    with peak_memory(peaks):
      report = merge(changes)
  if 'output' not in job:
    print('SWEPT', json.dumps(report))
    return
  reports = list(report.values()) if isinstance(report, dict) else [report]
  printed = {
    'done': sum(made.units_done for made in reports),
    'resumed': sum(made.units_resumed for made in reports),
    'read': sum(read) + read_by_tensorstore(),
    'peaks': peaks,
  }
  print('REPORT', json.dumps(printed))


def keep_compiled() -> None:
  """Lets every process keep what it compiles, for those of later tests.

  Most of their time went into compiling. JAX has no setting for this: only its
  first process writes, and what that finds again the others do not, whose
  devices differ.
  """
  from jax._src import compiler

  state = types.SimpleNamespace(process_id=0, client=None)
  compiler.distributed = types.SimpleNamespace(global_state=state)


def digest(tree) -> str:
  """Of the bytes of a tree that is spread over all processes."""
  import jax
  from jax.experimental import multihost_utils

  whole = multihost_utils.process_allgather(tree, tiled=True)
  found = hashlib.sha256()
  for leaf in jax.tree.leaves(whole):
    found.update(leaf.tobytes())
  return found.hexdigest()


@contextlib.contextmanager
def touched_sources():
  """Lets every look at a source find another state than the last."""
  from mergekit_jax.jobs import job

  fingerprints, looks = job._fingerprints, itertools.count()
  job._fingerprints = lambda models: {
    name: f'{found}{next(looks)}'
    for name, found in fingerprints(models).items()
  }
  try:
    yield
  finally:
    job._fingerprints = fingerprints


@contextlib.contextmanager
def peak_memory(peaks: list[int]):
  """Appends the most anonymous memory of the process meanwhile, in bytes."""
  ended = threading.Event()
  peaks.append(0)

  def sample():
    while not ended.wait(0.002):
      status = pathlib.Path('/proc/self/status').read_text()
      kilobytes = int(status.split('RssAnon:')[1].split()[0])
      peaks[-1] = max(peaks[-1], 1024 * kilobytes)

  sampler = threading.Thread(target=sample, daemon=True)
  sampler.start()
  try:
    yield
  finally:
    ended.set()
    sampler.join()


def run_command(job: dict) -> None:
  from mergekit_jax import cli
  from mergekit_jax.command import joining

  if 'shutdown_timeout' in job:
    joining._SHUTDOWN_TIMEOUT_SECONDS = job['shutdown_timeout']
  sys.argv = ['mergekit-jax', *job['command']]
  sys.argv += [f'--coordinator_address=127.0.0.1:{job["port"]}']
  sys.argv += [f'--num_processes={job["processes"]}']
  sys.argv += [f'--process_id={job["process"]}']
  cli.run()


def count_preadv(limit: float) -> list[int]:
  """The bytes of every `os.preadv` from now on; after `limit` all fail."""
  read, preadv = [], os.preadv

  def counted(*arguments):
    if len(read) >= limit:
      raise OSError('no way to the disk')
    read.append(preadv(*arguments))
    return read[-1]

  os.preadv = counted
  return read


def read_by_tensorstore() -> int:
  """Bytes that it has read from files, without those it mapped."""
  import tensorstore as ts

  metrics = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/')
  return sum(
    value.get('value', 0)
    for metric in metrics
    if metric['name'].endswith('/bytes_read')
    for value in metric['values']
  )


def report_of(output: str) -> dict:
  """What a process printed."""
  line = next(x for x in output.splitlines() if x.startswith('REPORT'))
  return json.loads(line.removeprefix('REPORT '))


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
