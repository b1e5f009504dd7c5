"""Runs a preset of the study.

  python -m experiments.scale_study --preset=smoke

Trains bases, experts and multitask models, merges the experts, scores
everything and writes the results to --output_dir. The same command goes on
where it was killed. A field of the preset is changed by --set=NAME=VALUE.

A strict preset, such as smoke, ends with an error if an expert does not learn
its task or a streamed merge is not, bit by bit, the merge in memory.
"""

import importlib
import io
import os
from pathlib import Path
import pkgutil
import sys

from absl import app, flags, logging
import jax

from experiments.scale_study import configs, scheduler, study_config
from experiments.scale_study.study_config import StudyConfig

_PRESET = flags.DEFINE_string(
  'preset', 'smoke', 'What to run: a module of configs/.'
)
_OUTPUT_DIR = flags.DEFINE_string(
  'output_dir', None, 'Where the results go; default results/<preset>.'
)
_SET = flags.DEFINE_multi_string(
  'set', [], 'Changes a field of the preset: --set=pretrain_steps=100.'
)
_PHASE = flags.DEFINE_multi_string(
  'phase', [], 'Does only this phase, or these; default all.'
)
_PART = flags.DEFINE_string(
  'part', None, 'Does only the bases SIZE/SEED, or the arm SIZE/BASE/SEED.'
)
_CELL = flags.DEFINE_string(
  'cell', None, 'Makes one merge again, named as in its command.'
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed', False, 'Joins the processes of a TPU pod or a SLURM job.'
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  'coordinator_address', None, 'HOST:PORT of process 0, to join them by hand.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Of the study, if they are joined by hand.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, if they are joined by hand.'
)


def main(argv: list[str]) -> str | None:
  """Runs the preset and returns what went wrong, for the exit code."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}.')
  if not flags.FLAGS['verbosity'].present:
    # Orbax logs every file it touches; --verbosity=0 shows that and the stages.
    logging.set_verbosity(logging.WARNING)
  if not (_DISTRIBUTED.value or _COORDINATOR_ADDRESS.value):
    if _NUM_PROCESSES.value is not None or _PROCESS_ID.value is not None:
      raise app.UsageError(
        '--num_processes and --process_id were given, but nothing says where '
        'the processes meet. Add --coordinator_address=HOST:PORT.'
      )
  try:
    config = _config()
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  if '://' in (_OUTPUT_DIR.value or ''):
    return (
      f'--output_dir={_OUTPUT_DIR.value}: give a local folder, or one of a '
      'file system that is mounted, such as a bucket by gcsfuse.'
    )
  output_dir = Path(_OUTPUT_DIR.value or f'results/{_PRESET.value}').resolve()
  try:
    return _study(config, output_dir)
  except (OSError, ValueError, scheduler.PartFailedError) as error:
    if flags.FLAGS['verbosity'].present:
      raise
    return f'{error}'


def _config() -> StudyConfig:
  presets = [preset.name for preset in pkgutil.iter_modules(configs.__path__)]
  if _PRESET.value not in presets:
    raise ValueError(
      f'There is no preset {_PRESET.value!r}.'
      + study_config.nearest(_PRESET.value, presets)
    )
  preset = importlib.import_module(f'{configs.__name__}.{_PRESET.value}')
  config = preset.CONFIG
  for setting in _SET.value:
    config = study_config.override(config, setting)
  return config


def _study(config: StudyConfig, output_dir: Path) -> str | None:
  if config.host_devices is not None:
    jax.config.update('jax_platforms', 'cpu')
    if 'xla_force_host_platform' not in os.environ.get('XLA_FLAGS', ''):
      jax.config.update('jax_num_cpu_devices', config.host_devices)
  if _DISTRIBUTED.value or _COORDINATOR_ADDRESS.value:
    if config.processes > 1:
      raise ValueError(
        f'The preset runs {config.processes} processes side by side, which '
        'cannot be joined: add --set=processes=1.'
      )
    if config.mesh is None:
      raise ValueError(
        'Processes that are joined share a mesh, and the preset has none, so '
        "that each would train alone: give mesh, such as {'data': 1, 'fsdp': "
        "8, 'tensor': 1} for 8 devices, in a preset of your own."
      )
    jax.distributed.initialize(
      _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    )
    if jax.process_index() > 0 and not flags.FLAGS['verbosity'].present:
      # The first warns of what concerns all.
      logging.set_verbosity(logging.ERROR)
  try:
    from experiments.scale_study import study
  except ModuleNotFoundError as error:
    raise ValueError(
      f'The study needs {error.name}: install its packages by '
      "pip install -e '.[study]'."
    ) from error

  wanted = _PHASE.value or study.PHASES
  for phase in wanted:
    if phase not in study.PHASES:
      raise ValueError(
        f'--phase={phase}: there is no such phase.'
        + study_config.nearest(phase, study.PHASES)
      )
  # Every arm of a size needs the same programs.
  jax.config.update('jax_compilation_cache_dir', f'{output_dir}/compiled')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  given = [f'--preset={_PRESET.value}']
  given += [f'--set={setting}' for setting in _SET.value]
  if _OUTPUT_DIR.value:
    given += [f'--output_dir={_OUTPUT_DIR.value}']
  running = study.Study(config, output_dir, given)
  if _CELL.value:
    print(running.reproduce(_CELL.value))
  elif _PART.value:
    running.run_part(_PART.value, wanted)
  else:
    print(running.run(wanted))
    if config.strict and 'report' in wanted:
      return '\n'.join(running.failures()) or None
  return None


if __name__ == '__main__':
  if isinstance(sys.stdout, io.TextIOWrapper):
    # A locale may have no ≥ and no −.
    sys.stdout.reconfigure(errors='backslashreplace')
  app.run(main)
