"""Folders of JSON lines: what is read, and what every mistake is called."""

import itertools
import json

import pytest

from experiments.scale_study.tasks import json_lines, p3
from experiments.scale_study.tasks.source import Example

_LINE = {
  'inputs': 'A fine film. Good or bad?',
  'targets': 'good',
  'answer_choices': ['good', 'bad'],
  'category': 'sentiment',
  'dataset': 'films',
  'template': 'short',
}


def _write(folder, split, *changes):
  """Adds a line for each dict of changes to `_LINE`."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / f'{split}.jsonl').open('a') as file:
    for change in changes:
      file.write(json.dumps(_LINE | change) + '\n')


def _write_films(folder):
  for split in ('train', 'validation', 'test'):
    _write(folder, split, *({'inputs': f'{split} {i}'} for i in range(5)))


def test_every_field_arrives(tmp_path):
  _write_films(tmp_path / 'films')
  story = {'category': 'sentence_completion', 'dataset': 'stories'}
  _write(tmp_path / 'stories', 'test', story)
  told = {'category': 'instruction', 'dataset': 'do', 'inputs': 'Do it.'}
  _write(tmp_path, 'train', told)
  source = p3.source(tmp_path)
  assert [d.name for d in source.held_in['sentiment']] == ['films']
  (stories,) = source.held_out['sentence_completion']
  assert (stories.name, stories.held_in) == ('stories', False)
  assert [d.name for d in source.instruction] == ['do']
  assert list(stories.examples('test', 0)) == [
    Example('A fine film. Good or bad?', 'good', ('good', 'bad'))
  ]


def test_training_examples_never_end_and_others_come_once(tmp_path):
  _write_films(tmp_path)
  (films,) = p3.source(tmp_path).held_in['sentiment']
  prompts = [e.prompt for e in itertools.islice(films.examples('train', 0), 15)]
  expected = {f'train {i}' for i in range(5)}
  assert all(
    set(prompts[start : start + 5]) == expected for start in (0, 5, 10)
  )
  assert prompts == [
    e.prompt for e in itertools.islice(films.examples('train', 0), 15)
  ]
  assert sorted(e.prompt for e in films.examples('test', 0)) == [
    f'test {i}' for i in range(5)
  ]


@pytest.mark.parametrize(
  ('category', 'choices', 'metric'),
  [
    ('sentiment', ['good', 'bad'], 'accuracy'),
    ('closed_book_qa', None, 'exact_match'),
    ('summarization', [], 'rouge_l'),
  ],
)
def test_the_metric_follows_from_choices_and_category(
  tmp_path, category, choices, metric
):
  for split in ('train', 'validation', 'test'):
    _write(
      tmp_path,
      split,
      {'inputs': split, 'category': category, 'answer_choices': choices},
    )
  (dataset,) = p3.source(tmp_path).held_in[category]
  assert dataset.metric == metric


def test_choices_beside_texts_are_matched_exactly(tmp_path):
  """ROUGE-L of some and a choice of others would be no one score."""
  for split in ('train', 'validation', 'test'):
    rows = [
      {'inputs': f'{split} {choices}', 'answer_choices': choices}
      for choices in (['good', 'bad'], None)
    ]
    _write(
      tmp_path, split, *({**row, 'category': 'summarization'} for row in rows)
    )
  (dataset,) = p3.source(tmp_path).held_in['summarization']
  assert dataset.metric == 'exact_match'


@pytest.mark.parametrize(
  ('answers', 'choices', 'reached'),
  [
    # Seven of ten, one of which teaches it.
    ('gggggggbbb', lambda _: ['g', 'b'], 6 / 10),
    ('gggggbbbbb', lambda _: ['g', 'b'], 5 / 10),
    # In another order they are the same candidates.
    ('ggggb', lambda i: ['g', 'b'] if i % 2 else ['b', 'g'], 3 / 5),
    # What comes once has no commonest answer.
    ('gbb', lambda i: ['g', 'b', f'{i}', 'none'], 1 / 4),
    # Texts: none is right by a guess.
    ('aaabcd', lambda _: None, 2 / 6),
    ('abcd', lambda _: None, 0),
    # Seven of ten, and two of which each comes once.
    (
      'gggggggbbbgb',
      lambda i: ['g', 'b'] if i < 10 else ['g', 'b', f'{i}', 'none'],
      (6 + 2 / 4) / 12,
    ),
  ],
)
def test_what_always_the_same_answer_reaches(
  tmp_path, answers, choices, reached
):
  _write(
    tmp_path,
    'test',
    *(
      {
        'category': 'sentence_completion',
        'inputs': f'What is {i}?',
        'targets': answer,
        'answer_choices': choices(i),
      }
      for i, answer in enumerate(answers)
    ),
  )
  (dataset,) = p3.source(tmp_path).held_out['sentence_completion']
  assert dataset.constant == pytest.approx(reached)


def test_that_answer_is_learned_from_training(tmp_path):
  for split, answers in (
    ('train', ['good', 'bad', 'good']),
    ('validation', ['bad']),
    ('test', ['good', 'good', 'good', 'bad']),
  ):
    for number, answer in enumerate(answers):
      _write(
        tmp_path, split, {'inputs': f'{split} {number}', 'targets': answer}
      )
  (films,) = p3.source(tmp_path).held_in['sentiment']
  assert films.constant == 3 / 4


def test_held_in_data_without_validation_are_an_error(tmp_path):
  for split in ('train', 'test'):
    _write(tmp_path, split, {'inputs': split})
  with pytest.raises(
    ValueError, match="'films' of sentiment has no validation"
  ):
    p3.source(tmp_path)


def test_held_out_data_need_testing_only(tmp_path):
  _write(tmp_path, 'train', {'category': 'coreference_resolution'})
  with pytest.raises(ValueError, match='has no test examples, only train'):
    p3.source(tmp_path)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'category': 'sentimant'}, "'sentimant' is not a category"),
    ({'targets': 'fine'}, "'fine', not one of answer_choices"),
    ({'targets': ' '}, "targets is ' '"),
    ({'inputs': 3}, 'inputs is 3'),
    ({'answer_choices': 'good'}, "answer_choices is 'good'"),
    ({'answer_choices': ['good', 'good ']}, 'leaves nothing to choose'),
    ({'answer_choices': ['good', 'New  York', 'New York']}, '1 differ from'),
    ({'answer_choices': ['good', 'U.S.', 'U. S.']}, '1 differ from others by'),
    ({'category': 'summarization'}, 'A dataset has one category'),
  ],
)
def test_a_wrong_line_is_named(tmp_path, change, message):
  _write(tmp_path, 'train', {}, change)
  with pytest.raises(ValueError, match=message) as error:
    p3.source(tmp_path)
  assert f'{tmp_path / "train.jsonl"}, line 2' in str(error.value)


@pytest.mark.parametrize('field', json_lines.FIELDS)
def test_a_missing_field_is_named(tmp_path, field):
  line = {key: value for key, value in _LINE.items() if key != field}
  (tmp_path / 'test.jsonl').write_text(f'\n{json.dumps(line)}\n')
  with pytest.raises(ValueError, match=f'test.jsonl, line 2 lacks {field}'):
    p3.source(tmp_path)


@pytest.mark.parametrize('text', ['{"inputs": ', '["a"]'])
def test_what_is_not_an_object_is_an_error(tmp_path, text):
  (tmp_path / 'train.jsonl').write_text(text)
  with pytest.raises(ValueError, match='line 1 is .*not'):
    p3.source(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
  with pytest.raises(ValueError, match='has no train.jsonl, validation.jsonl'):
    p3.source(tmp_path)


@pytest.mark.parametrize(
  'name', ['films/training.jsonl', 'Test.jsonl', 'films/corpus.jsonl']
)
def test_a_file_of_another_name_is_an_error(tmp_path, name):
  _write_films(tmp_path / 'films')
  (tmp_path / 'corpus.jsonl').write_text('{"text": "one"}')
  (tmp_path / name).write_text('{}')
  with pytest.raises(ValueError, match='such a file is not read') as error:
    p3.source(tmp_path)
  assert str(error.value).startswith(f'{tmp_path / name}: ')


def test_hidden_folders_are_not_read(tmp_path):
  _write_films(tmp_path)
  for name in ('train.jsonl', 'train-checkpoint.jsonl'):
    copy = tmp_path / '.ipynb_checkpoints' / name
    copy.parent.mkdir(exist_ok=True)
    copy.write_text((tmp_path / 'train.jsonl').read_text())
  (films,) = p3.source(tmp_path).held_in['sentiment']
  assert len(films.pool) == 5


def test_a_byte_order_mark_is_no_text(tmp_path):
  _write_films(tmp_path)
  for path in [*tmp_path.glob('*.jsonl')]:
    path.write_text(path.read_text(), encoding='utf-8-sig')
  (films,) = p3.source(tmp_path).held_in['sentiment']
  assert len(films.pool) == 5


def test_a_prompt_of_the_test_is_not_trained_on(tmp_path):
  _write_films(tmp_path)
  _write(tmp_path, 'train', {'inputs': 'test 0'}, {'inputs': 'validation 1'})
  (films,) = p3.source(tmp_path).held_in['sentiment']
  drawn = itertools.islice(films.examples('train', 0), 50)
  assert {e.prompt for e in drawn} == {f'train {i}' for i in range(5)}


@pytest.mark.parametrize('space', ['  ', '\r\n', '\u00a0'])
def test_nor_is_one_with_other_spaces(tmp_path, space):
  """The tokens are the same."""
  _write_films(tmp_path)
  _write(tmp_path, 'train', {'inputs': f'test{space}0'})
  (films,) = p3.source(tmp_path).held_in['sentiment']
  drawn = itertools.islice(films.examples('train', 0), 50)
  assert {e.prompt for e in drawn} == {f'train {i}' for i in range(5)}


def test_a_prompt_of_another_test_is_not_trained_on(tmp_path, caplog):
  _write_films(tmp_path)
  tested = {'category': 'sentence_completion', 'dataset': 'stories'}
  _write(tmp_path, 'test', tested | {'inputs': 'train 0'})
  _write(tmp_path, 'validation', tested | {'inputs': 'train 1'})
  told = {'category': 'instruction', 'dataset': 'do'}
  for prompt in ('validation 2', 'do it'):
    _write(tmp_path, 'train', told | {'inputs': prompt})
  # Two tests may ask the same, in another format for instance.
  _write(tmp_path, 'test', tested | {'inputs': 'test 4'})
  with caplog.at_level('WARNING', logger='absl'):
    source = p3.source(tmp_path)
  (films,), (do,) = source.held_in['sentiment'], source.instruction
  (stories,) = source.held_out['sentence_completion']
  for dataset, expected in (
    (films, {'train 2', 'train 3', 'train 4'}),
    (do, {'do it'}),
  ):
    drawn = itertools.islice(dataset.examples('train', 0), 50)
    assert {e.prompt for e in drawn} == expected
  assert 'films: left out 2 of 5 train examples' in caplog.text
  assert 'do: left out 1 of 2 train examples' in caplog.text
  for dataset, count in ((films, 5), (stories, 2)):
    assert len([*dataset.examples('test', 0)]) == count


def test_answers_that_contradict_each_other_are_told(tmp_path, caplog):
  _write_films(tmp_path)
  for targets in ('good', 'good', 'bad'):
    _write(tmp_path, 'test', {'inputs': 'once more', 'targets': targets})
  with caplog.at_level('WARNING', logger='absl'):
    (films,) = p3.source(tmp_path).held_in['sentiment']
  assert 'films: 1 test examples have a prompt that' in caplog.text
  answers = {e.prompt: e.answer for e in films.examples('test', 0)}
  assert answers['once more'] == 'bad'


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
  (tmp_path / 'train.jsonl').write_bytes('{"inputs": "naïve"}'.encode('cp1252'))
  with pytest.raises(ValueError, match='/train.jsonl is not UTF-8'):
    p3.source(tmp_path)


def test_data_that_are_all_tested_are_an_error(tmp_path):
  for split in ('train', 'validation', 'test'):
    _write(tmp_path, split, {})
  with pytest.raises(ValueError, match='All validation prompts'):
    p3.source(tmp_path)


def test_frequent_words_have_ids_and_others_are_spelled(tmp_path):
  _write_films(tmp_path)
  tokenizer = p3.source(tmp_path, vocabulary=2).tokenizer
  assert tokenizer.words == ('good', 'train')
  assert len(tokenizer.encode('train good')) == 2
  assert len(tokenizer.encode('naïve')) == len('naïve '.encode())
  assert tokenizer.decode(tokenizer.encode('a naïve, good man')) == (
    'a naïve , good man'
  )


def test_the_corpus_is_read_when_it_is_needed(tmp_path):
  _write_films(tmp_path)
  source = p3.source(tmp_path)
  with pytest.raises(ValueError, match='corpus.jsonl to pretrain on'):
    next(source.corpus(0))
  (tmp_path / 'corpus.jsonl').write_text('{"text": "one"}\n{"text": "two"}\n')
  texts = [t[0].text for t in itertools.islice(source.corpus(0), 4)]
  assert sorted(texts) == ['one', 'one', 'two', 'two']
  (tmp_path / 'corpus.jsonl').write_text('{"words": "one"}\n')
  with pytest.raises(ValueError, match='line 1 lacks "text"'):
    next(source.corpus(0))
