"""Plans and compiles for a pod of 512 devices, in a process of its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time

METHODS = {
  'average': 'mk.average()',
  'task_arithmetic': 'mk.task_arithmetic()',
  'dare': 'mk.dare()',
  'dare_ties': 'mk.dare_ties()',
  **{
    f'{name} over the {scope}': f'mk.{name}({density}, scope={scope!r})'
    for name, density in [('ties', 0.2), ('dare_ties', '0.9, 0.2')]
    for scope in ('model', 'tensor')
  },
}


def main(models: str, names: list[str]) -> None:
  """Prints a line of JSON for each method of each model, as '1b,8b'."""
  experts, devices, hosts = 8, 512, 64
  import jax

  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', devices)
  import mergekit_jax as mk
  from mergekit_jax import sharding
  from mergekit_jax.forecasting import compiled, described, forecast

  decoders = map(described.model, models.split(','))
  mesh = sharding.make_mesh({'fsdp': devices})
  for decoder, name in itertools.product(decoders, names or METHODS):
    start = time.perf_counter()
    plan = described.make_plan(
      decoder.specs,
      [eval(METHODS[name], {'mk': mk})],
      experts,
      mesh=mesh,
      hosts=hosts,
      stacked_axes=decoder.stacked_axes,
    )
    kernels = compiled.compile_kernels(plan)
    facts = {
      'method': name,
      'bytes': dataclasses.asdict(forecast.host_bytes(plan, hosts)),
      'host_memory': plan.host_bytes,
      'memory_budget': plan.memory_budget,
      'rounds': plan.rounds,
      'device_memory': max(kernel.device_bytes for kernel in kernels),
      'steps': [kernel.step for kernel in kernels],
      'collectives': [kernel.collectives for kernel in kernels],
      'seconds': round(time.perf_counter() - start, 1),
    }
    print(json.dumps(facts), flush=True)


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2:])
