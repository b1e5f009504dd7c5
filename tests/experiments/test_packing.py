"""Groups of texts against a search in the tasks they come from."""

import numpy as np

from experiments.scale_study import packing
from experiments.scale_study.packing import ROWS
from experiments.scale_study.tasks.batches import Questions


def task(generator, texts, tokens, length):
  """Texts with two candidates each, of up to `tokens` tokens."""
  row = np.repeat(np.arange(texts), 2)
  start = generator.integers(0, length - tokens, texts)[row]
  spans = generator.integers(1, tokens + 1, 2 * texts)
  shape = (2 * texts, tokens)
  return Questions(
    ids=generator.integers(1, 99, (texts, length)).astype(np.int32),
    row=row,
    position=start[:, None] + np.arange(tokens),
    token=generator.integers(1, 99, shape),
    weight=(np.arange(tokens) < spans[:, None]).astype(np.float32),
    example=row,
    right=np.arange(2 * texts) % 2 == 0,
    dataset=np.zeros(texts, np.int32),
    chance=np.full(texts, 0.5, np.float32),
  )


def test_each_place_is_asked_once_about_its_own_text():
  generator = np.random.default_rng(0)
  tasks = [
    task(generator, texts, tokens, 40)
    for texts, tokens in ((90, 1), (7, 5), (64, 3))
  ]
  expected = [
    (ids[position].item(), ids[: position + 1].tobytes(), token)
    for questions in tasks
    for row, positions, tokens, weights in zip(
      questions.row,
      questions.position,
      questions.token,
      questions.weight,
      strict=True,
    )
    for ids in [questions.ids[row]]
    for position, token, weight in zip(positions, tokens, weights, strict=True)
    if weight
  ]
  most = packing.most_places(tasks)
  assert most == ROWS * max(
    q.weight.sum(1).reshape(-1, 2).sum(1).max() for q in tasks
  )
  found = {}
  lengths = []
  for group in packing.groups(tasks, most):
    assert group.asked.shape == (3, most)
    assert group.ids.shape[0] == ROWS
    lengths.append(group.ids.shape[1])
    for index, (row, position, token) in zip(
      group.index, group.asked.T, strict=False
    ):
      ids = group.ids[row]
      assert index not in found
      found[index] = (
        ids[position].item(),
        ids[: position + 1].tobytes(),
        token,
      )
  assert [found[index] for index in range(len(expected))] == expected
  # 161 texts, the short ones first and in shorter arrays.
  assert len(lengths) == 3
  assert lengths == sorted(lengths)
  assert lengths[0] < lengths[-1] <= 40
  assert all(length % 8 == 0 for length in lengths)
