"""The report: complete, self-contained, and shown by a browser."""

import base64
import csv
import dataclasses
from html.parser import HTMLParser
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

from absl import app
from matplotlib import image
import numpy as np
import pytest

from experiments.scale_study.analysis import (
  cards,
  html,
  markup,
  sections,
  verdicts,
  what_was_run,
  written,
)
from experiments.scale_study.analysis.__main__ import main
from experiments.scale_study.analysis.cells import BASES
from experiments.scale_study.analysis.figures import number
from experiments.scale_study.analysis.law import Fit
from experiments.scale_study.analysis.report import analyse
from tests.experiments import made_up_grid
from tests.experiments.made_up_grid import Truth

RESULTS = pathlib.Path(__file__).parents[2] / 'experiments' / 'results'
_CHROMIUM = next(
  filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'chrome'))),
  None,
)
needs_chromium = pytest.mark.skipif(
  _CHROMIUM is None,
  reason='needs a browser: apt-get install chromium',
)

# Asked inside the report, answered to the page that holds it in a frame.
_PROBE = """<script>
addEventListener('load', () => parent.postMessage({
  images: [...document.images].map(
    i => [i.naturalWidth, i.getBoundingClientRect().width]),
  width: document.documentElement.clientWidth,
  needed: document.documentElement.scrollWidth,
}, '*'));
</script>"""
_FRAME = """<iframe src="probed.html" style="width:390px;height:800px;border:0">
</iframe><pre>nothing</pre><script>
addEventListener('message', event => {
  document.querySelector('pre').textContent = JSON.stringify(event.data);
});
</script>"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  study = made_up_grid.study(
    Truth(noise=0.02, held_out_multitask=1.3),
    sizes={'s': 121_000, 'm': 372_000},
    settings=('validated', 'fixed'),
    sweeps=True,
    failing=[('s', 'pretrained', 'paraphrase')],
  )
  folder = tmp_path_factory.mktemp('study')
  made_up_grid.write(study, folder)
  printed = subprocess.run(
    [sys.executable, '-m', 'experiments.scale_study.analysis', str(folder)],
    capture_output=True,
    text=True,
    check=True,
    # Files are the same in a locale that has none of their letters.
    env={**os.environ, 'PYTHONUTF8': '0', 'LC_ALL': 'C'},
  ).stdout
  *_, finding, picture, report = printed.splitlines()
  assert 'supported' in finding
  assert picture == f'Wrote {folder / "figures" / "scores.png"}'
  assert report == f'Wrote {folder / "report.html"}'
  return folder


class _Page(HTMLParser):
  """Everything that is asked of a page, without a browser."""

  def __init__(self, text):
    super().__init__()
    self.open, self.attributes, self.words = [], [], []
    self.feed(text)
    self.text = ' '.join(' '.join(self.words).split())

  def handle_starttag(self, tag, attrs):
    self.attributes += [(tag, name, value or '') for name, value in attrs]
    if tag not in ('meta', 'link', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != 'style':
      self.words.append(data)

  def values(self, tag, name):
    return [v for t, n, v in self.attributes if (t, n) == (tag, name)]


@pytest.fixture(scope='module')
def page(folder):
  return _Page((folder / 'report.html').read_text())


def test_written_answers(folder):
  """Beside exact match, the mean over tasks and seeds."""
  (folder / 'rouge_l.csv').write_text(
    'size,base,seed,model,task,score,rouge_l\n'
    's,pretrained,0,ties,summarization,0.0,0.5\n'
    's,pretrained,1,ties,summarization,0.5,0.9\n'
    's,pretrained,0,base,summarization,0.0,0.1\n'
  )
  assert written.load(folder) == [
    ('s', 'pretrained', 'base', 0.0, 0.1),
    ('s', 'pretrained', 'ties', 0.25, 0.7),
  ]
  assert (
    's Pretrained TIES 0.25 0.70'
    in _Page(sections.written_answers(written.load(folder))).text
  )
  (folder / 'rouge_l.csv').unlink()
  assert written.load(folder) == []


def test_the_law_has_the_symbols_of_its_formula_and_a_unit():
  named = dict.fromkeys(('floor', 'B', 'beta', 'A', 'gamma', 'b'), 1.0)
  fit = Fit('pretrained', 'ties', 'all sizes', '', '', named, ('floor', 'b'))
  text = _Page(sections.law([fit])).text
  assert 'L* = 1, B = 1, β = 1, A = 1, γ = 1, b = 1 L*, b' in text
  assert 'errors in nats a token' in text
  assert 'floor' not in text


def test_every_file_is_written(folder):
  figures = {path.stem for path in (folder / 'figures').glob('*.png')}
  assert figures == {
    'scores',
    'findings',
    'held_in_by_base',
    'held_in_by_size',
    'held_out_by_number',
    'by_number_and_size',
    'methods_compared',
    'sweep_scale',
    'sweep_density',
    'drift',
    'merging_law',
  }
  for name in ('verdicts', 'law'):
    # NaN is no JSON, and other readers stop at it.
    json.loads(
      (folder / f'{name}.json').read_text(), parse_constant=pytest.fail
    )


def test_the_page_needs_nothing_else(page):
  assert not page.open
  for tag, name, value in page.attributes:
    if name in ('src', 'href'):
      assert value.startswith(('#', 'data:')), (tag, value[:80])
  assert 'url(' not in page.text and '@import' not in page.text
  assert not page.values('script', 'src')


def test_every_picture_is_in_the_page(page, folder):
  sources = page.values('img', 'src')
  files = {path.read_bytes() for path in (folder / 'figures').glob('*.png')}
  assert len(sources) == len(files) == 11
  for source in sources:
    kind, _, data = source.partition(',')
    assert kind == 'data:image/png;base64'
    png = base64.b64decode(data, validate=True)
    assert png in files
    pixels = image.imread(io.BytesIO(png))
    assert pixels.shape[0] >= 400 and pixels.shape[1] >= 700
    assert pixels[..., :3].std() > 0.05
  assert all(len(text) > 40 for text in page.values('img', 'alt'))


def test_the_page_says_what_the_files_say(page, folder):
  verdicts = json.loads((folder / 'verdicts.json').read_text())
  main = [*verdicts.values()]
  assert [*verdicts] == [*('1', '2', '3', '3a', '3b', '4', '5')]
  for finding, verdict in verdicts.items():
    assert verdict['finding'] == finding
    assert (verdict['setting'], verdict['measure']) == ('validated', 'ratio')
    beside = {'1': 6, '2': 6, '3': 3, '3a': 3, '3b': 3}
    assert len(verdict['others']) == beside.get(finding, 5)
  markdown = (folder / 'tables' / 'verdicts.md').read_text()
  for verdict in main:
    if verdict['finding'] in '12345':
      claim = f'{verdict["finding"]}. {verdict["claim"]} {verdict["verdict"]}'
      assert claim in page.text
    assert f'{verdict["claim"]} | **{verdict["verdict"]}**' in markdown
    effect = f'{verdict["effect"]:+.3f} ({verdict["low"]:+.3f} to '
    assert effect.replace('-', '−') in page.text
    assert effect.replace('-', '−') in markdown


def test_what_is_not_testable_is_said_with_its_reason(page):
  assert 's Pretrained paraphrase failed: an expert beats its base' in page.text
  assert 'These are not testable: no ratio and no verdict counts' in page.text


def test_methods_are_named_in_their_order():
  study = made_up_grid.study(sizes={'s': 100}, ns=(2,))
  text = html.render(
    dataclasses.replace(study, cells=study.cells[::-1]), [], [], []
  )
  assert 'by Averaging, Task arithmetic, Dare-TIES and TIES' in text


def test_a_merge_can_be_traced(page, folder):
  cell = json.loads((folder / 'cells.jsonl').read_text().splitlines()[0])
  assert cell['checkpoints']['base'] in page.text
  assert cell['command'] in page.text


_CONFIG = {
  'tasks': 'procedural',
  'sizes': {'s': {'width': 64, 'layers': 2, 'heads': 4}},
  'bases': ['pretrained', 'instruction-tuned'],
  'seeds': [0, 1, 2],
  'corpus_length': 48,
  'length': 40,
  'batch': 32,
  'pretrain_steps': 3000,
  'pretrain_rate': 0.003,
  'instruction_steps': 600,
  'instruction_rate': 0.0015,
  'expert_steps': 300,
  'expert_rates': [0.0005, 0.001],
  'multitask_steps': 900,
  'multitask_rate': 0.001,
  'direct_steps': 0,
  'direct_rate': 0.001,
  'test_examples': 64,
  'validation_examples': 32,
  'merged': [2, 8],
  'subsets': 3,
  'methods': {
    'average': {'fixed': {}, 'choices': {}},
    'ties': {'fixed': {}, 'choices': {'density': [0.2, 0.5], 'scale': [1]}},
  },
}
_SECONDS = [
  {'part': 's/0', 'phase': 'bases', 'cpu': 1000.4, 'wall': 2.0},
  *(
    {
      'part': f's/pretrained/{seed}',
      'phase': 'merge',
      'cpu': 20.0,
      'wall': 30.0,
      'commit': 'df58d6a24626',
      'cores': 2,
      'processor': 'x86_64, made up',
      'jax': '0.10.2',
    }
    for seed in range(2)
  ),
]


def test_the_page_says_what_was_run(tmp_path):
  study = made_up_grid.study(sizes={'s': 121_000}, ns=(2,), seeds=1)
  (tmp_path / 'config.json').write_text(json.dumps(_CONFIG))
  lines = '\n'.join(map(json.dumps, _SECONDS))
  (tmp_path / 'seconds.jsonl').write_text(f'{lines}\n')
  run = what_was_run.load(tmp_path)
  text = _Page(what_was_run.section(study, run)).text
  for said in (
    'The data are synthetic: a micro-world',
    'share their answer formats with the categories of the study, but no '
    'question and no task. This is what Flan does too',
    'size s 121k parameters, 2 layers of width 64, 4 heads',
    'pretraining 3,000 steps at a rate of 0.003, on texts of 48 tokens',
    'instruction tuning 600 steps at 0.0015',
    '300 steps at 0.0005 and 0.001',
    'multitask model 900 steps at 0.001',
    'batch 32 texts of at most 40 tokens',
    'seeds 0, 1 and 2: ',
    'N = 2 and 8, at most 3 subsets each',
    'at most 64 of the test and 32 of validation',
    'TIES chosen of density 0.2 and 0.5; scale 1',
    'have to match exactly',
    'not recorded bases of s 1,000 not recorded',
    'commit df58d6a24626 merge of s 40 cores 2, processor x86_64, made up, '
    'jax 0.10.2',
  ):
    assert said in text
  # It was 0, and averaging has no choice.
  assert 'direct training' not in text and 'Averaging' not in text


@pytest.mark.parametrize('left', [*_CONFIG, *_SECONDS[1]])
def test_what_a_folder_does_not_know_is_not_told(left):
  study = made_up_grid.study(sizes={'s': 121_000}, ns=(2,), seeds=1)
  config = {name: value for name, value in _CONFIG.items() if name != left}
  phases = [
    {name: value for name, value in phase.items() if name != left}
    for phase in _SECONDS
  ]
  run = what_was_run.Run(config, phases)
  text = _Page(what_was_run.section(study, run)).text
  assert '{' not in text and 'None' not in text
  assert 'Our own choices where the paper is silent' in text


def test_a_folder_without_a_configuration_has_a_section_too(page):
  assert 'There is no config.json that would tell' in page.text
  assert 'There is no seconds.jsonl that would tell' in page.text
  assert 'size m 372k parameters' in page.text


def test_models_that_there_were_are_not_said_to_be_pretrained():
  study = made_up_grid.study(sizes={'s': 121_000}, ns=(2,), seeds=1)
  stored = {'instruction_tuned': 'smollm2', 'pretrained': None, 'shape': None}
  run = what_was_run.Run({**_CONFIG, 'tasks': 'real', 'sizes': {'s': stored}})
  text = _Page(what_was_run.section(study, run)).text
  assert 'The data are real texts' in text
  assert 'size s 121k parameters, smollm2 as stored' in text
  assert 'pretraining' not in text and 'Flan' not in text
  run = what_was_run.Run({'tasks': '/data/mine', 'text_metric': 'rouge_l'})
  text = _Page(what_was_run.section(study, run)).text
  assert 'The data are JSON lines of the folder /data/mine.' in text
  assert 'ROUGE-L in structure to text and summarization' in text


def test_the_committed_reports_say_what_was_run():
  for preset in ('cpu', 'full', 'smollm2'):
    page = _Page((RESULTS / preset / 'report.html').read_text('utf-8')).text
    config = json.loads((RESULTS / preset / 'config.json').read_text())
    assert f'{config["expert_steps"]} steps at' in page
    seconds = (RESULTS / preset / 'seconds.jsonl').read_text().splitlines()
    commits = {json.loads(line).get('commit', '') for line in seconds}
    assert all(commit in page for commit in commits)


def test_a_row_is_the_mean_over_what_is_testable(page, folder):
  """As the page says how to trace it: paraphrase fails at s."""
  assert 'over the categories that are testable for its size and base' in (
    page.text
  )
  lines = (folder / 'cells.jsonl').read_text().splitlines()
  where = {'setting': 'validated', 'size': 's', 'base': 'pretrained'}
  where |= {'method': 'ties', 'n': 4}
  kept = []
  for cell in map(json.loads, lines):
    if all(cell[name] == value for name, value in where.items()):
      merged = [name for name in cell['subset'] if name != 'paraphrase']
      ratios = [cell['scores'][c] / cell['expert'][c] for c in merged]
      kept.append(np.mean(ratios))
  (row,) = (
    row
    for row in _read(folder / 'tables' / 'merges.csv')
    if all(row[name] == str(value) for name, value in where.items())
  )
  # Tables have six digits.
  assert float(row['held_in']) == pytest.approx(np.mean(kept), abs=1e-5)


def test_a_card_says_what_one_question_is():
  study = made_up_grid.study(sizes={'s': 100}, ns=(2,), seeds=1)
  judged = verdicts.judge_all(study)
  said = 'one more of 64 is 0.016 of the score of a task'
  assert said in _Page(cards.findings(study, judged, 64)).text
  assert 'one more of' not in _Page(cards.findings(study, judged)).text


@pytest.mark.parametrize(
  ('cell', 'kind'),
  [
    ('0.46 (0.31 to 0.52)', 'number'),
    ('−0.1', 'number'),
    ('–', 'number'),
    ('5,614', 'number'),
    ('800 steps at 0.0015', None),
    ('121k parameters, 2 layers of width 64, 4 heads', 'words'),
    ('TIES', None),
  ],
)
def test_numbers_stand_at_the_right_and_sentences_do_not(cell, kind):
  found = _Page(markup.table(['a'], [[cell]])).values('td', 'class')
  assert found == ([kind] if kind else [])


def test_the_documents_say_what_is_less_than_a_question():
  results = RESULTS / 'smollm2'
  stored = json.loads((results / 'verdicts.json').read_text())['3a']
  (fixed,) = (
    other
    for other in stored['others']
    if (other['setting'], other['measure']) == ('fixed', 'ratio')
  )
  (asked,) = {*json.loads((results / 'questions.json').read_text()).values()}
  assert fixed['verdict'] == 'supported'
  page = (RESULTS.parents[1] / 'docs' / 'scale_study.md').read_text('utf-8')
  assert (
    f'fixed hyperparameters, at {fixed["effect"]:+.3f}, where one question of '
    f'{asked} is {1 / asked:.3f} of'
  ) in ' '.join(page.split())


def test_tables_hold_every_merge(folder):
  cells = (folder / 'cells.jsonl').read_text().splitlines()
  rows = _read(folder / 'tables' / 'cells.csv')
  assert len(rows) == len(cells)
  groups = _read(folder / 'tables' / 'merges.csv')
  # 2 settings, 2 sizes, 2 bases, 4 methods, 4 numbers of experts.
  assert len(groups) == 2 * 2 * 2 * 4 * 4
  group = groups[0]
  same = ('setting', 'size', 'base', 'method', 'n')
  chosen = [r for r in rows if all(r[k] == group[k] for k in same)]
  assert len(chosen) == int(group['merges']) == 12
  # Every seed has four subsets here, so that one mean is the mean of means.
  for name in ('held_in', 'gain_kept', 'held_out', 'drift', 'loss'):
    mean = sum(float(row[name]) for row in chosen) / len(chosen)
    assert float(group[name]) == pytest.approx(mean, abs=1e-5)
  sweeps = _read(folder / 'tables' / 'sweeps.csv')
  # 5 + 4 + 5 scales and 3 densities, on two splits.
  assert len(sweeps) == 2 * 2 * 4 * 2 * (5 + 4 + 5 + 3)


def _read(path):
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


_EVERY_GATE = [
  ('s', base, name)
  for base in BASES
  for name in (*made_up_grid.HELD_IN, *made_up_grid.HELD_OUT)
]


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
  'changes, pictures',
  [
    ({'bases': BASES[1:], 'methods': ('ties',), 'seeds': 1}, 6),
    # Bases can be compared.
    ({'methods': ('ties', 'average'), 'failing': _EVERY_GATE}, 7),
  ],
  ids=['one of each', 'nothing testable'],
)
def test_little_data_makes_a_report_too(tmp_path, changes, pictures):
  study = made_up_grid.study(sizes={'s': 100}, ns=(2,), **changes)
  made_up_grid.write(study, tmp_path)
  said = analyse(tmp_path)
  assert 'None of the five findings is testable' in said
  page = _Page((tmp_path / 'report.html').read_text())
  verdicts = json.loads((tmp_path / 'verdicts.json').read_text())
  judged = {verdict['verdict'] for verdict in verdicts.values()}
  assert judged == {'not testable'}
  assert len(page.values('img', 'src')) == pictures
  assert 'nan' not in page.text.lower().split()


def test_only_what_was_drawn_is_named(tmp_path):
  """Of single experts there are no merges whose scores could be drawn."""
  study = made_up_grid.study(sizes={'s': 100}, ns=(1,))
  made_up_grid.write(study, tmp_path)
  named = [
    line.removeprefix('Wrote ')
    for line in analyse(tmp_path).splitlines()
    if line.startswith('Wrote ')
  ]
  assert not (tmp_path / 'figures' / 'scores.png').exists()
  assert named == [str(tmp_path / 'report.html')]


@pytest.mark.filterwarnings('error')
def test_a_report_without_held_out_tasks(tmp_path):
  study = made_up_grid.study(sizes={'s': 100}, bases=BASES[:1], ns=(2, 4))
  cells = tuple(dataclasses.replace(c, held_out=()) for c in study.cells)
  made_up_grid.write(dataclasses.replace(study, cells=cells), tmp_path)
  analyse(tmp_path)
  page = _Page((tmp_path / 'report.html').read_text())
  figures = {path.stem for path in (tmp_path / 'figures').glob('*.png')}
  assert 'by_number_and_size' in figures
  assert 'held_out_by_number' not in figures
  assert 'nan' not in page.text.lower().split()


@pytest.mark.filterwarnings('error')
def test_what_may_not_be_counted_is_not_read_from_a_picture():
  study = made_up_grid.study(
    sizes={'s': 100}, ns=(2, 4), seeds=1, failing=_EVERY_GATE
  )
  for draw in (number.draw_held_out, number.draw_by_size):
    assert draw(study.grid()).reading == 'No category may be counted.'


def test_panels_that_share_an_axis_show_all_levels():
  """A multitask model of the second size far above all of the first."""
  study = made_up_grid.study(sizes={'s': 100, 'm': 200}, ns=(2, 4))
  cells = [
    dataclasses.replace(c, multitask={t: 3 * x for t, x in c.multitask.items()})
    if c.size == 'm'
    else c
    for c in study.cells
  ]
  grid = dataclasses.replace(study, cells=tuple(cells)).grid()
  figure = number.draw_by_size(grid).figure
  for panel in figure.axes:
    low, high = panel.get_ylim()
    for line in panel.lines:
      assert low <= np.nanmin(line.get_ydata())
      assert np.nanmax(line.get_ydata()) <= high


def _browse(folder, url):
  """Returns the page as scripts left it, and what the console was told."""
  assert _CHROMIUM is not None
  process = subprocess.run(
    [
      _CHROMIUM,
      '--headless',
      '--no-sandbox',
      '--disable-gpu',
      f'--user-data-dir={folder / "profile"}',
      '--enable-logging=stderr',
      '--virtual-time-budget=10000',
      '--dump-dom',
      f'file://{url}',
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
    env={**os.environ, 'HOME': str(folder)},
  )
  console = [line for line in process.stderr.splitlines() if 'CONSOLE' in line]
  return process.stdout, console


@needs_chromium
@pytest.mark.parametrize('of', ['made up', 'cpu', 'full', 'smollm2'])
def test_a_browser_shows_every_picture_at_phone_width(folder, tmp_path, of):
  results = folder if of == 'made up' else RESULTS / of
  report = (results / 'report.html').read_text('utf-8')
  (tmp_path / 'probed.html').write_text(report + _PROBE, 'utf-8')
  (tmp_path / 'frame.html').write_text(_FRAME)
  page, console = _browse(tmp_path, tmp_path / 'frame.html')
  assert console == []
  seen = json.loads(page.partition('<pre>')[2].partition('</pre>')[0])
  pictures = [*(results / 'figures').glob('*.png')]
  assert len(seen['images']) == len(pictures) > 0
  for natural, shown in seen['images']:
    assert natural >= 700 and shown >= 300
  # A scroll bar may take some of the 390.
  assert seen['needed'] <= seen['width'] <= 390


@needs_chromium
def test_the_console_would_be_heard(tmp_path):
  (tmp_path / 'broken.html').write_text('<script>nothing.here()</script>')
  _, console = _browse(tmp_path, tmp_path / 'broken.html')
  assert len(console) == 1 and 'nothing is not defined' in console[0]


def test_missing_files_are_a_usage_error(tmp_path):
  with pytest.raises(app.UsageError, match='cells.jsonl is missing: run the'):
    main(['analysis', str(tmp_path)])
