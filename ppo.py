"""PPO from human feedback for a language model, in one file to read, edit and run.

    4 models   actor    pi_theta  writes the responses                  trained by the policy loss
               critic   V         predicts the reward still to come     trained by the value loss
               reward   score     judges a whole response               frozen
               ref      pi_ref    the actor as it was loaded            frozen, the anchor
    2 losses   policy loss (Eq. 5), value loss (Eq. 6)
    1 loop     samples = generate_samples(prompts, actor)             for each rollout
               experiences = generate_experiences(samples, models)    log-probs, values, scores, KL,
                                                                      rewards, advantages (GAE)
               train_step(minibatch, actor, critic)                   max_epochs times over it all

`python ppo.py` builds a small demo offline and trains it. For your own models edit the constants.
The README derives Eq. 1-12 in the order of this file and says what each curve means; "Trap n" is
row n of its table of the bugs that public code has. Helpers of sections 1-7 stand in 8-15.

Symbols, one letter one meaning:
    B rows (responses)   P width of prompts, padded left   T width of responses, padded right
    L = P + T            t = 0 .. T-1 an action, that is a response token, the end token included
    s_t the prompt and the first t response tokens   a_t response token t   V value   A advantage
    r_t reward of a token   score reward of a response   ratio pi / pi_old
"""

import contextlib
import copy
import datetime
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections import defaultdict
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from unittest.mock import Mock, patch  # patch.object: another attribute inside a `with`

import numpy
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn

# ---- 0. Constants: edit these ------------------------------------------------------------------

# Models: a folder or a hub id each. The demo's are built when they are not there.
actor_name = "demo/actor"       # the model to train; as loaded, it is the reference too
reward_name = "demo/reward"     # a sequence classifier with one output
critic_name = None              # None: the reward model's body where that fits, else the actor's
reward_fn = None                # in its place: reward_fn(prompts, responses, **columns) -> floats
gold_fn = None                  # same form; logged, never trained on: is the reward hacked?
lora_rank = 0                   # 0: all weights; 8 to 64: adapters (less memory; raise actor_lr)
gradient_checkpointing = False  # True: a third more time, far less memory
device = "cuda" if torch.cuda.is_available() else "cpu"
trust_remote_code = False       # True runs Python out of the model's folder: read it first

# Prompts: a list, a .txt (one a line) or a .jsonl (`prompt` or `messages`, columns for reward_fn)
prompts_file = "demo/prompts.txt"
eval_prompts_file = "demo/eval_prompts.txt"  # held out; None: no evaluation
apply_chat_template = True      # wrap what actor and reward model read in their own templates
max_length = 32                 # prompt tokens; longer prompts lose their beginning (you are told)

# Rollout: rollout_batch_size * n_samples_per_prompt rows. More rows, less noise, slower.
episodes = 6                    # passes over the prompts
rollout_batch_size = 64         # prompts
n_samples_per_prompt = 2        # responses to each: more tell luck from skill
micro_rollout_batch_size = 128  # rows per `generate`: as many as fit
max_new_tokens = 24
temperature = 1.0               # of sampling and of scoring alike (Trap 8)
missing_eos_penalty = 1.0       # taken off the score of a response that did not end; None: 0
truncated = "terminal"          # a cut response earns its score as it stands; "bootstrap": V(s_T)

# Learning
max_epochs = 4                  # passes over a rollout: more learn more, until most is clipped
train_batch_size = 64           # rows per optimizer step; divides the rows of a rollout
micro_train_batch_size = 64     # rows per forward and backward, and for scoring: the memory knob
actor_lr = 5e-4                 # 5e-7 to 1e-5 for real models
critic_lr = 1e-3                # 5e-6 to 1e-5 for real models
lr_schedule = "linear"          # down to 0; or "cosine", "constant"; each after the warm-up
warmup_steps = 0                # optimizer steps in which the rates rise from 0
weight_decay = 0.0
max_grad_norm = 1.0             # each trained model's gradient is clipped to this norm (Trap 27)
critic_warmup = 1               # first rollouts in which only the critic learns

# Losses
policy_loss = "clip"            # Eq. 5; "ppo1": Eq. 5c, a penalty holds KL(old, new) at target_kl
clip_eps = 0.2                  # room of the ratio on both sides: more room, larger steps
clip_eps_high = None            # room upwards, e.g. 0.28; None: clip_eps
dual_clip = None                # e.g. 3.0: bounds the loss of a bad token whose ratio ran away
value_clip_eps = None           # keeps V near the rollout's V; None: free
huber_delta = None              # errors of V beyond it count linearly; None: squared
loss_agg = "token-mean"         # or "seq-mean-token-mean", "seq-mean-token-sum" (Trap 18)
entropy_coef = 0.0              # above 0 rewards randomness, and costs a softmax
target_kl = None                # KL(old, new), nats a token: above it epochs end; PPO1 aims at it
gamma = 1.0                     # below 1 the first tokens see less of the score (Trap 4)
lambd = 0.95                    # GAE: 1 trusts the rewards (noise), 0 trusts the critic (bias)
whiten_advantages = True        # over the rollout, so that entropy_coef means the same at any scale

# KL and reward
kl_coef = 0.05                  # price of a nat of distance from the reference
kl_coef_start = None            # a higher one at the start, annealed in the first half of the run
kl_in = "reward"                # Eq. 8 with k1; "loss": k2 in the policy's loss
kl_target = None                # nats per response that an adaptive kl_coef aims at; None: fixed
kl_horizon = 10000              # rows over which kl_coef adapts
clip_reward = 10.0              # scores are cut at +- this: keep it wide (Trap 6); None: never
normalize_scores = False        # by mean and standard deviation of all scores so far
whiten_rewards = False          # token rewards to variance 1, mean kept

# Running
seed = 1
run_name = "demo"               # TensorBoard, checkpoints, best actor: runs/<run_name>
eval_every = 10                 # rollouts; 0: before and after only
save_every = 20                 # rollouts; 0: no checkpoint
keep_checkpoints = 2
resume = None                   # "latest", or the path of a checkpoint
self_check = "stop"             # checks before rollout 1; "warn": a failed one stops nothing; "off"
trace_every = 20                # rollouts between two responses shown token by token; 0: none

class InputError(ValueError):
    """Something that the user can mend: main prints it as one sentence, without a traceback."""

# ---- 1. Prompts --------------------------------------------------------------------------------

class PromptDataset(torch.utils.data.Dataset):
    """Items are dicts: `prompt` (a text or messages), `text` as the actor reads it, other columns.

    `truncated` counts the prompts of more than max_length tokens: they will lose their beginning.
    Raises InputError, with file and line, for what is no prompt."""

    def __init__(self, prompts, tokenizer, apply_chat_template, max_length):
        self.items, self.truncated = read_prompts(prompts), 0
        if apply_chat_template and not tokenizer.chat_template:
            raise InputError("actor_name has no chat template: set apply_chat_template = False")
        for n, item in enumerate(self.items, 1):
            item["text"] = item["prompt"]
            if apply_chat_template:
                item["text"] = apply_template(to_messages(item["prompt"], tokenizer), tokenizer,
                                              add_generation_prompt=True)
            elif not isinstance(item["prompt"], str):
                raise InputError(f"prompt {n} is messages: set apply_chat_template = True")
            ids = tokenizer(item["text"], add_special_tokens=not apply_chat_template)["input_ids"]
            if not ids:
                raise InputError(f"prompt {n} has no token: {item['text'][:50]!r}")
            self.truncated += len(ids) > max_length

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

# ---- 2. Four models ----------------------------------------------------------------------------
#
# How the tensors lie. One row with P = 4 (one pad) and T = 4, ended after three tokens:
#
#     column          0    1    2    3  |  4    5    6    7       column P + t holds a_t
#     seqs           pad   q0   q1   q2 |  a0   a1  eos  pad      the end token is an action: it has
#     attention_mask  0    1    1    1  |  1    1    1    0       the score and a gradient, by which
#     action_mask                       |  1    1    1    0       stopping is learnt (Traps 1, 2)
#     position_ids    0    0    1    2  |  3    4    5    5
#     predicts                       a0 |  a1  eos                log pi(a_t) and V(s_t) are read
#                                                                 one column left of a_t (Trap 3)
#
# Actor and reference are loaded twice from actor_name, the reward model from reward_name, in fp32
# with dropout off (load_model in section 8); the critic gets a body of its own.

def get_position_ids(attention_mask):
    """(B, L) -> (B, L), counted from the first real token. Without them left padding shifts learned
    positions (GPT-2: log-probs off by 0.2 to 5, Trap 11); rotary ones are right by luck."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

def autocast(model):
    """bf16 for the matrix products on a GPU. Weights stay fp32: in bf16 Adam's small steps would be
    rounded away (Trap 17)."""
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")

def compute_log_probs(model, seqs, attention_mask, num_actions, temperature=1.0,
                      with_entropy=False):
    """Eq. 3: log pi(a_t given s_t) = z[a_t] - logsumexp(z), z = (logits left of a_t) / temperature.

    (B, L) -> (B, T), T = num_actions; with_entropy: also the entropy of pi(. given s_t), (B, T).
    Logits are computed only where a response token is predicted, and only its log-prob is kept: at
    a vocabulary of 152k they are most of the memory (Trap 29). They come from the model's own
    forward: some models scale or cap them after the lm_head (Granite, Cohere, Gemma 2)."""
    with autocast(model):  # the last token predicts nothing that is needed
        logits = model(input_ids=seqs[:, :-1], attention_mask=attention_mask[:, :-1],
                       position_ids=get_position_ids(attention_mask[:, :-1]),
                       use_cache=False, logits_to_keep=num_actions).logits  # (B, T, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # for the softmax
    if temperature != 1.0:
        logits = logits / temperature
    actions = seqs[:, -num_actions:]
    losses = F.cross_entropy(logits.flatten(0, 1), actions.flatten(), reduction="none")
    log_probs = -losses.view_as(actions)
    if not with_entropy:
        return log_probs
    all_log_probs = logits.log_softmax(-1)
    return log_probs, -(all_log_probs.exp() * all_log_probs).sum(-1)

class Critic(nn.Module):
    """V(s_t): a decoder's body and one number per position, e.g. Critic(actor_model.base_model).

    The body is copied: one shared with the actor would be moved by two optimizers, each after the
    other's loss was computed (Trap 7). The head starts at 0: a random one would make the first
    advantages noise (Trap 5)."""

    def __init__(self, base_model):
        super().__init__()
        self.base_model = copy.deepcopy(base_model.base_model).requires_grad_(True)  # no lm_head
        hidden_size = base_model.get_input_embeddings().weight.shape[1]  # OPT's config has another
        self.value_head = nn.Linear(hidden_size, 1, device=base_model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, seqs, attention_mask, num_actions, with_last=False):
        """(B, L) -> V(s_0) .. V(s_{T-1}), (B, T); with_last: and V(s_T), (B, T + 1)."""
        if not with_last:
            seqs, attention_mask = seqs[:, :-1], attention_mask[:, :-1]
        with autocast(self):
            hidden = self.base_model(
                input_ids=seqs, attention_mask=attention_mask, use_cache=False,
                position_ids=get_position_ids(attention_mask)).last_hidden_state
        hidden = hidden[:, -(num_actions + with_last):].to(self.value_head.weight.dtype)
        return self.value_head(hidden).squeeze(-1).clone()  # no view, of which FSDP2 would warn

def make_critic(actor_model, reward_model):
    """The critic starts from the reward model's body, which knows good from bad, where it reads the
    same tokens (a decoder of one type, vocabulary and length); else from the actor's."""
    def kind(config):
        return [getattr(config, name, None)
                for name in ("model_type", "vocab_size", "max_position_embeddings")]

    fits = kind(actor_model.config) == kind(getattr(reward_model, "config", None))
    return Critic((reward_model if fits else actor_model).base_model).eval()

# ---- 3. Two losses -----------------------------------------------------------------------------

def compute_policy_loss(log_probs, old_log_probs, advantages, action_mask=None, clip_eps=0.2,
                        clip_eps_high=None, dual_clip=None, loss_agg="token-mean",
                        denominator=None):
    """Eq. 4, 5: ratio = exp(log_probs - old_log_probs); loss = -min(ratio A, clip(ratio) A), with
    clip to [1 - clip_eps, 1 + clip_eps_high]; where A < 0, at most -dual_clip A.

    (B, T) each -> scalar. clip_eps None: no clipping (PPO1); clip_eps_high None: as clip_eps;
    dual_clip: above 1. loss_agg: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum".
    denominator: the sum is divided by it; None: by the tokens of this call (for the last two, its
    rows). For a micro-batch, give the count of the whole step. ValueError: another loss_agg.
    Schulman et al. 2017 (arXiv 1707.06347), Eq. 6-7; dual clip: Ye et al. 2020 (1912.09729)."""
    mask = (torch.ones_like(log_probs) if action_mask is None else action_mask).bool()
    # Masked before exp: garbage on padding would become inf, and inf * 0 is NaN (Trap 22). Clamped
    # for the backward of a huge ratio: e^89 is inf in fp32; e^20 is far beyond every clip.
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0).clamp(max=20.0)
    advantages = advantages.masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    losses = -ratio * advantages
    if clip_eps is not None:
        high = clip_eps if clip_eps_high is None else clip_eps_high
        # The larger loss of two. With the clamp alone, or with one that forgets the ratio, a bad
        # token that became likelier would get no gradient (Trap 21).
        losses = torch.max(losses, -ratio.clamp(1 - clip_eps, 1 + high) * advantages)
    if dual_clip is not None:
        bounded = torch.min(losses, -dual_clip * advantages)
        losses = torch.where(advantages < 0, bounded, losses)
    if loss_agg not in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        raise ValueError(f"loss_agg is {loss_agg!r}: use token-mean, seq-mean-token-mean or -sum")
    if loss_agg == "seq-mean-token-mean":  # tokens of a short response weigh more (Trap 18)
        losses = losses / mask.sum(-1, keepdim=True).clamp(min=1)
    count = mask.sum() if loss_agg == "token-mean" else mask.any(-1).sum()
    return losses.sum() / (count.clamp(min=1) if denominator is None else denominator)

def compute_value_loss(values, old_values, returns, action_mask=None, clip_eps=None,
                       huber_delta=None, loss_agg="token-mean", denominator=None):
    """Eq. 6: e = V - return; loss = e^2 / 2, beyond |e| = d = huber_delta: d (|e| - d / 2).

    (B, T) each -> scalar. clip_eps: the larger of this loss and that of V kept within clip_eps of
    old_values. No further half, no coefficient: the critic has its own optimizer. loss_agg,
    denominator, ValueError: as in compute_policy_loss. Huber 1964; the clip is not Schulman's, it
    comes from OpenAI's baselines (ppo2): Engstrom et al. 2020 (arXiv 2005.12729)."""
    mask = (torch.ones_like(values) if action_mask is None else action_mask).bool()

    def error_loss(predicted):
        error = (predicted - returns).masked_fill(~mask, 0.0)
        if huber_delta is None:
            return error.square() / 2
        return F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=huber_delta)

    losses = error_loss(values)
    if clip_eps is not None:
        near_old = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
        losses = torch.max(losses, error_loss(near_old))
    if loss_agg not in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        raise ValueError(f"loss_agg is {loss_agg!r}: use token-mean, seq-mean-token-mean or -sum")
    if loss_agg == "seq-mean-token-mean":
        losses = losses / mask.sum(-1, keepdim=True).clamp(min=1)
    count = mask.sum() if loss_agg == "token-mean" else mask.any(-1).sum()
    return losses.sum() / (count.clamp(min=1) if denominator is None else denominator)

