"""What may stand on the command line: commands, flags and their help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
import itertools
import re
from typing import Any

from absl.flags import argparse_flags

from mergekit_jax.checkpoint import FORMATS
from mergekit_jax.command import names

_EPILOGUE = """
Expressions (REGEX) match whole paths as `inspect` prints them; the first match
wins, and one that matches nothing is an error.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Reads the command line; exits with 2 and a message if it cannot."""
  parser = argparse_flags.ArgumentParser(
    prog='mergekit-jax',
    description='Merges fine-tuned experts of one base model, as partitioned '
    'checkpoints on a mesh, without any host holding a whole model.',
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(
    dest='command', required=True, parser_class=_Command
  )
  merging = _Command(add_help=False)
  _add_merging(merging)
  merge = commands.add_parser(
    'merge', parents=[merging], help='merge', epilog=_EPILOGUE
  )
  _add_writing(merge, output_needed=True)
  _add_joining(merge)
  plan = commands.add_parser(
    'plan',
    parents=[merging],
    help='print what a merge with these flags will read, write and need; write '
    'nothing',
    epilog=_EPILOGUE,
  )
  _add_planning(plan)
  # The command of a merge can be planned as it is, but needs no output.
  _add_writing(plan, output_needed=False)

  look = commands.add_parser('inspect', help="print a checkpoint's leaves")
  look.add_argument('checkpoint', type=_path)

  check = commands.add_parser(
    'verify', help='compare a merged checkpoint with its checksums'
  )
  check.add_argument('checkpoint', type=_path)

  commands.add_parser('methods', help='print methods and options')
  for command in (merge, plan):
    # Later versions of Python do so themselves. In 3.11 what begins like
    # --weights -0.5,1 or -1e-1 is taken for a flag.
    command._negative_number_matcher = re.compile(r'-\.?\d')
  return parser.parse_args(argv[1:])


class _Command(argparse.ArgumentParser):
  """Takes whole names alone, and says first which flag there is not.

  One that is misspelled would else be said to be missing.
  """

  def __init__(self, **options: Any):
    super().__init__(allow_abbrev=False, **options)

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    known = self._option_string_actions
    for word in itertools.takewhile(lambda word: word != '--', args):
      flag = word.partition('=')[0]
      if flag.startswith('--') and flag not in known:
        self.error(f'there is no flag {flag}.{names.nearest(flag, known)}')
    return super().parse_known_args(args, namespace)


def _add_merging(parser: argparse.ArgumentParser) -> None:
  """What `merge` and `plan` share: the rules, the models, the devices."""
  add = parser.add_argument
  add(
    '--method',
    action='extend',
    nargs='+',
    required=True,
    metavar='NAME',
    help='a name that `methods` prints, or several to merge from one read',
  )
  add(
    '--set',
    action='extend',
    nargs='+',
    default=[],
    metavar='NAME=VALUE',
    help="options of the methods that have them, as 'density=0.2 scope=tensor'",
  )
  add(
    '--sweep',
    action='extend',
    nargs='+',
    default=[],
    metavar='NAME=VALUE,VALUE,...',
    help="a merge for each value, from the same reads, as 'scale=0.3,0.5,1'",
  )
  add('--base', type=_path, help='checkpoint of the base model')
  add(
    '--experts',
    action='extend',
    nargs='+',
    type=_path,
    required=True,
    help='checkpoints of the experts',
  )
  add(
    '--weights',
    action='extend',
    nargs='+',
    default=[],
    help='a number for each expert, in their order; 1 each if absent',
  )
  add(
    '--override',
    action='extend',
    nargs='+',
    default=[],
    metavar='REGEX:base|REGEX:NAME=VALUE,...',
    help='keep leaves as in the base, or merge them with other options than '
    '--set; TIES trims those by a threshold of their own',
  )
  add(
    '--stacked_axes',
    action='extend',
    nargs='+',
    default=[],
    metavar='REGEX=AXIS[,AXIS]',
    help='axes over which layers are stacked',
  )
  add(
    '--partition_rules',
    action='extend',
    nargs='+',
    default=[],
    metavar='REGEX=AXES,...',
    help="mesh axes by dimension, as '.*/kernel=fsdp,-' ('-': not sharded)",
  )
  add(
    '--seed',
    action='extend',
    nargs='+',
    type=int,
    default=[],
    help='of random masks, 0 if absent; of several a merge for each, by random '
    'methods',
  )
  add(
    '--mesh',
    help="axes of devices, as 'fsdp=4,tensor=2'; all on one axis if absent",
  )
  add('--devices', type=int, help='CPU devices to make; one a core if absent')
  add(
    '--memory_budget',
    default='4GiB',
    help='host memory that each process may take, as 512MiB; 4GiB if absent',
  )
  add('--dtype', help="of the merged leaves, as bf16; the base's if absent")


def _add_writing(parser: argparse.ArgumentParser, output_needed: bool) -> None:
  """What `merge` needs to write its output; `plan` says what it refuses."""
  add = parser.add_argument
  add(
    '--output',
    type=_path,
    required=output_needed,
    help='a new directory; of several merges, where theirs are made',
  )
  add(
    '--format',
    choices=FORMATS,
    help="of the output; the base's if absent",
  )
  add(
    '--shard_size', help='of safetensors files, as 5GB; as the base if absent'
  )
  for flag, zarr3 in (('--zarr3', True), ('--nozarr3', False)):
    add(
      flag,
      dest='zarr3',
      action='store_const',
      const=zarr3,
      help=f'arrays of Orbax in zarr{2 + zarr3}; as the base if absent',
    )
  add('--compression', choices=['zstd'], help='of Orbax; none if absent')
  add(
    '--allow_nonfinite',
    action='store_true',
    help='let NaN and Inf in the sources through',
  )
  add(
    '--overwrite',
    action='store_true',
    help='replace an output that exists, once the new one is complete',
  )
  add(
    '--noresume',
    action='store_true',
    help='throw away what a killed merge into this output left',
  )


def _add_joining(parser: argparse.ArgumentParser) -> None:
  """What processes that merge together need."""
  add = parser.add_argument
  add(
    '--distributed',
    action='store_true',
    help='join the processes of a TPU pod or a SLURM job',
  )
  add('--coordinator_address', help='HOST:PORT of process 0')
  add('--num_processes', type=int, help='how many processes merge together')
  add('--process_id', type=int, help='which of them this is')


def _add_planning(parser: argparse.ArgumentParser) -> None:
  """What `plan` alone can be asked."""
  add = parser.add_argument
  add(
    '--model',
    help="a described model instead of checkpoints, as '64b'; --experts is "
    'then their number',
  )
  add(
    '--hosts',
    type=int,
    help='hosts of the mesh; its devices need not be there',
  )
  add(
    '--topology',
    metavar='NAME',
    help="TPUs that need not be there, as 'v5e:16x16', for which TPU's own "
    "compiler compiles (pip install 'jax[tpu]'); one axis if --mesh is absent",
  )
  add(
    '--bandwidth',
    help='at which a host reads or writes, as 2GB/s, to tell the seconds',
  )
  add(
    '--compile',
    action='store_true',
    help="compile the largest kernels, for the devices' memory (with --model "
    'this is always done)',
  )


def _path(text: str) -> str:
  """Refuses a path that is empty: argparse says of which flag it was."""
  if not text:
    raise argparse.ArgumentTypeError(
      'an empty path was given, perhaps of a variable that is not set; the '
      "working directory is '.'"
    )
  return text
