"""What TRL's trainers call things, and what says the same here.

Read from TRL 1.16 (and 0.x and 1.9 for what has since been removed: BCO and process rewards).
Expressions are parsed in tests/test_setup_docs.py, so none can go stale.
"""

from typing import NamedTuple


class Option(NamedTuple):
  """`flag` of a trainer, and our `expression` (an objective), or a config `setting`, or neither.

  `note` says what differs, or why there is nothing.
  """

  flag: str
  expression: str = ''
  setting: str = ''
  note: str = ''


_BIAS_CORRECTED = 'grpo() + 0.04*weighted_kl(reduce=sequence_mean)'
TRAINERS: dict[str, tuple[Option, ...]] = {
  'DPOTrainer': (
    Option("loss_type='sigmoid', beta=0.1", 'dpo(beta=0.1)'),
    Option(
      "loss_type='sigmoid', label_smoothing=0.1",
      'dpo(beta=0.1, label_smoothing=0.1)',
      note='TRL 1.16 ignores label_smoothing here; ours is cDPO',
    ),
    Option("loss_type='hinge'", 'hinge(beta=0.1)'),
    Option("loss_type='ipo'", 'ipo(beta=0.1, score=per_token)', note='length-averaged, as TRL'),
    Option("(the paper's IPO)", 'ipo(beta=0.1)', note='summed log-ratios, eq. 17'),
    Option("loss_type='exo_pair', label_smoothing=0.001", 'exo(beta=0.1, label_smoothing=0.001)'),
    Option("loss_type='nca_pair'", 'nca(beta=0.1)'),
    Option("loss_type='robust', label_smoothing=0.1", 'robust_dpo(beta=0.1, label_smoothing=0.1)'),
    Option("loss_type='bco_pair'", 'bco_pair(beta=0.1)', note='without the running shift, as TRL'),
    Option("(the paper's BCO on pairs)", 'bco(beta=0.1)', note='with its running shift'),
    Option("loss_type='sppo_hard'", 'sppo(beta=0.1)'),
    Option("loss_type='aot'", 'aot(beta=0.1)', note='sorted over the global batch'),
    Option(
      "loss_type='aot_unpaired'", 'aot_unpaired(beta=0.1)', note='sorted over the global batch'
    ),
    Option("loss_type='apo_zero'", 'apo_zero(beta=0.1)'),
    Option("loss_type='apo_down'", 'apo_down(beta=0.1)'),
    Option("loss_type='discopop', discopop_tau=0.05", 'discopop(beta=0.1, tau=0.05)'),
    Option("loss_type='sft'", 'sft()', note='token mean over the global batch'),
    Option("loss_type='sigmoid_norm'", 'sigmoid_norm(beta=0.1)'),
    Option(
      "loss_type=['sigmoid','bco_pair','sft'], loss_weights=[0.8,0.2,1.0]",
      '0.8*dpo(beta=0.1) + 0.2*bco_pair(beta=0.1) + sft()',
      note='MPO; any sum works',
    ),
    Option('rpo_alpha=1.0 (removed in TRL)', 'dpo(beta=0.1) + sft()'),
    Option('ld_alpha=0.5', 'ld_dpo(beta=0.1, alpha=0.5)'),
    Option("f_divergence_type='forward_kl'", 'dpo(beta=0.1, divergence=forward_kl)'),
    Option("f_divergence_type='js_divergence'", 'dpo(beta=0.1, divergence=js)'),
    Option(
      "f_divergence_type='alpha_divergence', f_alpha_divergence_coef=0.5",
      'dpo(beta=0.1, divergence=alpha(0.5))',
    ),
    Option('use_weighting=True', 'wpo(beta=0.1)'),
    Option(
      'precompute_ref_log_probs=True',
      setting="reference='table'",
      note='the default; kept for other betas, losses and seeds',
    ),
    Option('precompute_ref_log_probs=False', setting="reference='live'"),
    Option(
      'sync_ref_model=True, ref_model_mixup_alpha=0.6, ref_model_sync_steps=512',
      setting="reference='live', reference_sync.mixup=0.6, reference_sync.every=512",
    ),
    Option(
      'reference_free=True (removed in TRL)',
      'cpo(beta=0.1, alpha=0.0)',
      note='a uniform one',
    ),
    Option('router_aux_loss_coef=0.001', 'dpo(beta=0.1) + 0.001*router_balance()'),
    Option('max_length, truncation_mode', setting="data.max_length, data.truncate='end'"),
    Option('padding_free', note='rows are always packed; prompts are laid out once'),
    Option('disable_dropout', note='there is no dropout'),
  ),
  'KTOTrainer': (
    Option(
      'desirable_weight=1.0, undesirable_weight=1.0',
      'kto(beta=0.1, lambda_d=1.0, lambda_u=1.0)',
      note='z0 is the mean over the global batch, of one fixed derangement of the data',
    ),
    Option("loss_type='apo_zero_unpaired'", 'apo_zero_unpaired(beta=0.1)'),
    Option('paired data', setting="data.kind='unpaired'", note='a pair becomes two examples'),
  ),
  'CPOTrainer': (
    Option("loss_type='sigmoid', cpo_alpha=1.0", 'cpo(beta=0.1, alpha=1.0)'),
    Option("loss_type='simpo', simpo_gamma=0.5, cpo_alpha=0", 'simpo(beta=2.0, gamma=0.5)'),
    Option(
      "loss_type='simpo', cpo_alpha=1.0", 'simpo(beta=2.0, gamma=0.5) + sft()', note='CPO-SimPO'
    ),
    Option("loss_type='alphapo', alpha=0.25", 'alphapo(beta=2.0, gamma=0.5, alpha=0.25)'),
  ),
  'ORPOTrainer': (
    Option('beta=0.1', 'orpo(lambda_=0.1)', note='TRL counts the prompt in its NLL; ours does not'),
  ),
  'TPOTrainer': (
    Option(
      "beta=0.01, loss_type='sigmoid', tpo_alpha=1.0",
      'tpo(beta=0.01, gamma=0.0, alpha=1.0)',
      note='lists of three: reference, chosen, rejected',
    ),
    Option("loss_type='tpo-l', tpo_l_gamma=0.5", 'tpo(beta=0.01, gamma=0.5, score=per_token)'),
  ),
  'BCOTrainer (removed in 1.16)': (
    Option('beta=0.1', 'bco_unpaired(beta=0.1)'),
    Option('prompt_sample_size, min/max_density_ratio', note='put the density ratio into `weight`'),
  ),
  'RewardTrainer': (
    Option('(default)', 'bradley_terry()'),
    Option('center_rewards_coefficient=0.01', 'bradley_terry(centring=0.01)'),
    Option('a margin column', 'bradley_terry_margin()'),
  ),
  'PRMTrainer (removed in 1.16)': (Option('(default)', 'process_reward()'),),
  'SFTTrainer': (
    Option("loss_type='nll'", 'sft()'),
    Option("loss_type='dft'", 'dft()'),
    Option('packing, padding_free', note='always'),
    Option('completion_only_loss, assistant_only_loss', note='always; all of a text record'),
  ),
  'GRPOTrainer': (
    Option("loss_type='dapo' (default)", 'dapo(clip_high=0.2)', note="the paper's is dapo()"),
    Option("loss_type='grpo', beta=0.04", 'grpo() + 0.04*kl(reduce=sequence_mean)'),
    Option("loss_type='grpo', beta=0.04, use_bias_correction_kl", _BIAS_CORRECTED),
    Option("loss_type='bnpo'", 'ppo_clip()', note='over the global batch, not the microbatch'),
    Option("loss_type='dr_grpo', max_completion_length=256", 'dr_grpo(reduce=fixed_length(256))'),
    Option("loss_type='cispo', epsilon_high=5.0", 'cispo(clip_high=4.0)', note='ε, not the cap'),
    Option("loss_type='sapo'", 'sapo()'),
    Option("loss_type='luspo'", 'gspo(reduce=fixed_length(1))'),
    Option("importance_sampling_level='sequence', epsilon=3e-4, epsilon_high=4e-4", 'gspo()'),
    Option('epsilon=0.2, epsilon_high=0.28', 'grpo(clip_low=0.2, clip_high=0.28)'),
    Option('delta=3.0', 'grpo(dual_clip=3.0)'),
    Option('entropy_coef=0.001', 'grpo() + 0.001*entropy()'),
    Option('(GMPO)', 'gmpo()'),
    Option(
      'temperature=0.7', setting='temperature=0.7', note='of sampling and of the policy alike'
    ),
    Option('num_iterations=2', setting='rollout.epochs=2'),
    Option("scale_rewards='batch'", setting="rollout.advantages='group_baseline(scale=batch_std)'"),
    Option("scale_rewards='none'", setting="rollout.advantages='group_baseline(scale=no_scale)'"),
    Option('mask_truncated_completions=True', setting='rollout.mask_truncated=True'),
  ),
  'RLOOTrainer': (
    Option('(default)', 'rloo()', note='the KL penalty is in the reward'),
    Option("(the paper's RLOO)", 'reinforce()', note='without a ratio, one step a batch'),
  ),
  'PPOTrainer (removed in 1.16)': (
    Option('cliprange=0.2, vf_coef=0.1, cliprange_value=0.2', 'ppo_clip() + 0.1*value_loss()'),
  ),
}


def page() -> str:
  """The section of docs/losses.md."""
  out = [
    '## From TRL\n',
    "What TRL's trainers call it, and the objective (or config key) that says the same. Reductions",
    'are over the global batch, whatever the microbatches and devices.\n',
  ]
  for trainer, options in TRAINERS.items():
    out.append(f'### {trainer}\n\n| TRL | jaxpref | note |\n|---|---|---|')
    for option in options:
      ours = option.expression or option.setting
      out.append(f'| `{option.flag}` | {f"`{ours}`" if ours else "-"} | {option.note} |')
    out.append('')
  return '\n'.join(out)