# ---- 4. What the losses need: KL, rewards, advantages and returns ------------------------------

def compute_approx_kl(log_probs, ref_log_probs, action_mask=None, kl_estimator="k1"):
    """Eq. 7: k1 = log pi - log pi_ref, k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1.

    (B, T) each -> (B, T), nats per token, 0 where the mask is 0. The first argument is the policy
    that sampled: only then are the means of k1 and k3 KL(pi, pi_ref). A token's k1 may be negative;
    a mean that stays so says that sampling and scoring differ (Trap 8). ValueError: another
    estimator. Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html)."""
    log_ratio = log_probs - ref_log_probs
    if action_mask is not None:
        log_ratio = log_ratio.masked_fill(~action_mask.bool(), 0.0)
    if kl_estimator == "k1":
        return log_ratio
    if kl_estimator == "k2":
        return log_ratio.square() / 2
    if kl_estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"kl_estimator is {kl_estimator!r}: use k1, k2 or k3")

def compute_rewards(kl, scores, action_mask, kl_coef, clip_reward=None):
    """Eq. 8: r_t = -kl_coef kl_t; the last real token gets the score too, clamped to +-clip_reward.

    kl (B, T), scores (B,), action_mask (B, T) -> (B, T), 0 where the mask is 0. kl is k1: as a
    reward its gradient is that of -KL; k3's can have the wrong sign (Trap 24). Ziegler et al.
    2019 (arXiv 1909.08593), Eq. 2."""
    mask = action_mask.bool()
    rewards = -kl_coef * kl.masked_fill(~mask, 0.0)
    if clip_reward is not None:  # wide: within +-0.2 all good answers are equal (Trap 6)
        scores = scores.clamp(-clip_reward, clip_reward)
    # Each row's own last token, not the last column: there a short row has padding (Traps 1, 23).
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    return rewards + scores.to(rewards.dtype).reshape(len(mask), 1).where(is_last, 0.0)

def get_advantages_and_returns(values, rewards, action_mask, gamma, lambd, last_values=None,
                               dones=None):
    """Eq. 9: delta_t = r_t + gamma V(s_{t+1}) - V(s_t);
    Eq. 10, 11: A_t = delta_t + gamma lambd A_{t+1}; return_t = A_t + V(s_t).

    (B, T) each -> (advantages, returns), (B, T), detached, 0 where the mask is 0 (None: all real).
    After a row's last real token V is last_values (B,); by default 0, for the response has ended.
    dones (B, T): episodes inside a row, as in a simulator; nothing flows back across one.
    Schulman et al. 2016 (arXiv 1506.02438), section 3."""
    mask = (torch.ones_like(values) if action_mask is None else action_mask).bool()
    values, rewards = values.masked_fill(~mask, 0.0), rewards.masked_fill(~mask, 0.0)
    dones = torch.zeros_like(mask) if dones is None else dones.bool() & mask
    lastgaelam = torch.zeros_like(values[:, 0])
    nextvalues = lastgaelam if last_values is None else last_values.to(values.dtype)
    advantages_reversed = []
    for t in reversed(range(values.shape[1])):
        nextvalues = nextvalues.masked_fill(dones[:, t], 0.0)
        lastgaelam = lastgaelam.masked_fill(dones[:, t], 0.0)
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        # Padding hands on what comes from its right: each row starts at its own last token.
        lastgaelam = torch.where(mask[:, t], delta + gamma * lambd * lastgaelam, lastgaelam)
        nextvalues = torch.where(mask[:, t], values[:, t], nextvalues)
        advantages_reversed.append(lastgaelam)
    advantages = torch.stack(advantages_reversed[::-1], dim=1).masked_fill(~mask, 0.0)
    return advantages.detach(), (advantages + values).detach()

def whiten(values, mask, shift_mean=True):
    """Variance 1 (unbiased) and mean 0 (shift_mean=False: the mean it had) over the entries where
    the mask is 1; the others become 0. Any shape -> the same; finite also for equal entries or a
    single one. Whiten a whole rollout: by micro-batches it would change what is learnt. Ziegler et
    al. 2019, in their code."""
    mask = mask.bool()
    count = mask.sum()
    mean = values.masked_fill(~mask, 0.0).sum() / count.clamp(min=1)
    centred = (values - mean).masked_fill(~mask, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    whitened = centred * (variance + max(1e-8, torch.finfo(variance.dtype).tiny)).rsqrt()
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)

def anneal_kl_coef(fraction, kl_coef, kl_coef_start):
    """kl_coef at a fraction 0 .. 1 of the run: geometric from kl_coef_start to kl_coef in the first
    half. A strong anchor at first keeps alive responses that turn out to be good later."""
    return kl_coef_start * (kl_coef / kl_coef_start) ** min(1.0, 2 * fraction)

def adapt_kl_coef(kl_coef, kl, kl_target, rows, kl_horizon):
    """Up if kl, nats a response, is above kl_target. Ziegler et al. 2019, section 2.2 and code."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(rows / kl_horizon, 1))

def adapt_ppo1_beta(ppo1_beta, kl, target_kl):
    """The coefficient of PPO1's penalty, from KL(old, new). Schulman et al. 2017, section 4."""
    factor = 0.5 if kl < target_kl / 1.5 else 2.0 if kl > target_kl * 1.5 else 1.0
    return ppo1_beta * factor

# ---- 5. What flows between ---------------------------------------------------------------------

@dataclass
class Samples:
    """A batch out of `generate`, still padded."""
    seqs: torch.Tensor            # (B, L) tokens of prompt and response
    attention_mask: torch.Tensor  # (B, L) 1 on real tokens
    action_mask: torch.Tensor     # (B, T) 1 on real response tokens, the end token included
    num_actions: int              # T
    ended: torch.Tensor           # (B,)   an end token was sampled
    items: list                   # B items of the PromptDataset
    responses: list               # B texts

@dataclass
class Experience:
    """In the buffer one row, without B and padding; as it comes from collate_fn a padded batch."""
    seqs: torch.Tensor                         # (B, L)
    attention_mask: torch.Tensor               # (B, L)
    action_mask: torch.Tensor                  # (B, T)
    info: dict = None                          # item, response, ended, raw_score
    old_action_log_probs: torch.Tensor = None  # (B, T) log pi_old(a_t given s_t): the sampler
    ref_action_log_probs: torch.Tensor = None  # (B, T) log pi_ref(a_t given s_t)
    values: torch.Tensor = None                # (B, T) V_old(s_t)
    last_values: torch.Tensor = None           # (B,)   after the last token: 0, or V_old(s_T)
    kl: torch.Tensor = None                    # (B, T) k1 of (pi_old, pi_ref)
    scores: torch.Tensor = None                # (B,)   as Eq. 8 takes them
    rewards: torch.Tensor = None               # (B, T) r_t
    advantages: torch.Tensor = None            # (B, T) A_t
    returns: torch.Tensor = None               # (B, T) return_t

def collate_fn(rows):
    """Rows -> one Experience, padded with zeros: prompts on the left, responses on the right. Masks
    are padded with zeros too, and where a mask is 0 nothing counts."""
    T = max(len(row.action_mask) for row in rows)
    P = max(len(row.seqs) - len(row.action_mask) for row in rows)

    def pad(name):
        parts = [getattr(row, name) for row in rows]
        if not isinstance(parts[0], torch.Tensor):
            return parts
        if parts[0].dim() == 0:
            return torch.stack(parts)
        whole = name in ("seqs", "attention_mask")  # prompt and response, not the response alone
        batch = parts[0].new_zeros(len(rows), P + T if whole else T)
        for line, part, row in zip(batch, parts, rows):
            start = P + len(row.action_mask) - len(row.seqs) if whole else 0
            line[start:start + len(part)] = part
        return batch

    return Experience(**{f.name: pad(f.name) for f in fields(Experience)})

def split_by_length(rows, size):
    """Lists of `size` rows of similar length, so that little of a micro-batch is padding. The
    longest come first: what does not fit into memory fails at once."""
    rows = sorted(rows, key=lambda row: -len(row.seqs))
    return [rows[i:i + size] for i in range(0, len(rows), size)]

@dataclass
class ExperienceBuffer:
    """The rows of one rollout. Rows, not micro-batches: a batch of 2 is 2 rows (Trap 15)."""
    rows: list = field(default_factory=list)

    def append(self, experiences):
        self.rows.extend(experiences)

    def clear(self):
        self.rows.clear()

    def minibatches(self, size, generator=None):
        """A new random order, in lists of `size` rows; the last may be shorter."""
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        return [[self.rows[i] for i in order[k:k + size]] for k in range(0, len(order), size)]

# ---- 6. Prompts to experience ------------------------------------------------------------------

