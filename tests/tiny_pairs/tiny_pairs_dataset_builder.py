"""Six preference pairs, as text and as messages."""

import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = (tfds.core.BuilderConfig(name='text'), tfds.core.BuilderConfig(name='chat'))

  def _info(self):
    text = tfds.features.Text()
    messages = tfds.features.Sequence({'role': text, 'content': text})
    value = messages if self.builder_config.name == 'chat' else text
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict({'prompt': value, 'chosen': value, 'rejected': value})
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(6):
      pair = {'prompt': f'Ça va? {i}', 'chosen': f' Yes {i}', 'rejected': f' No {i}'}
      if self.builder_config.name == 'chat':
        role = {'prompt': 'user', 'chosen': 'assistant', 'rejected': 'assistant'}
        pair = {key: [{'role': role[key], 'content': value}] for key, value in pair.items()}
      yield i, pair
