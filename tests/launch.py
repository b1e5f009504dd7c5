"""Runs merges in processes of their own, to kill them or to have several."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def run_merge(job: dict, *, processes=1, devices=2, timeout=120, check=True):
  """Merges in `processes` processes; returns exit codes and outputs.

  Args:
    job: arguments of `merge_checkpoints`, with `method` as Python text, and
      `kill: [process, units]` to end a process after it has recorded so many.
    processes: how many.
    devices: CPU devices of each.
    timeout: seconds.
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
  while time.monotonic() < end and any(p.poll() is None for p in running):
    time.sleep(0.05)
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
  assert not any(hung), f'still running after {timeout} s:\n{described}'
  if check:
    assert not any(codes), f'exit codes {codes}:\n{described}'
  return codes, outputs


def main(job: dict) -> None:
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

  if job.get('count_bytes'):
    import tensorstore as ts

    from mergekit_jax.checkpoint import orbax

    # TensorStore counts what it reads, but not what it maps into memory.
    caches = {'cache_pool#ocdbt': {'total_bytes_limit': 2**24}}
    orbax._context = lambda item, decoded_bytes=0: ts.Context(caches)

  names = ('experts', 'base', 'output', 'memory_budget', 'stacked_axes', 'seed')
  arguments = {name: job[name] for name in names if name in job}
  report = mk.merge_checkpoints(eval(job['method'], {'mk': mk}), **arguments)
  print(
    'REPORT',
    json.dumps({'done': report.units_done, 'resumed': report.units_resumed}),
    json.dumps({'read': bytes_read()}),
  )


def bytes_read() -> int:
  """Bytes that TensorStore has read from files in this process."""
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
  done, end = json.JSONDecoder().raw_decode(line, len('REPORT '))
  return done | json.loads(line[end:])


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