def get_end_tokens(model, tokenizer):
    """Ids that end a response: the model's own (chat models have several) and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return sorted({*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None})

def get_action_mask(responses, end_tokens):
    """(B, T) ids -> (B, T), 1 up to and including the first end token. By position: padding may be
    spelled like an end token, and a pad token may be sampled (Trap 9). An empty answer is one
    action, its end token (Trap 10)."""
    is_end = torch.isin(responses, torch.tensor(end_tokens, device=responses.device)).long()
    return (is_end.cumsum(-1) - is_end == 0).long()

def plain_sampling(model, end_tokens, pad_token_id, temperature, max_new_tokens):
    """Inside, `generate` samples from softmax(logits / temperature) and nothing else. The model's
    own config is replaced, for `generate` takes from it what a config passed in leaves open. top_k
    is set to 0, for unset it is 50. Otherwise KL to the reference turns negative (Trap 8)."""
    return patch.object(model, "generation_config", transformers.GenerationConfig(
        do_sample=True, temperature=float(temperature), top_k=0, top_p=1.0, repetition_penalty=1.0,
        max_new_tokens=max_new_tokens, eos_token_id=end_tokens, pad_token_id=pad_token_id))

@torch.no_grad()
def generate_samples(prompts, model, actor_tokenizer, max_length, max_new_tokens,
                     n_samples_per_prompt, micro_rollout_batch_size, temperature=1.0,
                     add_special_tokens=True):
    """Items of a PromptDataset, or texts -> list of Samples, micro_rollout_batch_size rows in each,
    n_samples_per_prompt successive rows for each prompt. add_special_tokens: False for text out of
    a chat template, which brings its own BOS (Trap 16). TypeError: prompts of another form."""
    items = [p if isinstance(p, dict) else {"prompt": p, "text": p} for p in prompts]
    if isinstance(prompts, (str, dict)) or not all(isinstance(i["text"], str) for i in items):
        raise TypeError("prompts: give a list of texts, or items of a PromptDataset")
    items = [item for item in items for _ in range(n_samples_per_prompt)]
    # Padded on the left, so that all responses start in the same column. Cut on the left as well:
    # the question stands on the right (Trap 12).
    actor_tokenizer.padding_side = actor_tokenizer.truncation_side = "left"
    end_tokens, samples_list = get_end_tokens(model, actor_tokenizer), []
    for start in range(0, len(items), micro_rollout_batch_size):
        part = items[start:start + micro_rollout_batch_size]
        inputs = actor_tokenizer(
            [item["text"] for item in part], add_special_tokens=add_special_tokens, padding=True,
            truncation=True, max_length=max_length, return_tensors="pt").to(model.device)
        prompt_ids, prompt_mask = inputs["input_ids"], inputs["attention_mask"]  # (B, P)
        # undivided: no layer in parts (section 13); less_time: one random number a token (15).
        with undivided(model), autocast(model), less_time(model), plain_sampling(
                model, end_tokens, actor_tokenizer.pad_token_id, temperature, max_new_tokens):
            seqs = model.generate(input_ids=prompt_ids, attention_mask=prompt_mask)
        action_mask = get_action_mask(seqs[:, prompt_ids.shape[1]:], end_tokens)
        attention_mask = torch.cat([prompt_mask, action_mask], dim=1)
        num_actions, lengths = action_mask.shape[1], action_mask.sum(-1)
        actions = [row[:n] for row, n in zip(seqs[:, -num_actions:], lengths)]
        ended = torch.tensor([row[-1].item() in end_tokens for row in actions])
        # After plain text, decode its last token too: alone, a Llama's first word loses its space.
        before = prompt_ids[:, -1:] if add_special_tokens else prompt_ids[:, :0]
        alone, whole = (actor_tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (
            before, [torch.cat(pair) for pair in zip(before, actions)]))
        responses = [text[len(first):] for first, text in zip(alone, whole)]
        samples_list.append(
            Samples(seqs, attention_mask, action_mask, num_actions, ended, part, responses))
    return samples_list

@torch.no_grad()
def compute_scores(prompts, responses, reward_model, reward_tokenizer=None,
                   apply_chat_template=True, micro_train_batch_size=8, columns=None):
    """Texts -> floats, one a response. reward_model: a sequence classifier, or a function
    reward_fn(prompts, responses, **columns). InputError: it returned something else."""
    if not isinstance(reward_model, nn.Module):
        return check_scores(reward_model(prompts, responses, **(columns or {})), responses)
    reward_tokenizer.padding_side, reward_tokenizer.truncation_side = "right", "left"
    # The model finds a row's last token by this one; configs often lack it, or name another.
    reward_model.config.get_text_config().pad_token_id = reward_tokenizer.pad_token_id
    limit = min(get_positions(reward_model), reward_tokenizer.model_max_length)
    inputs = [to_reward_inputs(prompt, response, reward_tokenizer, apply_chat_template, limit)
              for prompt, response in zip(prompts, responses, strict=True)]
    by_length = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]["input_ids"]))
    scores = {}
    for start in range(0, len(inputs), micro_train_batch_size):
        part = by_length[start:start + micro_train_batch_size]
        batch = reward_tokenizer.pad([inputs[i] for i in part], return_tensors="pt")
        with autocast(reward_model):  # no position_ids: encoders count in their own way (Trap 11)
            logits = reward_model(**batch.to(reward_model.device)).logits  # (B, 1)
        scores.update(zip(part, logits.squeeze(-1).tolist()))
    return check_scores([scores[i] for i in range(len(inputs))], responses, "reward_name")

def to_rows(samples_list):
    """Samples -> list of Experience, a row each, without padding."""
    rows = []
    for samples in samples_list:
        for i, n in enumerate(samples.action_mask.sum(-1).tolist()):
            seqs = samples.seqs[i][samples.attention_mask[i].bool()]
            info = dict(item=samples.items[i], response=samples.responses[i],
                        ended=bool(samples.ended[i]))
            rows.append(Experience(seqs, torch.ones_like(seqs), torch.ones_like(seqs[-n:]), info))
    return rows

@torch.no_grad()
def generate_experiences(samples_list, actor_model, critic_model, reward_model, ref_model,
                         reward_tokenizer=None, apply_chat_template=True, temperature=1.0,
                         micro_train_batch_size=8, kl_coef=0.0, kl_in="reward", clip_reward=None,
                         score_moments=None, missing_eos_penalty=None, truncated="terminal",
                         whiten_rewards=False, whiten_advantages=True, gamma=1.0, lambd=0.95):
    """Samples -> complete rows: what four models say (Eq. 3, 7), rewards (Eq. 8), advantages and
    returns (Eq. 9-11). score_moments: [count, mean, squares about it] of all scores so far;
    if given, it is updated with the new scores, which are then normalised by it."""
    rows, bootstrap = to_rows(samples_list), truncated == "bootstrap"
    for part in split_by_length(rows, micro_train_batch_size):
        batch = collate_fn(part)
        inputs, num_actions = (batch.seqs, batch.attention_mask), batch.action_mask.shape[1]
        # Not from `generate`: only with train_step's own forward is the first ratio 1 (Trap 20).
        action_log_probs = compute_log_probs(actor_model, *inputs, num_actions, temperature)
        ref_action_log_probs = compute_log_probs(ref_model, *inputs, num_actions, temperature)
        value = critic_model(*inputs, num_actions, with_last=bootstrap)
        for i, row in enumerate(part):
            n = len(row.action_mask)
            row.old_action_log_probs = action_log_probs[i, :n]
            row.ref_action_log_probs = ref_action_log_probs[i, :n]
            row.values = value[i, :n]
            # Nothing comes after an end; a cut response goes on, if `truncated` says so (Trap 28).
            goes_on = bootstrap and not row.info["ended"]
            row.last_values = value[i, n] if goes_on else torch.zeros_like(value[i, 0])

    prompts, responses, columns = get_columns(rows)
    raw_scores = compute_scores(prompts, responses, reward_model, reward_tokenizer,
                                apply_chat_template, micro_train_batch_size, columns)
    for row, raw_score in zip(rows, raw_scores):
        row.info["raw_score"] = raw_score

    rows = gather_rows(rows)  # of all processes: means from here on are over the whole rollout
    batch = collate_fn(rows)
    action_mask = batch.action_mask
    scores = torch.tensor([row.info["raw_score"] for row in rows], dtype=torch.float64)  # (B,)
    ended = torch.tensor([row.info["ended"] for row in rows], dtype=torch.float64)  # (B,)
    if score_moments is not None:
        mean, std = update_moments(score_moments, scores)
        scores = (scores - mean) / (std + 1e-8)
    scores = scores * ended if bootstrap else scores  # a cut one earns V(s_T) instead (Trap 28)
    scores = (scores - (missing_eos_penalty or 0.0) * (1 - ended)).to(batch.values)
    kl = compute_approx_kl(batch.old_action_log_probs, batch.ref_action_log_probs, action_mask)
    in_reward = kl_coef if kl_in == "reward" else 0.0
    rewards = compute_rewards(kl, scores, action_mask, in_reward, clip_reward)
    if whiten_rewards:
        rewards = whiten(rewards, action_mask, shift_mean=False)
    advantages, returns = get_advantages_and_returns(
        batch.values, rewards, action_mask, gamma, lambd, batch.last_values)
    if whiten_advantages:
        advantages = whiten(advantages, action_mask)
    for i, row in enumerate(rows):
        n, row.scores = len(row.action_mask), scores[i]
        row.kl, row.rewards, row.advantages, row.returns = (
            tensor[i, :n] for tensor in (kl, rewards, advantages, returns))
    return rows

# ---- 7. The update and the loop ----------------------------------------------------------------

def compute_penalty(action_log_probs, batch, entropy, ppo1_beta, kl_loss_coef, entropy_coef):
    """Optional terms of the policy's loss, (B, T): Eq. 5c, PPO1's ppo1_beta KL(old, new) by k3; the
    KL to the reference by k2; minus the entropy."""
    old_action_log_probs, mask = batch.old_action_log_probs, batch.action_mask
    kl = compute_approx_kl(old_action_log_probs, action_log_probs, mask, "k3")
    penalty = ppo1_beta * kl
    if kl_loss_coef:
        # k2's gradient is k1 grad log pi: that of this token's own KL (not of the tokens' after it)
        # if the current policy drew the token. The old policy drew it: hence the ratio.
        ratio = (action_log_probs - old_action_log_probs).masked_fill(mask == 0, 0.0).detach().exp()
        k2 = compute_approx_kl(action_log_probs, batch.ref_action_log_probs, mask, "k2")
        penalty = penalty + kl_loss_coef * ratio * k2
    return penalty - entropy_coef * entropy if entropy_coef else penalty

def train_step(experience, actor_model, critic_model, actor_optimizer, critic_optimizer,
               micro_train_batch_size, temperature=1.0, clip_eps=0.2, clip_eps_high=None,
               dual_clip=None, value_clip_eps=None, huber_delta=None, loss_agg="token-mean",
               max_grad_norm=1.0, ppo1_beta=0.0, kl_loss_coef=0.0, entropy_coef=0.0,
               update_actor=True):
    """One optimizer step of actor and critic on a list of rows -> dict of floats, means over the
    real tokens of the step. Changes models and optimizers only. FloatingPointError: a loss or a
    gradient is not finite; no weight has moved then."""
    share, metrics = my_share(experience), defaultdict(float)  # one process: all its rows
    # One denominator for the whole step: a mean of micro-batch means would weigh the tokens of a
    # short micro-batch more (Trap 19). Each process has its part: gradients are then averaged.
    tokens = sum(len(row.action_mask) for row in experience)
    whole = tokens if loss_agg == "token-mean" else len(experience)
    agg = dict(loss_agg=loss_agg, denominator=whole * len(share) / len(experience))
    for optimizer in (actor_optimizer, critic_optimizer):
        optimizer.zero_grad(set_to_none=False)  # kept allocated: fresh memory is slow to touch
    for rows in split_by_length(share, micro_train_batch_size):
        batch = collate_fn(rows)
        inputs, action_mask = (batch.seqs, batch.attention_mask), batch.action_mask
        num_actions, old_action_log_probs = action_mask.shape[1], batch.old_action_log_probs
        # What a print of these two finds while the critic alone learns:
        policy_loss, action_log_probs = torch.zeros(()), old_action_log_probs
        if update_actor:
            with less_memory(actor_model):  # section 15
                output = compute_log_probs(actor_model, *inputs, num_actions, temperature,
                                           with_entropy=entropy_coef != 0)
                action_log_probs, entropy = output if entropy_coef else (output, None)
                policy_loss = compute_policy_loss(
                    action_log_probs, old_action_log_probs, batch.advantages, action_mask,
                    clip_eps, clip_eps_high, dual_clip, **agg)
                penalty = compute_penalty(action_log_probs, batch, entropy, ppo1_beta,
                                          kl_loss_coef, entropy_coef)
                # compute_policy_loss just as a mean: at ratio 1 it gives that of -A; A is -penalty.
                here = action_log_probs.detach()
                penalty = compute_policy_loss(here, here, -penalty, action_mask, None, **agg)
                (policy_loss + penalty).backward()
            add_policy_metrics(metrics, policy_loss, here, batch, clip_eps, clip_eps_high)
        with less_memory(critic_model):
            values = critic_model(*inputs, num_actions)
            value_loss = compute_value_loss(values, batch.values, batch.returns, action_mask,
                                            value_clip_eps, huber_delta, **agg)
            value_loss.backward()
        add_value_metrics(metrics, value_loss, values.detach(), batch, value_clip_eps)
    metrics = finish_metrics(metrics)
    if update_actor:  # the norms before clipping (Trap 27)
        metrics["actor_grad_norm"] = clip_gradients(actor_model, max_grad_norm)
    metrics["critic_grad_norm"] = clip_gradients(critic_model, max_grad_norm)
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value}")
    if update_actor:
        actor_optimizer.step()
    critic_optimizer.step()
    return metrics

def evaluate(dataset, actor_model, critic_model, reward_model, ref_model, sampling, scoring, seed):
    """One response to each held-out prompt -> list of rows. Its random numbers are the same each
    time, and those of training stay as they were."""
    with torch.random.fork_rng([actor_model.device] * (actor_model.device.type == "cuda")):
        torch.manual_seed(seed)
        samples_list = generate_samples(
            my_share(list(dataset)), actor_model, **sampling | dict(n_samples_per_prompt=1))
        return generate_experiences(samples_list, actor_model, critic_model, reward_model,
                                    ref_model, **scoring)[:len(dataset)]  # my_share may repeat some

def train(prompts_dataset, eval_dataset, actor_model, critic_model, reward_model, ref_model,
          actor_tokenizer, reward_tokenizer, writer):
    """The run that the constants describe -> its Run (section 10). reward_model: a classifier or a
    function reward_fn(prompts, responses, **columns) -> floats; eval_dataset, writer: or None."""
    check_values()
    models = (actor_model, critic_model, reward_model, ref_model)
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr,
                                    weight_decay=weight_decay, fused=True)
                  for model, lr in ((actor_model, actor_lr), (critic_model, critic_lr))]
    sampling = dict(actor_tokenizer=actor_tokenizer, max_length=max_length,
                    max_new_tokens=max_new_tokens, n_samples_per_prompt=n_samples_per_prompt,
                    micro_rollout_batch_size=micro_rollout_batch_size, temperature=temperature,
                    add_special_tokens=not apply_chat_template)
    scoring = dict(reward_tokenizer=reward_tokenizer, apply_chat_template=apply_chat_template,
                   temperature=temperature, micro_train_batch_size=micro_train_batch_size,
                   clip_reward=clip_reward, missing_eos_penalty=missing_eos_penalty,
                   truncated=truncated)
    run = Run(models, optimizers, sampling, scoring, prompts_dataset, eval_dataset, writer)
    state, buffer = run.start(), ExperienceBuffer()
    while run.goes_on():
        if kl_coef_start is not None:
            state.kl_coef = anneal_kl_coef(state.rollout / run.rollouts, kl_coef, kl_coef_start)
        with run.phase("generate"):
            samples_list = generate_samples(my_share(run.next_prompts()), actor_model, **sampling)
        with run.phase("score"):
            buffer.append(generate_experiences(
                samples_list, *models, **scoring, kl_coef=state.kl_coef, kl_in=kl_in, gamma=gamma,
                score_moments=state.score_moments if normalize_scores else None, lambd=lambd,
                whiten_rewards=whiten_rewards, whiten_advantages=whiten_advantages))
            run.metrics |= get_rollout_metrics(buffer.rows)  # gold_fn may fail: no weight has moved
        with run.phase("train"):
            for experience in run.epochs(buffer):  # max_epochs times all minibatches
                metrics = train_step(
                    experience, actor_model, critic_model, *optimizers, micro_train_batch_size,
                    temperature, clip_eps if policy_loss == "clip" else None, clip_eps_high,
                    dual_clip, value_clip_eps, huber_delta, loss_agg, max_grad_norm,
                    state.ppo1_beta if policy_loss == "ppo1" else 0.0,
                    state.kl_coef if kl_in == "loss" else 0.0, entropy_coef,
                    update_actor=state.rollout >= critic_warmup)
                run.steps.append(metrics)
                if policy_loss == "clip" and metrics.get("approx_kl", 0) > (target_kl or math.inf):
                    break  # the policy has moved too far from this rollout
        if kl_target is not None and state.rollout >= critic_warmup:
            kl, rows = sum(row.kl.sum().item() for row in buffer.rows), len(buffer.rows)
            state.kl_coef = adapt_kl_coef(state.kl_coef, kl / rows, kl_target, rows, kl_horizon)
        if policy_loss == "ppo1" and state.rollout >= critic_warmup:
            state.ppo1_beta = adapt_ppo1_beta(state.ppo1_beta, run.last_kl(), target_kl)
        run.finish_rollout(buffer.rows)  # log, evaluate, save
        buffer.clear()
    return run.finish()

# ---- the algorithm ends here -------------------------------------------------------------------

# ---- 8. Input ----------------------------------------------------------------------------------

def read_prompts(source):
    """A list, or the path of a .txt or .jsonl -> list of dicts: `prompt` and the user's columns."""
    where, items = f"prompts {source!r:.200}", []
    entries = {f"prompt {n}": item for n, item in enumerate(source, 1)}
    try:
        if isinstance(source, str):
            with open(source, encoding="utf-8-sig") as file:
                entries = {f"{source}, line {n}": line.strip() for n, line in enumerate(file, 1)
                           if line.strip()}
        if not entries or isinstance(source, dict):  # a dict of columns is not a list of prompts
            raise ValueError("no prompt found")
        for where, item in entries.items():
            if isinstance(source, str) and source.endswith(".jsonl"):
                item = json.loads(item)
            item = dict(item) if isinstance(item, dict) else {"prompt": item}
            item["prompt"] = prompt = item.pop("messages", None) or item.get("prompt") or None
            turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            texts = [isinstance(turn, dict) and turn.get(key)
                     for turn in turns for key in ("role", "content")]
            if not all(isinstance(text, str) for text in texts) or not texts[-1].strip():
                raise ValueError(f"{prompt!r:.200} is not a prompt")
            if turns[-1]["role"] == "assistant":  # data for fine-tuning, say: it holds the answer
                raise ValueError("the last message is a reply already, leave it out")
            "".join(texts).encode()  # ValueError: half a surrogate pair, which JSON can spell
            if taken := {"text", "prompts", "responses"}.intersection(item):
                raise ValueError(f"a column cannot be named {min(taken)}")
            items.append(item)
    except (OSError, ValueError, RecursionError) as error:  # of file, Unicode, JSON; from above
        raise InputError(f"{where}: {error}: write one text per line, or in a .jsonl an object per "
                         "line with `prompt` (a text) or `messages` (role, content)") from None
    columns = dict.fromkeys(name for item in items for name in item)
    return [columns | item for item in items]  # None where an item lacks a column

def to_dataset(source, sampling):
    """A PromptDataset, or a part of one, as it is; anything else becomes a PromptDataset."""
    if not isinstance(source, (str, dict)):  # a Dataset's items may be endless: by its length
        source = list(itertools.islice(source, getattr(source, "__len__", lambda: None)()))
    if source and all(isinstance(item, dict) and {"prompt", "text"} <= {*item} for item in source):
        return source
    return PromptDataset(source, sampling["actor_tokenizer"], apply_chat_template, max_length)

def get_columns(rows):
    """Rows -> prompts, responses, and the user's other columns. Lists and dicts are copied: if a
    reward_fn appends to the messages it gets, the next sample's must stay as they were."""
    items = [row.info["item"] for row in rows]
    columns = {name: [copy.deepcopy(value) if isinstance(value, (list, dict)) else value
                      for value in (item.get(name) for item in items)]
               for name in set().union(*items)}
    prompts, _ = columns.pop("prompt"), columns.pop("text")
    return prompts, [row.info["response"] for row in rows], columns

def get_lr_factor(step, total_steps):
    """What multiplies both learning rates. It follows from the step alone: nothing to save."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    x = (step - warmup_steps) / (total_steps - warmup_steps)
    return dict(constant=1.0, linear=1 - x, cosine=(1 + math.cos(math.pi * x)) / 2)[lr_schedule]

@functools.lru_cache(8)
def get_special_tokens(tokenizer, _):
    """Cached: with thousands of them a call takes 20 ms. `_`: len(tokenizer), to see new ones."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added.union(tokenizer.all_special_tokens) - {""}

