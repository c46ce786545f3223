"""TRL's side of the bench, run by the Python of its own environment: `trl_worker.py job.json`.

A job is a JSON object: task, model (a Hugging Face folder), pairs (lists of token ids: prompt,
chosen, rejected; of KTO prompt, completion, other, and a label), batch, max_length, steps, dtype,
optimizer, beta, reference ('live' or 'table'), and for samples: prompts, samples, new_tokens,
max_prompt, kl.
"""

import json
import os
import sys
import tempfile

os.environ.setdefault('TQDM_DISABLE', '1')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('HF_DATASETS_CACHE', tempfile.mkdtemp())  # tables are built, not found

import protocol
import torch
import transformers
import trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import SequentialSampler

PAD, EOS = 0, 1


def words(vocab_size):
  """A tokenizer whose token i is the word 't<i>'."""
  vocab = {f't{i}': i for i in range(vocab_size)}
  inner = Tokenizer(models.WordLevel(vocab, unk_token=f't{vocab_size - 1}'))
  inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, pad_token=f't{PAD}', eos_token=f't{EOS}', unk_token=f't{vocab_size - 1}'
  )


class Turns(transformers.TrainerCallback):
  """Lets a trainer's own loop take as many steps as are asked for, and waits in between."""

  def __init__(self):
    self.losses, self.notes, self.left, self.clock = [], {}, 0, None

  def on_train_begin(self, args, state, control, **_):
    ready()
    self._wait(control)

  def on_step_end(self, args, state, control, **_):
    self.left -= 1
    if not self.left:
      losses = [float(loss) for loss in self.losses]
      taken = self.clock.read()
      protocol.say(steps=len(losses), losses=losses, peak_gib=held(), **taken, **self.notes)
      self._wait(control)

  def _wait(self, control):
    count = protocol.asked()
    if count is None:
      control.should_training_stop = True
      return
    self.losses, self.left, self.clock = [], count, protocol.Clock()


def ready():
  versions = protocol.versions('trl', 'torch', 'transformers')
  protocol.say(versions=versions, device=device())


def device():
  return torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'


def held():
  """Of the GPU where there is one."""
  if torch.cuda.is_available():
    return torch.cuda.max_memory_allocated() / 2**30
  return protocol.peak_gib()


def watched(trainer_class, turns, **methods):
  """The trainer, its losses kept, in the data's order."""

  def compute_loss(self, *args, **kwargs):
    found = trainer_class.compute_loss(self, *args, **kwargs)
    turns.losses.append((found[0] if isinstance(found, tuple) else found).detach())
    return found

  return type(trainer_class.__name__, (trainer_class,), {'compute_loss': compute_loss, **methods})


def settings(job):
  optimizer = job['optimizer']
  return {
    'output_dir': tempfile.mkdtemp(),
    'per_device_train_batch_size': job['batch'],
    'max_steps': job['steps'],
    'learning_rate': optimizer['learning_rate'],
    'weight_decay': optimizer['weight_decay'],
    'adam_beta1': optimizer['b1'],
    'adam_beta2': optimizer['b2'],
    'adam_epsilon': optimizer['eps'],
    'max_grad_norm': optimizer['clip'],
    'lr_scheduler_type': 'constant',
    'gradient_checkpointing': False,  # its fastest
    'bf16': job['dtype'] == 'bfloat16',
    'logging_steps': 10**9,
    'save_strategy': 'no',
    'report_to': 'none',
    'disable_tqdm': True,
    'seed': 0,
  }


def in_order(self, *_):
  return SequentialSampler(self.train_dataset)


def as_is(self, dataset, *_args, **_kwargs):
  return dataset


GIVEN = {'_prepare_dataset': as_is, '_get_train_sampler': in_order}  # token ids, in their order


def load(job, kind=transformers.AutoModelForCausalLM, **more):
  return kind.from_pretrained(job['model'], dtype=torch.float32, **more)


def trainer_of(kind, turns, model, args, rows, **more):
  return kind(
    model=model,
    args=args,
    train_dataset=Dataset.from_list(rows),
    processing_class=words(model.config.vocab_size),
    callbacks=[turns],
    **more,
  )


def referring(trainer_class, config_class, job, turns, rows):
  """The trainer of a loss with a reference, in the step or from a table built here."""
  table = job['reference'] == 'table'
  args = config_class(
    beta=job['beta'], max_length=job['max_length'], precompute_ref_log_probs=table, **settings(job)
  )
  kind, model = watched(trainer_class, turns, **GIVEN), load(job)
  clock = protocol.Clock()
  trainer = trainer_of(kind, turns, model, args, rows, ref_model=None if table else load(job))
  if table:
    turns.notes['table_seconds'] = clock.read()['seconds']
  return trainer


