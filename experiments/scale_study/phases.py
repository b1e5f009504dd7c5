"""Training of the models of a study, before anything is merged.

Every model is the checkpoint that its training leaves. A phase that is started
again skips what is finished and goes on where it was killed.
"""

from experiments.scale_study import stored
from experiments.scale_study.folder import Arm, read_json, write_json
from experiments.scale_study.size import Size
from experiments.scale_study.study_config import (
  INSTRUCTION_TUNED,
  PRETRAINED,
  Stored,
)
from mergekit_jax import processes


def bases(size: Size, seed: int) -> None:
  """Makes the bases of a size: pretraining, then instruction tuning."""
  config = size.config
  arms = [
    Arm(size.name, base, seed) for base in (PRETRAINED, INSTRUCTION_TUNED)
  ]
  if isinstance(size.models, Stored):
    paths = (size.models.pretrained, size.models.instruction_tuned)
    for arm, path in zip(arms, paths, strict=True):
      if arm.base in config.bases and path is not None:
        _copy(size, arm, path, size.models)
    return
  size.pretrain(size.base(arms[0]), seed)
  if INSTRUCTION_TUNED in config.bases:
    size.fine_tune(
      size.base(arms[1]),
      size.load(size.base(arms[0])),
      size.source.instruction,
      seed,
      config.instruction_steps,
      config.instruction_rate,
    )


def experts(size: Size, arm: Arm) -> None:
  """Trains an expert for each held-in category, at each rate."""
  size.demand_trained(arm, 'base', size.base(arm))
  base = size.load(size.base(arm))
  for category, datasets in size.source.held_in.items():
    for rate in size.config.expert_rates:
      size.fine_tune(
        size.expert(arm, category, rate),
        base,
        datasets,
        arm.seed,
        size.config.expert_steps,
        rate,
      )


def multitask(size: Size, arm: Arm) -> None:
  """Trains one model on all held-in tasks, and for the gates the held-out."""
  size.demand_trained(arm, 'base', size.base(arm))
  config, base = size.config, size.load(size.base(arm))
  held_in = [dataset for of in size.source.held_in.values() for dataset in of]
  size.fine_tune(
    size.folder.model(arm, 'multitask'),
    base,
    held_in,
    arm.seed,
    config.multitask_steps,
    config.multitask_rate,
  )
  for category, datasets in size.direct.items():
    size.fine_tune(
      size.folder.model(arm, f'direct/{category}'),
      base,
      datasets,
      arm.seed,
      config.direct_steps,
      config.direct_rate,
    )


def _copy(size: Size, arm: Arm, source: str, models: Stored) -> None:
  """Copies a model that there is already into a study, once.

  Raises:
    ValueError: if another was copied before.
  """
  base, note = size.base(arm), size.folder.model(arm, 'base.json')
  copied = base.exists()
  known = read_json(note)['files'] if note.exists() else None
  # Each host may have copies of its own, with other times.
  files = processes.first_told(_files(source))
  # What was copied is not needed any more.
  if copied and files in ('', known):
    return
  params = stored.original(source, models, size.mesh)
  if not copied:
    stored.save(base, params)
  elif stored.fingerprint(params) != stored.fingerprint(size.load(base)):
    raise ValueError(
      f'{source} is not the model any more that was copied to {base}. Bring '
      'that back, or give another --output_dir; or, to start over, remove '
      f'models/, scores/ and cells/ of {arm.name} in {size.folder.root}.'
    )
  write_json(note, {'copy_of': source, 'files': files})


def _files(source: str) -> str:
  """Digests a model's files, '' if there are none."""
  try:
    return stored.files(stored.folder(source))
  except (FileNotFoundError, ValueError):
    return ''
