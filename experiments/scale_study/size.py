"""What all models of a size have in common."""

from collections.abc import Iterator, Sequence
import contextlib
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from absl import logging
import jax

from experiments.scale_study import loading, model, shapes, smollm2, stored
from experiments.scale_study.analysis.cells import BASES
from experiments.scale_study.examination import Examination
from experiments.scale_study.folder import Arm, Folder
from experiments.scale_study.study_config import (
  INSTRUCTION_TUNED,
  PRETRAINED,
  Stored,
  StudyConfig,
)
from experiments.scale_study.tasks import batches
from experiments.scale_study.tasks.source import Dataset, Source
from experiments.scale_study.train import train
from mergekit_jax.sharding import make_mesh


class Size:
  """Shape, place, tasks and checkpoints of the models of a size."""

  def __init__(
    self, config: StudyConfig, folder: Folder, name: str, source: Source
  ):
    """Finds the shape; trains and loads nothing.

    Args:
      config: the preset.
      folder: of the results.
      name: of the size.
      source: of the tasks, as `loading.load_source` returns it.

    Raises:
      ValueError: if the tasks or their tokenizer do not fit the models.
    """
    self.config, self.folder, self.name = config, folder, name
    self.source = source
    self.direct = loading.direct(config, source)
    self.mesh = make_mesh(config.mesh) if config.mesh else None
    self.models = config.sizes[name]
    if isinstance(self.models, Stored):
      if PRETRAINED in config.bases and self.models.pretrained is None:
        raise ValueError(
          f'There is no pretrained model of size {name!r}: take '
          f'--set=bases={INSTRUCTION_TUNED}, or give one in the preset.'
        )
      self.shape = stored.stored_shape(self.models)
      if self.models.shape is None:
        _demand_own_tokenizer(config, name, self.models)
      if self.source.tokenizer.size > self.shape.vocabulary_size:
        raise ValueError(
          f'The tokenizer has {self.source.tokenizer.size} ids, but the models '
          f'of size {name!r} only {self.shape.vocabulary_size}. Give their own '
          "in the preset: tokenizer='.../tokenizer.json'."
        )
    else:
      self.shape = shapes.small(
        vocabulary_size=-(-self.source.tokenizer.size // 16) * 16,
        width=self.models.width,
        layers=self.models.layers,
        heads=self.models.heads,
      )
    self.shape = shapes.computed(self.shape, config)

  @functools.cached_property
  def parameters(self) -> int:
    """Number of parameters."""
    specs = jax.tree.leaves(model.abstract_params(self.shape))
    return sum(spec.size for spec in specs)

  @functools.cached_property
  def examination(self) -> Examination:
    """The examples on which models are scored."""
    return Examination(
      self.shape,
      self.source,
      validation=self.config.validation_examples,
      test=self.config.test_examples,
      length=self.config.length,
      text_metric=self.config.text_metric,
    )

  def base(self, arm: Arm) -> Path:
    """Checkpoint of the base of an arm."""
    return self.folder.model(arm, 'base')

  def expert(self, arm: Arm, category: str, rate: float) -> Path:
    """Checkpoint of an expert of an arm, trained at a rate."""
    return self.folder.model(arm, f'experts/{category}/{rate:g}')

  def load(self, path: Path) -> model.Params:
    """Reads the parameters of a model of this size."""
    return stored.load(path, self.shape, self.mesh)

  def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
    """Computes on the mesh, if there is one."""
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

  def train(
    self,
    path: Path,
    params: model.Params,
    drawn: Iterator[batches.Batch],
    steps: int,
    rate: float,
    data: str,
  ) -> None:
    """Trains a model into its checkpoint, or what is left to train of it.

    Args:
      path: of the checkpoint.
      params: where to start.
      drawn: what to train on.
      steps: how many of these batches.
      rate: peak learning rate.
      data: digest of what they are drawn from, as `train.train` takes it.
    """
    train(
      self.shape,
      params,
      drawn,
      steps=steps,
      peak_rate=rate,
      label=str(path.relative_to(self.folder.root / 'models')),
      data=data,
      directory=path,
      mesh=self.mesh,
    )

  def pretrain(self, path: Path, seed: int) -> None:
    """Trains a model from nothing on the corpus, as `train` does."""
    config = self.config
    texts = batches.corpus_batches(
      self.source, batch=config.batch, length=config.corpus_length, seed=seed
    )
    self.train(
      path,
      model.create(self.shape, jax.random.key(seed)),
      texts,
      config.pretrain_steps,
      config.pretrain_rate,
      _digest_of_file(self.source.corpus_file),
    )

  def fine_tune(
    self,
    path: Path,
    params: model.Params,
    datasets: Sequence[Dataset],
    seed: int,
    steps: int,
    rate: float,
  ) -> None:
    """Trains a model on datasets, as `train` does."""
    examples = batches.example_batches(
      datasets,
      self.source.tokenizer,
      batch=self.config.batch,
      length=self.config.length,
      seed=seed,
    )
    self.train(path, params, examples, steps, rate, _digest_of_pools(datasets))

  def demand_trained(self, arm: Arm, kind: str, path: Path) -> None:
    """Raises ValueError if a model is not there, or not trained to its end.

    Args:
      arm: of the model.
      kind: 'base', 'experts', 'multitask' or 'direct'.
      path: of its checkpoint.
    """
    config = self.config
    is_pretrained = arm.base == PRETRAINED
    phase, steps = {
      'base': (
        'bases',
        config.pretrain_steps if is_pretrained else config.instruction_steps,
      ),
      'experts': ('experts', config.expert_steps),
      'multitask': ('multitask', config.multitask_steps),
      'direct': ('multitask', config.direct_steps),
    }[kind]
    demand(path, phase)
    is_copied = kind == 'base' and isinstance(self.models, Stored)
    if not is_copied:
      demand(path / str(steps), phase)


def demand(path: Path, phase: str) -> None:
  """Raises ValueError if an earlier phase has not left this behind."""
  if not path.exists():
    raise ValueError(
      f'There is no {path}: do --phase={phase} first, or all phases, by giving '
      'none.'
    )


def _demand_own_tokenizer(
  config: StudyConfig, name: str, models: Stored
) -> None:
  """Raises ValueError if models of Hugging Face are told other words' ids."""
  used = config.tokenizer
  if config.tasks == 'real' and not used:
    used = str(smollm2.folder() / 'tokenizer.json')
  sources = (models.pretrained, models.instruction_tuned)
  for base, source in zip(BASES, sources, strict=True):
    if source is None or base not in config.bases:
      continue
    folder = stored.folder(source)
    own = folder / 'tokenizer.json'
    if used and own.exists() and _vocabulary(own) != _vocabulary(Path(used)):
      raise ValueError(
        f'The {base} model of size {name!r} has another vocabulary, in {own}, '
        f'than the tokenizer of the study, {used}. Give its own in the preset; '
        'models of different families each need a preset.'
      )
    if not used and any(folder.glob('tokenizer*')):
      raise ValueError(
        f'{folder}, a model of size {name!r}, has a tokenizer of its own, but '
        f'the preset gives none: add tokenizer={str(own)!r}.'
      )
    if not used:
      logging.warning(
        'Neither the preset nor %s has a tokenizer: words of the tasks get '
        'numbers that the model has never seen. Give tokenizer in the preset.',
        folder,
      )


def _vocabulary(tokenizer: Path) -> Any:
  # The rest of the file is written otherwise by other versions.
  return json.loads(tokenizer.read_text(encoding='utf-8'))['model']['vocab']


def _digest_of_pools(datasets: Sequence[Dataset]) -> str:
  """Digests all training examples, if they are not made as they are drawn."""
  total = hashlib.blake2b(digest_size=8)
  for dataset in datasets:
    total.update(f'{dataset.name}\n'.encode())
    for example in dataset.pool:
      total.update(f'{json.dumps(example)}\n'.encode())
  return total.hexdigest()


def _digest_of_file(path: Path | None) -> str:
  # That it is missing is said as soon as texts are drawn.
  if path is None or not path.exists():
    return ''
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'blake2b').hexdigest()[:16]
