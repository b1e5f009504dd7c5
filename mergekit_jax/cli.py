"""The command line: mergekit-jax merge, plan, inspect, verify, methods."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import inspect
from logging import WARNING
import os
import sys
from typing import Any

from absl import app, logging
from absl.flags import argparse_flags

from mergekit_jax import flags

_HEARTBEAT_TIMEOUT_SECONDS = 15

_EPILOGUE = """
Expressions (REGEX) match whole paths as `inspect` prints them; the first match
wins, and one that matches nothing is an error.
"""


def run() -> None:
  """The console script."""
  app.run(main, flags_parser=parse)


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Reads the command line; exits with 2 and a message if it cannot."""
  parser = argparse_flags.ArgumentParser(
    prog='mergekit-jax',
    description='Merges fine-tuned experts of one base model, as partitioned '
    'checkpoints on a mesh, without any host holding a whole model.',
  )
  commands = parser.add_subparsers(dest='command', required=True)

  merging: Any = argparse.ArgumentParser(add_help=False)
  add = merging.add_argument
  add('--method', required=True, help='a name that `methods` prints')
  add(
    '--set',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help="an option of the method, as 'density=0.2'; may be repeated",
  )
  add('--base', help='checkpoint of the base model')
  add('--experts', nargs='+', required=True, help='checkpoints of the experts')
  add('--weights', nargs='+', type=float, help='one number an expert')
  add(
    '--override',
    action='append',
    default=[],
    metavar='REGEX:base|REGEX:NAME=VALUE,...',
    help='keep leaves as in the base, or merge them with other options',
  )
  add(
    '--stacked_axes',
    action='append',
    default=[],
    metavar='REGEX=AXIS[,AXIS]',
    help='axes over which layers are stacked',
  )
  add(
    '--partition_rules',
    action='append',
    default=[],
    metavar='REGEX=AXES,...',
    help="mesh axes by dimension, as '.*/kernel=fsdp,-' ('-': not sharded)",
  )
  add('--mesh', help="as 'fsdp=4,tensor=2'; all devices on one axis if absent")
  add('--devices', type=int, help='CPU devices to make; one a core if absent')
  add('--memory_budget', default='4GiB', help='host memory, as 512MiB or 4GiB')
  add('--dtype', help="of the merged leaves; the base's if absent")

  merge = commands.add_parser(
    'merge', parents=[merging], help='merge', epilog=_EPILOGUE
  )
  merge.add_argument('--output', required=True, help='a new directory')
  merge.add_argument('--seed', type=int, default=0, help='of random masks')
  merge.add_argument(
    '--format',
    choices=['orbax', 'safetensors'],
    help="of the output; the base's if absent",
  )
  merge.add_argument(
    '--shard_size', help='of safetensors files, as 5GB; as the base if absent'
  )
  merge.add_argument('--allow_nonfinite', action='store_true')
  merge.add_argument('--overwrite', action='store_true')
  merge.add_argument(
    '--noresume',
    action='store_true',
    help='throw away what a killed merge into this output left',
  )
  merge.add_argument(
    '--distributed',
    action='store_true',
    help='join the processes of a TPU pod or a SLURM job',
  )
  merge.add_argument('--coordinator_address', help='HOST:PORT of process 0')
  merge.add_argument('--num_processes', type=int)
  merge.add_argument('--process_id', type=int)
  merge.set_defaults(run=_merge)

  plan = commands.add_parser(
    'plan',
    parents=[merging],
    help='print what a merge will read, write and need; write nothing',
    epilog=_EPILOGUE,
  )
  plan.set_defaults(run=_plan)

  look = commands.add_parser('inspect', help="print a checkpoint's leaves")
  look.add_argument('checkpoint')
  look.set_defaults(run=_inspect)

  check = commands.add_parser(
    'verify', help='compare a merged checkpoint with its checksums'
  )
  check.add_argument('checkpoint')
  check.set_defaults(run=_verify)

  listing = commands.add_parser('methods', help='print methods and options')
  listing.set_defaults(run=_methods)
  return parser.parse_args(argv[1:])


