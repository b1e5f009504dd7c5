"""Answers prompts of the micro-world by reading them.

It knows the words (`lexicon`) and the unchanging facts, and works on the text
alone: nothing of what generated a prompt is used.
"""

from collections.abc import Callable, Iterable
import re

from experiments.scale_study.tasks.procedural import lexicon, world

_OPTIONS = (
  r'\? options : (.*) \. answer :$',
  r'\? choose one of (.*) \. answer :$',
  r'\? (\( a \) .*) answer :$',
  r'\? ([^?]* or [^?]*) \? answer :$',
)
_RELATED = {
  word: {topic}
  for topic, (things, verbs) in lexicon.TOPICS.items()
  for word in things + verbs
}
_POSITIVE = lexicon.GOOD + lexicon.PRAISED
_NEGATIVE = lexicon.BAD + lexicon.BLAMED
_MEANING = {
  word: synonyms.words
  for synonyms in lexicon.SYNONYMS
  for word in synonyms.words
}
_KIND = {
  value: name
  for name, relation in lexicon.RELATIONS.items()
  for value in relation.values
}


def split_options(prompt: str) -> tuple[str, list[str]]:
  """Separates a prompt from its answer format and the options listed."""
  for pattern in _OPTIONS:
    if match := re.search(pattern, prompt):
      listed = re.split(r' , | or |\( \w \)', match[1])
      options = [option.strip() for option in listed if option.strip()]
      return prompt[: match.start()].strip(), options
  return prompt.removesuffix('answer :').strip(' ?'), []


def template(prompt: str) -> str:
  """A prompt with a blank for every word that is drawn."""
  return re.sub(r'(_ ?)+', '_', ' '.join(map(_blank, prompt.split())))


def question_template(prompt: str) -> str:
  """The last sentence of a prompt without its answer format, as a template."""
  text, _ = split_options(prompt)
  text = text.removesuffix('.').strip()
  return template(text.rpartition(' . ')[2].removeprefix('question : '))


def _blank(word: str) -> str:
  drawn = (
    word in _RELATED
    or word in lexicon.AMBIGUOUS
    or word in _POSITIVE + _NEGATIVE + lexicon.PEOPLE + lexicon.THINGS
    or word in _MEANING
    or word in _KIND
  )
  return '_' if drawn else word


def answer(dataset: str, prompt: str) -> str:
  """Answers a prompt of a dataset."""
  text, options = split_options(prompt)
  return _READERS[dataset](text, options)


def _words(text: str, known: Iterable[str]) -> list[str]:
  return [word for word in text.split() if word in set(known)]


def _yes_no(true: bool) -> str:
  return 'yes' if true else 'no'


def _only(found: Iterable[str]) -> str:
  (word,) = set(found)
  return word


def _topics(text: str) -> set[str]:
  return set().union(*(_RELATED.get(word, ()) for word in text.split()))


def _is_positive(text: str) -> bool:
  (word,) = _words(text, _POSITIVE + _NEGATIVE)
  return (word in _POSITIVE) != ('not' in text.split())


def _same_meaning(text: str) -> bool:
  nouns = {_MEANING[word] for word in _words(text, _MEANING)}
  # One adjective and one noun if all that is said agrees; else two of each.
  assert len(nouns) in (2, 4)
  return len(nouns) == 2


def _predicates(text: str) -> dict[str, str]:
  found = {}
  for name, relation in lexicon.RELATIONS.items():
    if match := re.search(rf'{relation.predicate} (\w+)', text):
      found[name] = match[1]
  return found


def _asked_relation(text: str) -> tuple[str, str]:
  for name, relation in lexicon.RELATIONS.items():
    for wording in relation.questions:
      if match := re.search(wording.replace('{}', r'(\w+)') + '$', text):
        return match[1], name
  raise AssertionError(text)


def _choose_by_topic(text: str, options: list[str]) -> str:
  topics = set(_words(text, lexicon.TOPICS)) or _topics(text)
  return _only(o for o in options if _topics(o) == topics)