def to_messages(prompt, tokenizer):
    """A prompt (text or messages) -> messages for a chat template. A special token spelt out there
    gets a space inserted: what a user or a model writes must not end its turn and open another."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{key: turn[key] for key in ("role", "content")} for turn in turns]
    whole = "".join(text for message in messages for text in message.values())
    for token in filter(whole.__contains__, get_special_tokens(tokenizer, len(tokenizer))):
        for message, key in itertools.product(messages, ("role", "content")):
            message[key] = message[key].replace(token, token[0] + " " + token[1:])
    return messages

@contextlib.contextmanager
def refuse(sentence):
    """Any exception inside (libraries raise many kinds) becomes InputError("sentence: reason")."""
    try:
        yield
    except Exception as error:
        reason = show(" ".join(str(error).split()))[:300]
        raise InputError(f"{sentence}: {reason}") from None

def apply_template(messages, tokenizer, **options):
    """Messages -> text. InputError: the template refuses a role, or the order of the roles."""
    with refuse(f"the chat template of {tokenizer.name_or_path} refuses {str(messages)[:100]}"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

def get_turn_end(tokenizer):
    """The id of the special token that the chat template writes after a reply, or None."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "reply"}]
    with contextlib.suppress(InputError):  # a template that takes no reply
        after = apply_template(turns, tokenizer).rpartition("reply")[2].strip()
        ids = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        return next((id for id in ids if id in tokenizer.added_tokens_decoder), None)

def load(make, constant, name, source=None, **options):
    """make(source or name, **options); any exception becomes an InputError about the constant."""
    with refuse(f"{constant} = {name!r} cannot be loaded"):
        return make(source or name, trust_remote_code=trust_remote_code, **options)

def adds_end(tokenizer):
    """Does the tokenizer by itself put its end token behind every text?"""
    return tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]

