"""Fields that are changed on the command line, and mistakes in them."""

import dataclasses

import pytest

from experiments.scale_study import study_config
from experiments.scale_study.configs import cpu, full, pod
from experiments.scale_study.study_config import Scratch


@pytest.mark.parametrize(
  'setting, name, value',
  [
    ('expert_steps=200', 'expert_steps', 200),
    ('pretrain_rate=1', 'pretrain_rate', 1.0),
    ('pretrain_rate=2e-3', 'pretrain_rate', 0.002),
    ('seeds=3', 'seeds', (3,)),
    ('seeds=0,1', 'seeds', (0, 1)),
    ('expert_rates=1e-3,5e-4', 'expert_rates', (1e-3, 5e-4)),
    ('bases=pretrained', 'bases', ('pretrained',)),
    ('tasks=data/p3', 'tasks', 'data/p3'),
    ('strict=True', 'strict', True),
    ('host_devices=4', 'host_devices', 4),
  ],
)
def test_a_field_is_changed(setting, name, value):
  changed = study_config.override(cpu.CONFIG, setting)
  assert getattr(changed, name) == value


@pytest.mark.parametrize(
  'setting, message',
  [
    ('expert_step=200', 'Did you mean expert_steps'),
    ('expert_steps', 'not NAME=VALUE'),
    ('expert_steps=2.5', 'not of that kind'),
    ('expert_steps=many', 'not of that kind'),
    ('pretrain_rate=1e999', 'not of that kind'),
    ('seeds=a', 'not of that kind'),
    ('strict=1', 'not of that kind'),
    ('processes=True', 'not of that kind'),
    ('sizes=s', 'not of that kind'),
    ('host_devices=four', 'not of that kind'),
    ('text_metric=rougeL', 'one of exact_match, rouge_l'),
    ('compute_dtype=float16', 'one of float32, bfloat16'),
    ('gates=0.1', 'in a preset of your own'),
    ('bases=pretrain', 'one of pretrained, instruction-tuned'),
    ('bases=', 'bases=.* at least one'),
    ('seeds=', 'seeds=.* at least one'),
    ('seeds=0,0', 'each once'),
    ('seeds=-1', 'seeds=-1 was given; give 0 or more'),
    ('merged=2,0', 'merged=0 was given; give 1 or more'),
    ('merged=2,2', 'each once'),
    ('batch=0', 'batch=0 was given; give 1 or more'),
    ('subsets=-1', 'subsets=-1'),
    ('direct_steps=-1', 'give 0 or more'),
    ('host_devices=0', 'host_devices=0'),
    ('expert_rates=1e-3,0', 'expert_rates=0.0 was given; give more than 0'),
  ],
)
def test_a_mistake_is_named(setting, message):
  with pytest.raises(ValueError, match=message):
    study_config.override(cpu.CONFIG, setting)


@pytest.mark.parametrize('choices', [{'scale': ()}, {'density': (0.1, 0.2)}])
def test_choices_are_of_what_is_fixed_and_not_empty(choices):
  with pytest.raises(ValueError, match='at least one value'):
    study_config.MethodGrid({'scale': 1.0}, choices)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'merged': (4)}, r'merged=4 was given; give a tuple, such as \(4,\)'),
    ({'merged': (1,)}, 'give more than 1 beside it'),
    ({'merged': [2, 2]}, 'each once'),
    # A text, each letter of which would be a base.
    ({'bases': ('pretrained')}, "bases='pretrained' was given; give a tuple"),
    ({'sizes': {'s': {'width': 8}}}, r"sizes\['s'\]=.*; give Scratch or Stor"),
    ({'sizes': {'t/1': Scratch(8, 1, 1)}}, "named 't/1'; .* without a /"),
    ({'methods': {'ties': {'density': 0.2}}}, r"\['ties'\]=.* MethodGrid\("),
    ({'sweeps': {'ties': {'density': 0.2}}}, r"\['ties'\]\['density'\]=0.2"),
    ({'gates': {'gain': 0.1}}, r'gates=.* give Gates\('),
  ],
)
def test_a_mistake_in_a_preset_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(cpu.CONFIG, **changes)


def test_values_to_choose_from_are_several():
  with pytest.raises(ValueError, match=r"choices\['scale'\]=0.3 was given"):
    study_config.MethodGrid({'scale': 1.0}, {'scale': 0.3})


def test_what_older_records_lack_is_what_presets_need_not_give():
  record = study_config.as_json(cpu.CONFIG)
  for name in ('gates', 'remat', 'compute_dtype'):
    del record[name]
  assert study_config.differences(cpu.CONFIG, record) == {}
  assert study_config.only_gained(cpu.CONFIG, record)
  changed = dataclasses.replace(cpu.CONFIG, compute_dtype='bfloat16')
  assert study_config.differences(changed, record) == {
    'compute_dtype': "compute_dtype was 'float32' and is 'bfloat16'"
  }


def test_how_a_study_runs_is_no_difference():
  record = study_config.as_json(cpu.CONFIG)
  run = {'memory_budget': '1GiB', 'processes': 7, 'strict': True}
  changed = dataclasses.replace(cpu.CONFIG, **run)
  assert study_config.as_json(changed) == record
  # Records once held the memory.
  old = {**record, 'memory_budget': '4GiB'}
  assert study_config.differences(changed, old) == {}
  assert study_config.only_gained(changed, old)


def test_presets_are_told_apart_and_may_be_written_down():
  record = study_config.as_json(full.CONFIG)
  assert study_config.differences(full.CONFIG, record) == {}
  assert study_config.differences(pod.CONFIG, record)
  assert any(
    'a_new_field was 1' in line
    for line in study_config.differences(
      full.CONFIG, {**record, 'a_new_field': 1}
    ).values()
  )
