"""Verdicts on made-up studies whose true effects are known."""

import dataclasses
import pathlib

import numpy as np
import pytest
from scipy import stats

from experiments.scale_study.analysis import effects, measures, verdicts
from experiments.scale_study.analysis.aggregate import Grid, Results
from tests.experiments import made_up_grid
from tests.experiments.made_up_grid import HELD_IN, HELD_OUT, Truth

_NOISE = 0.02
_TRUE = Truth(noise=_NOISE)
# Nothing of what the paper claims is so.
_FALSE = Truth(
  quality=-0.1,
  rise=-0.06,
  lost_less=-0.05,
  spread_less=-0.05,
  held_out=0.9,
  held_out_multitask=1.05,
  noise=_NOISE,
)
_ONE_SIZE = {'s': 100_000}


def _judge(study, measure='ratio'):
  return {
    verdict.finding: verdict
    for verdict in verdicts.judge_all(study)
    if verdict.measure == measure
  }


def test_finding_4_says_which_categories_the_fewest_experts_are_of():
  study = made_up_grid.study(_TRUE)
  few = [c for c in study.cells if c.n > 2 or c.subset_number < 3]
  said = 'the subsets of N = 2 of one seed cover 6 of the 8 categories'
  assert said not in _judge(study)['4'].reason
  judged = _judge(dataclasses.replace(study, cells=tuple(few)))
  assert said in judged['4'].reason
  assert said not in judged['2'].reason


def test_effects_are_those_that_were_put_in():
  truth = Truth()
  judged = _judge(made_up_grid.study(truth))
  # Mean over N = 2, 4, 6, 8 of what size saves: 0, 1/3, 2/3, 1.
  rise = truth.rise + truth.lost_less / 2
  expected = {
    '1': truth.quality,
    '2': rise,
    '3a': truth.held_out - 1,
    '3b': truth.held_out - truth.held_out_multitask,
    '4': truth.lost_less,
    '5': truth.spread_less,
  }
  for finding, effect in expected.items():
    verdict = judged[finding]
    found = (verdict.effect, verdict.low, verdict.high)
    assert found == pytest.approx((effect,) * 3, abs=1e-9), finding
    parts = [part.effect for part in verdict.parts]
    if finding != '2':
      assert parts == pytest.approx([effect] * len(parts), abs=1e-9)
  # The base reaches half of every expert, so that gains are twice as large.
  gains = _judge(made_up_grid.study(truth, sizes=_ONE_SIZE), measure='gain')
  assert gains['1'].effect == pytest.approx(2 * truth.quality)
  assert '3' not in gains


def test_what_is_there_without_a_merge_stands_beside_1_and_2():
  """The base at half of its expert; a tenth more if it is the better one."""
  study = made_up_grid.study(Truth(noise=_NOISE))

  def ahead(cell):
    if cell.base == 'pretrained' or cell.size == 's':
      return cell
    better = {
      task: score + 0.1 * cell.expert.get(task, 0)
      for task, score in cell.base_scores.items()
    }
    return dataclasses.replace(cell, base_scores=better)

  made = dataclasses.replace(study, cells=tuple(map(ahead, study.cells)))
  judged = _judge(made, verdicts.UNMERGED)
  assert [*judged] == ['1', '2']
  # Two sizes of three.
  assert judged['1'].effect == pytest.approx(0.2 / 3)
  # 0, 0.1, 0.1 over two doublings, from one of two bases.
  slope = np.polyfit([0, 1, 2], [0, 0.1, 0.1], 1)[0]
  assert judged['2'].effect == pytest.approx(slope / 2)


def test_slopes_are_of_least_squares():
  sizes = {'s': 100_000, 'm': 200_000, 'l': 1_600_000}
  study = made_up_grid.study(Truth(lost_less=0, spread_less=0), sizes=sizes)
  bent = [
    dataclasses.replace(
      cell,
      scores={
        task: score + (0.05 * cell.expert[task] if cell.size == 'm' else 0)
        for task, score in cell.scores.items()
        if task in cell.expert
      },
      held_out=(),
    )
    for cell in study.cells
  ]
  judged = _judge(Results(tuple(bent), study.gates))
  y = [0, Truth.rise + 0.05, 4 * Truth.rise]
  assert judged['2'].effect == pytest.approx(np.polyfit([0, 1, 4], y, 1)[0])


