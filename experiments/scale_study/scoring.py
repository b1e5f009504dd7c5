"""Scoring a model on the tasks, by one compiled program for each size."""

from collections.abc import Iterable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from experiments.scale_study import metrics, model
from experiments.scale_study.model import ModelConfig, Params
from experiments.scale_study.tasks import batches
from experiments.scale_study.tasks.batches import Questions
from experiments.scale_study.tasks.source import Dataset, Source, Split

# Texts in a forward pass: what most datasets are asked at once.
ROWS = 64


class Score(NamedTuple):
  """How a model does on a task.

  Attributes:
    value: part of the examples answered correctly, or mean ROUGE-L.
    loss: mean over examples of −log p of the right answer, nats a token.
  """

  value: float
  loss: float


def tasks_of(categories: Mapping[str, Sequence[Dataset]]) -> dict[str, Dataset]:
  """Returns the datasets by name of their task, `category/dataset`."""
  return {
    f'{category}/{dataset.name}': dataset
    for category, datasets in categories.items()
    for dataset in datasets
  }


class Examination:
  """The validation and test examples of a source, ready to be scored."""

  def __init__(
    self,
    shape: ModelConfig,
    source: Source,
    *,
    validation: int,
    test: int,
    length: int,
    text_metric: str,
  ):
    """Draws the examples.

    Args:
      shape: of the models.
      source: of the tasks.
      validation: examples of a held-in task, at most.
      test: examples of a task, at most.
      length: tokens of a text.
      text_metric: 'exact_match' or 'rouge_l', for datasets of the latter: small
        models have to write the answer, larger ones may only come near.

    Raises:
      ValueError: if a held-in task has no validation examples, or any task no
        test examples.
    """
    self._shape = shape
    self._tokenizer = source.tokenizer
    self._text_metric = text_metric
    self._tasks = tasks_of(source.categories)
    self._questions: dict[tuple[Split, str], Questions] = {}
    splits: Sequence[tuple[Split, int, dict[str, Dataset]]] = (
      ('validation', validation, tasks_of(source.held_in)),
      ('test', test, self._tasks),
    )
    for split, examples, tasks in splits:
      for task, dataset in tasks.items():
        if next(dataset.examples(split, 0), None) is None:
          raise ValueError(
            f'{task} has no {split} examples. Merge hyperparameters are chosen '
            'on validation examples and merges judged on test examples: put '
            'some of the others aside.'
          )
        self._questions[split, task] = batches.questions(
          [dataset],
          source.tokenizer,
          split=split,
          examples=examples,
          length=length,
        )
    # One compiled shape for all of them.
    self._candidates = ROWS * max(
      np.bincount(q.row).max() for q in self._questions.values()
    )
    self._tokens = max(q.token.shape[1] for q in self._questions.values())

  def chance(self) -> dict[str, float]:
    """Returns the score of guessing by task of the test."""
    return {
      task: float(questions.chance.mean())
      for (split, task), questions in self._questions.items()
      if split == 'test'
    }

  def scores(
    self, params: Params, split: Split, categories: Iterable[str] | None = None
  ) -> dict[str, Score]:
    """Scores a model.

    Args:
      params: of the model.
      split: 'validation' (held-in tasks) or 'test' (all tasks).
      categories: whose tasks; None takes all.
    """
    asked = {
      task: questions
      for (of, task), questions in self._questions.items()
      if of == split
      and (categories is None or task.partition('/')[0] in categories)
    }
    pending = {task: self._answers(params, q) for task, q in asked.items()}
    return {
      task: self._score(params, (split, task), answers)
      for task, answers in pending.items()
    }

  def rouge_l(self, params: Params, task: str, split: Split = 'test') -> float:
    """Returns mean ROUGE-L of what a model writes by greedy decoding."""
    questions = self._questions[split, task]
    starts = questions.position[:, 0] + 1
    values = []
    for first in range(0, len(starts), ROWS):
      part = slice(first, first + ROWS)
      ids = _rows(questions.ids[part])
      written = _on_host(
        _write(self._shape, params, ids, _rows(starts[part]), self._tokens)
      )
      values += [
        metrics.rouge_l(
          self._tokenizer.decode(row[start:]),
          self._tokenizer.decode([*tokens, self._tokenizer.end]),
        )
        for row, start, tokens in zip(
          written, starts[part], questions.token[part], strict=False
        )
      ]
    return float(np.mean(values))

  def written(
    self, params: Params, categories: Iterable[str] | None = None
  ) -> dict[str, float]:
    """Returns ROUGE-L on the test of tasks whose datasets ask for it.

    Args:
      params: of the model.
      categories: whose tasks; None takes all.
    """
    return {
      task: self.rouge_l(params, task)
      for task, dataset in self._tasks.items()
      if dataset.metric == 'rouge_l'
      and (categories is None or dataset.category in categories)
    }

  def _score(
    self, params: Params, key: tuple[Split, str], answers: Any
  ) -> Score:
    split, task = key
    questions = self._questions[key]
    likelihoods, greedy = (
      np.concatenate([_on_host(part[i])[:n] for *part, n in answers])
      for i in range(2)
    )
    tokens = likelihoods.shape[1]
    weight = np.zeros((len(likelihoods), tokens), np.float32)
    weight[:, : questions.weight.shape[1]] = questions.weight
    total = (likelihoods * weight).sum(1)
    exact = (greedy | (weight == 0)).all(1)
    right = questions.right
    loss = -(total[right] / weight[right].sum(1)).mean()
    if {self._tasks[task].metric, self._text_metric} == {'rouge_l'}:
      return Score(self.rouge_l(params, task, split), float(loss))
    value = metrics.is_right(questions, total, exact).mean()
    return Score(float(value), float(loss))

  def _answers(
    self, params: Params, questions: Questions
  ) -> list[tuple[jax.Array, jax.Array, int]]:
    """Starts to score candidates, the texts in groups of `ROWS`."""
    answers = []
    for first in range(0, len(questions.ids), ROWS):
      start, stop = np.searchsorted(questions.row, [first, first + ROWS])
      count = stop - start
      row = np.zeros(self._candidates, np.int32)
      row[:count] = questions.row[start:stop] - first
      position = np.zeros((self._candidates, self._tokens), np.int32)
      token = np.zeros_like(position)
      width = questions.token.shape[1]
      position[:count, :width] = questions.position[start:stop]
      token[:count, :width] = questions.token[start:stop]
      ids = _rows(questions.ids[first : first + ROWS])
      answers.append(
        (*_likelihoods(self._shape, params, ids, row, position, token), count)
      )
    return answers


