"""The study from the first pretraining step to the last score."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
import time

from absl import logging
import jax

from experiments.scale_study import checkpoints, merges, model, shapes
from experiments.scale_study.config import StudyConfig
from experiments.scale_study.evaluate import evaluate
from experiments.scale_study.results import Results
from experiments.scale_study.tasks import encoding
from experiments.scale_study.tasks.held_in import HELD_IN
from experiments.scale_study.train import train, TrainState


class Stopwatch:
  """Adds up the wall time of named stages."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    elapsed = time.perf_counter() - start
    self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed
    logging.info('%s: %.1f s', stage, elapsed)


def run(config: StudyConfig, output_dir: Path) -> Results:
  """Trains, merges and scores all models of a preset.

  Args:
    config: the preset.
    output_dir: where the checkpoints go.

  Returns:
    The scores of base, experts and merges, all of them on every task.
  """
  watch = Stopwatch()
  shape = shapes.small(
    vocabulary_size=len(encoding.vocabulary()),
    width=config.width,
    layers=config.layers,
    heads=config.heads,
  )
  mesh = checkpoints.fsdp_mesh()
  base_path = output_dir / 'checkpoints' / 'base'
  expert_paths = {
    task: output_dir / 'checkpoints' / 'experts' / task for task in HELD_IN
  }
  merge_paths = {
    name: output_dir / 'checkpoints' / 'merges' / name
    for name in config.methods
  }
  methods = {
    name: merges.method_of(name, hyperparameters)
    for name, hyperparameters in config.methods.items()
  }

  with watch('pretrain'):
    state = pretrain(config, shape, output_dir / 'training' / 'base')
  with watch('save'):
    checkpoints.save(base_path, checkpoints.shard(state, mesh))
  for task, path in expert_paths.items():
    with watch('fine-tune'):
      expert = fine_tune(
        config, shape, state['params'], task, output_dir / 'training' / task
      )
    with watch('save'):
      checkpoints.save(path, checkpoints.shard(expert, mesh))

  for name, path in merge_paths.items():
    with watch(f'merge: {name}'):
      merges.merge_checkpoints(
        methods[name],
        experts=list(expert_paths.values()),
        base=base_path,
        output=path,
        mesh=mesh,
        seed=config.seed,
      )

  with watch('restore'):
    base = checkpoints.restore(base_path, state)['params']
    experts = {
      task: checkpoints.restore(path, state)['params']
      for task, path in expert_paths.items()
    }
    merged = {
      name: checkpoints.restore(path, {'params': base})['params']
      for name, path in merge_paths.items()
    }
  with watch('check'):
    in_memory = merges.merge_in_memory(
      methods, experts=list(experts.values()), base=base, seed=config.seed
    )
    unequal_leaves = {
      name: merges.unequal_leaves(merged[name], in_memory[name])
      for name in methods
    }
  with watch('evaluate'):
    tests, chance = {}, {}
    for task, datasets in HELD_IN.items():
      tests[task], chance[task] = encoding.chosen_questions(
        datasets,
        split='test',
        examples=config.test_examples,
        length=config.length,
      )
    return Results(
      config=config,
      chance=chance,
      base=evaluate(shape, base, tests),
      experts={t: evaluate(shape, p, tests) for t, p in experts.items()},
      merges={n: evaluate(shape, p, tests) for n, p in merged.items()},
      unequal_leaves=unequal_leaves,
      seconds=watch.seconds,
    )


def pretrain(
  config: StudyConfig, shape: model.ModelConfig, directory: Path
) -> TrainState:
  """Trains the base on the corpus."""
  batches = encoding.pretraining_batches(
    steps=config.pretrain_steps,
    batch=config.batch,
    length=config.length,
    seed=config.seed,
  )
  params = model.create(shape, jax.random.key(config.seed))
  state, _ = train(
    shape,
    params,
    zip(*batches, strict=True),
    steps=config.pretrain_steps,
    peak_rate=config.pretrain_rate,
    label='pretrain',
    directory=directory,
  )
  return state


def fine_tune(
  config: StudyConfig,
  shape: model.ModelConfig,
  base: model.Params,
  task: str,
  directory: Path,
) -> TrainState:
  """Trains the expert of a task from the base."""
  batches = encoding.fine_tuning_batches(
    HELD_IN[task],
    steps=config.expert_steps,
    batch=config.batch,
    length=config.length,
    seed=config.seed,
  )
  state, _ = train(
    shape,
    base,
    zip(*batches, strict=True),
    steps=config.expert_steps,
    peak_rate=config.expert_rate,
    label=task,
    directory=directory,
  )
  return state