def load_tokenizer(constant, name):
    """With a pad token. InputError: no end token, one in every prompt, ids that the model lacks."""
    tokenizer = load(transformers.AutoTokenizer.from_pretrained, constant, name)
    if not (tokenizer.eos_token or constant == "reward_name" and tokenizer.pad_token):
        raise InputError(f"{constant} = {name!r}: its tokenizer has no end token: set eos_token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # masks tell them apart
    if constant == "actor_name" and not apply_chat_template and adds_end(tokenizer):
        raise InputError(f"{constant} = {name!r}: its tokenizer ends every prompt with the end "
                         "token: turn that off in the tokenizer's files (add_eos_token)")
    config = load(transformers.AutoConfig.from_pretrained, constant, name).get_text_config()
    # A special token that is never written may lie beyond the vocabulary: Gemma 3 1B's for images.
    used = {getattr(tokenizer, kind) for kind in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    unused = get_special_tokens(tokenizer, len(tokenizer)) - used
    for token, number in tokenizer.get_vocab().items():
        if number >= getattr(config, "vocab_size", math.inf) and (
                token not in unused or token in str(tokenizer.chat_template)):
            raise InputError(f"{constant} = {name!r}: its tokenizer has {token!r}, number "
                             f"{number}, but its model only {config.vocab_size} tokens: enlarge "
                             "the model with resize_token_embeddings")
    return tokenizer

def load_model(constant, name):
    """A model in fp32, with dropout off for good. Only safetensors are read: no pickle can run.
    InputError: weights that the files lack; a reward model that has not exactly one output."""
    kind = "CausalLM" if constant == "actor_name" else "SequenceClassification"
    # dtype must be given: the default is the file's, often bf16 (Trap 17). Not so num_labels: with
    # it a plain language model passes for a reward model, its head random numbers (Trap 14).
    model, info = load(getattr(transformers, f"AutoModelFor{kind}").from_pretrained, constant, name,
                       dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if constant == "reward_name" and model.config.num_labels != 1:
        raise InputError(f"{constant} = {name!r} has {model.config.num_labels} outputs, it needs 1")
    if constant != "critic_name" and (missing := info["missing_keys"]):
        raise InputError(f"{constant} = {name!r} has no trained {min(missing)}: name another model")
    for module in model.modules():  # eval() is not enough: `less_memory` sets layers to training
        vars(module).update({key: 0.0 for key, value in vars(module).items()
                             if "dropout" in key and isinstance(value, float)})
    return model.eval()  # dropout would move the ratio before any step (Trap 20)

def get_positions(model):
    """How many tokens a model can read. RoBERTa and the like count from padding_idx + 1."""
    number = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    first = max((m.padding_idx + 1 for name, m in model.named_modules() if name.endswith(
        "position_embeddings") and getattr(m, "padding_idx", None) is not None), default=0)
    return number - first if number > 0 else sys.maxsize  # XLNet says -1

def make_models(load_model):
    """-> actor, critic, reward model, reference, all from load_model(constant, name); the bill
    passes one that takes no memory. InputError: a model has too few positions or tokens."""
    actor_model = load_model("actor_name", actor_name)
    reward_model = reward_fn or load_model("reward_name", reward_name).requires_grad_(False)
    if lora_rank:
        actor_model, critic_model, ref_model = add_adapters(actor_model)
    else:
        ref_model = load_model("actor_name", actor_name).requires_grad_(False)
        critic_model = make_critic(actor_model, reward_model) if critic_name is None else Critic(
            load_model("critic_name", critic_name).base_model).eval()
    for constant, model in (("actor_name", actor_model), ("critic_name", critic_model.base_model)):
        config, length = model.config.get_text_config(), max_length + max_new_tokens
        if length > get_positions(model):
            raise InputError(f"max_length + max_new_tokens = {length}: lower one of them, as "
                             f"{constant} has only {get_positions(model)} positions")
        if constant == "critic_name" and model.can_generate():  # Llama 4: it keeps its lm_head
            raise InputError("critic_name: set another model, for actor_name's body has an lm_head")
        if config.vocab_size < actor_model.config.get_text_config().vocab_size:
            raise InputError(f"{constant} knows fewer tokens than actor_name: name another model")
        if gradient_checkpointing:  # prepared here; `less_memory` switches it on
            if not model.supports_gradient_checkpointing:
                raise InputError(f"gradient_checkpointing: set it to False, {constant} has none")
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()  # its name in older transformers
    return actor_model, critic_model, reward_model, ref_model

def to_reward_inputs(prompt, response, tokenizer, apply_chat_template, max_length):
    """Tokens in the form that the reward model knows (Trap 13): its chat template if it has one, a
    pair if its tokenizer separates pairs (encoders), else prompt + response + end token."""
    cut = dict(truncation=True, max_length=max_length)
    messages = to_messages(prompt, tokenizer) + to_messages(
        [{"role": "assistant", "content": response}], tokenizer)
    if apply_chat_template and tokenizer.chat_template:
        text = apply_template(messages, tokenizer)
        return tokenizer(text, add_special_tokens=False, **cut)
    *asked, response = [message["content"] for message in messages]
    if tokenizer.sep_token and tokenizer.num_special_tokens_to_add(pair=True) > 2:
        return tokenizer("\n".join(asked), response, **cut)
    asked = prompt if isinstance(prompt, str) else "\n".join(asked)  # a text is read unaltered
    end = "" if adds_end(tokenizer) else tokenizer.eos_token or ""
    return tokenizer(asked + response + end, **cut)

def check_scores(scores, responses, name="reward_fn"):
    """What a reward function or model returned -> list of floats, one a response, or InputError."""
    with refuse(f"{name} has to return {len(responses)} finite floats, one for each response"):
        floats = [float(score) for score in scores if not isinstance(score, str)]
        if len(floats) != len(responses) or not all(map(math.isfinite, floats)):
            raise ValueError(f"it returned {scores}")
    return floats

def update_moments(moments, scores):
    """Adds scores to [count, mean, squared deviations] -> mean, standard deviation (Welford)."""
    for score in scores.tolist():
        moments[0] += 1
        delta = score - moments[1]
        moments[1] += delta / moments[0]
        moments[2] += delta * (score - moments[1])
    return moments[1], math.sqrt(moments[2] / max(moments[0] - 1, 1))

def show(text):
    """The text without control characters: a response must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)

def to_cell(text):
    """Escapes a Markdown table's cell: a response must add no column and load no remote image."""
    return re.sub(r"[^\w ]|_", lambda match: f"&#{ord(match[0])};", show(text))

# ---- 9. What is logged -------------------------------------------------------------------------

CHARTS = {  # "page: chart": {tag: meaning, or (meaning, healthy from, to, advice outside that)}
    "4 models: score and gold": {
        "reward/score_mean": "raw score of a response", "reward/after_kl": "score - kl_coef x KL",
        "reward/score_std": ("deviation of scores", 1e-6, None, "all equal: check the reward"),
        "reward/gold": "gold score of a response",
        "reward/gold_lost": ("best gold - gold", None, 0.1, "reward is hacked: raise kl_coef")},
    "4 models: KL to the reference": {
        "kl/ref_k1": ("nats a response", -0.5, None, "sampling and scoring differ: Trap 8"),
        "kl/ref_k3": ("nats a response, never below 0", None, 100, "far from ref: raise kl_coef")},
    "4 models: price of KL": {
        "kl/kl_coef": "price of a nat", "kl/ppo1_beta": "price of a nat of KL(old, new)"},
    "4 models: what V knows": {
        "value/explained_variance": ("1: V knows all", 0, None, "critic_warmup up, critic_lr down"),
        "rollout/advantage_std": "of A before whitening"},
    "4 models: entropy, share that ended": {
        "policy/entropy": ("nats a token", 0.01, None, "collapse: raise kl_coef or entropy_coef"),
        "rollout/ended": ("share of ended responses", 0.05, None, "raise missing_eos_penalty")},
    "4 models: response length": {
        "rollout/response_length": ("tokens", 2, None, "empty: lower missing_eos_penalty")},
    "2 losses: policy_loss, tokens clipped": {
        "policy_loss": "does not measure progress: Trap 26",
        "policy/approx_kl": ("KL(old, new) a token", None, 0.1, "lower actor_lr, set target_kl"),
        "policy/clip_fraction": ("share of tokens", 1e-9, 0.3, "lower actor_lr; if 0, raise it"),
        "policy/clip_upper": "those with A > 0", "policy/clip_lower": "those with A < 0"},
    "2 losses: ratio": {
        "policy/ratio_mean": ("pi / pi_old", 0.9, 1.1, "steps are too large: lower actor_lr"),
        "policy/ratio_max": ("pi / pi_old", None, 100, "steps are too large: lower actor_lr")},
    "2 losses: value_loss, tokens clipped": {
        "value_loss": "squared error / 2",
        "value/value_clip_fraction": ("share of tokens", None, 0.5, "raise value_clip_eps")},
    "loop: learning rates": {"policy/actor_lr": "as scheduled", "value/critic_lr": "as scheduled"},
    "loop: gradient norms": {
        "policy/actor_grad_norm": "before clipping", "value/critic_grad_norm": "before clipping"},
    "loop: tokens a second": {"time/tokens_per_second": "response tokens"},
    "loop: seconds": {"time/generate": "seconds", "time/score": "seconds", "time/train": "seconds"},
}
METRICS = {tag: row if isinstance(row, tuple) else (row, None, None, "")
           for tags in CHARTS.values() for tag, row in tags.items()}

def add_policy_metrics(metrics, policy_loss, action_log_probs, batch, clip_eps, clip_eps_high):
    """Adds a micro-batch's sums over real tokens: padding would dilute the means (Trap 25)."""
    mask = batch.action_mask.bool()
    log_ratio = (action_log_probs - batch.old_action_log_probs)[mask]
    ratio, advantages = log_ratio.exp(), batch.advantages[mask]
    metrics["policy_loss"] += policy_loss.item()
    metrics["ratio_mean"] += ratio.sum().item()
    metrics["ratio_max"] = max(metrics["ratio_max"], ratio.max().item())
    metrics["approx_kl"] += (ratio - 1 - log_ratio).sum().item()
    if clip_eps is not None:
        high = clip_eps if clip_eps_high is None else clip_eps_high
        metrics["clip_upper"] += ((ratio > 1 + high) & (advantages > 0)).sum().item()
        metrics["clip_lower"] += ((ratio < 1 - clip_eps) & (advantages < 0)).sum().item()
        metrics["clip_fraction"] = metrics["clip_upper"] + metrics["clip_lower"]

def add_value_metrics(metrics, value_loss, values, batch, value_clip_eps):
    moved = (values - batch.values)[batch.action_mask.bool()].abs()
    metrics["tokens"] += moved.numel()
    metrics["value_loss"] += value_loss.item()
    metrics["value_clip_fraction"] += (moved > (value_clip_eps or math.inf)).sum().item()

def finish_metrics(metrics):
    """Sums of each process -> means over all tokens of the step. Losses, already divided by the
    denominator of a process' share, are averaged over the processes."""
    parts = gather(metrics)
    tokens = sum(part["tokens"] for part in parts)
    joins = dict(ratio_max=max, tokens=sum, policy_loss=numpy.mean, value_loss=numpy.mean)
    return {name: float(joins.get(name, lambda sums: sum(sums) / tokens)(
        [part[name] for part in parts])) for name in metrics}

def get_rollout_metrics(rows):
    """Rows -> dict of means over all real tokens of a rollout, or over its responses."""
    batch, n = collate_fn(rows), len(rows)
    mask = batch.action_mask.bool()
    k3 = compute_approx_kl(batch.old_action_log_probs, batch.ref_action_log_probs, mask, "k3")
    scores = torch.tensor([row.info["raw_score"] for row in rows], dtype=torch.float64)
    returns, errors = batch.returns[mask], (batch.returns - batch.values)[mask]
    spread, scale = returns.var(correction=0), (returns.square() + errors.square()).mean()
    # Returns that differ by rounding alone leave V nothing to explain: 0, and not -1e8.
    unexplained = errors.var(correction=0) / spread if spread > 1e-10 * scale else 1.0
    metrics = dict(
        score_mean=scores.mean(), score_std=scores.std(correction=0),
        after_kl=scores.mean() - kl_coef * batch.kl.sum() / n, ref_k1=batch.kl.sum() / n,
        ref_k3=k3.sum() / n, response_length=mask.sum() / n, advantage_std=errors.std(correction=0),
        ended=sum(row.info["ended"] for row in rows) / n, explained_variance=1 - unexplained,
        entropy=-batch.old_action_log_probs[mask].mean())  # unbiased: this policy drew the sample
    if gold_fn is not None:
        prompts, responses, columns = get_columns(rows)
        golds = check_scores(gold_fn(prompts, responses, **columns), responses, "gold_fn")
        metrics |= dict(gold=sum(golds) / n, gold_noise=4 * numpy.std(golds) / n ** 0.5)
    return {name: float(value) for name, value in metrics.items()}

# ---- 10. The run around the loop ---------------------------------------------------------------
#
# `train` says what is learnt, `Run` does the rest: goes_on (takes a snapshot, sets the seed), phase
# (times and guards), epochs, finish_rollout (logs, traces, evaluates, saves). A rollout that is
# stopped before its first optimizer step is dropped: its start is saved. After that it is finished.

class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. `phase` catches it, saves the state and raises it again."""

@dataclass
class State:
    """What a rollout changes besides weights and optimizers; checkpoints hold it."""
    rollout: int = 0              # how many are finished
    kl_coef: float = 0.0          # as adapted or annealed so far
    ppo1_beta: float = 1.0        # as adapted so far
    best: float = -math.inf       # held-out score - kl_coef x KL of the actor saved in `best`
    best_gold: float = -math.inf  # highest mean of gold_fn in a rollout
    score_moments: list = field(default_factory=lambda: [0, 0.0, 0.0])  # as update_moments has them

class Run:
    """Log, evaluation, checkpoints and signals around the loop of `train`. `steps` and `metrics`
    belong to the current rollout; `snapshot` is the State at its start, saved if it is dropped."""

    def __init__(self, models, optimizers, sampling, scoring, prompts_dataset, eval_dataset,
                 writer):
        self.models, self.optimizers, self.writer = models, optimizers, writer
        self.sampling, self.scoring = sampling, scoring
        self.prompts_dataset = to_dataset(prompts_dataset, sampling)
        self.eval_dataset = eval_dataset and to_dataset(eval_dataset, sampling)
        asked = episodes * len(self.prompts_dataset) / rollout_batch_size
        self.rollouts = math.ceil(round(asked, 6)) or 1  # in floats 1.1 * 50 > 55
        if self.rollouts <= critic_warmup:
            say(f"  ! critic_warmup = {critic_warmup} of {self.rollouts} rollouts: no actor learns")
        self.state = State(kl_coef=kl_coef)
        self.steps, self.metrics, self.strikes = [], {}, defaultdict(int)  # strikes: see `log`
        self.now, self.stopping, self.after = None, False, []  # phase, signalled?, last evaluation
        self.signals = contextlib.ExitStack()  # its close() puts the former handlers back

    def start(self):
        """Resumes, runs the self-check, evaluates the reference -> the State."""
        if path := find_checkpoint():
            load_checkpoint(path, self)
        for other in list_checkpoints() if rank() == 0 else []:  # newer ones go aside
            if not path or other[-6:] >= path[-6:] and not os.path.samefile(other, path):
                shutil.rmtree(other + ".aside", ignore_errors=True)
                os.rename(other, other + ".aside")
        if self_check != "off":
            run_self_check(self)
        lines = [f"| {name} | {show(repr(value))} |" for name, value in get_constants().items()]
        self.plot("add_text", "constants", "\n".join(["| constant | value |", "|-|-|", *lines]),
                  self.state.rollout)
        if not is_ours(path):  # else the folder has the charts from before
            pages = defaultdict(dict)
            for title, tags in CHARTS.items():
                page, chart = title.split(": ")
                pages[page][chart] = ["Multiline", list(tags)]
            self.plot("add_custom_scalars", pages)
        self.before = self.evaluate(self.models[3], log=not path)  # ref is the actor before PPO
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self.signals.callback(signal.signal, number, signal.signal(number, self.on_signal))
        return self.state

    def goes_on(self):
        """Is there another rollout? Seeds it from its number (and the process'), which also gives
        its prompts and rates: a resumed run draws the same without any saved random state."""
        self.snapshot = copy.deepcopy(vars(self.state))
        transformers.set_seed((seed * 1_000_003 + self.state.rollout * 1009 + rank()) % 2 ** 32)
        return self.state.rollout < self.rollouts

    def next_prompts(self):
        """The rollout's prompts. Each episode shuffles anew; its last rollout is filled up from the
        next episode. All follows from the rollout's number: no position has to be saved."""
        prompts, queue = list(self.prompts_dataset), []
        episode, place = divmod(self.state.rollout * rollout_batch_size, len(prompts))
        while len(queue) < place + rollout_batch_size:
            queue += random.Random(f"{seed} {episode}").sample(prompts, len(prompts))
            episode += 1
        return queue[place:place + rollout_batch_size]

    def epochs(self, buffer):
        """Yields all minibatches of all epochs, with the learning rates set for each."""
        steps = max_epochs * math.ceil(len(buffer.rows) / train_batch_size)
        step, rates = self.state.rollout * steps, dict(actor_lr=actor_lr, critic_lr=critic_lr)
        self.metrics["kl_coef"] = self.state.kl_coef  # as used; `train` may adapt both later
        if policy_loss == "ppo1":
            self.metrics["ppo1_beta"] = self.state.ppo1_beta
        for _ in range(max_epochs):
            order = torch.Generator().manual_seed(seed * 1_000_003 + step)  # alike in all processes
            for experience in buffer.minibatches(train_batch_size, order):
                factor = get_lr_factor(step, self.rollouts * steps)
                for optimizer, (name, lr) in zip(self.optimizers, rates.items()):
                    self.metrics[name] = optimizer.param_groups[0]["lr"] = lr * factor
                yield experience
                step += 1

    def mean(self, name, steps=None):
        """Mean of a train_step metric over the rollout's steps, or `steps`, weighted by tokens."""
        pairs = [(step[name], step["tokens"]) for step in steps or self.steps]
        return sum(value * tokens for value, tokens in pairs) / sum(tokens for _, tokens in pairs)

    def last_kl(self):
        """KL(old, new) a token in the last epoch: in the first steps new and old hardly differ."""
        return self.mean("approx_kl", self.steps[-(len(self.steps) // max_epochs):])

    @contextlib.contextmanager
    def phase(self, name):
        """Times a phase. Saves all when a signal stopped it, the actor if a loss is not finite."""
        start, self.now = time.perf_counter(), name
        try:
            if name != "evaluate" and any(gather(self.stopping)):
                raise Stopped
            yield
            self.now, self.metrics[name] = None, time.perf_counter() - start
        except Stopped:
            saved = " and saved: set resume = 'latest' to go on" if save_checkpoint(self) else ""
            raise Stopped("stopped" + saved) from None
        except FloatingPointError as error:
            together = name == "train" or world_size() == 1  # who saves alone waits for ever
            saved = f"; {run_folder()}/stopped has the actor" * (
                together and self.save_actor("stopped"))
            raise InputError(
                f"rollout {self.state.rollout + 1}, optimizer step {len(self.steps) + 1}: {error}; "
                f"lower actor_lr or critic_lr{saved}") from None
        except Exception:  # most likely in reward_fn: no weight has moved in this rollout
            if self.state.rollout and name != "train" and world_size() == 1:
                if save_checkpoint(self):
                    say("  saved: set resume = 'latest' to go on")
            raise
        finally:
            if name not in self.metrics:  # an exception: the run ends
                self.signals.close()

    def on_signal(self, *_):
        """The first signal stops the run in good order, a second one at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self.stopping = True
        say("  stopping in good order; press Ctrl-C once more to stop at once")
        if self.now in ("generate", "score") and world_size() == 1:
            raise Stopped  # drops this rollout; `phase` saves its start

    def finish_rollout(self, rows):
        """Logs the rollout; evaluates and saves if eval_every and save_every say so."""
        state = self.state
        metrics = self.metrics | {name: self.mean(name) for name in self.steps[0]}
        if "ratio_max" in metrics:
            metrics["ratio_max"] = max(step["ratio_max"] for step in self.steps)
        seconds = sum(metrics[name] for name in ("generate", "score", "train"))
        metrics["tokens_per_second"] = sum(len(row.action_mask) for row in rows) / seconds
        if "gold" in metrics:
            state.best_gold = max(state.best_gold, metrics["gold"])
            metrics["gold_lost"] = state.best_gold - metrics["gold"]
        episode = 1 + state.rollout * rollout_batch_size // len(self.prompts_dataset)
        state.rollout += 1
        done, last = state.rollout, state.rollout == self.rollouts
        left = int(seconds * (self.rollouts - done))
        m = defaultdict(float, metrics)  # the policy's are 0 while only the critic learns
        say(f"ep {episode:2d} {done:3d}/{self.rollouts} score {m['score_mean']:6.2f} "
            f"kl {m['ref_k1']:5.2f} loss {m['policy_loss']:6.3f} {m['value_loss']:6.3f} "
            f"clip {m['clip_fraction']:.2f} len {m['response_length']:4.1f} "
            f"{m['tokens_per_second']:5.0f} tok/s {left // 60}:{left % 60:02d} left")
        self.log(metrics)
        if trace_every and done % trace_every == 0:
            text = trace(rows, self.models[0], self.sampling["actor_tokenizer"],
                         metrics["kl_coef"] if kl_in == "reward" else 0.0)
            # Indented, it is code to Markdown, which leaves it as it is.
            self.plot("add_text", "trace", "    " + text.replace("\n", "\n    "), done)
        self.steps, self.metrics, self.snapshot = [], {}, vars(state)  # live until `goes_on`
        if last or eval_every and done % eval_every == 0:
            with self.phase("evaluate"):
                self.after = self.evaluate(self.models[0])
        if save_every and (last or done % save_every == 0):
            save_checkpoint(self)

    def plot(self, kind, *what):
        """writer.<kind>(*what), where it has that: your own needs add_scalar only. After an error
        (a full disk) the run goes on without curves."""
        try:
            if self.writer and (kind == "add_scalar" or hasattr(self.writer, kind)):
                getattr(self.writer, kind)(*what)
        except Exception as error:  # OSError from TensorBoard's, anything from a user's own writer
            say(f"  ! TensorBoard cannot be written: no more curves ({error})")
            self.writer.all_writers = self.writer = None  # else its close() would raise again

    def log(self, metrics):
        """Plots all metrics; gives advice when one is out of its range three times in a row."""
        allowed = {  # upper bounds rise to the targets that are set, and gold's 0.1 to its noise
            "policy/approx_kl": 1.5 * (target_kl or 0), "kl/ref_k3": 1.5 * (kl_target or 0),
            "reward/gold_lost": metrics.get("gold_noise", 0)}
        # One step clips nothing; nor is actor_lr too low where target_kl or lr_schedule holds it.
        held = target_kl or len(self.steps) == 1 or metrics.get("actor_lr", actor_lr) < actor_lr / 2
        for tag, (what, low, high, advice) in METRICS.items():
            if (value := metrics.get(tag.split("/")[-1])) is None:
                continue
            self.plot("add_scalar", tag, value, self.state.rollout)
            low = None if held and tag == "policy/clip_fraction" else low
            high = high and max(high, allowed.get(tag, 0))
            outside = low is not None and value < low or high is not None and value > high
            self.strikes[tag] = self.strikes[tag] + 1 if outside else 0
            if self.strikes[tag] == 3:
                say(f"  ! {tag} ({what}) is {value:.3g}, the third time in a row: {advice}")

    def evaluate(self, actor_model, log=True):
        """Held-out prompts -> rows. With `log`: to TensorBoard too, and saves the best actor."""
        if not self.eval_dataset:
            return []
        rows = evaluate(self.eval_dataset, actor_model, *self.models[1:], self.sampling,
                        self.scoring, seed + 1_000_003 * rank())
        metrics, done = get_rollout_metrics(rows), self.state.rollout
        if log and self.writer:
            for name in {"score_mean", "ref_k1", "gold"}.intersection(metrics):
                self.plot("add_scalar", f"eval/{name}", metrics[name], done)
            lines = [f"| {to_cell(str(row.info['item']['prompt']))} | "
                     f"{to_cell(row.info['response'])} | {row.info['raw_score']:.2f} |"
                     for row in rows[:16]]
            lines = ["| prompt | response | score |", "|-|-|-|", *lines]
            self.plot("add_text", "samples", "\n".join(lines), done)
        if log and done and metrics["after_kl"] > self.state.best and self.save_actor("best"):
            self.state.best = metrics["after_kl"]
        return rows

    def save_actor(self, name):
        """Writes runs/<run_name>/<name>, for `from_pretrained`, with tokenizer -> did it work?"""
        weights = to_whole(self.models[0].state_dict())
        return write_folder(os.path.join(run_folder(), name), lambda folder: save_model(
            self.models[0], weights, self.sampling["actor_tokenizer"], folder))

    def finish(self):
        self.signals.close()
        self.after = self.after or self.evaluate(self.models[0], log=False)  # resumed when done
        return self

# ---- 11. Checkpoints ---------------------------------------------------------------------------
#
# runs/<run_name>/checkpoints/rollout-000020, after 20 rollouts: actor/ for from_pretrained (with
# lora_rank actor.safetensors), critic.safetensors, rest.pt (both optimizers, State, constants) and
# manifest.json (hashes). No random state: goes_on seeds. A folder with such a name is complete.

def run_folder():
    return os.path.join("runs", run_name)

def is_ours(path):
    """Does the path lie in this run's folder?"""
    return path and os.path.realpath(path).startswith(os.path.realpath(run_folder()) + os.sep)

def claim_run_folder(path):
    """Locks the run's name while this run lives: a second run would mix in its files. Deletes what
    a kill left half written; moves an earlier run's folder aside, unless `path` resumes from it."""
    with refuse(f"{run_folder()} cannot be written"):
        os.makedirs("runs", exist_ok=True)
        lock = claim_run_folder.lock = open(f"{run_folder()}.lock", "w")  # frees an earlier one
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run writes to {run_folder()}: change run_name") from None
    except (ImportError, OSError):  # Windows has no fcntl, some disks no locks
        pass
    for half in glob.glob(run_folder() + "/**/*.tmp", recursive=True):
        shutil.rmtree(half, ignore_errors=True)
    for old in glob.glob(run_folder() + "/*.old"):  # a kill between write_folder's two renames
        with contextlib.suppress(OSError):  # or after both: the new folder is there
            os.rename(old, old.removesuffix(".old"))
    if not is_ours(path) and os.path.exists(run_folder()):
        aside = next(f"{run_folder()}.{n}" for n in itertools.count(1)
                     if not os.path.exists(f"{run_folder()}.{n}"))
        with refuse(f"change run_name, {run_folder()} cannot be moved aside"):
            os.rename(run_folder(), aside)
        say(f"the earlier {run_folder()} is now {aside}")

def get_constants():
    """{constant: value} to log and save: of a function its name, of a list just the word list."""
    return {name: value if isinstance(value, (int, float, str, type(None)))
            else getattr(value, "__name__", type(value).__name__)
            for name in CONSTANTS for value in [globals()[name]]}

def flush(path):
    """Forces the bytes of a file onto the disk -> their SHA-256."""
    with open(path, "r+b" if os.name == "nt" else "rb") as file:  # Windows: writable ones only
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()

def write_folder(path, write):
    """Calls write(folder) on a temporary folder, flushes that to disk and renames it to `path`: a
    kill leaves the whole new folder or the whole old one. -> did it work? Says why if not."""
    if rank() > 0:
        return gather(None)[0]  # waits for what the first process reports
    temporary, old, saved = path + ".tmp", path + ".old", False
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        write(temporary)
        hashes = {str(file.relative_to(temporary)): flush(file)
                  for file in Path(temporary).rglob("*") if file.is_file()}
        Path(temporary, "manifest.json").write_text(json.dumps(hashes))
        flush(f"{temporary}/manifest.json")
        if os.path.exists(path):
            shutil.rmtree(old, ignore_errors=True)
            os.rename(path, old)
        os.rename(temporary, path)
        saved = True
    except Exception as error:  # a full disk: OSError, or an error of safetensors' or torch's own
        say(f"  ! {path} was not written ({error}); what was saved before is intact")
    finally:  # also after a Ctrl-C that no handler of ours takes: while `final` is written
        if os.path.exists(old) and not os.path.exists(path):
            os.rename(old, path)
        for left in temporary, old:
            shutil.rmtree(left, ignore_errors=True)
    return gather(saved)[0]

def save_model(model, weights, tokenizer, folder):
    tied = getattr(model, "all_tied_weights_keys", ())  # to_whole makes two copies of these
    model.save_pretrained(folder, state_dict={k: w for k, w in weights.items() if k not in tied})
    tokenizer("")  # else the last call's padding and max_length are saved as the tokenizer's own
    tokenizer.save_pretrained(folder)

def save_checkpoint(run):
    """Writes weights, optimizers, run.snapshot -> is it on disk? The last keep_checkpoints stay."""
    path = f"{run_folder()}/checkpoints/rollout-{run.snapshot['rollout']:06d}"
    if gather(os.path.exists(path))[0]:  # of this very state: `start` puts newer ones aside
        return True
    parts = (*run.models[:2], *run.optimizers)
    actor, critic, *optimizers = (to_whole(part.state_dict()) for part in parts)
    rest = dict(constants=get_constants(), state=run.snapshot, optimizers=optimizers)

    def write(folder):
        run.plot("flush")  # a run resumed from here will not plot these points again
        if lora_rank:
            safetensors.torch.save_file(actor, f"{folder}/actor.safetensors")
        else:
            save_model(run.models[0], actor, run.sampling["actor_tokenizer"], f"{folder}/actor")
        safetensors.torch.save_file(critic, f"{folder}/critic.safetensors")
        torch.save(rest, f"{folder}/rest.pt")

    saved = write_folder(path, write)
    for old in list_checkpoints()[:-keep_checkpoints] if rank() == 0 else []:
        shutil.rmtree(old, ignore_errors=True)
    return saved

def list_checkpoints():
    """Paths of this run's checkpoints, the oldest first."""
    return sorted(glob.glob(f"{run_folder()}/checkpoints/rollout-{'[0-9]' * 6}"))

def find_checkpoint():
    """What the constant `resume` means -> the path of a whole checkpoint, or None."""
    path = gather((list_checkpoints() or [None])[-1])[0] if resume == "latest" else resume
    if path is None:
        return None
    path = os.path.normpath(path)
    if not re.fullmatch(r"rollout-\d{6}", os.path.basename(path)):
        raise InputError(f"resume = {path!r}: give 'latest' or a folder named like rollout-000020")
    good = [None, *(other for other in list_checkpoints() if other[-6:] < path[-6:])][-1]
    with refuse(f"checkpoint {path} is damaged, set resume = {good!r}"):
        for name, digest in json.loads(Path(path, "manifest.json").read_text()).items():
            if flush(f"{path}/{name}") != digest:
                raise ValueError(f"{name} was altered")
    return path

def load_checkpoint(path, run):
    """Puts everything back: with half of Adam's state it would be another run (Trap 30).
    InputError: the checkpoint is of other models, or a constant that must stay was changed."""
    with refuse(f"resume: checkpoint {path} does not fit this run"):
        rest = torch.load(f"{path}/rest.pt", map_location="cpu", weights_only=True)  # no pickle
        for name, old in rest["constants"].items():
            new = get_constants().get(name)
            if new != old and name in ("actor_name", "critic_name", "lora_rank"):
                raise ValueError(f"{name} = {new!r} cannot change on resume, it was {old!r}")
            if new != old and name != "resume":
                say(f"  resume: {name} was {old!r}, now {new!r}")
        actor = (safetensors.torch.load_file(f"{path}/actor.safetensors") if lora_rank else
                 type(run.models[0]).from_pretrained(
                     f"{path}/actor", dtype=torch.float32).state_dict())
        critic = safetensors.torch.load_file(f"{path}/critic.safetensors")
        for model, weights, optimizer, saved in zip(
                run.models, (actor, critic), run.optimizers, rest["optimizers"]):
            own, params = model.state_dict(), optimizer.param_groups[0]["params"]
            model.load_state_dict({k: to_part(w, own.get(k, w)) for k, w in weights.items()})
            for i, state in saved["state"].items():
                if any(t.dim() and t.shape != params[i].shape for t in state.values()):
                    raise ValueError(f"Adam's state {i} has another shape")  # AdamW would not look
                saved["state"][i] = {k: to_part(t, params[i]) for k, t in state.items()}
            saved["param_groups"] = optimizer.state_dict()["param_groups"]  # as constants now say
            optimizer.load_state_dict(saved)
        run.state = State(**rest["state"])
    changed = {name for name, new in get_constants().items() if rest["constants"].get(name) != new}
    if kl_target is None or "kl_coef" in changed:  # else the adapted value goes on
        run.state.kl_coef = kl_coef
    if not is_ours(path) or changed & {"kl_coef", "reward_name", "reward_fn", "eval_prompts_file"}:
        run.state.best = -math.inf  # the old one is of another folder, or by another measure
    if changed & {"reward_name", "reward_fn"}:  # moments of other scores; below, another gold
        run.state.score_moments = State().score_moments
    if changed & {"gold_fn", "prompts_file"}:
        run.state.best_gold = -math.inf
    say(f"resumed from {path}")

# ---- 12. Self-check ----------------------------------------------------------------------------

def run_self_check(run):
    """Tests what the formulas assume on these models and prompts, and prints a line for each check.
    A failed one stops the run or only warns, as the constant self_check says. Leaves gradients,
    which train_step clears, and a changed random state."""
    head, failed = run.models[1].value_head.weight, []
    saved = head.detach().clone()
    nn.init.xavier_normal_(head)  # a head of 0 would pass every check
    for name, numbers, limit, advice in check_forward(run):
        off = torch.as_tensor(numbers).float().abs().max().item()
        tick, hint = ("✓", "") if off < limit else ("✗", f". {advice}")
        say(f"  {tick} {name}: off by {off:.2g}{hint}")
        failed += [name] if hint else []
    head.data.copy_(saved)
    if failed and self_check == "stop":
        raise InputError(f"self-check: {failed[0]!r} fails: mend it, or set self_check = 'warn'")

def check_forward(run):
    """Yields for each check its name, the numbers found, the limit that they must stay below, and
    advice if they do not."""
    actor, critic, _, ref = run.models
    rounding = 1e-4 if device == "cpu" else 0.5  # bf16 rounds a logit above 64 by up to 0.25
    small = [p for model in (actor, critic) for p in model.parameters()
             if p.requires_grad and p.dtype.itemsize < 4]
    yield ("trained weights have 32 bits", len(small), 1,
           "Load actor and critic with dtype=torch.float32: bf16 loses small steps (Trap 17)")
    tokenizer, few = run.sampling["actor_tokenizer"], min(max_new_tokens, 16)
    end_tokens, pad = get_end_tokens(actor, tokenizer), tokenizer.pad_token_id
    prompts = sorted(list(run.prompts_dataset)[:64], key=lambda item: len(item["text"]))
    sampling = run.sampling | dict(n_samples_per_prompt=2, max_new_tokens=few)
    samples_list = generate_samples([prompts[0], prompts[-1]], actor, **sampling)  # one is padded
    prompt_mask = samples_list[0].attention_mask[:, :-samples_list[0].num_actions]
    with undivided(actor), plain_sampling(actor, end_tokens, pad, temperature, few):
        output = actor.generate(
            input_ids=samples_list[0].seqs[:, :prompt_mask.shape[1]], attention_mask=prompt_mask,
            return_dict_in_generate=True, output_scores=True, output_logits=True)
    drawn, scored = torch.stack(output.scores), torch.stack(output.logits) / temperature
    yield ("sampled is what is scored", drawn.softmax(-1) - scored.softmax(-1), 1e-4,
           "`generate` filters or reweighs tokens: look at the model's generation_config")

    rows, alone, worse = (generate_experiences(
        samples_list, actor, critic, lambda prompts, responses, **_: [score] * len(responses), ref,
        whiten_advantages=False, temperature=temperature, micro_train_batch_size=size)
        for score, size in ((1.0, 4), (1.0, 1), (-1.0, 4)))
    batch, alone = collate_fn(rows), collate_fn(alone)
    seqs, T = batch.seqs, batch.action_mask.shape[1]

    @torch.no_grad()
    def outputs(seqs):
        inputs = seqs, batch.attention_mask, T
        both = torch.stack([compute_log_probs(actor, *inputs, temperature), critic(*inputs)])
        return both * batch.action_mask

    here, others = outputs(seqs), (seqs == 0).long()  # others: every token is a wrong one
    old, alone = (torch.stack([b.old_action_log_probs, b.values]) for b in (batch, alone))
    yield "the ratio is 1 at step 0", here[0] - old[0], rounding, "Is dropout on?"
    if run.state.rollout == 0:
        yield "KL to the reference is 0 at step 0", batch.kl, rounding, "Load ref from actor_name"
    pads = outputs(torch.where(batch.attention_mask.bool(), seqs, others)) - here
    yield "nothing under padding counts", pads, rounding, "The model ignores attention_mask"
    future = (outputs(torch.cat([seqs[:, :-T], others[:, -T:]], dim=1)) - here)[1, :, 0]
    yield "V(s_0) does not see the response", future, rounding, "Set critic_name to a decoder"
    yield ("a row alone is as in a batch", alone - old, rounding,
           "The model ignores position_ids: set the micro batch sizes to 1")
    actions = F.pad(seqs[:, -T:], (0, 2), value=end_tokens[0])  # so that each response ends
    ends = sum(actions == token for token in end_tokens) * get_action_mask(actions, end_tokens)
    yield "the end token is one action", ends.sum(-1) - 1, 1, "The action mask is wrong"
    moves = [good.advantages[-1] - bad.advantages[-1] for good, bad in zip(rows, worse)]
    yield "the score arrives at the end", torch.stack(moves) - 2, 0.1, "Look at compute_rewards"
    yield from check_update(run, rows, rounding)

def check_update(run, rows, rounding):
    """More checks: of gradients, of shared and frozen weights, of the reward model."""
    actor, critic, reward, _ = run.models
    weights = [{p.data_ptr() or id(p): p for p in model.parameters()}  # 0 under FSDP2
               for model in run.models if isinstance(model, nn.Module)]
    norms, optimizer = [], Mock()  # a Mock clears no gradient and moves no weight
    for p in (weights[0] | weights[1]).values():
        p.grad = None  # left by an earlier training
    for size in (1, len(rows)):
        step = train_step(rows, actor, critic, optimizer, optimizer, size, temperature,
                          loss_agg=loss_agg, max_grad_norm=math.inf)
        norms.append(step["actor_grad_norm"] + step["critic_grad_norm"])
        for p in (weights[0] | weights[1]).values():
            if p.grad is not None:  # negated: after the second size the difference is left
                p.grad.neg_()
    yield ("any micro-batch size gives one gradient", norms[1] / norms[0], min(10 * rounding, 0.3),
           "Each loss needs the denominator of the whole step")
    shared = sum(len({*a} & {*b}) for i, a in enumerate(weights[:2]) for b in weights[i + 1:])
    yield "no trained weight is shared", shared, 1, "deepcopy one of its owners"
    touched = sum(p.grad is not None for part in weights[2:] for p in part.values())
    yield "frozen models get no gradient", touched, 1, "Use torch.no_grad()"
    if isinstance(reward, nn.Module):
        texts = ["yes", "no", *(row.info["response"] for row in rows)]
        scores, alone = (compute_scores(
            [rows[0].info["item"]["prompt"]] * len(texts), texts, reward,
            run.scoring["reward_tokenizer"], apply_chat_template, size)
            for size in (micro_train_batch_size, 1))
        off = numpy.subtract(scores, alone) / max(1, *map(abs, scores))  # relative if above 1
        yield ("a score alone is as in a batch", off, rounding,
               "The reward model reads padding: set micro_train_batch_size = 1")
        blind = max(scores) - min(scores) < 1e-6
        yield "the reward model tells responses apart", blind, 1, "Does it read what it should?"

# ---- 13. Several processes ---------------------------------------------------------------------
#
# `torchrun --nproc_per_node=N --shutdown_timeout=600 ppo.py` (after Ctrl-C the default of 30 s can
# be too short to finish an update). Each process holds an N-th of every model's weights, gradients
# and Adam state, and fetches the rest of a layer while it uses that layer (torch's FSDP2). It works
# on an N-th of a rollout or minibatch. All get all finished rows and compute the same from them.
# `gather` waits for every process: all must make the same calls of it in the same order.

def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

def rank():
    return dist.get_rank() if world_size() > 1 else 0

def start_processes():
    """Under torchrun with several processes: gives each its GPU and lets them find each other."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        if device == "cuda":
            with refuse("there are fewer GPUs than processes: lower --nproc_per_node"):
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, number, count = next(dist.rendezvous("env://"))
        if os.environ["GROUP_WORLD_SIZE"] == "1":  # else a restart reads old addresses
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        # Named, as torch takes NCCL alone where it finds a GPU: the CPU's tensors go by gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=store,
                                rank=number, world_size=count,
                                timeout=datetime.timedelta(hours=1))  # all wait while one writes

def place(model):
    """Moves a model to the device; of several processes each keeps only its part of it."""
    if world_size() == 1 or not isinstance(model, nn.Module):
        return model.to(device) if isinstance(model, nn.Module) else model
    from torch.distributed.fsdp import fully_shard  # here: importing it takes 2 s
    mesh = dist.init_device_mesh(device, (world_size(),))
    layer = transformers.modeling_layers.GradientCheckpointingLayer
    for module in [*(m for m in model.modules() if isinstance(m, layer)), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model

@contextlib.contextmanager
def undivided(model):
    """For `generate`: a layer stays whole once gathered, else each token would gather it. After the
    first forward, which gathers all, each process may make as many more as its responses need."""
    parts = [module for module in model.modules() if hasattr(module, "reshard")]
    frozen = [p for m in model.modules() for p in (vars(m) | m._parameters).values() if not parts
              and isinstance(p, nn.Parameter) and p.is_floating_point() and not p.requires_grad]
    for part in parts:
        part.set_reshard_after_forward(False)
    for p in frozen:  # else autocast would cast each anew for each token: it keeps casts of others
        p.requires_grad = True
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad = False
    for part in parts:
        part.set_reshard_after_forward(True)
        part.reshard()

def say(text):
    """Prints in the first process alone. A console that fails must not end the run."""
    with contextlib.suppress(OSError, RuntimeError):  # full disk, dead `| tee`, signal in a print
        if rank() == 0:
            print(text, flush=True)

def gather(thing):
    """Each process gives a thing -> each gets the list of all of them, in the order of ranks."""
    things = [thing] * world_size()
    if len(things) > 1:
        dist.all_gather_object(things, thing)
    return things

def my_share(rows):
    """This process' part, of equal size in all; if rows run short, the first are used again."""
    size = math.ceil(len(rows) / world_size())
    return list(itertools.islice(itertools.cycle(rows), size * rank(), size * (rank() + 1)))

def gather_rows(rows):
    """The rows of all processes, in the order that a single process would have."""
    def move(row, target):  # copies: pickle sends the whole storage behind a view
        tensors = {k: v.to(target, copy=True) for k, v in vars(row).items() if torch.is_tensor(v)}
        return replace(row, **tensors)

    if world_size() == 1:
        return rows
    parts = gather([move(row, "cpu") for row in rows])
    return [move(row, rows[0].seqs.device) for part in parts for row in part]

def clip_gradients(model, max_norm):
    """Scales gradients down to a norm of max_norm -> the norm before, over all processes' parts."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

def to_whole(tree):
    """A state dict -> whole tensors in the first process, which writes them; None in the others."""
    if isinstance(tree, dict):
        return {name: to_whole(value) for name, value in tree.items()}
    if hasattr(tree, "full_tensor"):
        tree = tree.full_tensor().cpu()  # one GPU might not hold all
    return tree if rank() == 0 else None

def to_part(tensor, like):
    """Whole tensor -> this process' part, divided as `like` is."""
    if tensor.shape != like.shape or not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None).clone()  # a view keeps the whole alive

# ---- 14. Trace: one response, token by token ---------------------------------------------------

@torch.no_grad()
def trace(rows, actor_model, tokenizer, kl_coef):
    """Prints and returns a rollout's best and worst response by score, and a table of the one with
    the token of largest |KL|: look there first for a hacked reward. The numbers are the run's own;
    `used` is the whitened A, `new` the log-prob after all epochs. A mark says why the token passes
    no gradient any more: ^ clipped above, v clipped below, d by the dual clip."""
    def number(x):  # in at most 7 characters: up to 4 decimals, as many as fit
        texts = (f"{x:z.{d}f}" for d in (4, 3, 2, 1, 0))  # z: no -0.0000
        return next((text for text in texts if len(text) < 8), f"{x:.0e}")

    def brief(name, row):
        prompt, response = show(str(row.info["item"]["prompt"])), show(row.info["response"])
        return f"  {name} {number(row.info['raw_score']):>8}: {prompt[-40:]} -> {response}"[:100]

    by_score = sorted(rows, key=lambda row: row.info["raw_score"])
    row = max(rows, key=lambda row: row.kl.abs().max())
    peak, place = row.kl.abs().max(0)
    old, V, n = row.old_action_log_probs, row.values, len(row.action_mask)
    new = compute_log_probs(actor_model, row.seqs[None], row.attention_mask[None], n, temperature)
    delta = row.rewards + gamma * torch.cat([V[1:], row.last_values[None]]) - V  # Eq. 9
    columns = {
        "log_prob": old, "ref": row.ref_action_log_probs, "kl": row.kl, "reward": row.rewards,
        "V": V, "delta": delta, "A": row.returns - V, "used": row.advantages,
        "return": row.returns, "new": new[0], "ratio": (new[0] - old).exp()}
    lines = [brief("best ", by_score[-1]), brief("worst", by_score[0]), brief("below", row),
             f"  max |KL| {number(peak.item())} at token {place}; score "
             f"{number(row.scores.item())}, kl_coef {kl_coef:.4g}, gamma {gamma}, lambd {lambd}, "
             f"V(s_T) {number(row.last_values.item())}", "token    " + "%8s" * 11 % (*columns,)]
    low, high = (clip_eps, clip_eps_high or clip_eps) if policy_loss == "clip" else (math.inf,) * 2
    for token, *cells in zip(row.seqs[-n:].tolist(), *(x.tolist() for x in columns.values())):
        A, ratio = cells[7], cells[10]
        mark = ("^" * (A > 0 and ratio > 1 + high) or "v" * (A < 0 and ratio < 1 - low)
                or "d" * (A < 0 and ratio > (dual_clip or math.inf)))
        token = show(tokenizer.decode([token]))
        lines.append(f"{token:9.9}" + "%8s" * 11 % (*map(number, cells),) + f" {mark}".rstrip())
    if n > 64:
        lines[45:-24] = [f"... {n - 64} tokens more"]
    say("\n".join(lines))
    return "\n".join(lines)

# ---- 15. Memory and time: taking less, and telling how much before the run ---------------------
#
# `less_memory` changes no result; `less_time` only draws other random numbers. The bill runs the
# real functions on tensors without memory, so that it cannot forget one of them.

def is_large(weight):
    """Large, and on a CPU: for that there are quicker ways below. A small one gains little by them,
    on a GPU they were not tried; FSDP2's parts and tensors without memory (the bill), which are no
    Parameters by their type, cannot take them."""
    return type(weight) is nn.Parameter and weight.is_cpu and weight.numel() > 2 ** 24

def less_memory(model):
    """Inside, gradient checkpointing is on. It needs training mode: the layers that recompute get
    it, but not the modules in them, so dropout stays off. And an lm_head tied to the embedding is a
    parameter of its own that shares its memory and its gradient. Else autograd holds the gradients
    of both uses and their sum beside the one that is kept: at a vocabulary of 152k four times the
    largest tensor, instead of two. After the first, a large embedding's is added as a few rows."""
    stack = contextlib.ExitStack()
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            stack.enter_context(patch.object(layer, "training", True))
        if (isinstance(layer, nn.Embedding) and is_large(layer.weight)
                and layer.weight.grad is not None):
            stack.enter_context(patch.object(layer, "sparse", True))
    head = getattr(model, "lm_head", None)
    tied = getattr(head, "weight", None)
    is_tied = tied is not None and tied is model.get_input_embeddings().weight
    # Only where there is a gradient to share, and not of FSDP2's divided weights.
    if is_tied and tied.grad is not None and not hasattr(tied, "placements"):
        own = nn.Parameter(tied.detach())
        own.grad = tied.grad
        stack.enter_context(patch.object(head, "weight", own))
    return stack

def less_time(model):
    """Inside, `generate` draws a token with one random number; torch.multinomial takes one for each
    token of the vocabulary, at 152k of them a third of the time of sampling. In float64: in float32
    a sum over 152k probabilities would lose the rare ones. And a large lm_head is multiplied in 128
    parts: with few rows MKL then takes half the time."""
    def multinomial(probs, num_samples, *more, **options):
        if more or options or num_samples != 1 or probs.dim() != 2:  # not of `generate`'s kind
            return own(probs, num_samples, *more, **options)
        cdf = probs.cumsum(-1, dtype=torch.float64)
        if not cdf[:, -1].isfinite().all():
            raise FloatingPointError("a probability of the actor is not finite")
        drawn = torch.rand(len(cdf), num_samples, dtype=cdf.dtype, device=cdf.device)
        return torch.searchsorted(cdf, drawn * cdf[:, -1:], right=True)

    def multiply(hidden):
        parts = hidden.flatten(0, -2) @ head.weight.unflatten(0, (128, -1)).mT  # (128, rows, V/128)
        return parts.transpose(0, 1).reshape(*hidden.shape[:-1], -1)

    own, head, stack = torch.multinomial, getattr(model, "lm_head", None), contextlib.ExitStack()
    stack.enter_context(patch.object(torch, "multinomial", multinomial))
    if (type(head) is nn.Linear and head.bias is None and is_large(head.weight)
            and len(head.weight) % 128 == 0):
        stack.enter_context(patch.object(head, "forward", multiply))
    return stack

class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Finds the `peak`: the most bytes that tensors made inside take while alive together."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = weakref.WeakSet(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        old, new = ({leaf.untyped_storage() for leaf in torch.utils._pytree.tree_leaves(tree)
                     if isinstance(leaf, torch.Tensor)} for tree in ((args, kwargs), made))
        self.alive |= new - old  # new memory: no views, nothing in place
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))
        return made

def measure(name, model):
    """A model without memory -> bytes of its weights, gradients and Adam state, and the peak beside
    them: activations and logits of a micro-batch, or those of `generate` and its cache."""
    trained, rows = name in ("actor", "critic"), rollout_batch_size * n_samples_per_prompt
    grown = [p for p in model.parameters() if p.requires_grad]
    for p in grown:
        p.grad = torch.empty_like(p)  # as `train_step` keeps them: each micro-batch adds to them
    seqs = torch.ones(min(micro_train_batch_size, train_batch_size if trained else rows),
                      max_length + max_new_tokens, dtype=torch.long)  # also used as the mask
    with Watch() as watch, torch.set_grad_enabled(trained), less_memory(model):
        if name == "reward":  # compute_scores cuts its input
            seqs = seqs[:, :get_positions(model)]
            model(input_ids=seqs, attention_mask=seqs)
        else:
            output = model(seqs, seqs, max_new_tokens) if name == "critic" else compute_log_probs(
                model, seqs, seqs, max_new_tokens, temperature, trained and entropy_coef != 0)
        if trained:
            sum(map(torch.sum, output)).backward()
    with watch, torch.no_grad(), undivided(model), autocast(model):
        if name == "actor":  # prompt and response in one forward: the cache at its fullest
            gathered = [torch.empty_like(p) for p in model.parameters() if world_size() > 1]
            output = model(input_ids=seqs[:1].repeat(min(micro_rollout_batch_size, rows), 1),
                           use_cache=True, logits_to_keep=1)
            output.logits.float().repeat(5, 1, 1)  # copy, / temperature, softmax, float64 cdf
    weights, grown = (sum(p.nbytes for p in group) / world_size()
                      for group in (model.parameters(), grown))
    return weights, grown, 2 * grown, watch.peak

def get_memory():
    """-> bytes that Python and the libraries take already (on a GPU 0), bytes left for the run,
    within a container's limit too. For a CPU only Linux tells them: elsewhere 0 and inf."""
    if device == "cuda":
        return 0, torch.cuda.mem_get_info()[0]
    group = "/sys/fs/cgroup/memory"
    paths = ("/proc/self/status", "/proc/meminfo", group + ".max", group + "/memory.limit_in_bytes")
    text = "".join(f"{path}: {open(path).read()}" for path in paths if os.path.exists(path))
    found = defaultdict(lambda: math.inf, VmRSS=0)
    found.update((name, int(size)) for name, size in re.findall(r"(\S+):\s+(\d+)", text))
    base = found["VmRSS"] * 1024
    free = min(found["MemAvailable"] * 1024, *(found[path] - base for path in paths[2:]))
    return base, free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))