def train(trainer, turns):
  clip = trainer.accelerator.clip_grad_norm_

  def noted(*args, **kwargs):
    norm = clip(*args, **kwargs)
    turns.notes.setdefault('grad_norm', float(norm))
    return norm

  trainer.accelerator.clip_grad_norm_ = noted
  trainer.train()


def dpo_trainer(job, turns):
  parts = ('prompt', 'chosen', 'rejected')
  rows = [{f'{part}_ids': pair[part] for part in parts} for pair in job['pairs']]
  return referring(trl.DPOTrainer, trl.DPOConfig, job, turns, rows)


def dpo(job):
  turns = Turns()
  train(dpo_trainer(job, turns), turns)


def kto(job):
  turns = Turns()
  rows = [
    {
      'prompt_ids': one['prompt'],
      'completion_ids': one['completion'],
      'KL_completion_ids': one['other'],
      'label': one['label'],
    }
    for one in job['pairs']
  ]
  train(referring(trl.KTOTrainer, trl.KTOConfig, job, turns, rows), turns)


def logprobs(job):
  turns = Turns()
  trainer = dpo_trainer({**job, 'reference': 'live'}, turns)
  trainer.model.eval()
  batches = iter(trainer.get_train_dataloader())

  def step():
    with torch.no_grad():
      found = trainer.compute_ref_log_probs(trainer.model, next(batches))
    return float(sum(x.sum() for x in found))

  ready()
  protocol.serve(step, {}, held)


def sft(job):
  turns = Turns()
  rows = [
    {
      'input_ids': pair['prompt'] + pair['chosen'],
      'labels': [-100] * len(pair['prompt']) + pair['chosen'],
    }
    for pair in job['pairs']
  ]
  args = trl.SFTConfig(
    max_length=job['max_length'],
    dataset_kwargs={'skip_prepare_dataset': True},
    **settings(job),
  )
  kind = watched(trl.SFTTrainer, turns, _get_train_sampler=in_order)
  train(trainer_of(kind, turns, load(job), args, rows), turns)


def reward(job):
  turns = Turns()
  model = load(job, transformers.AutoModelForSequenceClassification, num_labels=1)
  model.config.pad_token_id = PAD
  rows = [
    {f'{part}_ids': pair['prompt'] + pair[part] for part in ('chosen', 'rejected')}
    for pair in job['pairs']
  ]
  args = trl.RewardConfig(max_length=job['max_length'], **settings(job))
  kind = watched(trl.RewardTrainer, turns, **GIVEN)
  train(trainer_of(kind, turns, model, args, rows), turns)


def variety(completions, **_):
  return protocol.variety(completions)


def grpo(job):
  turns = Turns()
  texts = [protocol.spelt(pair['prompt'][-job['max_prompt'] :]) for pair in job['pairs']]
  own = settings(job) | {'per_device_train_batch_size': job['prompts'] * job['samples']}
  args = trl.GRPOConfig(
    num_generations=job['samples'],
    max_completion_length=job['new_tokens'],
    beta=job['kl'],
    loss_type='grpo',
    temperature=1.0,
    shuffle_dataset=False,
    # No completion ends before its last token.
    generation_kwargs={'min_new_tokens': job['new_tokens']},
    **own,
  )
  kind = watched(trl.GRPOTrainer, turns)
  rows = [{'prompt': text} for text in texts]
  train(trainer_of(kind, turns, load(job), args, rows, reward_funcs=variety), turns)


def decode(job):
  model = load(job).eval()
  if torch.cuda.is_available():
    model = model.cuda()
  if job['dtype'] == 'bfloat16':
    model = model.bfloat16()
  prompts = [pair['prompt'][-job['max_prompt'] :] for pair in job['pairs']]
  size = job['prompts']
  count = 0

  def step():
    nonlocal count
    own = [p for p in prompts[count * size : (count + 1) * size] for _ in range(job['samples'])]
    count += 1
    width = max(map(len, own))
    tokens = torch.tensor([[PAD] * (width - len(p)) + p for p in own], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in own], device=model.device)
    with torch.no_grad():
      model.generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=job['new_tokens'],
        min_new_tokens=job['new_tokens'],
        pad_token_id=PAD,
        eos_token_id=EOS,
      )

  ready()
  protocol.serve(step, {}, held)


TASKS = {
  'dpo': dpo,
  'kto': kto,
  'sft': sft,
  'reward': reward,
  'grpo': grpo,
  'decode': decode,
  'logprobs': logprobs,
}

if __name__ == '__main__':
  transformers.logging.set_verbosity_error()
  disable_progress_bars()
  with open(sys.argv[1], encoding='utf-8') as file:
    JOB = json.load(file)
  TASKS[JOB['task']](JOB)