@pytest.mark.parametrize('finding', ['1', '2', '3', '3a', '3b', '4', '5'])
def test_true_findings_are_supported_and_false_ones_are_not(finding, judged):
  true, false = (of_truth[finding] for of_truth in judged)
  assert true.verdict == 'supported'
  assert 0 < true.low <= true.effect <= true.high
  assert false.verdict == 'not supported'
  assert false.low <= false.effect <= false.high < 0
  assert 'the opposite' in false.reason
  assert true.seeds == false.seeds == 4 and true.cells == false.cells > 0


@pytest.fixture(scope='module')
def judged():
  return [
    _judge(made_up_grid.study(truth, seeds=4)) for truth in (_TRUE, _FALSE)
  ]


def test_no_effect_is_not_supported():
  truth = Truth(quality=0, noise=_NOISE)
  verdict = _judge(made_up_grid.study(truth))['1']
  assert verdict.verdict == 'not supported'
  assert verdict.low < 0 < verdict.high
  assert verdict.reason == 'the interval includes 0'


def _judge_spread(monkeypatch, values):
  """Finding 5 of two sizes, four methods and one subset, of these ratios."""
  grid = made_up_grid.study(
    sizes={'s': 100_000, 'm': 200_000}, ns=[8], seeds=len(values)
  ).grid()
  monkeypatch.setattr(Grid, 'values', lambda *_: np.array(values))
  effect = effects.spread_shrinks(grid, measures.held_in)
  return verdicts.judge('5', effect, 'validated', 'ratio')


def test_an_interval_that_ends_on_the_effect_decides_nothing(monkeypatch):
  """Each seed has another best method: of fewer seeds one is further ahead."""
  values = np.zeros((3, 1, 2, 2, 4, 1))
  for seed in range(3):
    # At the smaller size; at the larger all methods are alike.
    values[seed, :, 0, :, seed] = 0.3
  values[:, :, 0, :, 3] = -0.2
  verdict = _judge_spread(monkeypatch, values)
  # Best − worst of the means, 0.1 − (−0.2), and of each seed alone.
  assert verdict.effect == pytest.approx(0.3)
  assert verdict.by_seed == pytest.approx([0.5] * 3)
  assert verdict.verdict == 'not testable'
  assert 'one side of the effect alone' in verdict.reason
  assert np.isnan([verdict.low, verdict.high]).all()
  # Nor is the opposite found, where the sizes are the other way round.
  verdict = _judge_spread(monkeypatch, values[:, :, ::-1])
  assert verdict.effect == pytest.approx(-0.3)
  assert verdict.verdict == 'not testable'


@pytest.mark.parametrize(
  ('larger', 'rate', 'said'),
  [
    (1, 0.005, 'in under 1 % of simulated studies where'),
    (0.5, 0.19, 'in about 19 % where'),
  ],
)
def test_the_page_says_how_often_noise_alone_supports_5(
  larger, rate, said, monkeypatch
):
  """Four equal methods; at the larger size seeds scatter so much of it.

  The rates are of 3,000 studies.
  """
  generator = np.random.default_rng(0)
  scatter = np.array([1, larger])[:, None, None, None]
  trials = 100
  supported = sum(
    _judge_spread(
      monkeypatch, 0.7 + generator.normal(0, 0.1, (3, 1, 2, 2, 4, 1)) * scatter
    ).verdict
    == 'supported'
    for _ in range(trials)
  )
  deviation = (rate * (1 - rate) / trials) ** 0.5
  assert abs(supported / trials - rate) < 2 * deviation
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'scale_study.md'
  assert said in ' '.join(page.read_text('utf-8').split())


def test_merges_are_counted():
  judged = _judge(made_up_grid.study())
  # 3 seeds, 3 sizes, 2 bases, 4 methods; 4, 2, 4, 1 subsets.
  assert judged['1'].cells == 3 * 3 * 2 * 4
  assert judged['2'].cells == judged['3a'].cells == 3 * 3 * 2 * 4 * 11
  assert judged['3b'].cells == 3 * 4 * (4 + 1)
  assert judged['4'].cells == 3 * 3 * 2 * 4 * (4 + 1)