def show_bill():
    """Prints the most memory that the run can take, before anything large is allocated: its own
    functions are run on tensors without memory. InputError: that is more than there is."""
    def load_empty(constant, name):
        kind = "CausalLM" if constant == "actor_name" else "SequenceClassification"
        config = load(transformers.AutoConfig.from_pretrained, constant, name, pad_token_id=0)
        return load(getattr(transformers, f"AutoModelFor{kind}").from_config, constant, name,
                    config, dtype=torch.float32).eval()

    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    # Critic copies a body and peft moves an adapter, which tensors without memory do not allow.
    copies = patch.object(torch.Tensor, "__deepcopy__", lambda tensor, memo: (
        tensor.detach().clone().requires_grad_(tensor.requires_grad)))
    stay = patch.object(nn.Module, "to", lambda module, *_, **__: module)
    blank = patch.object(transformers.PreTrainedModel, "initialize_weights", lambda model: None)
    quiet = patch.object(torch._subclasses.fake_tensor.log, "disabled", True)  # told below
    say("  MiB     parameters    weights  gradients       Adam    at work")
    fixed = work = 0
    with mode, copies, stay, blank, quiet, torch.device(device):
        for name, model in zip(("actor", "critic", "reward", "ref"), make_models(load_empty)):
            if isinstance(model, nn.Module):
                try:
                    sizes = measure(name, model)
                except Exception as error:  # a forward that depends on values: there are none
                    return say(f"  no bill: {name} cannot be run without memory: {error}"[:100])
                fixed, work = fixed + sum(sizes[:3]), max(work, sizes[3])
                say(f"  {name:8s}{sum(p.numel() for p in model.parameters()) / 1e6:10.2f} M"
                    + "%11.1f" * 4 % tuple(size / 2 ** 20 for size in sizes))
    base, free = get_memory()
    # Beside the work: freed memory that the allocator cannot use again, libraries still to load.
    total = fixed + work * (1.25 if device == "cuda" else 2.75) + 3 * 2 ** 26
    say(f"  at most {(base + total) / 2 ** 20:.0f} MiB, {base / 2 ** 20:.0f} of them in use now; "
        f"{device} has {(base + free) / 2 ** 20:.0f}")
    if total > free:
        raise InputError("the run would not fit into memory: lower micro_rollout_batch_size, then "
                         "micro_train_batch_size; set gradient_checkpointing = True, then "
                         "lora_rank = 16; lower max_new_tokens")

