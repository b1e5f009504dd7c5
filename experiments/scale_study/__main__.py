"""Runs a preset of the study.

  python -m experiments.scale_study --preset=smoke

Trains a base and its experts, merges them, scores everything and writes the
results to --output_dir. Exits with an error if an expert does not learn its
task or a streamed merge is not, bit by bit, the merge in memory.
"""

import dataclasses
import importlib
import os
from pathlib import Path
import pkgutil

from absl import app, flags, logging

from experiments.scale_study import configs
from experiments.scale_study.config import StudyConfig

_PRESET = flags.DEFINE_enum(
  'preset',
  'smoke',
  [preset.name for preset in pkgutil.iter_modules(configs.__path__)],
  'What to run: a module of configs/.',
)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', None, 'Where the results go; default results/<preset>.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of everything random.')
_SET = flags.DEFINE_multi_string(
  'set', [], 'Overrides a number of the preset: --set=pretrain_steps=100.'
)


def main(argv: list[str]) -> str | None:
  """Runs the preset and returns what went wrong, for the exit code."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}.')
  if not flags.FLAGS['verbosity'].present:
    # Orbax logs every file it touches; --verbosity=0 shows that and the stages.
    logging.set_verbosity(logging.WARNING)
  config = _config()
  if config.host_devices is not None:
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    os.environ.setdefault(
      'XLA_FLAGS',
      f'--xla_force_host_platform_device_count={config.host_devices}',
    )
  # Imported only now: JAX reads these variables when it is first imported.
  from experiments.scale_study import pipeline, report

  output_dir = Path(_OUTPUT_DIR.value or f'results/{_PRESET.value}').resolve()
  results = pipeline.run(config, output_dir)
  report.write(results, output_dir)
  print(
    f'{report.table(results)}\n\nWrote {output_dir}/results.{{csv,json,png}}'
  )
  return '\n'.join(results.failures()) or None


def _config() -> StudyConfig:
  preset = importlib.import_module(f'{configs.__name__}.{_PRESET.value}')
  config = dataclasses.replace(preset.CONFIG, seed=_SEED.value)
  for override in _SET.value:
    name, _, value = override.partition('=')
    current = getattr(config, name, None)
    if not isinstance(current, int | float):
      raise app.UsageError(
        f'--set={override} is not NAME=NUMBER for a field of the preset.'
      )
    config = dataclasses.replace(config, **{name: type(current)(value)})
  return config


if __name__ == '__main__':
  app.run(main)