@pytest.mark.parametrize(
  ('changes', 'untestable', 'said'),
  [
    ({'seeds': 2}, '12345', 'needs 3 seeds'),
    # Several subsets of a seed are no more seeds.
    ({'seeds': 2, 'ns': [2, 6]}, '12345', 'everywhere; 2 run'),
    ({'sizes': _ONE_SIZE}, '245', 'needs two sizes; only s was run'),
    ({'bases': ['pretrained']}, '1', 'needs both bases'),
    ({'ns': [2, 4]}, '3', 'needs N ≥ 6; the largest is 4'),
    ({'ns': [8]}, '4', 'needs two numbers of experts'),
    ({'methods': ['ties']}, '5', 'needs two methods'),
  ],
)
def test_what_was_not_run_is_not_testable(changes, untestable, said):
  judged = _judge(made_up_grid.study(Truth(), **changes))
  for finding in untestable:
    assert judged[finding].verdict == 'not testable'
    assert said in judged[finding].reason
  rest = set('12345') - set(untestable) - {'3'}
  assert {judged[finding].verdict for finding in rest} <= {'supported'}


def test_without_a_multitask_model_half_of_finding_3_is_not_testable():
  study = made_up_grid.study()
  cells = [dataclasses.replace(cell, multitask={}) for cell in study.cells]
  judged = _judge(Results(tuple(cells), study.gates))
  assert judged['3a'].verdict == 'supported'
  assert judged['3b'].verdict == judged['3'].verdict == 'not testable'


@pytest.mark.parametrize(
  ('truth', 'outcome'),
  [
    (Truth(held_out=1.1, held_out_multitask=1.2), 'not supported'),
    (Truth(held_out=0.9, held_out_multitask=0.8), 'not supported'),
    (Truth(held_out=1.1, held_out_multitask=1.0), 'supported'),
  ],
)
def test_finding_3_needs_both_halves(truth, outcome):
  assert _judge(made_up_grid.study(truth))['3'].verdict == outcome


def test_finding_3_fails_with_the_half_that_can_be_tested():
  """The claim is two; one that is false is enough."""
  judged = _judge(made_up_grid.study(Truth(held_out=0.9), ns=[2, 4]))
  assert judged['3a'].verdict == 'not supported'
  assert judged['3b'].verdict == 'not testable'
  assert judged['3'].verdict == 'not supported'


def test_a_failed_category_is_left_out_on_both_sides():
  """One base fails at an easy task: the other must not profit from it."""
  study = made_up_grid.study(Truth(quality=0.1))
  easy = [
    dataclasses.replace(
      cell, scores={**cell.scores, 'topic': cell.expert['topic']}
    )
    for cell in study.cells
  ]
  gates = [
    dataclasses.replace(
      gate, passed=(gate.base, gate.category) != ('pretrained', 'topic')
    )
    for gate in study.gates
  ]
  study = Results(tuple(easy), tuple(gates))
  assert _judge(study)['1'].effect == pytest.approx(0.1)
  # Beside it: all eight count, of which the easy one is alike in both.
  (every,) = (
    verdict
    for verdict in verdicts.judge_all(study)
    if (verdict.finding, verdict.setting, verdict.measure)
    == ('1', 'validated', 'every ratio')
  )
  assert every.effect == pytest.approx(0.1 * 7 / 8)


def test_a_category_without_a_ratio_is_nowhere_counted():
  """Whether its gate passed or not: an expert scores 0 with some seed."""
  study = made_up_grid.study()
  index = next(
    i
    for i, cell in enumerate(study.cells)
    if (cell.size, cell.base, cell.split) == ('s', 'pretrained', 'test')
    and 'topic' in cell.merged_tasks
  )
  cells = [*study.cells]
  cells[index] = dataclasses.replace(
    cells[index], expert={**cells[index].expert, 'topic': 0.0}
  )
  grid = Results(tuple(cells), study.gates).grid(gated=False)
  without = {
    a for a, counted in grid.countable.items() if 'topic' not in counted
  }
  assert without == {('s', 'pretrained')}


def test_bases_are_compared_where_one_is_better():
  study = made_up_grid.study()
  failed = dataclasses.replace(
    study.gates[0], size='s', category='all', split='held-in', passed=False
  )
  verdict = _judge(Results(study.cells, (*study.gates, failed)))['1']
  assert verdict.verdict == 'supported'
  assert {part.where[0] for part in verdict.parts if part.effect > 0} == {
    *('m', 'l')
  }
  assert 'no category may be counted in: s, average; s, ' in verdict.reason
  everywhere = [
    dataclasses.replace(failed, size=size) for size in made_up_grid.SIZES
  ]
  verdict = _judge(Results(study.cells, (*study.gates, *everywhere)))['1']
  assert verdict.verdict == 'not testable'
  assert verdict.reason.startswith('the instruction-tuned base is nowhere')