def main(arguments: argparse.Namespace) -> int:
  """Runs a command. Mistakes of the user end in one line, not a traceback."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_is_ours_or_a_warning)
  _keep_compiled_programs()
  _make_cpu_devices(getattr(arguments, 'devices', None))
  _join_processes(arguments)
  try:
    return arguments.run(arguments) or 0
  except (ValueError, OSError, FloatingPointError) as error:
    if logging.vlog_is_on(1):
      raise
    print(f'mergekit-jax: {error}', file=sys.stderr)
    return 1


def _is_ours_or_a_warning(record: Any) -> bool:
  """Keeps what Orbax and JAX report of their inner life off the screen."""
  return record.levelno >= WARNING or 'mergekit_jax' in record.pathname


def _keep_compiled_programs() -> None:
  """Compiles a kernel once a machine, unless the user has said where."""
  import jax

  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(cache, 'mergekit_jax')
    )
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _make_cpu_devices(count: int | None) -> None:
  """One CPU device a core, unless the user has said otherwise."""
  import jax

  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  jax.config.update('jax_num_cpu_devices', count or os.cpu_count() or 1)


def _join_processes(arguments: argparse.Namespace) -> None:
  """Several processes merge as one; one that dies ends the others."""
  given = getattr(arguments, 'coordinator_address', None)
  if not given and not getattr(arguments, 'distributed', False):
    return
  import jax

  jax.distributed.initialize(
    given,
    arguments.num_processes,
    arguments.process_id,
    heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
  )


def _verify(arguments: argparse.Namespace) -> int:
  from mergekit_jax.verify import verify

  damage = verify(arguments.checkpoint)
  print('\n'.join(damage) or f'{arguments.checkpoint} is as it was written.')
  return 1 if damage else 0


def _merge(arguments: argparse.Namespace) -> None:
  import mergekit_jax as mk

  report = mk.merge_checkpoints(
    output=arguments.output,
    seed=arguments.seed,
    format=arguments.format,
    shard_size=arguments.shard_size,
    allow_nonfinite=arguments.allow_nonfinite,
    overwrite=arguments.overwrite,
    resume=not arguments.noresume,
    **flags.what_to_merge(arguments),
  )
  print(report.table())
  print(f'merged checkpoint: {report.output}')


def _plan(arguments: argparse.Namespace) -> None:
  from mergekit_jax import job

  what = flags.what_to_merge(arguments)
  print(
    job.make_job(
      what.pop('method'), what.pop('experts'), what.pop('base'), **what
    ).describe()
  )


def _inspect(arguments: argparse.Namespace) -> None:
  import mergekit_jax as mk
  from mergekit_jax import report, tree

  checkpoint = mk.open_checkpoint(arguments.checkpoint)
  root = tree.parameter_root(checkpoint.specs)
  total = below = 0
  for path, spec in checkpoint.specs.items():
    stored = checkpoint.storage(path)
    notes = f'chunks {list(stored.chunk)}'
    notes += ', compressed' if stored.compressed else ''
    print(f'{path}  {spec.dtype}{list(spec.shape)}  {notes}')
    total += spec.size * spec.dtype.itemsize
    below += spec.size if tree.below(root, path) else 0
  print(
    f'{checkpoint.format}: {len(checkpoint.specs)} leaves, '
    f'{report.readable(total)}; parameter root {root or "(the whole tree)"!r} '
    f'with {below:,} parameters'
  )


def _methods(arguments: argparse.Namespace) -> None:
  del arguments
  for name, function in flags.all_methods().items():
    options = ', '.join(
      f'{option}={parameter.default!r}'
      for option, parameter in inspect.signature(function).parameters.items()
    )
    summary = (inspect.getdoc(function) or '').splitlines()[0]
    print(f'{name}({options})\n    {summary}')
