"""How the processes of a merge find each other, as the command line says."""

from __future__ import annotations

import argparse
import os
import re
import socket

import jax

_HEARTBEAT_TIMEOUT_SECONDS = 15
# How long a process that has ended, by an error of its own perhaps, lets the
# others go on before JAX ends them too. Those that ended well come within ms.
_SHUTDOWN_TIMEOUT_SECONDS = 20


def join(arguments: argparse.Namespace) -> None:
  """Several processes merge as one; one that fails or dies ends the others.

  Raises:
    ValueError: if the flags do not say where the processes meet.
    OSError: if they cannot meet there.
  """
  if not are_several(arguments):
    for name in ('num_processes', 'process_id'):
      if getattr(arguments, name, None) is not None:
        raise ValueError(
          f'--{name} was given, but nothing says where the processes meet. Add '
          '--coordinator_address HOST:PORT, or --distributed on a cluster that '
          'says so itself.'
        )
    return
  if arguments.coordinator_address is not None:
    _demand_address(arguments)
  # It would swallow the signal to end, after which there is but the kill.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      arguments.coordinator_address,
      arguments.num_processes,
      arguments.process_id,
      heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_SECONDS,
      shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise OSError(
      'This process could not join the others. Give each the '
      '--coordinator_address HOST:PORT of process 0, --num_processes and '
      '--process_id; or --distributed on a cluster that says so itself: '
      f'{error}'
    ) from error


def are_several(arguments: argparse.Namespace) -> bool:
  """Whether this is one of several processes, as only `merge` may be."""
  told = vars(arguments)
  # An empty address is of a variable that is not set: no process alone.
  address = told.get('coordinator_address')
  return address is not None or bool(told.get('distributed'))


def _demand_address(arguments: argparse.Namespace) -> None:
  """Demands that an address is one, with what belongs to it.

  Raises:
    ValueError: if it is not, or the process has no number.
    OSError: if process 0 cannot wait for the others there.
  """
  address = arguments.coordinator_address
  found = re.fullmatch(r'.+:(\d+)', address)
  if not found or not 0 < int(found[1]) < 2**16:
    raise ValueError(
      f'--coordinator_address {address!r} was given; write it as HOST:PORT, '
      "such as '10.0.0.1:8476'."
    )
  if arguments.distributed:
    return
  count, number = arguments.num_processes, arguments.process_id
  if count is None or number is None:
    raise ValueError(
      f'--coordinator_address {address} was given without --num_processes or '
      '--process_id. Give each process all three, or --distributed on a '
      'cluster that says the others itself.'
    )
  if not 0 <= number < count:
    raise ValueError(
      f'--process_id {number} was given with --num_processes {count}; number '
      'the processes from 0 to one less than there are.'
    )
  if number == 0 and 'JAX_COORDINATOR_BIND_ADDRESS' not in os.environ:
    _demand_free(address, int(found[1]))


def _demand_free(address: str, port: int) -> None:
  """Raises OSError if this process cannot wait for the others at a port.

  JAX may then end in a segmentation fault.
  """
  with socket.socket() as probe:
    # As JAX does: connections that an earlier run has left do not count.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(('', port))
    except OSError as error:
      raise OSError(
        f'--coordinator_address {address} was given, but process 0 cannot have '
        f'the port ({error.strerror}). Give all processes one that is free.'
      ) from error
