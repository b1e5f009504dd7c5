"""Scores, against cases decided by hand and by the model's own logits."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.scale_study import examination, metrics, model, shapes
from experiments.scale_study.examination import Examination
from experiments.scale_study.tasks import p3
from experiments.scale_study.tasks.batches import Questions
from tests.experiments import small_study


def ask(*right):
  """Questions whose candidates are right or not: one list an example."""
  flat = [(i, r) for i, example in enumerate(right) for r in example]
  zeros = np.zeros((len(flat), 1), np.int32)
  return Questions(
    ids=zeros,
    row=np.arange(len(flat)),
    position=zeros,
    token=zeros,
    weight=np.ones((len(flat), 1), np.float32),
    example=np.array([i for i, _ in flat]),
    right=np.array([r for _, r in flat]),
    dataset=np.zeros(len(right), np.int32),
    chance=np.zeros(len(right), np.float32),
  )


def test_the_likeliest_candidate_is_the_answer():
  questions = ask([False, True], [True, False, False], [True, False, True])
  likelihoods = np.array([-3.0, -2.0, -5.0, -9.0, -4.0, -1.0, -2.0, -1.0])
  greedy = np.zeros(8, bool)
  # The second prefers a wrong one; the third has two that are right.
  right = metrics.is_right(questions, likelihoods, greedy)
  np.testing.assert_array_equal(right, [True, False, True])


def test_a_model_that_cannot_tell_is_wrong():
  """Wherever the right candidate stands."""
  two = [True, False], [False, True]
  questions = ask(*two, *two, *two, [True, False], [True])
  nan = np.nan
  # The right one known, the wrong one, both alike, and neither.
  pairs = [(-1.0, nan), (nan, -1.0), (nan, -1.0), (-1.0, nan)]
  pairs += [(-1.0, -1.0), (-1.0, -1.0), (nan, nan)]
  likelihoods = np.array([*np.ravel(pairs), nan])
  right = metrics.is_right(questions, likelihoods, np.ones(15, bool))
  assert not right.any()


def test_free_text_has_to_be_what_is_written():
  questions = ask([True], [True], [False, True])
  likelihoods = np.array([-0.1, -9.0, -1.0, -2.0])
  greedy = np.array([False, True, True, False])
  right = metrics.is_right(questions, likelihoods, greedy)
  np.testing.assert_array_equal(right, [False, True, False])


@pytest.mark.parametrize(
  'written, reference, expected',
  [
    ('the cat sat', 'the cat sat', 1.0),
    ('The cat, sat.', 'the cat sat', 1.0),
    ('', 'the cat', 0.0),
    # Nothing but the text itself can be had of what has no words.
    ('😀 🐱', '😀 🐱', 1.0),
    ('😀', '😀 🐱', 0.0),
    ('a dog', 'the cat', 0.0),
    # police killed the gunman | police kill the gunman: 3 of 4 and of 4.
    ('police kill the gunman', 'police killed the gunman', 0.75),
    # Words that come again: 'a b a' is in common, 3 of 4 and of 5.
    ('b a b a', 'a a b c a', 2 * 3 / 9),
    # The same words in another order: "the gunman" only, 2 of 4 and of 4.
    ('the gunman kill police', 'police killed the gunman', 0.5),
    # 2 of 2 words written, 2 of 6 of the reference: 2 · 1 · ⅓ / (4/3).
    ('a e', 'a b c d e f', 0.5),
  ],
)
def test_rouge_l(written, reference, expected):
  assert metrics.rouge_l(written, reference) == pytest.approx(expected)


def test_scores_follow_from_the_logits(tmp_path, monkeypatch):
  small_study.write_tasks(tmp_path / 'tasks')
  source = p3.source(tmp_path / 'tasks')
  tokenizer = source.tokenizer
  shape = shapes.small(
    vocabulary_size=tokenizer.size, width=16, layers=1, heads=2
  )
  params = model.create(shape, jax.random.key(3))
  exam = Examination(
    shape,
    source,
    validation=2,
    test=9,
    length=12,
    text_metric='exact_match',
  )
  scores = exam.scores(params, 'test')
  chosen, losses, written = [], [], []
  (ranked,), (free,) = (
    source.held_in['sentiment'],
    source.held_in['structure_to_text'],
  )

  def log_p(text):
    ids = np.full((1, 12), tokenizer.pad, np.int32)
    ids[0, : len(text)] = text
    logits = np.float64(model.logits(shape, params, ids)[0])
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  for example, _ in zip(ranked.examples('test', 0), range(9), strict=False):
    prompt = [tokenizer.start, *tokenizer.encode(example.prompt)]
    after = log_p(prompt)[len(prompt) - 1]
    options = {c: after[tokenizer.encode(c)[0]] for c in example.candidates}
    chosen.append(max(options, key=options.__getitem__) == example.answer)
    losses.append(-options[example.answer])
  assert scores['sentiment/sentiment_in_colours'].value == pytest.approx(
    np.mean(chosen)
  )
  assert scores['sentiment/sentiment_in_colours'].loss == pytest.approx(
    np.mean(losses), rel=1e-5
  )
  exact, exact_losses = [], []
  for example, _ in zip(free.examples('test', 0), range(9), strict=False):
    text = [tokenizer.start, *tokenizer.encode(example.prompt)]
    start = len(text)
    answer = [*tokenizer.encode(example.answer), tokenizer.end]
    after = log_p([*text, *answer])[start - 1 : start - 1 + len(answer)]
    exact.append((after.argmax(1) == answer).all())
    exact_losses.append(-after[np.arange(len(answer)), answer].mean())
    # As many tokens as the longest answer has: two words and the end.
    while len(text) < start + 3:
      text.append(int(log_p(text)[len(text) - 1].argmax()))
    written.append(
      metrics.rouge_l(tokenizer.decode(text[start:]), example.answer)
    )
  name = 'structure_to_text/structure_to_text_in_colours'
  assert exam.rouge_l(params, name) == pytest.approx(np.mean(written))
  assert scores[name].value == np.mean(exact)
  assert scores[name].loss == pytest.approx(np.mean(exact_losses), rel=1e-5)
  # What fills up rows was not written, though a tokenizer has a word for it.
  lengths = []
  monkeypatch.setattr(
    type(tokenizer), 'decode', lambda _, ids: lengths.append(len(ids)) or ''
  )
  exam.rouge_l(params, name)
  # Two words and the end; behind a reference there is one more.
  assert sorted({*lengths}) == [3, 4]
  task = 'sentiment/sentiment_in_colours'
  assert exam.chance()[task] == 0.25
  uneven = dataclasses.replace(ranked, constant=0.75)
  monkeypatch.setitem(exam._tasks, task, uneven)
  assert exam.chance()[task] == 0.75
  assert set(exam.scores(params, 'validation', ['sentiment'])) == {
    'sentiment/sentiment_in_colours'
  }
  # Held-out tasks are not chosen by.
  assert set(exam.scores(params, 'validation')) == {
    'sentiment/sentiment_in_colours',
    name,
  }
  assert set(exam.written(params)) == {name}
  assert exam.written(params, ['sentiment']) == {}


def test_what_is_written_is_the_likeliest_token_after_token():
  """Behind each prompt, however long, up to the end of its row."""
  shape = shapes.small(vocabulary_size=11, width=16, layers=1, heads=2)
  params = model.create(shape, jax.random.key(1))
  starts = np.array([2, 4, 6])
  tokens = np.random.default_rng(0).integers(1, 11, (3, 8))
  ids = np.where(np.arange(8) < starts[:, None], tokens, 0)
  expected = ids.copy()
  for row, start in zip(expected, starts, strict=True):
    for at in range(start, min(start + 3, 8)):
      logits = model.logits(shape, params, row[None].astype(np.int32))
      row[at] = np.argmax(logits[0, at - 1])
  ids = ids.astype(np.int32)
  written = examination.write_greedily(shape, params, ids, starts, 3)
  np.testing.assert_array_equal(written, expected)
  assert len({*expected[:, 4:].ravel()}) > 1