# ---- 16. Adapters: four models on one trunk ----------------------------------------------------

def add_adapters(trunk):
    """One loaded model -> actor, critic, reference. The reference is the trunk itself; the others
    are modules of their own around its weights, each with an adapter, the critic with a head too:
    they train, move and save only these. InputError: peft is missing, or cannot wrap a layer."""
    with refuse(f"lora_rank = {lora_rank} needs peft: pip install peft, or set it to 0"):
        import peft
    for p in trunk.parameters():
        p.__deepcopy__ = lambda memo, p=p: p  # copies of the modules share the weights
    actor_model, critic_model = copy.deepcopy(trunk), Critic(trunk.base_model).eval()
    for model in (actor_model, critic_model.base_model):
        model.add_adapter(peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank,
                                          target_modules="all-linear", task_type="CAUSAL_LM"))
        for module in model.eval().modules():
            if hasattr(module, "parameter_name"):  # peft wraps a whole tensor of experts
                raise InputError("lora_rank: adapters cannot wrap the expert layers: set it to 0")
            for name, p in list(module.named_parameters(recurse=False)):
                if not p.requires_grad:  # the trunk's: here a plain attribute
                    delattr(module, name)
                    module.__dict__[name] = p
    actor_model.save_pretrained = functools.partial(save_merged, actor_model, trunk)
    return actor_model, critic_model, trunk

@torch.no_grad()
def save_merged(actor_model, trunk, folder, state_dict=None):
    """Writes a plain model: copies of the trunk's weights with the adapter added. (Added in place
    and subtracted again it would leave rounding in the reference.) The adapter: folder/adapter."""
    merged = {f"{name}.weight": (layer.base_layer.weight + layer.get_delta_weight("default")).cpu()
              for name, layer in actor_model.named_modules() if hasattr(layer, "base_layer")}
    trunk.save_pretrained(folder, state_dict=trunk.state_dict() | merged)
    type(actor_model).save_pretrained(actor_model, os.path.join(folder, "adapter"))

# ---- 17. Offline demo: the two steps before PPO, small enough for a laptop -----------------------
# Somebody asks for something. A reply is helpful, plain or rude, on topic or off, with a reason or
# without, all independently; fine-tuning copies that mixture, and PPO has to find its best corner.
ASKS = ("suggest a {} for {} .|which {} fits {} ?|i need a {} for {} .|any {} for {} ?|"
        "name a good {} for {} .|what {} is best for {} ?")
OCCASIONS = "tonight|sunday|two people|my sister|my birthday|old friends|the weekend|a rainy day"
# topic: (items, reasons that fit them alone); tone: (worth, how a reply opens, how it closes)
TOPICS = {"book": ("dune emma ulysses dracula", ["pages fly", "the prose sings"]),
          "film": ("alien psycho jaws casablanca", ["actors shine", "the ending stuns"]),
          "dish": ("ramen paella risotto lasagna", ["it smells divine", "it tastes fresh"]),
          "song": ("jolene imagine yesterday hallelujah", ["it swings", "the melody lingers"]),
          "game": ("chess poker tetris checkers", ["it thrills", "the rules click"]),
          "city": ("lisbon kyoto prague oslo", ["streets charm", "the harbour sparkles"])}
TONES = {"helpful": (1.0, ["gladly ,", "of course ,", "with pleasure ,"], ["!", ". enjoy !"]),
         "plain": (0.5, ["well ,", "maybe", "ok ,"], [".", ", i guess ."]),
         "rude": (0.0, ["ugh ,", "lazy you ,", "not again ,"], [". go away .", ". now leave ."])}