def _choose_by_meaning(text: str, options: list[str]) -> str:
  *_, key = text.split()
  if key in _MEANING:
    return _only(o for o in options if o in _MEANING[key])
  if key in ('man', 'he', 'woman', 'she'):
    return _only(
      o for o in options if (o in lexicon.MEN) == (key in ('man', 'he'))
    )
  positive = key in ('positive', *lexicon.PRAISED)
  return _only(o for o in options if (o in lexicon.GOOD) == positive)


def _extract_fact(text: str, _: list[str]) -> str:
  return _predicates(text)[_asked_relation(text)[1]]


def _extract_from_scene(text: str, _: list[str]) -> str:
  question = text.split(' . ')[-1].split()
  known = lexicon.THINGS
  if {'man', 'he'} & set(question):
    known = lexicon.MEN
  elif {'woman', 'she'} & set(question):
    known = lexicon.WOMEN
  elif {'city', 'where'} & set(question):
    known = lexicon.CITIES
  return _only(_words(text, known))


def _recall(text: str, _: list[str]) -> str:
  asked = _asked_relation(text)
  return _only(f.value for f in world.FACTS if f[:2] == asked)


def _sentiment_label(text: str, _: list[str]) -> str:
  return 'positive' if _is_positive(text) else 'negative'


def _sentiment_yes_no(text: str, options: list[str]) -> str:
  del options
  passage, _, question = text.rpartition(' . ')
  asks_bad = bool({'negative', 'bad', 'unhappy'} & set(question.split()))
  return _yes_no(_is_positive(passage.rpartition(' . ')[2]) != asks_bad)


def _topic_label(text: str, _: list[str]) -> str:
  return _only(_topics(text))


def _topic_choice(text: str, options: list[str]) -> str:
  if set(options) <= {'yes', 'no'}:
    return _yes_no(set(_words(text, lexicon.TOPICS)) == _topics(text))
  return _only(_topics(text))


def _paraphrase(text: str, _: list[str]) -> str:
  return _yes_no(_same_meaning(text))


def _describe_attributes(text: str, _: list[str]) -> str:
  (name,) = re.findall(r'name : (\w+)', text)
  keys = '|'.join(lexicon.RELATIONS)
  rest = re.findall(rf'({keys}) : (\w+)', text)
  said = [f'{lexicon.RELATIONS[key].predicate} {value}' for key, value in rest]
  return f'{name} {" and ".join(said)}'


def _sentence_of_keywords(text: str, _: list[str]) -> str:
  name, verb, one, two = re.findall(r'(\w+) , (\w+) , (\w+) , (\w+)', text)[0]
  return f'{name} {verb} the {one} with the {two}'


def _headline(text: str, _: list[str]) -> str:
  name, verb, *rest = [
    word for word in text.split() if word in lexicon.PEOPLE or word in _RELATED
  ]
  return f'{name} {verb} the {rest[0]}'


def _note_about_person(text: str, _: list[str]) -> str:
  *_, name = _words(text, lexicon.VISITORS)
  ((relation, value),) = _predicates(text).items()
  return f'{name} {lexicon.RELATIONS[relation].predicate} {value}'


def _end_of_reason(text: str, options: list[str]) -> str:
  return _only(o for o in options if _is_positive(o) == _is_positive(text))


def _end_of_story(text: str, options: list[str]) -> str:
  return _only(o for o in options if _topics(o) == _topics(text))


def _entailment_of_gist(text: str, options: list[str]) -> str:
  del options
  premise, _, claim = text.rpartition(' . ')
  if topics := _words(claim, lexicon.TOPICS):
    return _yes_no(set(topics) == _topics(premise))
  claims_bad = bool({'bad', 'negative'} & set(claim.split()))
  return _yes_no(_is_positive(premise) != claims_bad)


def _who(text: str, options: list[str]) -> str:
  he = 'he' in text.split()
  return _only(o for o in options if (o in lexicon.MEN) == he)


def _sense_of_word(text: str, _: list[str]) -> str:
  return _only(_topics(text))


