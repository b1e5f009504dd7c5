"""Scoring a model on the tasks, all texts that are asked about together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from experiments.scale_study import metrics, model, packing
from experiments.scale_study.analysis.cells import category
from experiments.scale_study.model import ModelConfig, Params
from experiments.scale_study.packing import Group, ROWS
from experiments.scale_study.tasks import batches
from experiments.scale_study.tasks.batches import Questions
from experiments.scale_study.tasks.source import Dataset, Source, Split


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
        self._questions[split, task] = batches.questions(
          [dataset],
          source.tokenizer,
          split=split,
          examples=examples,
          length=length,
        )
    self._places = packing.most_places([*self._questions.values()])
    self._groups: dict[tuple[tuple[Split, str], ...], list[Group]] = {}
    self._tokens = max(q.token.shape[1] for q in self._questions.values())

  def chance(self) -> dict[str, float]:
    """Returns the score of guessing by task of the test.

    The better one of guessing uniformly and of giving always the same answer.
    """
    return {
      task: max(float(questions.chance.mean()), self._tasks[task].constant)
      for (split, task), questions in self._questions.items()
      if split == 'test'
    }

  def test_examples(self) -> dict[str, int]:
    """Returns how many examples there are by task of the test."""
    return {
      task: len(questions.chance)
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
    keys = tuple(
      key
      for key in self._questions
      if key[0] == split
      and (categories is None or category(key[1]) in categories)
    )
    answers = self._answers(params, keys) if keys else ()
    return {
      key[1]: self._score(params, key, *answer)
      for key, answer in zip(keys, answers, strict=True)
    }

  def rouge_l(self, params: Params, task: str, split: Split = 'test') -> float:
    """Returns mean ROUGE-L of what a model writes by greedy decoding."""
    questions = self._questions[split, task]
    starts = questions.position[:, 0] + 1
    values = []
    for first in range(0, len(starts), ROWS):
      part = slice(first, first + ROWS)
      ids = packing.padded(questions.ids[part], ROWS)
      written = _on_host(
        write_greedily(
          self._shape,
          params,
          ids,
          packing.padded(starts[part], ROWS),
          self._tokens,
        )
      )
      values += [
        metrics.rouge_l(
          self._tokenizer.decode(row[start : start + self._tokens]),
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

    Of none where that is their score already.

    Args:
      params: of the model.
      categories: whose tasks; None takes all.
    """
    return {
      task: self.rouge_l(params, task)
      for task, dataset in self._tasks.items()
      if dataset.metric == 'rouge_l' != self._text_metric
      and (categories is None or dataset.category in categories)
    }

  def _score(
    self,
    params: Params,
    key: tuple[Split, str],
    likelihoods: np.ndarray,
    greedy: np.ndarray,
  ) -> Score:
    split, task = key
    questions = self._questions[key]
    learned = questions.weight > 0
    total = np.zeros(learned.shape, np.float32)
    exact = np.ones(learned.shape, bool)
    total[learned], exact[learned] = likelihoods, greedy
    total, exact = total.sum(1), np.all(exact, axis=1)
    right = questions.right
    loss = -(total[right] / learned[right].sum(1)).mean()
    if {self._tasks[task].metric, self._text_metric} == {'rouge_l'}:
      return Score(self.rouge_l(params, task, split), float(loss))
    value = metrics.is_right(questions, total, exact).mean()
    return Score(float(value), float(loss))

  def _answers(
    self, params: Params, keys: tuple[tuple[Split, str], ...]
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, of each task, what is known of the tokens that have weight."""
    questions = [self._questions[key] for key in keys]
    if keys not in self._groups:
      self._groups[keys] = [*packing.groups(questions, self._places)]
    asked = self._groups[keys]
    pending = [
      token_likelihoods(self._shape, params, group.ids, *group.asked)
      for group in asked
    ]
    counts = [int((q.weight > 0).sum()) for q in questions]
    likelihoods = np.empty(sum(counts), np.float32)
    greedy = np.empty(sum(counts), bool)
    for group, answer in zip(asked, pending, strict=True):
      for known, part in zip((likelihoods, greedy), answer, strict=True):
        known[group.index] = _on_host(part)[: len(group.index)]
    ends = np.cumsum(counts)[:-1]
    yield from zip(
      np.split(likelihoods, ends), np.split(greedy, ends), strict=True
    )


def _on_host(array: jax.Array) -> np.ndarray:
  """All of an array, on each host."""
  if jax.process_count() == 1:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@functools.partial(jax.jit, static_argnames='shape')
def token_likelihoods(
  shape: ModelConfig,
  params: Params,
  ids: jax.Array,
  row: jax.Array,
  position: jax.Array,
  token: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """log p of each token, and whether it is the likeliest, [places].

  Args:
    shape: of the model.
    params: of the model.
    ids: texts, [rows, length].
    row: of the text, [places].
    position: where in it the token is predicted, [places].
    token: [places].
  """
  at = row[:, None], position[:, None]
  logits = model.logits(shape, params, ids, at=at)[:, 0]
  chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
  normalizer = jax.nn.logsumexp(logits, axis=-1)
  return chosen - normalizer, jnp.argmax(logits, axis=-1) == token


@functools.partial(jax.jit, static_argnames=('shape', 'tokens'))
def write_greedily(
  shape: ModelConfig,
  params: Params,
  ids: jax.Array,
  starts: jax.Array,
  tokens: int,
) -> jax.Array:
  """Replaces what follows the prompts by what the model writes, greedily.

  Args:
    shape: of the model.
    params: of the model.
    ids: texts, [rows, length].
    starts: length of each prompt, [rows].
    tokens: to write behind each, up to the end of its row.
  """
  rows = jnp.arange(ids.shape[0])

  def step(index: jax.Array, ids: jax.Array) -> jax.Array:
    at = rows[:, None], (starts + index - 1)[:, None]
    logits = model.logits(shape, params, ids, at=at)[:, 0]
    # Past the end of the text there is nothing left to write.
    return ids.at[rows, starts + index].set(jnp.argmax(logits, -1), mode='drop')

  return jax.lax.fori_loop(0, tokens, step, jnp.asarray(ids))
