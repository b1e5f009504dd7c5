"""Gates: differences to chance and to the base, against their thresholds."""

import dataclasses
from types import SimpleNamespace

import pytest

from experiments.scale_study import gates
from experiments.scale_study.study_config import Gates

CHANCE = {'topic': 0.25, 'completion': 0.5}


def record(**scores):
  """What `evaluate` keeps of a model: value and loss of each task."""
  return {
    'test': {f'{name}/one': (score, 9.0) for name, score in scores.items()},
    # What is scored to choose by must not decide.
    'validation': {f'{name}/one': (0.0, 9.0) for name in scores},
  }


@pytest.fixture
def check(monkeypatch):
  """Checks two arms; gives what passed, by base, category and text."""

  def checked(scored):
    size = SimpleNamespace(
      name='s',
      config=SimpleNamespace(bases=tuple(scored), gates=Gates()),
      source=SimpleNamespace(
        categories=('topic', 'completion'),
        held_in=('topic',),
        held_out=('completion',),
      ),
      examination=SimpleNamespace(
        chance=lambda: {f'{name}/one': p for name, p in CHANCE.items()}
      ),
    )
    monkeypatch.setattr(gates, 'Scored', lambda _, arm: scored[arm.base])
    return list(gates.check(size, 0))

  return checked


def models(base, expert, direct, multitask):
  return SimpleNamespace(
    base=record(topic=base, completion=base),
    experts={'topic': record(topic=expert)},
    direct={'completion': record(completion=direct)},
    multitask=record(topic=0.0, completion=multitask),
  )


def test_differences_are_held_against_the_thresholds(check):
  """0.3 over chance, 0.2 over the base, 0.1 over chance for transfer."""
  # No less is enough, though 1 − 0.8 < 0.2 and 0.6 − 0.5 < 0.1 in floats.
  passing = models(base=0.8, expert=1.0, direct=0.8, multitask=0.6)
  failing = models(base=0.35, expert=0.54, direct=0.79, multitask=0.59)
  for scored, passed in (passing, True), (failing, False):
    found = check({'pretrained': scored})
    assert [(g.category, g.split, g.chance) for g in found] == [
      *[('topic', 'held-in', 0.25)] * 2,
      *[('completion', 'held-out', 0.5)] * 2,
    ]
    assert [g.passed for g in found] == [passed] * 4
    # The second is about two models and shows the score of the expert.
    assert found[0].score == found[1].score != found[2].score


@pytest.mark.parametrize('after, passed', [(0.5, False), (0.51, True)])
def test_a_better_base_scores_more(check, after, passed):
  found = check(
    {
      'pretrained': models(0.5, 1.0, 1.0, 1.0),
      'instruction-tuned': models(after, 1.0, 1.0, 1.0),
    }
  )
  of_all = [gate for gate in found if gate.category == 'all']
  assert [gate.split for gate in of_all] == ['held-in', 'held-out']
  assert [gate.passed for gate in of_all] == [passed] * 2
  assert [gate.score for gate in of_all] == [after] * 2


def test_a_failure_is_said_with_its_score(check):
  failing = models(base=0.35, expert=0.54, direct=0.79, multitask=0.59)
  first, *_ = check({'pretrained': failing})
  assert gates.failure(first) == (
    'topic, size s, pretrained base, seed 0: direct training beats chance by '
    '0.3 did not hold, with a score of 0.54 where chance is 0.25'
  )
  of_all = dataclasses.replace(first, category='all', chance=None)
  assert gates.failure(of_all).endswith('with a score of 0.54')
  assert gates.as_json(first)['pass'] is False
