"""The five findings at a glance: every effect, its interval and its parts."""

from collections.abc import Sequence
import math

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
import numpy as np

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.figures import style
from experiments.scale_study.analysis.figures.picture import Picture
from experiments.scale_study.analysis.verdicts import Verdict

_OPPOSITE = 'not supported, the opposite found'
_COLORS = {
  'supported': '#0072b2',
  'not supported': '#d55e00',
  _OPPOSITE: '#cc79a7',
  'not testable': '#9ca3af',
}
_SHOWN = ('1', '2', '3a', '3b', '4', '5')


def draw(verdicts: Sequence[Verdict]) -> Picture:
  """Draws a panel a finding with an effect, a row a setting and measure."""
  shown = [verdict for verdict in verdicts if verdict.finding in _SHOWN]
  present = [verdict for verdict in shown if not np.isnan(verdict.effect)]
  drawn = sorted({verdict.finding for verdict in present})
  columns = min(2, len(drawn))
  figure, axes = style.panels(
    math.ceil(len(drawn) / columns), columns, height=2.2
  )
  for panel, finding in zip(axes.flat, drawn, strict=False):
    rows = [verdict for verdict in shown if verdict.finding == finding]
    outcome = _outcome(rows[0]).replace(', ', ',\n')
    style.title(panel, f'Finding {finding}: {outcome}')
    _draw_rows(panel, rows)
  for panel in axes.flat[len(drawn) :]:
    panel.remove()
  outcomes = {_outcome(verdict) for verdict in present}
  handles = [
    style.handle(outcome, color=color, marker='o')
    for outcome, color in _COLORS.items()
    if outcome in outcomes
  ]
  style.legend(figure, handles)
  return Picture(
    'findings',
    'The five findings at a glance',
    _reading([verdict for verdict in shown if verdict.is_main]),
    'Right of 0 is the paper’s side. Large marks are the effects with 95 % '
    'intervals, small ones their parts (sizes, bases or methods). Intervals '
    'are of seeds and do not cover which questions were asked: one that lies '
    'just beside 0 may be about less than one question. The first '
    'row is the verdict; ratio is merge ÷ expert, of the categories whose '
    'gates passed or of every one that has a ratio, gain the part of the '
    'expert’s gain over the base that is kept; unmerged is base ÷ expert, what '
    'of an effect is there before anything is merged.',
    figure,
  )


def _draw_rows(panel: Axes, rows: Sequence[Verdict]) -> None:
  for y, verdict in enumerate(reversed(rows)):
    color = _COLORS[_outcome(verdict)]
    parts = [part.effect for part in verdict.parts]
    below = [y - 0.24] * len(parts)
    panel.scatter(parts, below, s=9, alpha=0.45, linewidths=0, color=color)
    size = 7 if verdict.is_main else 4.5
    panel.plot(verdict.effect, y, marker='o', markersize=size, color=color)
    panel.hlines(y, verdict.low, verdict.high, linewidth=2, color=color)
  panel.axvline(0, color=style.REFERENCE, linewidth=1, zorder=1)
  labels = [_label(verdict) for verdict in reversed(rows)]
  panel.set_yticks(range(len(rows)), labels, fontsize=style.SMALL)
  panel.set_ylim(-0.6, len(rows) - 0.4)
  panel.xaxis.set_major_locator(MaxNLocator(4))
  panel.set_xlabel(rows[0].unit, fontsize=style.SMALL, loc='right')


def _label(verdict: Verdict) -> str:
  return f'{verdict.setting}, {verdict.measure}'


def _outcome(verdict: Verdict) -> str:
  opposite = verdict.verdict == 'not supported' and verdict.high < 0
  return _OPPOSITE if opposite else verdict.verdict


def _reading(verdicts: Sequence[Verdict]) -> str:
  said: dict[str, list[str]] = {}
  for verdict in sorted(verdicts, key=lambda v: [*_COLORS].index(_outcome(v))):
    outcome = _outcome(verdict)
    if outcome == 'not testable':
      outcome += f' ({verdict.reason})'
    said.setdefault(outcome, []).append(verdict.finding)
  return ' '.join(
    f'{outcome[0].upper()}{outcome[1:]}: {names.join(findings)}.'
    for outcome, findings in said.items()
  )
