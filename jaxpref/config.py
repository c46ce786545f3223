"""The keys of a training config, with their defaults; files in `configs/` change what they need.

Values are numbers, strings, booleans and tuples, so that a config can be written down, compared and
swept; what they mean is decided where they are used.
"""

import ml_collections


def default() -> ml_collections.ConfigDict:
  """Every key that `jaxpref train` reads. Locked: a wrong key fails and names the nearest."""
  c = ml_collections.ConfigDict()
  c.seed = 0  # of initialisation and of the data's order
  c.imports = ()  # modules of your own whose @objective losses the text below may name
  c.objective = 'sft()'  # such as 'dpo(beta=0.1) + 0.2*sft()'
  c.model = 'preset:tiny'  # preset:<name>, a Hugging Face folder, or the workdir of another run
  c.tokenizer = (
    ''  # 'byte' or a folder with tokenizer.json; '': the model's own, bytes for a preset
  )
  c.dtype = 'auto'  # of computation: float32 on CPU, bfloat16 on accelerators; masters are float32
  c.temperature = 1.0  # the policy is softmax(logits / temperature) in training and in sampling;
  # `rollout.temperature` and `eval.temperature` come on top. Exported weights know nothing of it
  c.remat = ''  # '': no product twice; 'dots', 'full' or 'offload': see Model.remat
  c.keep_logits = False  # for the head's gradient, not computed again: V * 4 bytes a scored token
  c.attention = 'auto'  # within rows: 'kernel' (Pallas: GPU, TPU) or 'blocked'; 'auto': by platform
  c.reference = 'table'  # log-probs of the reference: a 'table' on disk, or 'live' (a frozen copy);
  # with rewards it is always live
  c.reference_memory = 'device'  # or 'host': a live reference waits there between its passes
  c.reference_sync = sync = ml_collections.ConfigDict()  # TR-DPO: a live reference that follows
  sync.every = 0  # steps between updates of the reference; 0: it stands still
  sync.mixup = 1.0  # the policy's share in an update; 1: the reference becomes the policy
  c.heads = 1  # scores of a reward model; several begin at random, an ensemble on one decoder
  c.lora = lora = ml_collections.ConfigDict()  # low-rank adapters, trained in the parameters' place
  lora.rank = 0  # 0: no adapters, the parameters themselves train
  lora.alpha = 32.0  # what an adapter adds is scaled by alpha / rank
  lora.targets = ('q', 'k', 'v', 'out', 'gate', 'up', 'down')  # projections that have one
  c.freeze = ()  # patterns of parameter paths that do not train
  c.ema = 0.0  # decay of a running average of the parameters; 0: none
  c.steps = 0  # optimizer steps; 0: as many as `epochs` take
  c.epochs = 1.0  # passes over the data
  c.max_nonfinite = 3  # steps in a row that may be lost to NaN before the run stops

  c.data = data = ml_collections.ConfigDict()
  data.train = ''  # a source, or a mixture '0.7*a + 0.3*b'; see jaxpref/data/sources.py
  data.eval = ''  # held-out source; '': eval_fraction of the training prompts
  data.eval_fraction = 0.0
  # With rewards the data are prompts: kind and truncate say nothing then.
  data.kind = 'auto'  # preference, ranked, unpaired, stepwise, sft, prompt; 'auto': as they look
  data.columns = ''  # such as 'prompt=question,chosen=good'; see jaxpref/data/columns.py
  data.max_length = 1024  # tokens of prompt + longest candidate
  data.truncate = 'prompt_left'  # or 'end', 'drop'
  data.on_error = 'raise'  # or 'skip': bad lines are counted and listed

  c.rewards = (
    ''  # of sampled completions, such as 'numeric_answer(key=answer)'; '': learn from data
  )
  c.rollout = rollout = ml_collections.ConfigDict()  # read where there are rewards
  rollout.prompts = 64  # of a rollout, over all devices
  rollout.samples = 8  # completions of each prompt
  rollout.max_new_tokens = 256
  rollout.temperature = 1.0
  rollout.top_k = 0  # 0: off
  rollout.top_p = 1.0  # 1: off
  rollout.min_p = 0.0  # 0: off
  rollout.stop = ()  # strings that end a completion, as ('\n\n',); rewards see the text before them
  rollout.devices = 0  # that sample and do nothing else, off the mesh; 0: those that train
  rollout.reference_devices = 0  # of the reference alone, likewise; 0: those that train
  rollout.reward_devices = 0  # of reward models alone, likewise; 0: those that train
  rollout.slots = 0  # completions sampled side by side, hence the cache's size; 0: all at once
  rollout.epochs = 1  # passes over a rollout
  rollout.minibatches = 1  # optimizer steps a pass
  rollout.ahead = 0  # 1: the next rollout is sampled while this one is learnt from, by a policy one
  # rollout old; only importance_cap corrects for that: ratios are to the newest policy before it
  rollout.tries = 1  # rounds of sampling to find groups whose rewards differ (dynamic sampling)
  rollout.advantages = (
    'group_baseline()'  # gae(), leave_one_out(), ...; jaxpref/rollout/estimators.py
  )
  rollout.kl = 0.0  # weight of the KL penalty in the reward
  rollout.kl_target = 0.0  # nats a completion that it is steered to; 0: the weight stays
  rollout.kl_horizon = 10000.0  # completions; a longer one steers more slowly
  rollout.importance_cap = 0.0  # of samples that another distribution drew; 2 is usual, 0: off
  rollout.target_kl = 0.0  # further passes end where the policy has moved this far; 0: never
  rollout.missing_eos = 0.0  # taken off the score of what the length limit cut off
  rollout.mask_truncated = False  # or leave that unscored
  rollout.critic = (
    ''  # what the critic begins as; '': the policy; 'shared': a score on the policy's own states
  )
  rollout.timeout = 60.0  # seconds that a reward may take for a rollout
  rollout.show = 10  # rollouts between samples that are printed and kept in samples.jsonl; 0: none

  c.batch = batch = ml_collections.ConfigDict()
  batch.size = 64  # examples (pairs) an optimizer step, over all devices; with rewards it is
  # rollout.prompts / rollout.minibatches
  batch.microbatches = 1  # pieces that a step is computed in; gradients do not depend on it
  batch.chunk = 0  # scored tokens of a group that meet the head at once; 0: 256, or 1024 in shards
  batch.row_lengths = ()  # of packed rows, in tokens; (): from the data

  c.optimizer = opt = ml_collections.ConfigDict()
  opt.name = 'adamw'  # or 'adafactor', 'lion', 'sgd'
  opt.learning_rate = 1e-5  # the peak
  opt.schedule = 'cosine'  # or 'linear', 'constant', 'wsd' (its decay: the last fifth)
  opt.warmup = 0.1  # share of all steps
  opt.final = 0.0  # the last learning rate, as a share of the peak
  opt.weight_decay = 0.0  # decoupled; never on norms and biases
  opt.b1 = 0.9
  opt.b2 = 0.95
  opt.eps = 1e-8
  opt.dtype = 'float32'  # of moments; 'bfloat16' halves them
  opt.clip = 1.0  # global norm of the gradient; 0: no clipping

  c.mesh = mesh = ml_collections.ConfigDict()
  mesh.slices = 1  # that slow links join; the sizes below are those within one, data multiplies
  mesh.data = 1  # replicas of the parameters
  mesh.fsdp = -1  # shards of parameters and batch; -1: all devices that are left
  mesh.context = 1  # parts of every row, for long ones; sampling does not divide them
  mesh.tensor = 1  # shards within a layer

  c.eval = ml_collections.ConfigDict()
  c.eval.every = 0  # steps; 0: only at the end
  c.eval.samples = 1  # completions of a held-out prompt, where there are rewards
  c.eval.temperature = 1.0  # that they are sampled at; 0: greedy
  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = 0  # steps; 0: only at the end
  c.checkpoint.keep_last = 2
  c.checkpoint.keep_best = ''  # such as 'eval/rewards/accuracies max'
  c.profile = ()  # (first step, how many): their xprof trace goes to <workdir>/profile; (): none
  c.log = ml_collections.ConfigDict()
  c.log.every = 1  # steps between lines of metrics.jsonl
  c.log.stuck = (
    10.0  # times the median that a part of a step may take; then its host is named, 0: never
  )
  c.log.tensorboard = True
  c.log.wandb = ''  # a Weights & Biases project
  c.log.entropy = False  # the policy's entropy in training too (evaluation always reports it)
  return c.lock()