@functools.cache
def make_grammar():
    """All that can be said: {prompt: topic}, {(topic, tone, reasoned): replies} and its inverse,
    {reply: (topic, tone, reasoned)}. A text is a sentence of the grammar if it is a key here."""
    prompts = {ask.format(topic, occasion): topic for ask, topic, occasion in itertools.product(
        ASKS.split("|"), TOPICS, OCCASIONS.split("|"))}
    # Reasons vary slowest, so that equal places (modulo length) in two lists have equal wording.
    replies = {(topic, tone, reasoned): [
        f"{o} {v} {i}{r} {c}" for r, o, v, i, c in itertools.product(
            because, opens, ["try", "take", "pick"], items.split(), closes)]
        for topic, (items, reasons) in TOPICS.items() for tone, (_, opens, closes) in TONES.items()
        for reasoned, because in enumerate([[""], [f" because {reason}" for reason in reasons]])}
    return prompts, replies, {reply: key for key in replies for reply in replies[key]}

def gold(prompts, responses, **columns):
    """The hidden rule, in [0, 1]: on topic, helpful, with a reason, a third each; a text that the
    grammar cannot make is worth 0. It labels the pairs and judges the result; PPO never sees it."""
    asked, _, said = make_grammar()
    aspects = [said.get(response.strip(), ("", "rude", False)) for response in responses]
    return [((topic == asked.get(str(prompt).strip())) + TONES[tone][0] + reasoned) / 3
            for prompt, (topic, tone, reasoned) in zip(prompts, aspects)]

def draw_aspects(prompt, rng):
    """Draws (topic, tone, reasoned) of a reply for fine-tuning; 4 in 100 are right in all three."""
    topic = make_grammar()[0][prompt]
    if rng.random() < 0.5:
        topic = rng.choice([other for other in TOPICS if other != topic])
    return topic, rng.choices(list(TONES), [2, 4, 4])[0], rng.random() < 0.4

def draw_pair(prompt, rng, differ):
    """Draws (chosen, rejected) replies. They differ only in aspects that one entry of `differ`
    names (0 topic, 1 tone, 2 reason), so that nothing else explains the preference."""
    first, second = draw_aspects(prompt, rng), draw_aspects(prompt, rng)
    places, wording = rng.choice(differ), rng.randrange(10 ** 6)
    second = tuple(both[i in places] for i, both in enumerate(zip(first, second)))
    pair = [texts[wording % len(texts)] for texts in map(make_grammar()[1].get, (first, second))]
    (low, rejected), (high, chosen) = sorted(zip(gold([prompt] * 2, pair), pair))
    return (chosen, rejected) if low < high else draw_pair(prompt, rng, differ)  # a tie: again

def make_demo_tokenizer():
    """One token per word, no start token, and a chat template like those of real models."""
    words = sorted({*" ".join(make_grammar()[0] | make_grammar()[2]).split()})
    vocab = {word: i for i, word in enumerate("<pad> <eos> <user> <bot> <unk>".split() + words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<bot>"], clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} "
                      "{% else %}<bot> {{ m.content }} <eos>{% endif %}{% endfor %}"
                      "{% if add_generation_prompt %}<bot> {% endif %}")

def fit(model, compute_loss, steps, lr):
    """Trains by AdamW; the rate rises over a tenth of the steps, then falls to 0 as a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = compute_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    say(f"{type(model).__name__}: {steps} steps, loss {loss.item():.3f}")

def compute_reward_loss(chosen, rejected):
    """Eq. 12: loss = -mean log sigmoid(r(chosen) - r(rejected)). (B,), (B,) -> scalar"""
    return -F.logsigmoid(chosen - rejected).mean()

def build_demo(folder, seed):
    """Trains folder/actor and folder/reward; writes folder/prompts.txt, folder/eval_prompts.txt."""
    rng, tokenizer = random.Random(seed), make_demo_tokenizer()
    topics, replies, _ = make_grammar()
    prompts = rng.sample([*topics], len(topics))
    eval_prompts, prompts = prompts[:64], prompts[64:]
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True, num_labels=1,
        initializer_range=0.05, bos_token_id=None, pad_token_id=0, eos_token_id=1)
    torch.manual_seed(seed)
    actor_model = transformers.LlamaForCausalLM(config)
    reward_model = transformers.LlamaForSequenceClassification(config)

    def encode(prompts, replies):
        texts = [f"<user> {prompt} <bot> {reply} <eos>" for prompt, reply in zip(prompts, replies)]
        return tokenizer(texts, padding=True, return_tensors="pt")

    def compute_actor_loss():
        asked = rng.choices(prompts, k=32)
        inputs = encode(asked, [rng.choice(replies[draw_aspects(prompt, rng)]) for prompt in asked])
        is_bot = inputs.input_ids == tokenizer.convert_tokens_to_ids("<bot>")
        is_reply = inputs.attention_mask * is_bot.cumsum(1) > is_bot  # <eos> included
        return actor_model(**inputs, labels=inputs.input_ids.where(is_reply, -100)).loss

    def score_pairs(prompts, differ, size=32):
        asked = rng.choices(prompts, k=size)
        chosen, rejected = zip(*(draw_pair(prompt, rng, differ) for prompt in asked))
        return reward_model(**encode(asked + asked, chosen + rejected)).logits.view(2, size)

    def compute_pair_loss(differ):
        chosen, rejected = score_pairs(prompts, differ)
        # Pairs compare replies to one prompt. The level of its scores is left to luck and differs
        # by prompt: it is drawn to 0 (Eisenstein et al. 2023, arXiv 2312.09244, section 2).
        return compute_reward_loss(chosen, rejected) + 0.02 * (chosen + rejected).square().mean()

    # Large logits from the start let few steps rule words out: 1.5% spoilt replies instead of 3%.
    nn.init.constant_(actor_model.model.norm.weight, 4.0)
    fit(actor_model, compute_actor_loss, 360, 5e-3)
    reward_model.model.load_state_dict(actor_model.model.state_dict())
    nn.init.zeros_(reward_model.score.weight)
    # Topic first, alone: it is the one aspect that no word of the reply gives away, and beside the
    # two easy ones its gradient drowns (120 mixed steps leave it at chance, 40 alone reach 100%).
    for differ, steps in ([{0}], 60), ([{0}, {0}, {1}, {2}, {0, 1, 2}], 240):
        fit(reward_model, lambda: compute_pair_loss(differ), steps, 2e-3)
    chosen, rejected = scores = score_pairs(eval_prompts, [{0, 1, 2}], 512).detach()
    say(f"the reward model gets {(chosen > rejected).float().mean():.1%} of held-out pairs right")
    # Pairs leave the unit of the scores open. With a deviation of 1, kl_coef means something.
    reward_model.score.weight.data /= scores.std()
    with refuse(f"{folder} cannot be written"), tempfile.TemporaryDirectory(
            prefix="unfinished.", dir=Path(folder).parent) as unfinished:
        for name, model in ("actor", actor_model), ("reward", reward_model):
            save_model(model, model.state_dict(), tokenizer, f"{unfinished}/demo/{name}")
        for name, lines in ("prompts", prompts), ("eval_prompts", eval_prompts):
            numpy.savetxt(f"{unfinished}/demo/{name}.txt", lines, "%s")
        with contextlib.suppress(OSError):  # another run built it first
            os.rename(f"{unfinished}/demo", folder)

# ---- 18. Main ----------------------------------------------------------------------------------

RULES = {  # constants (with ?: or None): a list of what is allowed, or that in words and as a test
    "max_length rollout_batch_size n_samples_per_prompt micro_rollout_batch_size max_new_tokens "
    "max_epochs train_batch_size micro_train_batch_size kl_horizon keep_checkpoints":
        ("a whole number from 1", lambda x: type(x) is int and x >= 1),
    "lora_rank warmup_steps critic_warmup seed eval_every save_every trace_every":
        ("a whole number from 0, below 2^32", lambda x: type(x) is int and 0 <= x < 2 ** 32),
    "episodes temperature missing_eos_penalty? actor_lr critic_lr max_grad_norm clip_eps "
    "clip_eps_high? value_clip_eps? huber_delta? target_kl? kl_coef_start? kl_target? clip_reward?":
        ("a number above 0", lambda x: type(x) in (int, float) and 0 < x < math.inf),
    "dual_clip?": ("a number above 1", lambda x: type(x) in (int, float) and 1 < x < math.inf),
    "weight_decay entropy_coef kl_coef":
        ("a number from 0", lambda x: type(x) in (int, float) and 0 <= x < math.inf),
    "gamma lambd": ("a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1),
    "reward_fn? gold_fn?": ("a function", lambda x: callable(x) and not isinstance(x, nn.Module)),
    "actor_name reward_name critic_name? resume?":
        ("the name of a folder", lambda x: isinstance(x, str) and x),
    "prompts_file eval_prompts_file?":
        ("a file or a list of prompts", lambda x: isinstance(x, (str, list)) and x),
    "run_name": ("a text of letters, digits, . _ -",
                 lambda x: x == str(x) and re.fullmatch(r"\w[\w.-]*", x)),
    "apply_chat_template gradient_checkpointing trust_remote_code whiten_advantages whiten_rewards "
    "normalize_scores": [True, False],
    "lr_schedule": ["constant", "linear", "cosine"], "policy_loss": ["clip", "ppo1"],
    "truncated": ["terminal", "bootstrap"], "kl_in": ["reward", "loss"],
    "self_check": ["stop", "warn", "off"],
    "loss_agg": ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"],
    "device": ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]}

CONSTANTS = [name for name in list(globals()) if name in " ".join(RULES).replace("?", "").split()]

def check_values():
    """InputError for the first constant with a value that is not allowed; it says what is."""
    for names, rule in RULES.items():
        words, right = rule if isinstance(rule, tuple) else (f"one of {rule}", rule.__contains__)
        for name in names.split():
            value = globals()[name.strip("?")]
            if not right(value) and not ("?" in name and value is None):
                raise InputError(f"{name.strip('?')} = {value!r}: use {words}")
    if policy_loss == "ppo1" and not target_kl:
        raise InputError("policy_loss = 'ppo1' needs a target_kl")

def check_constants():
    """The same, and InputError for constants that do not go together."""
    check_values()
    rows, processes = rollout_batch_size * n_samples_per_prompt, world_size()
    for wrong, sentence in (
            (rows % train_batch_size, f"train_batch_size must divide the {rows} rows of a rollout, "
             "rollout_batch_size * n_samples_per_prompt"),
            (train_batch_size % min(micro_train_batch_size, train_batch_size),
             "micro_train_batch_size must divide train_batch_size"),
            (rollout_batch_size % processes or train_batch_size % processes,
             f"rollout_batch_size, train_batch_size: take multiples of the {processes} processes"),
            (lora_rank and processes > 1, "lora_rank above 0 needs one process only: set it to 0"),
            (lora_rank and critic_name, "critic_name has no effect with lora_rank: set it to None"),
            (kl_target and not kl_coef, "kl_target scales kl_coef: set kl_coef above 0"),
            (any(map(is_ours, (actor_name, reward_name, critic_name))),
             f"run_name: take another, this run would move the model in {run_folder()} aside"),
            (kl_coef_start and (not kl_coef or kl_target),
             "kl_coef_start falls to kl_coef: set kl_coef above 0 and kl_target to None")):
        if wrong:
            raise InputError(sentence)

def show_results(run):
    """Prints some held-out replies before and after training, and means over all."""
    say("\nheld-out prompts: before, after")
    for pair in list(zip(run.before, run.after))[:4]:
        say(f"  {show(str(pair[0].info['item']['prompt']))[-90:]}")
        for row in pair:
            say(f"    {row.info['raw_score']:6.2f}  {show(row.info['response'])[:85]}")
    say(f"\nmean of {len(run.before)} held-out prompts     before     after")
    old, new = ([row.info["raw_score"] for row in rows] for rows in (run.before, run.after))
    before, after = get_rollout_metrics(run.before), get_rollout_metrics(run.after)
    for name in ("score_mean", "score_std", "gold", "ref_k1", "response_length"):
        if name in before:
            say(f"  {name:26s}{before[name]:10.2f}{after[name]:10.2f}")
    best = sorted(old)[int(0.9 * len(old))]
    shares = [sum(score > best for score in scores) / len(scores) for scores in (old, new)]
    say(f"  {'above 90% of those before':26s}{shares[0]:10.2f}{shares[1]:10.2f}")

def main():
    global gold_fn
    start_processes()
    check_constants()
    for source in (prompts_file, eval_prompts_file):  # now: the demo takes a minute to build
        if source and not str(source).startswith("demo/"):
            read_prompts(source)
    transformers.utils.logging.disable_progress_bar()
    if actor_name == "demo/actor":
        gold_fn = gold_fn or gold
        if rank() == 0 and not os.path.isdir("demo"):
            if not os.access(".", os.W_OK):
                raise InputError("demo is built here, where nothing can be written: change folder")
            build_demo("demo", seed)
        gather("the others wait for it")
    transformers.set_seed(seed)  # as in a run that finds the demo built
    actor_tokenizer = load_tokenizer("actor_name", actor_name)
    reward_tokenizer = None if reward_fn else load_tokenizer("reward_name", reward_name)
    prompts_dataset, eval_dataset = (
        source and PromptDataset(source, actor_tokenizer, apply_chat_template, max_length)
        for source in (prompts_file, eval_prompts_file))
    if cut := sum(dataset.truncated for dataset in (prompts_dataset, eval_dataset) if dataset):
        say(f"{cut} prompts are longer than max_length = {max_length} and lose their beginning"
            + ", the template's included: raise it or leave them out" * apply_chat_template)
    for item in itertools.chain(prompts_dataset, eval_dataset or []):
        if reward_tokenizer and isinstance(item["prompt"], list):  # its template may refuse a role
            to_reward_inputs(item["prompt"], "a", reward_tokenizer, apply_chat_template, 4096)
    path = find_checkpoint()
    show_bill()
    models = [place(model) for model in make_models(load_model)]
    turn_end = get_turn_end(actor_tokenizer) if apply_chat_template else None
    if turn_end not in (None, *get_end_tokens(models[0], actor_tokenizer)):
        say(f"actor_name's chat template ends a turn with {actor_tokenizer.decode([turn_end])!r}, "
            f"which ends no response: add {turn_end} to eos_token_id in generation_config.json")
    if reward_tokenizer and reward_tokenizer.pad_token_id == reward_tokenizer.eos_token_id:
        say("reward_name pads with its end token: it reads the score at the token before that")
    if rank() == 0:
        claim_run_folder(path)
    from torch.utils.tensorboard import SummaryWriter
    # A fresh run gives purge_step too: TensorBoard ignores the first one that it finds in a folder.
    start = int(path[-6:]) + 1 if path else 0
    make_writer = refuse(f"{run_folder()} cannot be written")(SummaryWriter)
    with (make_writer(run_folder(), purge_step=start) if rank() == 0
          else contextlib.nullcontext()) as writer:
        run = train(prompts_dataset, eval_dataset, *models, actor_tokenizer, reward_tokenizer,
                    writer)
        saved = run.save_actor("final")
        if run.before:
            show_results(run)
    if not saved:
        raise InputError(f"{run_folder()}/final was not written: make room, set resume = 'latest'")
    say(f"\nthe actor is in {run_folder()}/final; curves: tensorboard --logdir runs")
    if world_size() > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    if sys.stdout:  # a response may hold what a terminal cannot write; None: closed, as by >&-
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (InputError, FloatingPointError) as error:
        time.sleep(5 * (rank() > 0))  # all fail alike: let only the first say it
        sys.exit(f"ppo.py: {error}")
    except KeyboardInterrupt as error:  # Stopped is one, and says how to go on
        sys.exit((str(error) or "stopped") if rank() == 0 else 1)
