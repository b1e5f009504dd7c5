"""TPUs that are not there, for which their own compiler compiles.

libtpu holds the compiler, and needs no TPU for it: what a kernel takes of a
device's memory, and what devices send each other, is then what a pod would do,
not what simulated CPU devices do in its place.
"""

from __future__ import annotations

import os
from typing import Any

from jax.experimental import topologies

# Before libtpu is loaded: one process need not wait for another, nothing is
# asked of a TPU host's metadata server, which is not there either, and no logs
# are left.
_ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_LOG_DIR': 'disabled',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


def tpus(name: str) -> list[Any]:
  """The devices of a topology of TPUs, to compile for; nothing runs on them.

  Args:
    name: generation and grid of chips, as 'v5e:16x16', 'v5p:8x8x8', 'v6e:4x4'.

  Returns:
    Devices, each of which knows its host.

  Raises:
    ValueError: if there is no such topology, or libtpu is not installed.
  """
  for variable, value in _ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  try:
    described = topologies.get_topology_desc(name, platform='tpu')
  except RuntimeError as error:
    raise ValueError(
      f'The topology {name!r} was given: {error}. Give a generation and a grid '
      "of chips, as v5e:16x16, and install TPU's compiler, which needs no TPU: "
      "pip install 'jax[tpu]', on Linux."
    ) from error
  return described.devices
