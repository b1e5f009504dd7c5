"""What figures depend on, as it is noted beside them."""

import importlib.metadata

import pytest

from experiments import environment

_CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1
cpu MHz\t\t: 2445.422
flags\t\t: fpu avx f16c {flags} smep
bugs\t\t: spectre_v1

processor\t: 1
model\t\t: 99
model name\t: another
"""


@pytest.mark.parametrize(
  ('model', 'flags', 'described'),
  [
    (1, 'avx2', 'AMD EPYC, family 25, model 1, stepping 1, avx2'),
    (
      17,
      'avx2 avx512f avx512dq',
      'AMD EPYC, family 25, model 17, stepping 1, avx2, avx512f',
    ),
    (1, '', 'AMD EPYC, family 25, model 1, stepping 1'),
  ],
)
def test_processors_of_one_name_are_told_apart(model, flags, described):
  cpuinfo = _CPUINFO.format(model=model, flags=flags)
  assert environment.described(cpuinfo) == described


@pytest.mark.parametrize(
  ('cpuinfo', 'described'),
  [
    ('', 'unknown'),
    ('processor\t: 0\nCPU implementer\t: 0x41\n', 'unknown'),
    ('model name\t: Cortex: A72\n', 'Cortex: A72'),
  ],
)
def test_a_processor_may_tell_less(cpuinfo, described):
  assert environment.described(cpuinfo) == described


def test_packages_on_which_figures_depend_are_noted():
  noted = environment.machine()
  for name in ('jax', 'numpy', 'scipy'):
    assert noted[name] == importlib.metadata.version(name)