def _on_host(array: jax.Array) -> np.ndarray:
  """All of an array, on each host."""
  if jax.process_count() == 1:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _rows(array: np.ndarray) -> np.ndarray:
  """Fills up to `ROWS` rows."""
  padding = [(0, ROWS - len(array)), *([(0, 0)] * (array.ndim - 1))]
  return np.pad(array, padding)


@functools.partial(jax.jit, static_argnames='shape')
def _likelihoods(
  shape: ModelConfig,
  params: Params,
  ids: jax.Array,
  row: jax.Array,
  position: jax.Array,
  token: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """log p of each token, and whether it is the likeliest, [candidates, tokens].

  Args:
    shape: of the model.
    params: of the model.
    ids: texts, [rows, length].
    row: of each candidate, [candidates].
    position: where its tokens are predicted, [candidates, tokens].
    token: [candidates, tokens].
  """
  position = jnp.minimum(position, ids.shape[1] - 1)
  logits = model.logits(shape, params, ids, at=(row[:, None], position))
  chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  return chosen - normalizer, jnp.argmax(logits, axis=-1) == token


@functools.partial(jax.jit, static_argnames=('shape', 'tokens'))
def _write(
  shape: ModelConfig,
  params: Params,
  ids: jax.Array,
  starts: jax.Array,
  tokens: int,
) -> jax.Array:
  """Replaces what follows the prompts by what the model writes, greedily."""
  rows = jnp.arange(ids.shape[0])

  def step(index: jax.Array, ids: jax.Array) -> jax.Array:
    logits = model.logits(shape, params, ids)[rows, starts + index - 1]
    # Past the end of the text there is nothing left to write.
    return ids.at[rows, starts + index].set(jnp.argmax(logits, -1), mode='drop')

  return jax.lax.fori_loop(0, tokens, step, jnp.asarray(ids))