def test_a_part_without_categories_is_named():
  failing = [('s', 'pretrained', name) for name in HELD_OUT]
  verdict = _judge(made_up_grid.study(failing=failing))['3a']
  assert verdict.verdict == 'supported'
  assert 'may be counted in: s, pretrained)' in verdict.reason


def test_seeds_are_shown_alone_and_with_students_interval():
  values = made_up_grid.study(_TRUE).grid().values(measures.held_in)
  expected = [
    np.nanmean(seed[:, :, 1, :, -1] - seed[:, :, 0, :, -1]) for seed in values
  ]
  verdict = _judge(made_up_grid.study(_TRUE))['1']
  assert verdict.by_seed == pytest.approx(expected)
  interval = stats.ttest_1samp(expected, 0).confidence_interval(0.95)
  assert verdict.student == pytest.approx(tuple(interval))
  alone = _judge(made_up_grid.study(_TRUE, seeds=1))['1']
  assert len(alone.by_seed) == 1 and np.isnan(alone.student).all()


def test_a_seed_without_an_effect_is_not_among_them():
  study = made_up_grid.study(Truth(quality=0.1), seeds=4)
  kept = tuple(c for c in study.cells if (c.seed, c.base) != (1, 'pretrained'))
  verdict = _judge(Results(kept, study.gates))['1']
  assert verdict.by_seed == pytest.approx([0.1] * 3)
  assert verdict.student == pytest.approx((0.1, 0.1))


def test_nothing_is_testable_where_every_gate_failed():
  failing = [
    (size, base, name)
    for size in made_up_grid.SIZES
    for base in ('pretrained', 'instruction-tuned')
    for name in HELD_IN
  ]
  judged = _judge(made_up_grid.study(failing=failing))
  for finding in '1245':
    assert judged[finding].verdict == 'not testable'
    assert np.isnan(judged[finding].effect)
    assert judged[finding].reason == 'no category may be counted on all sides'
  assert judged['3'].verdict == 'supported'


def test_a_merge_without_counterpart_does_not_enter():
  study = made_up_grid.study(Truth(quality=0.1))
  lost = [
    cell
    for cell in study.cells
    if (cell.base, cell.n, cell.seed, cell.size) == ('pretrained', 8, 0, 's')
  ][0]
  kept = tuple(cell for cell in study.cells if cell is not lost)
  verdict = _judge(Results(kept, study.gates))['1']
  assert verdict.cells == 3 * 3 * 2 * 4 - 2
  assert verdict.verdict == 'not testable'
  more = made_up_grid.study(Truth(quality=0.1), seeds=4)
  kept = tuple(c for c in more.cells if c.identity != lost.identity)
  verdict = _judge(Results(kept, more.gates))['1']
  assert verdict.verdict == 'supported'
  assert verdict.effect == pytest.approx(0.1)


def test_fixed_settings_are_judged_beside():
  study = made_up_grid.study(
    settings=('validated', 'fixed'), sizes=_ONE_SIZE, methods=['ties']
  )
  worse = [
    cell
    if cell.setting == 'validated' or cell.base == 'pretrained'
    else dataclasses.replace(
      cell,
      scores={task: 0.5 * score for task, score in cell.scores.items()},
    )
    for cell in study.cells
  ]
  both = Results(tuple(worse), study.gates)
  outcomes = [
    verdict.verdict
    for verdict in verdicts.judge_all(both)
    if (verdict.finding, verdict.measure) == ('1', 'ratio')
  ]
  assert outcomes == ['supported', 'not supported']


def test_half_of_finding_3_is_of_the_large_model_with_many_experts():
  study = made_up_grid.study(Truth(held_out=1.1, held_out_multitask=1.05))
  where = ('l', 'instruction-tuned')
  elsewhere = [
    cell
    if (cell.size, cell.base) == where and cell.n >= 6
    else dataclasses.replace(
      cell, scores={task: 0.5 * score for task, score in cell.scores.items()}
    )
    for cell in study.cells
  ]
  verdict = _judge(Results(tuple(elsewhere), study.gates))['3b']
  assert verdict.verdict == 'supported'
  assert verdict.effect == pytest.approx(0.05)
