"""The command line: mergekit-jax merge, plan, inspect, verify, methods."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
import contextlib
import ctypes
import gc
import inspect
import io
import itertools
from logging import WARNING
import os
import sys
from typing import Any

from absl import app, logging
import jax

import mergekit_jax as mk
from mergekit_jax import report as reports
from mergekit_jax import roots, verify
from mergekit_jax.command import flags, joining
from mergekit_jax.command.parser import parse
from mergekit_jax.forecasting import compiled, described, forecast
from mergekit_jax.jobs import caveats, job, outputs

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def run() -> None:
  """The console script."""
  _mend_streams()
  app.run(main, flags_parser=parse)


def main(arguments: argparse.Namespace) -> int:
  """Runs a command. Mistakes of the user end in one line, not a traceback."""
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().addFilter(_is_ours_or_a_warning)
  _keep_heaps_small()
  _keep_compiled_programs(arguments)
  try:
    _make_devices(arguments)
    joining.join(arguments)
    code = _COMMANDS[arguments.command](arguments) or 0
    sys.stdout.flush()
    return code
  except BrokenPipeError:
    # Who reads, `head` perhaps, has seen enough. What is left of it must not
    # fail again as the program ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except KeyboardInterrupt:
    print('mergekit-jax: interrupted', file=sys.stderr)
    return 130
  except (ValueError, OSError, FloatingPointError) as error:
    if logging.vlog_is_on(1):
      raise
    print(f'mergekit-jax: {error}', file=sys.stderr)
    return 1


def _mend_streams() -> None:
  """Opens streams that are closed; writes as escapes what has no letters.

  The descriptor of a closed one would go to the next file that is opened, and
  with it all that libraries in C say there.
  """
  for name in ('stdin', 'stdout', 'stderr'):
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, 'r+'))
  # A notebook's is of another kind.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors='backslashreplace')


def _is_ours_or_a_warning(record: Any) -> bool:
  """Keeps what Orbax and JAX report of their inner life off the screen."""
  ours = record.pathname.startswith(os.path.dirname(__file__) + os.sep)
  return ours or record.levelno >= WARNING


def _keep_heaps_small() -> None:
  """Has malloc map the parts of boxes, unless the user has said otherwise.

  Left alone, glibc puts them in heaps as soon as the first one was freed, and
  these grow with the model: flags of 2.75 MiB did by 60 MiB at 4 GB. Counts of
  histograms, 2 MiB at four experts, would cost more to map than they leave.
  """
  if 'MALLOC_MMAP_THRESHOLD_' not in os.environ:
    with contextlib.suppress(AttributeError):  # another C library
      mallopt = ctypes.CDLL(None).mallopt
      mallopt(_M_MMAP_THRESHOLD, 5 * 2**19)
      # Or what is freed at the end of a heap would go back every time.
      mallopt(_M_TRIM_THRESHOLD, 2**25)


def _keep_compiled_programs(arguments: argparse.Namespace) -> None:
  """Compiles a kernel once a machine, unless the user has said where.

  Several processes do so only if the user has, in a place that they share: the
  first alone writes, and in its next run would not be there when GPUs choose
  kernels together.
  """
  if getattr(arguments, 'topology', None):
    # Nor does JAX load what was compiled for devices that are not there.
    jax.config.update('jax_enable_compilation_cache', False)
  if not (
    os.environ.get('JAX_COMPILATION_CACHE_DIR')
    or joining.are_several(arguments)
  ):
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(cache, 'mergekit_jax')
    )
  # A merge runs dozens of small programs, each of which takes longer to compile
  # than to load.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


def _make_devices(arguments: argparse.Namespace) -> None:
  """One CPU device a core, unless the user has said otherwise.

  A plan for devices that are not there is made on as many CPU devices.
  """
  imagined = flags.imagined_devices(arguments)
  if imagined:
    jax.config.update('jax_platforms', 'cpu')
  given = imagined or getattr(arguments, 'devices', None)
  if given is not None and given < 1:
    raise ValueError(f'--devices={given} was given; give 1 or more.')
  flag = '--xla_force_host_platform_device_count'
  if flag in (said := os.environ.get('XLA_FLAGS', '')):
    if given and f'{flag}={given}' not in said.split():
      raise ValueError(
        f'{given} CPU devices are wanted, but XLA_FLAGS says {said!r}. Take '
        f'{flag} out of it.'
      )
  elif given or 'JAX_NUM_CPU_DEVICES' not in os.environ:
    jax.config.update('jax_num_cpu_devices', given or _cores())


def _cores() -> int:
  """How many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _verify(arguments: argparse.Namespace) -> int:
  damage = verify.verify(arguments.checkpoint)
  print('\n'.join(damage) or f'{arguments.checkpoint} is as it was written.')
  return 1 if damage else 0


