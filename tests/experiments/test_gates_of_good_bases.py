"""Gates of bases so good that an expert has little to gain."""

import dataclasses
import math
import shutil

import pytest

from experiments.scale_study import folder, gates
from experiments.scale_study.folder import Folder
from experiments.scale_study.size import Size
from experiments.scale_study.study_config import Gates
from tests.experiments import small_study

ARM = small_study.ARM
TASK = 'sentiment/sentiment_in_colours'
# There are no more in the test of a task.
EXAMPLES = 21


@pytest.mark.parametrize(
  'base, expert, by_a_fifth, by_errors',
  [
    # 2 √(0.5 · 0.5 / 21 + 0.75 · 0.25 / 21) = 0.289
    (0.5, 0.75, True, False),
    # 2 √(0.8 · 0.2 / 21 + 0.99 · 0.01 / 21) = 0.180
    (0.8, 0.99, False, True),
    # Without any error there still has to be a gain.
    (1.0, 1.0, False, False),
    (0.0, 1.0, True, True),
  ],
)
def test_a_good_base_may_gain_little(
  undisturbed, tmp_path, base, expert, by_a_fifth, by_errors
):
  shutil.copytree(undisturbed.folder.root / 'scores', tmp_path / 'scores')
  config = dataclasses.replace(undisturbed.config, test_examples=EXAMPLES)
  results = Folder(tmp_path, config, 16 * '0')
  for name, score in (('base', base), ('experts/sentiment', expert)):
    path = results.score(ARM, name)
    record = folder.read_json(path)
    record['test'][TASK][0] = score
    folder.write_json(path, record)
  for gain, expected in ((0.2, by_a_fifth), (None, by_errors)):
    asked = dataclasses.replace(config, gates=Gates(gain=gain))
    size = Size(asked, results, 'xs', undisturbed.source)
    (gate,) = (
      gate
      for gate in gates.check_arm(size, ARM)
      if gate.category == 'sentiment' and 'beats its base' in gate.gate
    )
    assert gate.passed == expected
    if gain is None:
      variance = (base * (1 - base) + expert * (1 - expert)) / EXAMPLES
      assert f'two standard errors ({2 * math.sqrt(variance):.3f})' in gate.gate
