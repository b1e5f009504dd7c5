"""What a plan will cost, for people: bytes, seconds and memory."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import re

import jax
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from mergekit_jax.forecasting.compiled import Kernel
from mergekit_jax.planning.plan import Plan
from mergekit_jax.report import readable


@dataclasses.dataclass(frozen=True)
class HostBytes:
  """What the host that has the most to do reads and writes, in bytes."""

  read: int
  written: int


def host_bytes(plan: Plan, hosts: int | None = None) -> HostBytes:
  """The bytes that the busiest host reads and writes.

  Args:
    plan: the plan.
    hosts: over how many hosts the devices of the mesh are spread, in order; as
      the devices say themselves if None.
  """
  elements = collections.Counter()
  for scope in plan.scopes:
    for tensor in scope.tensors:
      stored = sum(dtype.itemsize for dtype in tensor.sources)
      stored *= scope.reads(tensor)
      for box in tensor.boxes:
        kind = box.spec, stored, tensor.dtype.itemsize
        elements[kind] += math.prod(box.shape)
  read = collections.Counter()
  written = collections.Counter()
  for (spec, stored, itemsize), count in elements.items():
    read[spec] += count * stored
    written[spec] += count * itemsize * plan.merges
  of_host = _host_of_devices(plan.mesh, hosts)
  shares = {spec: _shares(spec, plan.mesh, of_host) for spec in read}

  def most(count: Mapping[PartitionSpec, int], which: int) -> int:
    of_hosts = np.zeros(of_host.max() + 1)
    for spec, of_boxes in count.items():
      of_hosts += of_boxes * shares[spec][which]
    return round(of_hosts.max())

  return HostBytes(most(read, 0), most(written, 1))


def _host_of_devices(mesh: Mesh, hosts: int | None) -> np.ndarray:
  """The number of the host of every device of the mesh, in its order."""
  if hosts is not None:
    return np.arange(mesh.size) * hosts // mesh.size
  processes = [device.process_index for device in mesh.devices.flat]
  return np.unique(processes, return_inverse=True)[1]


def _shares(
  spec: PartitionSpec, mesh: Mesh, of_host: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The fraction of a box that each host reads, and that each writes.

  A host reads every part that one of its devices holds, once; the host of the
  first device that holds a part writes it.
  """
  place = dict(
    zip(mesh.axis_names, np.indices(mesh.devices.shape), strict=True)
  )
  parts = np.zeros(mesh.devices.shape, int)
  for name in jax.tree.leaves(tuple(spec)):
    parts = parts * mesh.shape[name] + place[name]
  held = np.unique(np.stack([of_host, parts.ravel()]), axis=1)
  count, first = np.unique(parts, return_index=True)
  hosts = of_host.max() + 1
  return (
    np.bincount(held[0], minlength=hosts) / len(count),
    np.bincount(of_host[first], minlength=hosts) / len(count),
  )


def describe(
  plan: Plan,
  *,
  hosts: int | None = None,
  bandwidth: int | None = None,
  kernels: Sequence[Kernel] = (),
) -> str:
  """What a merge will read, write and need, for people.

  Args:
    plan: the plan.
    hosts: as `host_bytes` has it.
    bandwidth: bytes a second that every host reads from storage, or writes.
    kernels: the compiled kernels, if they are.

  Returns:
    A table of the leaves, those of a name but for numbers in one row, and the
    sums below it.
  """
  tensors = [t for scope in plan.scopes for t in scope.tensors]
  copied = sum(len(s.tensors) for s in plan.scopes if not s.rules)
  boxes = sum(len(tensor.boxes) for tensor in tensors)
  reads = sum(len(t.boxes) * s.reads(t) for s in plan.scopes for t in s.tensors)
  busiest = host_bytes(plan, hosts)
  spread = busiest.read < plan.bytes_read
  of_host = lambda count: f', {readable(count)} on a host' if spread else ''
  axes = ','.join(f'{name}={size}' for name, size in plan.mesh.shape.items())
  number = _host_of_devices(plan.mesh, hosts).max() + 1
  lines = [
    *_rows(plan),
    f'mesh: {axes}, on {number} host{"s" if number > 1 else ""}',
    f'{len(tensors) - copied} tensors merged, {copied} copied, '
    f'in {boxes} boxes and {reads} reads of a box',
    f'rounds: {plan.rounds}',
    f'bytes read: {readable(plan.bytes_read)}{of_host(busiest.read)}',
    f'bytes written: {readable(plan.bytes_written)}{of_host(busiest.written)}',
    f'host memory: {readable(plan.host_bytes)} of a budget of '
    f'{readable(plan.memory_budget)}, beside imports and runtime',
  ]
  worst = max(tensors, key=lambda t: t.amplification, default=None)
  if worst is not None and worst.amplification > 1:
    lines.append(
      f'compressed chunks: up to {worst.amplification:.2f} bytes decoded for '
      f'each byte used ({worst.path})'
    )
  if kernels:
    lines += _compiled(kernels, plan.mesh)
  if bandwidth:
    lines.append(
      f'seconds: {busiest.read / bandwidth:,.1f} at least, to read '
      f'{readable(busiest.read)} at {readable(bandwidth)}/s on a host, and '
      f'meanwhile {busiest.written / bandwidth:,.1f} to write '
      f'{readable(busiest.written)}'
    )
  return '\n'.join(lines)


def _rows(plan: Plan) -> list[str]:
  """The table of leaves."""
  rows = collections.defaultdict(list)
  for scope in plan.scopes:
    for tensor in scope.tensors:
      rows[
        re.sub(r'\d+', '*', tensor.path),
        tensor.shape,
        len(tensor.boxes),
        scope.reads(tensor),
        tensor.stacked,
        tensor.boxes[0].spec,
      ].append(tensor.path)
  header = ['tensor', 'leaves', 'shape', 'layers along', 'boxes', 'reads']
  cells = [[*header, 'sharding']]
  along_of = functools.cache(
    lambda spec: ','.join('+'.join(jax.tree.leaves(x)) or '-' for x in spec)
  )
  for (pattern, shape, boxes, reads, stacked, spec), paths in rows.items():
    name = pattern if len(paths) > 1 else paths[0]
    along = along_of(spec)
    layers = ','.join(map(str, stacked)) or '-'
    numbers = map(str, (len(paths), list(shape), layers, boxes, reads))
    cells.append([name, *numbers, along or '-'])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  line = '  '.join(
    f'{{:{side}{width}}}' for side, width in zip('<><>>><', widths, strict=True)
  )
  return [line.format(*row).rstrip() for row in cells]


def _compiled(kernels: Sequence[Kernel], mesh: Mesh) -> list[str]:
  """The most memory that a kernel needs, and what they all communicate."""
  largest = max(kernels, key=lambda kernel: kernel.device_bytes)
  collectives = collections.Counter({'all-gather': 0, 'all-reduce': 0})
  for kernel in kernels:
    collectives.update(kernel.collectives)
  counted = ', '.join(f'{n} {kind}' for kind, n in collectives.items())
  return [
    f'device memory: {readable(largest.device_bytes)} in the largest kernel '
    f'({largest.step} of {largest.path}, {list(largest.box.shape)})',
    f'kernels: {len(kernels)} compiled for {mesh.size} devices '
    f'({mesh.devices.flat[0].platform}), with {counted}',
  ]