def _polarity_of_word(text: str, options: list[str]) -> str:
  positive = _is_positive(text)
  if 'negative' in options:
    return 'positive' if positive else 'negative'
  return _yes_no(positive == bool({'good', 'positive'} & set(text.split())))


def _gender_of_name(text: str, options: list[str]) -> str:
  (name,) = _words(text, lexicon.PEOPLE)
  noun, pronoun = ('man', 'he') if name in lexicon.MEN else ('woman', 'she')
  if 'he' in options or 'man' in options:
    return _only({noun, pronoun} & set(options))
  return _yes_no(noun in text.split())


def _pick_kind(text: str, options: list[str]) -> str:
  return _only(o for o in options if _KIND[o] == text.split()[-1])


def _is_synonym(text: str, _: list[str]) -> str:
  one, two = re.findall(r'words : (\w+) , (\w+)', text)[0]
  return _yes_no(two in _MEANING[one])


def _give_synonym(text: str, _: list[str]) -> str:
  (word,) = _words(text, _MEANING)
  return _only(set(_MEANING[word]) - {word})


def _lists(text: str) -> list[list[str]]:
  return [
    items.strip().split(' , ')
    for items in re.findall(r'list : ([^.]*?)(?: \.|$)', text)
  ]


def _is_in_list(text: str, _: list[str]) -> str:
  (words,) = _lists(text)
  return _yes_no(re.findall(r'is (\w+) in the list', text)[0] in words)


def _word_at_position(text: str, _: list[str]) -> str:
  (words,) = _lists(text)
  place = re.findall(r'what is the (\w+) word', text)[0]
  return words[('first', 'second', 'last').index(place)]


def _kind_of_word(text: str, options: list[str]) -> str:
  (word,) = _words(text, _KIND)
  if set(options) & set(lexicon.RELATIONS):
    return _KIND[word]
  return _yes_no(text.split()[-1] == _KIND[word])


def _find_kind(text: str, _: list[str]) -> str:
  (words,) = _lists(text)
  question = text.split(' . ')[-1].split()
  return _only(word for word in words if _KIND[word] in question)


def _copy_words(text: str, _: list[str]) -> str:
  return ' , '.join(_lists(text)[0])


def _shared_word(text: str, _: list[str]) -> str:
  one, two = _lists(text)
  return _only(set(one) & set(two))


def _same_words(text: str, _: list[str]) -> str:
  one, two = _lists(text)
  return _yes_no(set(one) == set(two))


_READERS: dict[str, Callable[[str, list[str]], str]] = {
  'choose_by_topic': _choose_by_topic,
  'choose_by_meaning': _choose_by_meaning,
  'extract_fact': _extract_fact,
  'extract_from_scene': _extract_from_scene,
  'recall_place': _recall,
  'recall_taste': _recall,
  'sentiment_label': _sentiment_label,
  'sentiment_yes_no': _sentiment_yes_no,
  'topic_label': _topic_label,
  'topic_choice': _topic_choice,
  'describe_attributes': _describe_attributes,
  'sentence_of_keywords': _sentence_of_keywords,
  'headline': _headline,
  'note_about_person': _note_about_person,
  'paraphrase_of_sentence': _paraphrase,
  'paraphrase_of_question': _paraphrase,
  'end_of_story': _end_of_story,
  'end_of_reason': _end_of_reason,
  'entailment_of_words': _paraphrase,
  'entailment_of_gist': _entailment_of_gist,
  'who_in_a_reason': _who,
  'who_acted': _who,
  'sense_of_word': _sense_of_word,
  'polarity_of_word': _polarity_of_word,
  'gender_of_name': _gender_of_name,
  'pick_kind': _pick_kind,
  'is_synonym': _is_synonym,
  'give_synonym': _give_synonym,
  'is_in_list': _is_in_list,
  'word_at_position': _word_at_position,
  'kind_of_word': _kind_of_word,
  'find_kind': _find_kind,
  'copy_words': _copy_words,
  'shared_word': _shared_word,
  'same_words': _same_words,
}