def _merge(arguments: argparse.Namespace) -> None:
  # What is imported stays: the collector need not look through it each time.
  gc.freeze()
  what = flags.what_to_merge(arguments)
  merged = mk.merge_checkpoints(
    **flags.outputs(arguments, what.pop('methods')),
    **_format(arguments),
    allow_nonfinite=arguments.allow_nonfinite,
    overwrite=arguments.overwrite,
    resume=not arguments.noresume,
    **what,
  )
  if jax.process_index() != 0:
    return
  if isinstance(merged, dict):
    print(reports.comparison(merged))
    print(f'merged checkpoints: {arguments.output}/<merge>')
    return
  print(merged.table())
  print(f'merged checkpoint: {merged.output}')


def _format(arguments: argparse.Namespace) -> dict[str, Any]:
  """How an output is to be written."""
  names = ('format', 'shard_size', 'zarr3', 'compression')
  return {name: getattr(arguments, name) for name in names}


def _refused(
  arguments: argparse.Namespace, methods: Mapping[str, Any], made: job.Job
) -> list[str]:
  """What `merge` would not do, if outputs are given, before it reads."""
  if not arguments.output:
    return []
  try:
    for output in outputs.outputs_of(**flags.outputs(arguments, methods)):
      output.demand_possible(
        made, _format(arguments), arguments.overwrite, not arguments.noresume
      )
  except (ValueError, OSError) as error:
    return [f'merge would refuse this: {error}']
  return []


def _plan(arguments: argparse.Namespace) -> None:
  # Nearly all that is made stays until the end: the collector, which would look
  # through all of it again and again, has little to find.
  gc.set_threshold(10**5)
  bandwidth = flags.bandwidth(arguments.bandwidth)
  what = flags.what_to_merge(arguments) | {'hosts': arguments.hosts}
  experts, base = what.pop('experts'), what.pop('base')
  count = len(experts)
  if arguments.model:
    count = flags.number_of_experts(arguments)
  named = what.pop('methods')
  merges = flags.seeded(arguments, named, count)
  methods = [rule for rule, _ in merges.values()]
  if arguments.model:
    model = described.model(arguments.model)
    what['stacked_axes'] = what['stacked_axes'] or model.stacked_axes
    plan = described.make_plan(model.specs, methods, count, **what)
    print(
      f'{arguments.model}: {model.parameters:,} parameters in bfloat16; a base '
      f'and {count} experts'
    )
    numbers = range(len(methods))
    warnings = [caveats.of_plan(plan, count, number) for number in numbers]
  else:
    made = job.make_job(methods, experts, base, **what)
    plan, warnings = made.plan, caveats.of_job(made)
    warnings = [*warnings, _refused(arguments, named, made)]
  kernels = []
  if arguments.model or arguments.topology or arguments.compile:
    kernels = compiled.compile_kernels(plan)
  print(
    forecast.describe(
      plan, hosts=arguments.hosts, bandwidth=bandwidth, kernels=kernels
    )
  )
  for warning in dict.fromkeys(itertools.chain(*warnings)):
    print(f'warning: {warning}')


def _inspect(arguments: argparse.Namespace) -> None:
  checkpoint = mk.open_checkpoint(arguments.checkpoint)
  root = roots.parameter_root(checkpoint.specs)
  holds = roots.parameters(checkpoint.specs, root)
  total = below = 0
  for path, spec in checkpoint.specs.items():
    stored = checkpoint.storage(path)
    notes = f'chunks {list(stored.chunk)}'
    notes += ', compressed' if stored.compressed else ''
    print(f'{path}  {spec.dtype}{list(spec.shape)}  {notes}')
    total += spec.size * spec.dtype.itemsize
    if holds(path):
      below += spec.size
  print(
    f'{checkpoint.format} at {checkpoint.location}: '
    f'{len(checkpoint.specs)} leaves, {reports.readable(total)}; '
    f'parameter root {root or "(the whole tree)"!r} with {below:,} parameters'
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


_COMMANDS = {
  'merge': _merge,
  'plan': _plan,
  'inspect': _inspect,
  'verify': _verify,
  'methods': _methods,
}
