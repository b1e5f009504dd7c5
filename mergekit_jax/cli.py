"""The command line: mergekit-jax merge, plan, inspect, verify, methods."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import ctypes
import inspect
from logging import WARNING
import os
import platform
import sys
from typing import Any

from absl import app, logging
from absl.flags import argparse_flags

from mergekit_jax import flags

# Of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

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
  add(
    '--method',
    nargs='+',
    required=True,
    metavar='NAME',
    help='a name that `methods` prints, or several to merge from one read',
  )
  add(
    '--set',
    action='append',
    default=[],
    metavar='NAME=VALUE',
    help="an option of the method, as 'density=0.2'; may be repeated",
  )
  add(
    '--sweep',
    action='append',
    default=[],
    metavar='NAME=VALUE,VALUE,...',
    help="a merge for each value, from one read, as 'scale=0.3,0.5,1'",
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
  add(
    '--seed',
    nargs='+',
    type=int,
    default=[0],
    help='of random masks; a merge for each',
  )
  add('--mesh', help="as 'fsdp=4,tensor=2'; all devices on one axis if absent")
  add('--devices', type=int, help='CPU devices to make; one a core if absent')
  add('--memory_budget', default='4GiB', help='host memory, as 512MiB or 4GiB')
  add('--dtype', help="of the merged leaves; the base's if absent")

  merge = commands.add_parser(
    'merge', parents=[merging], help='merge', epilog=_EPILOGUE
  )
  merge.add_argument(
    '--output',
    required=True,
    help='a new directory; of several merges, where theirs are made',
  )
  merge.add_argument(
    '--format',
    choices=['orbax', 'safetensors'],
    help="of the output; the base's if absent",
  )
  merge.add_argument(
    '--shard_size', help='of safetensors files, as 5GB; as the base if absent'
  )
  for flag, zarr3 in (('--zarr3', True), ('--nozarr3', False)):
    merge.add_argument(
      flag,
      dest='zarr3',
      action='store_const',
      const=zarr3,
      help=f'arrays of Orbax in zarr{2 + zarr3}; as the base if absent',
    )
  merge.add_argument(
    '--compression', choices=['zstd'], help='of Orbax; none if absent'
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
  plan.add_argument(
    '--model',
    help="a described model instead of checkpoints, as '64b'; --experts is "
    'then their number',
  )
  plan.add_argument(
    '--hosts',
    type=int,
    help='hosts of the mesh; its devices need not be there',
  )
  plan.add_argument(
    '--bandwidth', help='at which a host reads, as 2GB/s, to tell the seconds'
  )
  plan.add_argument(
    '--compile',
    action='store_true',
    help="compile the largest kernels, for the devices' memory (with --model "
    'this is always done)',
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
  _keep_memory()
  try:
    _make_devices(arguments)
    _join_processes(arguments)
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


def _keep_memory() -> None:
  """Lets freed memory be used again, unless the user has said otherwise.

  The GNU C library gives large blocks back to the system at once, and XLA
  allocates large blocks for every box: to get fresh pages for all of them took
  TIES more time than its arithmetic.
  """
  if any(name.startswith('MALLOC_') for name in os.environ):
    return
  if platform.libc_ver()[0] == 'glibc':
    set_option = ctypes.CDLL(None).mallopt
    set_option(_M_ARENA_MAX, 1)
    set_option(_M_MMAP_MAX, 0)
    set_option(_M_TRIM_THRESHOLD, 2**31 - 1)


def _make_devices(arguments: argparse.Namespace) -> None:
  """One CPU device a core, unless the user has said otherwise.

  A plan for devices that are not there is made on as many CPU devices.
  """
  import jax

  imagined = flags.imagined_devices(arguments)
  if imagined:
    jax.config.update('jax_platforms', 'cpu')
  if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  given = imagined or getattr(arguments, 'devices', None)
  jax.config.update('jax_num_cpu_devices', given or os.cpu_count() or 1)


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

  what = flags.what_to_merge(arguments)
  merged = mk.merge_checkpoints(
    **flags.outputs(arguments, what.pop('methods')),
    format=arguments.format,
    shard_size=arguments.shard_size,
    zarr3=arguments.zarr3,
    compression=arguments.compression,
    allow_nonfinite=arguments.allow_nonfinite,
    overwrite=arguments.overwrite,
    resume=not arguments.noresume,
    **what,
  )
  for report in merged.values() if isinstance(merged, dict) else [merged]:
    print(report.table())
    print(f'merged checkpoint: {report.output}')


def _plan(arguments: argparse.Namespace) -> None:
  from mergekit_jax import compiled, described, forecast, job

  bandwidth = flags.bandwidth(arguments.bandwidth)
  what = flags.what_to_merge(arguments) | {'hosts': arguments.hosts}
  methods = [*what.pop('methods').values()] * len(arguments.seed)
  experts, base = what.pop('experts'), what.pop('base')
  if arguments.model:
    model = described.model(arguments.model)
    count = flags.number_of_experts(arguments)
    plan = described.make_plan(model, methods, count, **what)
    print(
      f'{arguments.model}: {model.parameters:,} parameters in bfloat16; a base '
      f'and {count} experts'
    )
  else:
    plan = job.make_job(methods, experts, base, **what).plan
  kernels = []
  if arguments.model or arguments.compile:
    kernels = compiled.compile_kernels(plan, bool(arguments.model or base))
  print(
    forecast.describe(
      plan, hosts=arguments.hosts, bandwidth=bandwidth, kernels=kernels
    )
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
