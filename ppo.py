"""PPO from human feedback for a language model, in one file to read, edit and run.

    4 models   actor    pi_theta  writes the responses                  trained by the policy loss
               critic   V         expects the reward still to come      trained by the value loss
               reward   score     judges a whole response               frozen
               ref      pi_ref    the actor as it was loaded            frozen, the anchor
    2 losses   policy loss (Eq. 5), value loss (Eq. 6)
    1 loop     samples = generate_samples(prompts, actor)             for each rollout
               experiences = generate_experiences(samples, models)    log-probs, values, scores, KL,
                                                                      rewards, by GAE advantages
               train_step(minibatch, actor, critic)                   max_epochs times over it all

`python ppo.py` builds a small demo offline and trains it. For your own models edit the constants.
`import ppo` does nothing. The README derives Eq. 1-12 in the order of this file and says what each
curve means; "Trap n" is row n of its table of the bugs that public code has.

Symbols, one letter one meaning:
    B rows (responses)   P width of prompts, padded left   T width of responses, padded right
    L = P + T            t = 0 .. T-1 an action, that is a response token, the end token included
    s_t the prompt and the first t response tokens   a_t response token t   V value   A advantage
    r_t reward of a token   score reward of a response   ratio pi / pi_old
"""

import contextlib
import copy
import dataclasses
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
import textwrap
import threading
import time
import unittest.mock
import warnings
import weakref
from collections import defaultdict
from dataclasses import dataclass, field

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
reward_fn = None                # reward_fn(prompts, responses, **columns) -> floats, instead
gold_fn = None                  # the same form, logged and never trained on: is the reward hacked?
lora_rank = 0                   # 0: all weights; 8 to 64: adapters, less memory, a higher actor_lr
gradient_checkpointing = False  # True: a third more time, far less memory
device = "cuda" if torch.cuda.is_available() else "cpu"
trust_remote_code = False       # True runs Python out of the model's folder: read it first

# Prompts: a list, a .txt (one a line) or a .jsonl (`prompt` or `messages`, columns for reward_fn)
prompts_file = "demo/prompts.txt"
eval_prompts_file = "demo/eval_prompts.txt"  # held out; None: no evaluation
apply_chat_template = True      # wrap what actor and reward model read in their own templates
max_length = 32                 # prompt tokens; longer prompts lose their beginning, and it is said

# Rollout: rollout_batch_size * n_samples_per_prompt rows. More rows, less noise, slower.
episodes = 6                    # passes over the prompts
rollout_batch_size = 64         # prompts
n_samples_per_prompt = 2        # responses to each: more tell luck from skill
micro_rollout_batch_size = 128  # rows per `generate`: as many as fit
max_new_tokens = 24
temperature = 1.0               # of sampling and of scoring alike (Trap 8)
missing_eos_penalty = 1.0       # off the score of a response that did not end; None: nothing
truncated = "terminal"          # a response cut at max_new_tokens is over; "bootstrap": V goes on

# Learning
max_epochs = 4                  # passes over a rollout: more learn faster until the clip stops them
train_batch_size = 64           # rows per optimizer step; divides the rows of a rollout
micro_train_batch_size = 64     # rows per forward and backward, and for scoring: the memory knob
actor_lr = 5e-4                 # 5e-7 to 1e-5 for real models
critic_lr = 1e-3                # 5e-6 to 1e-5 for real models
lr_schedule = "linear"          # down to 0; or "cosine", "constant"; each after the warm-up
warmup_steps = 0                # optimizer steps in which the rates rise from 0
weight_decay = 0.0
max_grad_norm = 1.0             # of each trained model (Trap 27)
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
target_kl = None                # KL(old, new) that ends a rollout's epochs; PPO1: its target
gamma = 1.0                     # below 1 the first tokens do not see the score (Trap 4)
lambd = 0.95                    # GAE: 1 trusts the rewards (noise), 0 trusts the critic (bias)
whiten_advantages = True        # over the rollout: actor_lr means the same at any scale of scores

# KL and reward
kl_coef = 0.05                  # price of a nat of distance from the reference
kl_coef_start = None            # a higher one at the start, annealed in the first half of the run
kl_in = "reward"                # Eq. 8 with k1; "loss": k2 in the policy's loss
kl_target = None                # nats per response that an adaptive kl_coef aims at; None: fixed
kl_horizon = 10000              # rows over which it adapts
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
self_check = "stop"             # before the first rollout; "warn": go on all the same; "off"
trace_every = 20                # rollouts between two responses shown token by token; 0: none

CONSTANTS = [name for name, value in list(globals().items())
             if not name.startswith("_") and isinstance(value, (int, float, str, type(None)))]

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
                item["text"] = tokenizer.apply_chat_template(
                    to_messages(item["prompt"], tokenizer), tokenize=False,
                    add_generation_prompt=True)
            elif not isinstance(item["prompt"], str):
                raise InputError(f"prompt {n} is messages: set apply_chat_template = True")
            ids = tokenizer(item["text"], add_special_tokens=not apply_chat_template)["input_ids"]
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
#     seqs           pad   q0   q1   q2 |  a0   a1  eos  pad      the end token is an action, earns
#     attention_mask  0    1    1    1  |  1    1    1    0       the score, has a gradient: by that
#     action_mask                       |  1    1    1    0       stopping is learnt (Traps 1, 2)
#     position_ids    0    0    1    2  |  3    4    5    6
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
    """bf16 for the products on a GPU, over weights that stay fp32: in bf16 Adam's small steps would
    be rounded away (Trap 17)."""
    kind = next(model.parameters()).device.type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")

def compute_log_probs(model, seqs, attention_mask, num_actions, temperature=1.0,
                      with_entropy=False):
    """Eq. 3: log pi(a_t given s_t) = z[a_t] - logsumexp(z), z the logits one place left of a_t.

    (B, L) -> (B, T), T = num_actions; with_entropy: and the entropy of pi(. given s_t), (B, T).
    Logits are made for the response alone, and a_t's log-prob is all that stays of them: at a
    vocabulary of 152k they are most of the memory (Trap 29). They come from the model's own
    forward: some models scale or cap them after the lm_head (Granite, Cohere, Gemma 2)."""
    with autocast(model):  # the last token predicts nothing that is needed
        logits = model(input_ids=seqs[:, :-1], attention_mask=attention_mask[:, :-1],
                       position_ids=get_position_ids(attention_mask[:, :-1]),
                       use_cache=False, logits_to_keep=num_actions).logits  # (B, T, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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
        self.base_model = copy.deepcopy(base_model).requires_grad_(True)
        hidden_size = base_model.config.get_text_config().hidden_size
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
        return self.value_head(hidden).squeeze(-1)

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

    (B, T) each -> scalar. clip_eps None: no clipping (PPO1). loss_agg: "token-mean",
    "seq-mean-token-mean", "seq-mean-token-sum"; denominator: the tokens (the rows, for the latter
    two) of the whole optimizer step, when this call is a part of it. ValueError: other loss_agg.
    Schulman et al. 2017 (arXiv 1707.06347), Eq. 6-7; dual clip: Ye et al. 2020 (1912.09729)."""
    mask = torch.ones_like(log_probs) if action_mask is None else action_mask
    mask = mask.bool()
    # Masked before exp: garbage on padding would become inf, and inf * 0 is NaN (Trap 22). In the
    # backward too, hence the clamp: e^20 is far beyond every clip, e^89 is inf in fp32.
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0.0).clamp(max=20.0)
    advantages = advantages.masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    losses = -ratio * advantages
    if clip_eps is not None:
        high = clip_eps if clip_eps_high is None else clip_eps_high
        # The worse of two: the clamp alone has no gradient where a bad token became likelier, or a
        # good one less likely (Trap 21).
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

    (B, T) each -> scalar. clip_eps: the larger of this and the loss of V kept within clip_eps of
    old_values. No further half, no coefficient: the critic has its own optimizer. loss_agg,
    denominator, ValueError: as in compute_policy_loss. Huber 1964; the clip is not in a paper, it
    comes from OpenAI's baselines (ppo2)."""
    mask = torch.ones_like(values) if action_mask is None else action_mask
    mask = mask.bool()

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
    reward its gradient is that of -KL, that of k3 has the wrong sign (Trap 24). Ziegler et al. 2019
    (arXiv 1909.08593), Eq. 2."""
    mask = action_mask.bool()
    rewards = -kl_coef * kl.masked_fill(~mask, 0.0)
    if clip_reward is not None:  # wide: within +-0.2 all good answers are equal (Trap 6)
        scores = scores.clamp(-clip_reward, clip_reward)
    # Of each row its own last token: in the last column a short row has padding (Traps 1, 23).
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).argmax(-1, keepdim=True)  # (B, 1)
    score = scores.to(rewards.dtype).unsqueeze(-1)  # (B, 1)
    return rewards + torch.where((places == last) & mask, score, 0.0)

def get_advantages_and_returns(values, rewards, action_mask, gamma, lambd, last_values=None,
                               dones=None):
    """Eq. 9: delta_t = r_t + gamma V(s_{t+1}) - V(s_t);
    Eq. 10, 11: A_t = delta_t + gamma lambd A_{t+1}; return_t = A_t + V(s_t).

    (B, T) each -> (advantages, returns), (B, T), detached, 0 where the mask is 0 (None: all real).
    After the last real token of a row V is last_values (B,): by default 0, the response has ended.
    dones (B, T): episodes inside a row, as in a simulator; nothing flows back across one.
    Schulman et al. 2016 (arXiv 1506.02438), Eq. 12 and 16."""
    mask = torch.ones_like(values) if action_mask is None else action_mask
    mask = mask.bool()
    values, rewards = values.masked_fill(~mask, 0.0), rewards.masked_fill(~mask, 0.0)
    dones = torch.zeros_like(mask) if dones is None else dones.bool() & mask
    lastgaelam = torch.zeros_like(values[:, 0])
    nextvalues = lastgaelam if last_values is None else last_values.to(values.dtype)
    advantages_reversed = []
    for t in reversed(range(values.shape[1])):
        nextvalues = nextvalues.masked_fill(dones[:, t], 0.0)
        lastgaelam = lastgaelam.masked_fill(dones[:, t], 0.0)
        delta = rewards[:, t] + gamma * nextvalues - values[:, t]
        # Padding passes on what stands behind it, so a row ends at its own last token.
        lastgaelam = torch.where(mask[:, t], delta + gamma * lambd * lastgaelam, lastgaelam)
        nextvalues = torch.where(mask[:, t], values[:, t], nextvalues)
        advantages_reversed.append(lastgaelam)
    advantages = torch.stack(advantages_reversed[::-1], dim=1).masked_fill(~mask, 0.0)
    return advantages.detach(), (advantages + values).detach()

def whiten(values, mask, shift_mean=True):
    """Variance 1 (unbiased) and mean 0 (shift_mean=False: the mean it had) over the entries where
    the mask is 1; the others become 0. Any shape -> the same; finite also for equal entries or a
    single one. For a whole rollout: by micro-batches it would change what is learnt. Ziegler et al.
    2019, in their code."""
    mask = mask.bool()
    count = mask.sum()
    mean = values.masked_fill(~mask, 0.0).sum() / count.clamp(min=1)
    centred = (values - mean).masked_fill(~mask, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    whitened = centred * (variance + 1e-8).rsqrt()
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)

def anneal_kl_coef(fraction, kl_coef, kl_coef_start):
    """kl_coef at a fraction 0 .. 1 of the run: geometric from kl_coef_start to kl_coef in the first
    half. A strong anchor at first keeps responses alive that turn out good later."""
    return kl_coef_start * (kl_coef / kl_coef_start) ** min(1.0, 2 * fraction)

def adapt_kl_coef(kl_coef, kl, kl_target, rows, kl_horizon):
    """Larger where kl, nats per response, is above its target. Ziegler et al. 2019, section 2.2."""
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * rows / kl_horizon)

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
    """In the buffer one row, without B and without padding; from collate_fn a padded batch."""
    seqs: torch.Tensor                         # (B, L)
    attention_mask: torch.Tensor               # (B, L)
    action_mask: torch.Tensor                  # (B, T)
    info: dict = None                          # item, response, ended, raw_score
    old_action_log_probs: torch.Tensor = None  # (B, T) log pi_old(a_t given s_t): it sampled
    ref_action_log_probs: torch.Tensor = None  # (B, T) log pi_ref(a_t given s_t)
    values: torch.Tensor = None                # (B, T) V_old(s_t)
    last_values: torch.Tensor = None           # (B,)   after the last token: 0, or V_old(s_T)
    kl: torch.Tensor = None                    # (B, T) k1 of (pi_old, pi_ref)
    scores: torch.Tensor = None                # (B,)   as Eq. 8 takes them
    rewards: torch.Tensor = None               # (B, T) r_t
    advantages: torch.Tensor = None            # (B, T) A_t
    returns: torch.Tensor = None               # (B, T) return_t

def collate_fn(rows):
    """Rows -> one Experience, prompts padded on the left, responses on the right, with zeros: so
    are the masks there, and what lies under a mask counts nowhere."""
    T = max(len(row.action_mask) for row in rows)
    P = max(len(row.seqs) - len(row.action_mask) for row in rows)

    def pad(name):
        parts = [getattr(row, name) for row in rows]
        if not isinstance(parts[0], torch.Tensor):
            return parts
        if parts[0].dim() == 0:
            return torch.stack(parts)
        whole = name in ("seqs", "attention_mask")
        batch = parts[0].new_zeros(len(rows), P + T if whole else T)
        for line, part, row in zip(batch, parts, rows):
            start = P + len(row.action_mask) - len(row.seqs) if whole else 0
            line[start:start + len(part)] = part
        return batch

    return Experience(**{f.name: pad(f.name) for f in dataclasses.fields(Experience)})

def split_by_length(rows, size):
    """Lists of `size` rows of like length, so that little of a micro-batch is padding. The longest
    first: what does not fit into memory fails at once."""
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
    """(B, T) ids -> (B, T), 1 up to and with the first end token. By position: padding may be
    spelled like an end token, and a pad token may be sampled (Trap 9). An empty answer is one
    action, its end token (Trap 10)."""
    is_end = torch.isin(responses, torch.tensor(end_tokens, device=responses.device)).long()
    return (is_end.cumsum(-1) - is_end == 0).long()

@contextlib.contextmanager
def plain_sampling(model, end_tokens, pad_token_id, temperature, max_new_tokens):
    """Inside, `generate` samples from softmax(logits / temperature) and nothing else. The model's
    own config is replaced, for `generate` takes from it what a passed one leaves open; and top_k=0
    is said, for unsaid it is 50. Otherwise KL to the reference turns negative (Trap 8)."""
    own, model.generation_config = model.generation_config, transformers.GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, repetition_penalty=1.0,
        max_new_tokens=max_new_tokens, eos_token_id=end_tokens, pad_token_id=pad_token_id)
    try:
        yield
    finally:
        model.generation_config = own

@torch.no_grad()
def generate_samples(prompts, model, actor_tokenizer, max_length, max_new_tokens,
                     n_samples_per_prompt, micro_rollout_batch_size, temperature=1.0,
                     add_special_tokens=True):
    """Items of a PromptDataset, or texts -> list of Samples, micro_rollout_batch_size rows in each,
    n_samples_per_prompt for a prompt in turn. add_special_tokens: False for text out of a chat
    template, which brings its own BOS (Trap 16)."""
    items = [p if isinstance(p, dict) else {"prompt": p, "text": p} for p in prompts]
    items = [item for item in items for _ in range(n_samples_per_prompt)]
    # Padded on the left: every response starts in one column. Cut there too: the question stands on
    # the right (Trap 12).
    actor_tokenizer.padding_side = actor_tokenizer.truncation_side = "left"
    end_tokens, samples_list = get_end_tokens(model, actor_tokenizer), []
    for start in range(0, len(items), micro_rollout_batch_size):
        part = items[start:start + micro_rollout_batch_size]
        inputs = actor_tokenizer(
            [item["text"] for item in part], add_special_tokens=add_special_tokens, padding=True,
            truncation=True, max_length=max_length, return_tensors="pt").to(model.device)
        prompt_ids, prompt_mask = inputs["input_ids"], inputs["attention_mask"]  # (B, P)
        with undivided(model), autocast(model), plain_sampling(
                model, end_tokens, actor_tokenizer.pad_token_id, temperature, max_new_tokens):
            seqs = model.generate(input_ids=prompt_ids, attention_mask=prompt_mask)
        action_mask = get_action_mask(seqs[:, prompt_ids.shape[1]:], end_tokens)
        attention_mask = torch.cat([prompt_mask, action_mask], dim=1)
        num_actions, lengths = action_mask.shape[1], action_mask.sum(-1)
        actions = [row[:n] for row, n in zip(seqs[:, -num_actions:], lengths)]
        ended = torch.tensor([row[-1].item() in end_tokens for row in actions])
        responses = [actor_tokenizer.decode(row, skip_special_tokens=True) for row in actions]
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
    limit = getattr(reward_model.config, "max_position_embeddings", None) or sys.maxsize
    limit = min(limit, reward_tokenizer.model_max_length)
    inputs = [to_reward_inputs(prompt, response, reward_tokenizer, apply_chat_template, limit)
              for prompt, response in zip(prompts, responses)]
    by_length = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]["input_ids"]))
    scores = {}
    for start in range(0, len(inputs), micro_train_batch_size):
        part = by_length[start:start + micro_train_batch_size]
        batch = reward_tokenizer.pad([inputs[i] for i in part], return_tensors="pt")
        with autocast(reward_model):  # no position_ids: encoders count in their own way (Trap 11)
            logits = reward_model(**batch.to(reward_model.device)).logits  # (B, 1)
        scores.update(zip(part, logits.squeeze(-1).tolist()))
    return [scores[i] for i in range(len(inputs))]

def to_rows(samples_list):
    """Samples -> list of Experience, a row each, without padding."""
    rows = []
    for samples in samples_list:
        P = samples.seqs.shape[1] - samples.num_actions
        for i, n in enumerate(samples.action_mask.sum(-1).tolist()):
            seqs = samples.seqs[i, :P + n][samples.attention_mask[i, :P + n].bool()]
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
    returns (Eq. 9-11). score_moments: updated with the scores, which it then normalises."""
    rows, bootstrap = to_rows(samples_list), truncated == "bootstrap"
    for part in split_by_length(rows, micro_train_batch_size):
        batch = collate_fn(part)
        inputs, num_actions = (batch.seqs, batch.attention_mask), batch.action_mask.shape[1]
        # Not from `generate`: only the forward of train_step makes the first ratio 1 (Trap 20).
        action_log_probs = compute_log_probs(actor_model, *inputs, num_actions, temperature)
        ref_action_log_probs = compute_log_probs(ref_model, *inputs, num_actions, temperature)
        value = critic_model(*inputs, num_actions, with_last=bootstrap)
        for i, row in enumerate(part):
            n = len(row.action_mask)
            row.old_action_log_probs = action_log_probs[i, :n]
            row.ref_action_log_probs = ref_action_log_probs[i, :n]
            row.values = value[i, :n]
            # Nothing comes after an end; what was cut may go on, if one says so (Trap 28).
            goes_on = bootstrap and not row.info["ended"]
            row.last_values = value[i, n] if goes_on else torch.zeros_like(value[i, 0])

    items, responses = zip(*((row.info["item"], row.info["response"]) for row in rows))
    columns = {name: [item.get(name) for item in items] for name in set().union(*items)}
    prompts, _ = columns.pop("prompt"), columns.pop("text")
    raw_scores = compute_scores(prompts, list(responses), reward_model, reward_tokenizer,
                                apply_chat_template, micro_train_batch_size, columns)
    for row, raw_score in zip(rows, raw_scores):
        row.info["raw_score"] = raw_score

    rows = gather_rows(rows)  # now the whole rollout: means from here on are over all of it
    batch = collate_fn(rows)
    action_mask = batch.action_mask
    scores = torch.tensor([row.info["raw_score"] for row in rows], dtype=torch.float64)  # (B,)
    if score_moments is not None:
        mean, std = update_moments(score_moments, scores)
        scores = (scores - mean) / (std + 1e-8)
    if missing_eos_penalty is not None:
        scores -= missing_eos_penalty * torch.tensor([not row.info["ended"] for row in rows])
    scores = scores.to(batch.values)
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
        # k2's gradient is that of the token's own KL (not of the KL of tokens after it), under the
        # policy that sampled. That is the policy of now at the first step alone: hence the ratio.
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
    real tokens of the step. Changes weights and nothing else. FloatingPointError: a loss or a
    gradient is not finite; no weight has moved then."""
    share, metrics = my_share(experience), defaultdict(float)
    # One denominator for the whole step: a mean of micro-batch means would weigh the tokens of a
    # short micro-batch more (Trap 19).
    tokens = sum(len(row.action_mask) for row in experience)
    whole = tokens if loss_agg == "token-mean" else len(experience)
    agg = dict(loss_agg=loss_agg, denominator=whole * len(share) / len(experience))
    for optimizer in (actor_optimizer, critic_optimizer):
        optimizer.zero_grad(set_to_none=False)  # kept allocated: fresh memory is slow to touch
    for rows in split_by_length(share, micro_train_batch_size):
        batch = collate_fn(rows)
        inputs, action_mask = (batch.seqs, batch.attention_mask), batch.action_mask
        num_actions, old_action_log_probs = action_mask.shape[1], batch.old_action_log_probs
        if update_actor:
            with recomputing(actor_model):
                output = compute_log_probs(actor_model, *inputs, num_actions, temperature,
                                           with_entropy=entropy_coef != 0)
                action_log_probs, entropy = output if entropy_coef else (output, None)
                policy_loss = compute_policy_loss(
                    action_log_probs, old_action_log_probs, batch.advantages, action_mask,
                    clip_eps, clip_eps_high, dual_clip, **agg)
                penalty = compute_penalty(action_log_probs, batch, entropy, ppo1_beta,
                                          kl_loss_coef, entropy_coef)
                # At ratio 1 the policy loss is the mean of -A: the same mean for the penalty.
                here = action_log_probs.detach()
                penalty = compute_policy_loss(here, here, -penalty, action_mask, None, **agg)
                (policy_loss + penalty).backward()
            add_policy_metrics(metrics, policy_loss, here, batch, clip_eps, clip_eps_high)
        with recomputing(critic_model):
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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        samples_list = generate_samples(
            my_share(list(dataset)), actor_model, **{**sampling, "n_samples_per_prompt": 1})
        return generate_experiences(samples_list, actor_model, critic_model, reward_model,
                                    ref_model, **scoring)[:len(dataset)]

def train(prompts_dataset, eval_dataset, actor_model, critic_model, reward_model, ref_model,
          actor_tokenizer, reward_tokenizer, writer):
    """The run that the constants describe. reward_model: a sequence classifier, or a function
    reward_fn(prompts, responses, **columns) -> floats. eval_dataset and writer may be None."""
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
            state.kl_coef = anneal_kl_coef(run.fraction(), kl_coef, kl_coef_start)
        with run.phase("generate"):
            samples_list = generate_samples(my_share(run.next_prompts()), actor_model, **sampling)
        with run.phase("score"):
            buffer.append(generate_experiences(
                samples_list, *models, **scoring, kl_coef=state.kl_coef, kl_in=kl_in, gamma=gamma,
                score_moments=state.score_moments if normalize_scores else None, lambd=lambd,
                whiten_rewards=whiten_rewards, whiten_advantages=whiten_advantages))
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
                kl = metrics.get("approx_kl", 0.0)
                if policy_loss == "clip" and target_kl is not None and kl > target_kl:
                    break  # the rollout has become too old for its policy
        rows = len(buffer.rows)
        if kl_target is not None:
            kl = sum(row.kl.sum().item() for row in buffer.rows) / rows
            state.kl_coef = adapt_kl_coef(state.kl_coef, kl, kl_target, rows, kl_horizon)
        if policy_loss == "ppo1" and state.rollout >= critic_warmup:
            state.ppo1_beta = adapt_ppo1_beta(state.ppo1_beta, run.mean("approx_kl"), target_kl)
        run.finish_rollout(buffer.rows)  # log, evaluate, save
        buffer.clear()
    return run.finish()

# ---- the algorithm ends here -------------------------------------------------------------------

# ---- 8. Input ----------------------------------------------------------------------------------

def read_prompts(source):
    """A list, or the path of a .txt or .jsonl -> list of dicts: `prompt` and the other columns."""
    where, items = f"prompts {source!r}", []
    entries = {f"prompt {n}": item for n, item in enumerate(source, 1)}
    try:
        if isinstance(source, str):
            with open(source, encoding="utf-8-sig") as file:
                entries = {f"{source}, line {n}": line.strip() for n, line in enumerate(file, 1)
                           if line.strip()}
        if not entries:
            raise ValueError("there is none")
        for where, item in entries.items():
            if str(source).endswith(".jsonl"):
                item = json.loads(item)
            item = dict(item) if isinstance(item, dict) else {"prompt": item}
            item["prompt"] = prompt = item.pop("messages", None) or item.get("prompt") or None
            turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            texts = [isinstance(turn, dict) and turn.get(key)
                     for turn in turns for key in ("role", "content")]
            if not all(isinstance(text, str) for text in texts) or not texts[-1].strip():
                raise ValueError(f"{prompt!r} is no prompt")
            if taken := {"text", "prompts", "responses"}.intersection(item):
                raise ValueError(f"a column cannot be named {min(taken)}")
            items.append(item)
    except (OSError, ValueError) as error:  # of the file, of Unicode, of JSON, or from here
        raise InputError(f"{where}: {error}: write a text a line, or in a .jsonl JSON with "
                         "`prompt`, a text, or `messages`, with role and content") from None
    return items

def get_prompt_indices(rollout, num_prompts):
    """The prompts of a rollout: each episode is an order of its own, and the last rollout of one is
    filled from the next. A function of the rollout's number: no position has to be saved."""
    start = rollout * rollout_batch_size
    places = [divmod(k, num_prompts) for k in range(start, start + rollout_batch_size)]
    orders = {episode: random.Random(f"{seed} {episode}").sample(range(num_prompts), num_prompts)
              for episode in {episode for episode, _ in places}}
    return [orders[episode][place] for episode, place in places]

def get_lr_factor(step, total_steps):
    """What the rates are multiplied by. A function of the step's number: nothing is saved of it."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    x = (step - warmup_steps) / (total_steps - warmup_steps)
    return dict(constant=1.0, linear=1 - x, cosine=(1 + math.cos(math.pi * x)) / 2)[lr_schedule]

def to_messages(prompt, tokenizer):
    """A prompt, a text or messages -> messages for a chat template, special tokens that they spell
    broken by a space: what a user or a model writes must not end its turn and open another."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [{key: turn[key] for key in ("role", "content")} for turn in turns]
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token in added.union(tokenizer.all_special_tokens) - {""}:
        for message, key in itertools.product(messages, ("role", "content")):
            message[key] = message[key].replace(token, token[0] + " " + token[1:])
    return messages

def load(auto, constant, name, **options):
    try:
        return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # of many kinds, and all of them mean this
        reason = show(str(error).strip().split("\n")[0])
        raise InputError(f"{constant} = {name!r} cannot be loaded: {reason}") from None

def load_tokenizer(constant, name):
    tokenizer = load(transformers.AutoTokenizer, constant, name)
    if tokenizer.eos_token is None and constant == "actor_name":
        raise InputError(f"{constant} = {name!r} has a tokenizer without end token: set eos_token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # told apart by position
    return tokenizer

def load_model(constant, name):
    """A model in fp32, dropout off for good. Only safetensors are read: no pickle runs. InputError:
    weights that were never trained; a reward model with other than one output."""
    kind = "CausalLM" if constant == "actor_name" else "SequenceClassification"
    # dtype has to be said, bf16 is the default (Trap 17). num_labels must not be: with it a plain
    # language model passes for a reward model, with a head of random numbers (Trap 14).
    model, info = load(getattr(transformers, f"AutoModelFor{kind}"), constant, name,
                       dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    if constant == "reward_name" and model.config.num_labels != 1:
        raise InputError(f"{constant} = {name!r} has {model.config.num_labels} outputs, not 1")
    if constant != "critic_name" and (missing := info["missing_keys"]):
        raise InputError(f"{constant} = {name!r} has no trained {min(missing)}: name another model")
    for module in model.modules():  # a layer asks its own `training`, which `recomputing` sets
        vars(module).update({key: 0.0 for key, value in vars(module).items()
                             if "dropout" in key and isinstance(value, float)})
    return model.eval()  # dropout would move the ratio before any step (Trap 20)

ENABLE = "activation_checkpointing_enable"  # gradient_checkpointing_enable in older transformers

def make_models(load_model):
    """load_model(constant, name) -> actor, critic, reward model, reference. Of the bill's loader,
    models without memory. InputError: one has too few positions, or knows too few tokens."""
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
        if length > (getattr(config, "max_position_embeddings", None) or math.inf):
            raise InputError(f"max_length + max_new_tokens = {length}: lower one, {constant} has "
                             f"{config.max_position_embeddings} positions")
        if config.vocab_size < actor_model.config.get_text_config().vocab_size:
            raise InputError(f"{constant} knows fewer tokens than actor_name: name another model")
        if gradient_checkpointing:  # `recomputing` switches it on where it is wanted
            (getattr(model, ENABLE, None) or model.gradient_checkpointing_enable)()
    return actor_model, critic_model, reward_model, ref_model

def to_reward_inputs(prompt, response, tokenizer, apply_chat_template, max_length):
    """What a reward model reads, in its own words (Trap 13): its chat template where it has one, a
    pair where its tokenizer separates pairs (encoders), else prompt + response + end token."""
    cut = dict(truncation=True, max_length=max_length)
    messages = to_messages(prompt, tokenizer) + to_messages(
        [{"role": "assistant", "content": response}], tokenizer)
    if apply_chat_template and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer(text, add_special_tokens=False, **cut)
    *asked, response = [message["content"] for message in messages]
    if tokenizer.sep_token and tokenizer.num_special_tokens_to_add(pair=True) > 2:
        return tokenizer("\n".join(asked), response, **cut)
    asked = prompt if isinstance(prompt, str) else "\n".join(asked)  # a text as it stands
    return tokenizer(asked + response + (tokenizer.eos_token or ""), **cut)

def check_scores(scores, responses, name="reward_fn"):
    """What a function of the user's returned -> list of floats, or InputError."""
    try:
        floats = [float(score) for score in scores if not isinstance(score, str)]
    except (TypeError, ValueError, OverflowError):
        floats = []
    if len(floats) != len(responses) or not all(map(math.isfinite, floats)):
        raise InputError(f"{name} has to return {len(responses)} finite floats, one for each "
                         f"response, and returned {show(str(scores))[:200]}")
    return floats

def update_moments(moments, scores):
    """Adds scores to [count, mean, squares about it] -> mean, standard deviation (Welford)."""
    for score in scores.tolist():
        moments[0] += 1
        delta = score - moments[1]
        moments[1] += delta / moments[0]
        moments[2] += delta * (score - moments[1])
    return moments[1], math.sqrt(moments[2] / max(moments[0] - 1, 1))

def show(text):
    """Without control characters: a response must not steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)

# ---- 9. What is logged -------------------------------------------------------------------------

METRICS = {  # tag: what it is, healthy from, to, and where to look outside of that
    "reward/score_mean": ("score of a response, raw", None, None, ""),
    "reward/score_std": ("its deviation", 1e-6, None, "all scores are equal: look at the reward"),
    "reward/after_kl": ("score - kl_coef KL", None, None, ""),
    "reward/gold": ("gold_fn of a response", None, None, ""),
    "reward/gold_lost": ("gold below its best", None, 0.1, "the reward is hacked: raise kl_coef"),
    "kl/ref_k1": ("KL to ref, nats a response", -0.5, None, "sampling and scoring differ: Trap 8"),
    "kl/ref_k3": ("the same, never negative", None, 100, "far from ref: raise kl_coef"),
    "kl/kl_coef": ("price of a nat", None, None, ""),
    "kl/ppo1_beta": ("price of KL(old, new)", None, None, ""),
    "rollout/response_length": ("tokens", None, None, ""),
    "rollout/ended": ("share that ended", 0.05, None, "raise max_new_tokens, missing_eos_penalty"),
    "rollout/advantage_std": ("before whitening", None, None, ""),
    "policy_loss": ("its value is no progress: Trap 26", None, None, ""),
    "policy/ratio_mean": ("pi / pi_old", 0.9, 1.1, "steps are too large: lower actor_lr"),
    "policy/ratio_max": ("pi / pi_old", None, 100, "steps are too large: lower actor_lr"),
    "policy/clip_upper": ("share of tokens", None, 0.2, "lower actor_lr or max_epochs"),
    "policy/clip_lower": ("share of tokens", None, 0.2, "lower actor_lr or max_epochs"),
    "policy/approx_kl": ("KL(old, new), nats a token", None, 0.1, "lower actor_lr, set target_kl"),
    "policy/entropy": ("nats a token", 0.01, None, "collapse: raise kl_coef or entropy_coef"),
    "policy/actor_grad_norm": ("before clipping", None, None, ""),
    "policy/actor_lr": ("learning rate", None, None, ""),
    "value_loss": ("squared error / 2", None, None, ""),
    "value/value_clip_fraction": ("share of tokens", None, 0.5, "raise value_clip_eps"),
    "value/explained_variance": ("1: V knows all", -0.5, None, "lower critic_lr"),
    "value/critic_grad_norm": ("before clipping", None, None, ""),
    "value/critic_lr": ("learning rate", None, None, ""),
    "time/tokens_per_second": ("of responses", None, None, ""),
    "time/generate": ("seconds", None, None, ""),
    "time/score": ("seconds", None, None, ""),
    "time/train": ("seconds", None, None, ""),
}

def add_policy_metrics(metrics, policy_loss, action_log_probs, batch, clip_eps, clip_eps_high):
    """Adds sums over a micro-batch's real tokens: padding would only thin them out (Trap 25)."""
    mask = batch.action_mask.bool()
    log_ratio = (action_log_probs - batch.old_action_log_probs)[mask]
    ratio, advantages = log_ratio.exp(), batch.advantages[mask]
    low = math.inf if clip_eps is None else clip_eps
    high = low if clip_eps_high is None else clip_eps_high
    metrics["policy_loss"] += policy_loss.item()
    metrics["ratio_mean"] += ratio.sum().item()
    metrics["ratio_max"] = max(metrics["ratio_max"], ratio.max().item())
    metrics["approx_kl"] += (ratio - 1 - log_ratio).sum().item()
    metrics["clip_upper"] += ((ratio > 1 + high) & (advantages > 0)).sum().item()
    metrics["clip_lower"] += ((ratio < 1 - low) & (advantages < 0)).sum().item()

def add_value_metrics(metrics, value_loss, values, batch, value_clip_eps):
    moved = (values - batch.values)[batch.action_mask.bool()].abs()
    metrics["tokens"] += moved.numel()
    metrics["value_loss"] += value_loss.item()
    metrics["value_clip_fraction"] += (moved > (value_clip_eps or math.inf)).sum().item()

def finish_metrics(metrics):
    """Sums -> means over the tokens of the step, of all processes."""
    metrics = over_processes(metrics)
    whole = ("policy_loss", "value_loss", "ratio_max", "tokens")
    return {name: value if name in whole else value / metrics["tokens"]
            for name, value in metrics.items()}

def get_rollout_metrics(rows):
    """Rows -> means over all real tokens of a rollout, or over its responses."""
    batch, n = collate_fn(rows), len(rows)
    mask = batch.action_mask.bool()
    k3 = compute_approx_kl(batch.old_action_log_probs, batch.ref_action_log_probs, mask, "k3")
    scores = torch.tensor([row.info["raw_score"] for row in rows], dtype=torch.float64)
    returns, errors = batch.returns[mask], (batch.returns - batch.values)[mask]
    unexplained = errors.var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
    metrics = dict(
        score_mean=scores.mean(), score_std=scores.std(correction=0),
        after_kl=scores.mean() - kl_coef * batch.kl.sum() / n, ref_k1=batch.kl.sum() / n,
        ref_k3=k3.sum() / n, response_length=mask.sum() / n, advantage_std=errors.std(correction=0),
        ended=sum(row.info["ended"] for row in rows) / n, explained_variance=1 - unexplained,
        entropy=-batch.old_action_log_probs[mask].mean())  # unbiased: this policy drew the sample
    if gold_fn is not None:
        prompts = [row.info["item"]["prompt"] for row in rows]
        responses = [row.info["response"] for row in rows]
        metrics["gold"] = sum(check_scores(gold_fn(prompts, responses), responses, "gold_fn")) / n
    return {name: float(value) for name, value in metrics.items()}

# ---- 10. The run around the loop ---------------------------------------------------------------

class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, raised when the state has been saved."""

@dataclass
class State:
    """What rollouts change beside weights and optimizers."""
    rollout: int = 0
    kl_coef: float = 0.0
    ppo1_beta: float = 1.0
    best: float = -math.inf
    best_gold: float = -math.inf
    score_moments: list = field(default_factory=lambda: [0, 0.0, 0.0])

class Run:
    """Log, evaluation, checkpoints and signals around the loop of `train`."""

    def __init__(self, models, optimizers, sampling, scoring, prompts_dataset, eval_dataset,
                 writer):
        self.models, self.optimizers, self.writer = models, optimizers, writer
        self.sampling, self.scoring = sampling, scoring
        self.prompts_dataset, self.eval_dataset = prompts_dataset, eval_dataset
        self.rollouts = math.ceil(episodes * len(prompts_dataset) / rollout_batch_size)
        rows = rollout_batch_size * n_samples_per_prompt
        self.total_steps = self.rollouts * max_epochs * math.ceil(rows / train_batch_size)
        self.state = State(kl_coef=kl_coef if kl_coef_start is None else kl_coef_start)
        self.steps, self.seconds, self.strikes = [], {}, defaultdict(int)
        self.now, self.stopping, self.before, self.after = None, False, [], []
        self.old_handlers = {}

    def start(self):
        """Resumes, checks the models, looks at the held-out prompts."""
        path = find_checkpoint()
        if path:
            load_checkpoint(path, self)
        for half in glob.glob(glob.escape(run_folder()) + "/**/*.tmp", recursive=True):
            shutil.rmtree(half, ignore_errors=True)  # of a run that was killed as it wrote
        snapshot = take_snapshot(self.state)
        if self_check != "off":
            run_self_check(self)
        self.before = self.evaluate(self.models[3])  # the reference: what the actor was
        if self.writer and not path:
            lines = [f"| {name} | {show(repr(value))} |" for name, value in get_constants().items()]
            self.writer.add_text("constants", "\n".join(["| constant | value |", "|-|-|", *lines]))
            self.log_evaluation(self.before)
        if threading.current_thread() is threading.main_thread():  # no other may catch signals
            self.old_handlers = {number: signal.signal(number, self.on_signal)
                                 for number in (signal.SIGINT, signal.SIGTERM)}
        put_random(snapshot)  # whatever was drawn here: a resumed run must not notice
        self.started, self.first = time.perf_counter(), self.state.rollout
        return self.state

    def release_signals(self):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def goes_on(self):
        """Is there another rollout? Remembers its start, in case that it is dropped."""
        self.snapshot = take_snapshot(self.state)
        return self.state.rollout < self.rollouts

    def stop(self):
        self.release_signals()
        saved = save_checkpoint(self)
        raise Stopped("stopped and saved: set resume = 'latest' to go on" if saved else "stopped")

    def fraction(self):
        return self.state.rollout / self.rollouts

    def next_prompts(self):
        indices = get_prompt_indices(self.state.rollout, len(self.prompts_dataset))
        return [self.prompts_dataset[i] for i in indices]

    def epochs(self, buffer):
        """All minibatches of all epochs, the learning rates set for each."""
        step = self.state.rollout * self.total_steps // self.rollouts
        self.kl_coef = self.state.kl_coef  # that of this rollout, `train` may adapt it after this
        for _ in range(max_epochs):
            order = torch.Generator().manual_seed(seed * 1_000_003 + step)  # one in all processes
            for experience in buffer.minibatches(train_batch_size, order):
                factor = get_lr_factor(step, self.total_steps)
                for optimizer, lr in zip(self.optimizers, (actor_lr, critic_lr)):
                    for group in optimizer.param_groups:
                        group["lr"] = lr * factor
                yield experience
                step += 1

    def mean(self, name):
        """Of a train_step metric over the rollout's steps, weighted by their tokens."""
        steps = [step for step in self.steps if name in step]
        return (sum(step[name] * step["tokens"] for step in steps)
                / sum(step["tokens"] for step in steps))

    @contextlib.contextmanager
    def phase(self, name):
        """Times a phase, and says where a loss that is not finite came up."""
        start, self.now = time.perf_counter(), name
        try:
            if any(gather(self.stopping)):
                raise Stopped
            yield
        except BaseException as error:
            self.release_signals()
            if isinstance(error, Stopped):
                self.stop()
            if not isinstance(error, FloatingPointError):
                raise
            self.save_actor("stopped")
            raise InputError(
                f"rollout {self.state.rollout + 1}, optimizer step {len(self.steps) + 1}: {error}; "
                f"lower actor_lr or critic_lr; {run_folder()}/stopped has the actor") from None
        self.now, self.seconds[name] = None, time.perf_counter() - start

    def finish_rollout(self, rows):
        """Logs it, evaluates and saves where it is time to."""
        state, metrics = self.state, get_rollout_metrics(rows) | self.seconds
        metrics |= {name: self.mean(name) for name in set().union(*self.steps)}
        if "ratio_max" in metrics:
            metrics["ratio_max"] = max(step["ratio_max"] for step in self.steps)
        metrics |= {name: optimizer.param_groups[0]["lr"]
                    for name, optimizer in zip(("actor_lr", "critic_lr"), self.optimizers)}
        metrics["tokens_per_second"] = sum(len(row.action_mask) for row in rows) / sum(
            self.seconds.values())
        metrics["kl_coef"] = self.kl_coef
        if policy_loss == "ppo1":
            metrics["ppo1_beta"] = state.ppo1_beta
        if "gold" in metrics:
            state.best_gold = max(state.best_gold, metrics["gold"])
            metrics["gold_lost"] = state.best_gold - metrics["gold"]
        self.log(metrics)
        self.steps, self.seconds = [], {}
        state.rollout += 1
        if trace_every and state.rollout % trace_every == 0:
            text = trace(rows, self.models[0], self.sampling["actor_tokenizer"],
                         self.kl_coef if kl_in == "reward" else 0.0)
            if self.writer:  # indented, so that Markdown leaves it as it is
                self.writer.add_text("trace", textwrap.indent(text, "    "), state.rollout)
        last = state.rollout == self.rollouts
        if last or eval_every and state.rollout % eval_every == 0:
            self.after = self.evaluate(self.models[0])
            self.log_evaluation(self.after)
        if save_every and (last or state.rollout % save_every == 0):
            self.snapshot = take_snapshot(state)
            save_checkpoint(self)

    def log(self, metrics):
        """A console line, all tags, advice where one is outside its range for the third time."""
        done = self.state.rollout + 1
        left = (time.perf_counter() - self.started) / (done - self.first) * (self.rollouts - done)
        left = f"{int(left) // 60}:{int(left) % 60:02d}"
        clip = metrics.get("clip_upper", 0.0) + metrics.get("clip_lower", 0.0)
        episode = 1 + self.state.rollout * rollout_batch_size // len(self.prompts_dataset)
        say(f"ep {episode:2d} rollout {done:3d}/{self.rollouts} score {metrics['score_mean']:6.2f} "
            f"kl {metrics['ref_k1']:5.2f} loss {metrics.get('policy_loss', 0.0):6.3f} "
            f"{metrics['value_loss']:6.3f} clip {clip:.2f} len {metrics['response_length']:4.1f} "
            f"{metrics['tokens_per_second']:5.0f} tok/s {left} left")
        for tag, (what, low, high, advice) in METRICS.items():
            value = metrics.get(tag.split("/")[-1])
            if value is None:
                continue
            if self.writer:
                self.writer.add_scalar(tag, value, done)
            outside = low is not None and value < low or high is not None and value > high
            self.strikes[tag] = self.strikes[tag] + 1 if outside else 0
            if self.strikes[tag] == 3:
                say(f"  ! {tag} ({what}) is {value:.3g}, the third time in a row: {advice}")

    def evaluate(self, actor_model):
        if not self.eval_dataset:
            return []
        return evaluate(self.eval_dataset, actor_model, *self.models[1:], self.sampling,
                        self.scoring, seed)

    def log_evaluation(self, rows):
        """Held-out prompts to TensorBoard; keeps the best actor so far."""
        if not rows:
            return
        metrics, done = get_rollout_metrics(rows), self.state.rollout
        if self.writer:
            for name in {"score_mean", "ref_k1", "gold"}.intersection(metrics):
                self.writer.add_scalar(f"eval/{name}", metrics[name], done)
            lines = [f"| {show(str(row.info['item']['prompt']))} | {show(row.info['response'])} "
                     f"| {row.info['raw_score']:.2f} |".replace("\n", " ") for row in rows[:16]]
            lines = ["| prompt | response | score |", "|-|-|-|", *lines]
            self.writer.add_text("samples", "\n".join(lines), done)
        if done and metrics["after_kl"] > self.state.best:
            self.state.best = metrics["after_kl"]
            self.save_actor("best")

    def on_signal(self, *_):
        """The first one stops in good order, a second one at once."""
        for number in self.old_handlers:
            signal.signal(number, signal.SIG_DFL)
        self.stopping = True
        say("  stopping; once more to stop at once")
        if self.now in ("generate", "score") and world_size() == 1:
            raise Stopped  # drops this rollout; `phase` saves its start

    def save_actor(self, name):
        """runs/<run_name>/<name>: an ordinary folder for `from_pretrained`, with the tokenizer."""
        weights = to_whole(self.models[0].state_dict())
        write_folder(os.path.join(run_folder(), name), lambda folder: save_model(
            self.models[0], weights, self.sampling["actor_tokenizer"], folder))

    def finish(self):
        self.release_signals()
        self.after = self.after or self.evaluate(self.models[0])  # or: resumed at its end
        return self

# ---- 11. Checkpoints ---------------------------------------------------------------------------

def run_folder():
    return os.path.join("runs", run_name)

def get_constants():
    """Their values, functions by their names."""
    values = {name: globals()[name] for name in CONSTANTS}
    return {name: getattr(value, "__name__", type(value).__name__) if callable(value) else value
            for name, value in values.items()}

def take_snapshot(state):
    """State and random numbers at the start of a rollout, in types that need no pickle."""
    kind, keys, *rest = numpy.random.get_state()
    return dict(state=copy.deepcopy(vars(state)), torch=torch.get_rng_state(),
                cuda=torch.cuda.get_rng_state_all(), python=random.getstate(),
                numpy=(kind, keys.tolist(), *rest))

def put_random(snapshot):
    torch.set_rng_state(snapshot["torch"])
    torch.cuda.set_rng_state_all(snapshot["cuda"])
    random.setstate(snapshot["python"])
    numpy.random.set_state(snapshot["numpy"])

def write_folder(path, write):
    """Calls write(folder) on a temporary folder, flushes that to disk, renames it to `path`: at any
    time there is the whole of it, or what was there before. -> did it work? Says so if not."""
    if rank() > 0:
        return gather(None)[0]  # waits for the first, and for what it tells
    temporary = path + ".tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        write(temporary)
        files = sorted(os.path.relpath(os.path.join(root, name), temporary)
                       for root, _, names in os.walk(temporary) for name in names)
        hashes = {name: flush(os.path.join(temporary, name)) for name in files}
        with open(os.path.join(temporary, "manifest.json"), "w") as file:
            json.dump(hashes, file)
        flush(file.name)
        if os.path.exists(path):
            shutil.rmtree(path + ".old", ignore_errors=True)
            os.rename(path, path + ".old")
        os.rename(temporary, path)
        shutil.rmtree(path + ".old", ignore_errors=True)
    except Exception as error:  # OSError, or safetensors' and torch's own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if os.path.exists(path + ".old") and not os.path.exists(path):
            os.rename(path + ".old", path)
        say(f"  ! {path} was not written ({error}); what was saved before is whole")
        return gather(False)[0]
    return gather(True)[0]

def flush(path):
    """A file to disk -> its hash."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()

def save_model(model, weights, tokenizer, folder):
    if not lora_rank:  # adapters merge themselves
        tied = getattr(model, "all_tied_weights_keys", ())
        weights = {name: weight for name, weight in weights.items() if name not in tied}
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)

def save_checkpoint(run):
    path = os.path.join(run_folder(), "checkpoints",
                        f"rollout-{run.snapshot['state']['rollout']:06d}")
    if gather(os.path.exists(path))[0]:  # of this very state: newer ones are put aside on resume
        return True
    actor, critic = (to_whole(model.state_dict()) for model in run.models[:2])
    rest = dict(run.snapshot, constants=get_constants(), processes=gather(run.snapshot),
                optimizers=[to_whole(optimizer.state_dict()) for optimizer in run.optimizers])

    def write(folder):
        if run.writer:
            run.writer.flush()  # a run that goes on from here will not write these points again
        if lora_rank:
            safetensors.torch.save_file(actor, os.path.join(folder, "actor.safetensors"))
        else:
            save_model(run.models[0], actor, run.sampling["actor_tokenizer"],
                       os.path.join(folder, "actor"))
        safetensors.torch.save_file(critic, os.path.join(folder, "critic.safetensors"))
        torch.save(rest, os.path.join(folder, "rest.pt"))

    saved = write_folder(path, write)
    for old in list_checkpoints()[:-keep_checkpoints] if rank() == 0 else []:
        shutil.rmtree(old, ignore_errors=True)
    return saved

def list_checkpoints():
    """Oldest first."""
    folder = os.path.join(glob.escape(run_folder()), "checkpoints", "rollout-" + "[0-9]" * 6)
    return sorted(glob.glob(folder))

def find_checkpoint():
    """What the constant `resume` means -> the path of a whole checkpoint, or None."""
    path = gather((list_checkpoints() or [None])[-1])[0] if resume == "latest" else resume
    if path is None:
        return None
    path = os.path.normpath(path)
    if not re.fullmatch(r"rollout-\d{6}", os.path.basename(path)):
        raise InputError(f"resume = {path!r} is no checkpoint: those are named rollout-000020")
    try:
        with open(os.path.join(path, "manifest.json")) as file:
            hashes = json.load(file)
        damaged = [name for name in hashes if flush(os.path.join(path, name)) != hashes[name]]
    except Exception as error:
        damaged = [str(error)]
    if damaged:
        name = os.path.basename(path)
        older = [other for other in list_checkpoints() if os.path.basename(other) < name]
        instead = repr(older[-1]) if older else "None to start anew"
        raise InputError(f"checkpoint {path} is damaged ({damaged[0]}): set resume = {instead}")
    return path

def load_checkpoint(path, run):
    """Puts everything back, for half of Adam's state or other random numbers would be another run
    (Trap 30). InputError: a constant that cannot change was changed."""
    try:
        rest = torch.load(os.path.join(path, "rest.pt"), weights_only=True)  # runs no pickle
    except Exception:
        raise InputError(f"resume: {path} holds no state that can be read: name another") from None
    for name, old in rest["constants"].items():
        new = get_constants().get(name)
        if new != old and name in ("actor_name", "critic_name", "lora_rank"):
            raise InputError(f"{name} = {new!r} cannot change on resume: it was {old!r}")
        if new != old and name != "resume":
            say(f"  resume: {name} was {old!r}, now {new!r}")
    try:
        folder = os.path.join(path, "actor")
        if lora_rank:
            actor = safetensors.torch.load_file(folder + ".safetensors")
        else:
            actor = type(run.models[0]).from_pretrained(folder, dtype=torch.float32).state_dict()
        critic = safetensors.torch.load_file(os.path.join(path, "critic.safetensors"))
        for model, weights, optimizer, saved in zip(
                run.models, (actor, critic), run.optimizers, rest["optimizers"]):
            own, params = model.state_dict(), optimizer.param_groups[0]["params"]
            model.load_state_dict({k: to_part(w, own.get(k, w)) for k, w in weights.items()})
            for i, state in saved["state"].items():
                saved["state"][i] = {k: to_part(t, params[i]) for k, t in state.items()}
            optimizer.load_state_dict(saved)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"resume: {path} does not fit these models: {reason}") from None
    name = os.path.basename(path)
    for newer in list_checkpoints() if rank() == 0 else []:
        if os.path.basename(newer) >= name and not os.path.samefile(newer, path):  # not this course
            shutil.rmtree(newer + ".aside", ignore_errors=True)
            os.rename(newer, newer + ".aside")
    run.state, processes = State(**rest["state"]), rest["processes"]
    if len(processes) == world_size():
        put_random(processes[rank()])
    else:
        say(f"  resume: random numbers start anew, there were {len(processes)} process(es)")
    say(f"resumed from {path}")

# ---- 12. Self-check ----------------------------------------------------------------------------

def run_self_check(run):
    """Tries what the formulas rest on, on these models and prompts, a line for each check. A failed
    one stops the run, or warns, as the constant self_check says."""
    failed = []

    def check(name, passed, found, advice):
        say(f"  {'✓' if passed else '✗'} {name}: {found}" + ("" if passed else f". {advice}"))
        if not passed:
            failed.append(name)

    head = run.models[1].value_head.weight  # at 0 it would agree with everything
    saved = head.detach().clone()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nn.init.normal_(head)
        samples_list, rows = check_forward(run, check)
        check_update(run, samples_list, rows, check)
    with torch.no_grad():
        head.copy_(saved)
    for model in run.models:
        if isinstance(model, nn.Module):
            model.zero_grad(set_to_none=True)
    if failed and self_check == "stop":
        raise InputError(f"self-check: {failed[0]}: not so; mend it, or set self_check = 'warn'")

def check_forward(run, check):
    """The properties of one forward. Rounding of bf16 on a GPU is reported and not judged."""
    actor, critic, tokenizer = run.models[0], run.models[1], run.sampling["actor_tokenizer"]
    exact = 1e-4 if device == "cpu" else math.inf
    prompts = sorted(list(run.prompts_dataset)[:64], key=lambda item: len(item["text"]))
    prompts = [prompts[0], prompts[-1]]  # of two lengths, so that one is padded
    sampling = run.sampling | dict(n_samples_per_prompt=2, max_new_tokens=min(max_new_tokens, 16))
    samples_list = generate_samples(prompts, actor, **sampling)
    rows = generate_experiences(samples_list, *run.models, **run.scoring)
    batch, end_tokens = collate_fn(rows), torch.tensor(get_end_tokens(actor, tokenizer))

    def outputs(batch):
        n, inputs = batch.action_mask.shape[1], (batch.seqs, batch.attention_mask)
        with torch.no_grad():
            log_probs = compute_log_probs(actor, *inputs, n, temperature)
            return torch.stack([log_probs, critic(*inputs, n)])

    def largest(difference):
        return (difference * batch.action_mask).abs().max().item()

    here = outputs(batch)
    off = largest(here[0] - batch.old_action_log_probs)
    check("the ratio is 1 at step 0", off < exact, f"its log is at most {off:.1e}",
          "The actor's forward does not repeat itself: is dropout on?")
    off, started = batch.kl.abs().max().item(), run.state.rollout > 0
    check("KL to the reference is 0 at step 0", started or off < exact, f"up to {off:.1e}",
          "The reference is another model: load both from actor_name")
    off = compare_sampler(actor, tokenizer, prompts)
    check("sampled is what is scored", off < 1e-4, f"probabilities differ by {off:.1e}",
          "`generate` filters or reweighs: look at the model's generation_config")
    other = torch.where(batch.attention_mask.bool(), batch.seqs, batch.seqs.flip(1))
    off = largest(outputs(dataclasses.replace(batch, seqs=other)) - here)
    check("what stands under padding does not count", off < exact, f"it changes {off:.1e}",
          "The model ignores attention_mask: it cannot be trained in batches")
    future = batch.seqs.clone()
    future[:, -batch.action_mask.shape[1]:] = batch.seqs[:, :1]  # other actions
    off = (outputs(dataclasses.replace(batch, seqs=future)) - here)[1, :, 0].abs().max().item()
    check("V(s_0) does not see the response", off < exact, f"it changes by {off:.1e}",
          "The critic is no decoder: set critic_name to one, or to None")
    alone = torch.zeros_like(here)
    for i, row in enumerate(rows):
        alone[:, i, :len(row.action_mask)] = outputs(collate_fn([row]))[:, 0]
    off = largest(alone - here)
    check("a row alone is as in a batch", off < exact, f"differs by {off:.1e}",
          "The model ignores position_ids: set the micro batch sizes to 1")
    ends = [int(torch.isin(row.seqs.cpu()[-len(row.action_mask):], end_tokens).sum())
            for row in rows]
    made = get_action_mask(torch.tensor([[-1, end_tokens[0], end_tokens[0]]]), end_tokens.tolist())
    right = ends == [int(row.info["ended"]) for row in rows] and made.tolist() == [[1, 1, 0]]
    check("the end token is one action", right, f"{sum(ends)} in {len(ends)} responses",
          "The action mask is wrong: rewards would get lost")
    return samples_list, rows

def compare_sampler(actor, tokenizer, prompts):
    """The largest difference of what `generate` draws from to softmax(logits / temperature)."""
    inputs = tokenizer([item["text"] for item in prompts], return_tensors="pt", padding=True,
                       truncation=True, max_length=max_length).to(device)
    with undivided(actor), plain_sampling(
            actor, get_end_tokens(actor, tokenizer), tokenizer.pad_token_id, temperature,
            min(max_new_tokens, 8)):
        output = actor.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            return_dict_in_generate=True, output_scores=True, output_logits=True)
    drawn, raw = torch.stack(output.scores).float(), torch.stack(output.logits).float()
    return (drawn.softmax(-1) - (raw / temperature).softmax(-1)).abs().max().item()

def check_update(run, samples_list, rows, check):
    """The way of the score, and the properties of a backward."""
    actor, critic, reward, ref = run.models
    good, bad = (generate_experiences(
        samples_list, actor, critic, lambda prompts, responses, **_: [sign] * len(responses), ref,
        gamma=gamma, lambd=lambd, whiten_advantages=False, truncated=truncated,
        temperature=temperature, micro_train_batch_size=micro_train_batch_size)
        for sign in (1.0, -1.0))
    moves = [(up.advantages - down.advantages).tolist() for up, down in zip(good, bad)]
    check("the score arrives", all(move[-1] > 1.9 and min(move) >= 0 for move in moves),
          f"score 1 for -1 moves A_t by {min(map(min, moves)):.2f} to {max(map(max, moves)):.2f}",
          "The end of a response gets no reward: look at action_mask and compute_rewards")
    gradients = []
    for size in (1, len(rows)):
        optimizers = [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
                      for model in (actor, critic)]
        train_step(good, actor, critic, *optimizers, size, temperature, loss_agg=loss_agg,
                   max_grad_norm=math.inf)
        grads = [p.grad for model in (actor, critic) for p in model.parameters()
                 if p.grad is not None]
        gradients.append(torch.cat([getattr(grad, "full_tensor", grad.clone)().flatten()[:10_000]
                                    for grad in grads]))
    off = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max().clamp(min=1e-12)
    exact = 1e-3 if device == "cpu" else math.inf
    check("micro-batches of 1 and of all: one gradient", off < exact, f"differs by {off:.1e}",
          "Each loss needs the denominator of the whole step")
    modules = [model for model in run.models if isinstance(model, nn.Module)]
    weights = [{p.data_ptr() for p in model.parameters()} - {0} for model in modules]
    shared = sum(len(a & b) for i, a in enumerate(weights[:2]) for b in weights[i + 1:])
    touched = sum(p.grad is not None for model in modules[2:] for p in model.parameters())
    check("no trained weight is shared", not shared, f"{shared} are", "deepcopy one of its owners")
    check("frozen models get no gradient", not touched, f"{touched} do", "Use torch.no_grad()")
    if isinstance(reward, nn.Module):
        texts = sorted({row.info["response"] for row in rows} | {"yes", "no"})
        prompt = samples_list[0].items[0]["prompt"]
        scores = compute_scores([prompt] * len(texts), texts, reward,
                                run.scoring["reward_tokenizer"], apply_chat_template)
        check("the reward model tells responses apart", max(scores) - min(scores) > 1e-6,
              f"scores {min(scores):.2f} to {max(scores):.2f}", "Does it read what it should?")

# ---- 13. Several processes ---------------------------------------------------------------------
#
# `torchrun --nproc_per_node=N ppo.py`: each process holds an N-th of every weight of all models, of
# its gradient and its Adam, and borrows the rest of a layer when that is used (torch's FSDP2). It
# does an N-th of a rollout and of a minibatch; the finished rows are known to all, who compute the
# same from them. Who gathers waits for the others: all must come by the same gathers in turn.

def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

def rank():
    return dist.get_rank() if world_size() > 1 else 0

def start_processes():
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, number, count = next(dist.rendezvous("env://"))
        if os.environ["GROUP_WORLD_SIZE"] == "1":  # a restart would find addresses of before
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        hour = datetime.timedelta(hours=1)  # may the first one write while the others wait
        dist.init_process_group(store=store, rank=number, world_size=count, timeout=hour)

def place(model):
    """To the device; of several processes each gets its part."""
    if world_size() == 1 or not isinstance(model, nn.Module):
        return model.to(device) if isinstance(model, nn.Module) else model
    from torch.distributed.fsdp import fully_shard  # here, for it takes two seconds
    warnings.filterwarnings("ignore", ".*returned a view tensor")  # V is not changed in place
    mesh = dist.init_device_mesh(device, (world_size(),))
    layer = transformers.modeling_layers.GradientCheckpointingLayer
    for module in [*(m for m in model.modules() if isinstance(m, layer)), model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model

@contextlib.contextmanager
def undivided(model):
    """For `generate`: the whole model in each process, or every token would send for it."""
    parts = [module for module in model.modules() if hasattr(module, "unshard")]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False)
    yield
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(True)

def say(text):
    if rank() == 0:
        print(text, flush=True)

def gather(thing):
    """-> a list of what each process gave, in all of them."""
    things = [thing] * world_size()
    if len(things) > 1:
        dist.all_gather_object(things, thing)
    return things

def my_share(rows):
    """In each process as many; where they do not divide, the first come again at the end."""
    size = math.ceil(len(rows) / world_size())
    return list(itertools.islice(itertools.cycle(rows), size * rank(), size * (rank() + 1)))

def gather_rows(rows):
    """The rows of all processes, in the order that one alone would have."""
    def move(row, target):  # a copy: of a view, pickle would send all that is behind it
        tensors = {k: v.to(target, copy=True) for k, v in vars(row).items() if hasattr(v, "copy_")}
        return dataclasses.replace(row, **tensors)

    if world_size() == 1:
        return rows
    parts = gather([move(row, "cpu") for row in rows])
    return [move(row, rows[0].seqs.device) for part in parts for row in part]

def over_processes(metrics):
    """Sums and a maximum; of the losses, which have the denominator of a share, the mean."""
    parts = gather(metrics)
    joins = dict(ratio_max=max, policy_loss=numpy.mean, value_loss=numpy.mean)
    return {name: float(joins.get(name, sum)([p[name] for p in parts])) for name in metrics}

def clip_gradients(model, max_norm):
    """Scales gradients down to a norm of max_norm -> the norm before, that of all parts."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return float(norm.full_tensor() if world_size() > 1 else norm)

def to_whole(tree):
    """A state dict -> one with whole tensors for the first process to write, None for others."""
    if isinstance(tree, dict):
        return {name: to_whole(value) for name, value in tree.items()}
    if hasattr(tree, "full_tensor"):
        whole = tree.full_tensor()
        return whole.cpu() if rank() == 0 else None
    return tree

def to_part(tensor, like):
    """The part of a whole tensor that this process has of `like`."""
    if tensor.shape != like.shape or not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements,
                             src_data_rank=None).clone()  # a view would keep the whole

@contextlib.contextmanager
def recomputing(model):
    """Gradient checkpointing works inside only. In eval() it does nothing, so the layers that
    recompute are set to training, without what is in them: dropout stays off."""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False

# ---- 14. Trace: one response, token by token ---------------------------------------------------

@torch.no_grad()
def trace(rows, actor_model, tokenizer, kl_coef):
    """Prints and returns: a rollout's best and worst scored response, and as a table the one that
    holds its largest |KL| of a token: look there first for a hacked reward. The numbers are the
    run's own, `used` the whitened A, `new` that after all epochs. A mark says that the loss lets no
    gradient of the token through any more: ^ clipped above, v below, d by the dual clip."""
    def number(x):  # in 7 characters, with as many of 4 decimals as fit
        return next((s for d in (4, 3, 2, 1, 0) if len(s := f"{round(x, d) + 0.0:.{d}f}") < 8),
                    f"{x:.0e}")

    def brief(name, row):
        prompt, response = show(str(row.info["item"]["prompt"])), show(row.info["response"])
        return f"  {name} {number(row.info['raw_score']):>8}: {prompt[-40:]} -> {response}"[:100]

    low, high = clip_eps, clip_eps_high or clip_eps
    if policy_loss == "ppo1":
        low = high = math.inf
    by_score = sorted(rows, key=lambda row: row.info["raw_score"])
    row = max(rows, key=lambda row: row.kl.abs().max())
    place, n = row.kl.abs().argmax().item(), len(row.action_mask)
    tokens = [show(tokenizer.decode([i])) for i in row.seqs[-n:].tolist()]
    inputs = (row.seqs[None], row.attention_mask[None])
    new = compute_log_probs(actor_model, *inputs, n, temperature)[0]
    old, V = row.old_action_log_probs, row.values
    delta = row.rewards + gamma * torch.cat([V[1:], row.last_values[None]]) - V  # Eq. 9
    table = torch.stack([
        old, row.ref_action_log_probs, row.kl, row.rewards, V, delta, row.returns - V,
        row.advantages, row.returns, new, (new - old).exp()], dim=1).tolist()
    names = "log_prob ref kl reward V delta A used return new ratio".split()
    lines = [brief("best ", by_score[-1]), brief("worst", by_score[0]), brief("below", row),
             f"  max |KL| {number(abs(table[place][2]))} at token {place}; score "
             f"{number(row.scores.item())}, kl_coef {kl_coef:.4g}, gamma {gamma}, lambd {lambd}, "
             f"V(s_T) {number(row.last_values.item())}",
             f"{'token':9}" + "%8s" * 11 % (*names,)]
    for t, (token, cells) in enumerate(zip(tokens, table)):
        A, ratio = cells[7], cells[10]
        mark = ("^" if A > 0 and ratio > 1 + high else "v" if A < 0 and ratio < 1 - low else
                "d" if A < 0 and ratio > (dual_clip or math.inf) else "")
        if t == 40 < n - 24:
            lines.append(f"... {n - 64} tokens more")
        if t < 40 or t >= n - 24:
            lines.append(f"{token:9.9}" + "%8s" * 11 % (*map(number, cells),) + f" {mark}".rstrip())
    say("\n".join(lines))
    return "\n".join(lines)

# ---- 15. The bill: what a run takes, told before it takes it -----------------------------------

class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the tensors made inside: those alive `now`, and the `peak` of that."""
    now = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def storages(tree):
            return {leaf.untyped_storage() for leaf in torch.utils._pytree.tree_leaves(tree)
                    if isinstance(leaf, torch.Tensor)}

        made = function(*args, **(kwargs or {}))
        for storage in storages(made) - storages((args, kwargs)):  # no views, nothing in place
            self.add(storage.nbytes())
            weakref.finalize(storage, self.add, -storage.nbytes())
        return made

    def add(self, size):
        self.now, self.peak = self.now + size, max(self.peak, self.now + size)

def measure(name, model):
    """A model without memory -> bytes of its weights, gradients and Adam; the most that stands
    beside them in a micro-batch (activations, logits) and in `generate` (prompts, KV cache)."""
    trained, rows = name in ("actor", "critic"), rollout_batch_size * n_samples_per_prompt
    grown = [p for p in model.parameters() if p.requires_grad]
    for p in grown:
        p.grad = torch.empty_like(p)
    seqs = torch.ones(min(micro_train_batch_size, train_batch_size if trained else rows),
                      max_length + max_new_tokens, dtype=torch.long)
    inputs = (seqs, torch.ones_like(seqs), max_new_tokens)
    with Watch() as work, torch.set_grad_enabled(trained), recomputing(model):
        if name == "reward":
            model.config.pad_token_id = model.config.pad_token_id or 0  # main sets a missing one
            limit = getattr(model.config, "max_position_embeddings", None)  # longer texts are cut
            model(input_ids=seqs[:, :limit], attention_mask=inputs[1][:, :limit])
        elif name == "critic":
            model(*inputs).sum().backward()
        else:
            parts = compute_log_probs(model, *inputs, temperature, trained and entropy_coef != 0)
            if trained:
                sum(part.sum() for part in parts).backward()
    with Watch() as sampling, torch.no_grad(), autocast(model):
        if name == "actor":
            output = model(input_ids=seqs[:1, :max_length].repeat(
                min(micro_rollout_batch_size, rows), 1), use_cache=True, logits_to_keep=1)
            output.logits.float().repeat(4, 1, 1)  # copied, tempered, softmax, random numbers
            output = output.past_key_values
    weights, grown = (sum(p.nbytes for p in group) / world_size()
                      for group in (model.parameters(), grown))
    cache = sampling.now * (1 + max_new_tokens / max_length)
    return weights, grown, 2 * grown, work.peak, sampling.peak - sampling.now + cache

def get_memory():
    """Bytes: what Python and the libraries take, what is left for the run. On a GPU nothing counts
    for the first; on a CPU the container's limit does for the second."""
    if device == "cuda":
        return 0, torch.cuda.mem_get_info()[0]
    free, base, root = [math.inf], 0, "/sys/fs/cgroup/memory"
    for limit, used, pattern in (
            ("/proc/meminfo", None, r"MemAvailable: +(\d+)"),
            (root + ".max", root + ".stat", r"^anon (\d+)"),
            (root + "/memory.limit_in_bytes", root + "/memory.stat", r"^rss (\d+)")):
        with contextlib.suppress(OSError, ValueError):  # no such system, or "max"
            found = int(re.search(pattern, open(used or limit).read(), re.M)[1])
            free.append(int(open(limit).read()) - found if used else found * 1024)
    with contextlib.suppress(OSError):
        base = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return base, min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))

def show_bill():
    """Prints what the run takes at the most, before anything large is allocated: its own functions
    are run on tensors without memory. InputError: more than there is."""
    def load_empty(constant, name):
        kind = "CausalLM" if constant == "actor_name" else "SequenceClassification"
        auto = getattr(transformers, f"AutoModelFor{kind}")
        return auto.from_config(load(transformers.AutoConfig, constant, name), dtype=torch.float32,
                                trust_remote_code=trust_remote_code).eval()

    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    mode.__deepcopy__ = lambda memo: mode  # Critic copies a body
    stay = unittest.mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    say("  MiB     parameters    weights  gradients       Adam   training   generate")
    bills = []
    with mode, stay, torch.device(device):
        for name, model in zip(("actor", "critic", "reward", "ref"), make_models(load_empty)):
            if isinstance(model, nn.Module):
                try:
                    bills.append(measure(name, model))
                except Exception as error:  # a forward that looks at its numbers: there are none
                    return say(f"  no bill, {name} cannot be run without memory: {error}"[:100])
                say(f"  {name:8s}{sum(p.numel() for p in model.parameters()) / 1e6:10.2f} M"
                    + "%11.1f" * 5 % tuple(x / 2 ** 20 for x in bills[-1]))
    fixed, work = zip(*((sum(bill[:3]), max(bill[3:])) for bill in bills))
    base, free = get_memory()
    # Beside what tensors need: libraries yet to load, and what the allocator cannot use again. On
    # a CPU that can be as much as the work; more when it is told to give nothing back.
    slack = 1.25 if device == "cuda" else 3.5 if "MALLOC_MMAP_THRESHOLD_" in os.environ else 2.5
    total = sum(fixed) + slack * max(work) + bool(base) * 3 * 2 ** 26
    say(f"  at most {(base + total) / 2 ** 20:.0f} MiB, Python's {base / 2 ** 20:.0f} among them; "
        f"{device} has {(base + free) / 2 ** 20:.0f}")
    if total > free:
        raise InputError(
            f"the run would take {total / 2 ** 30:.1f} GiB of {free / 2 ** 30:.1f}: lower "
            "micro_rollout_batch_size, then micro_train_batch_size; set gradient_checkpointing = "
            "True, then lora_rank = 16; lower max_new_tokens")

# ---- 16. Adapters: four models on one trunk ----------------------------------------------------

class Adapted(nn.Module):
    """One of the models that share a trunk: in its forward the adapter `name` works alone, or none
    does (the reference). Its parameters are that adapter's, the reference's those of the trunk."""

    def __init__(self, trunk, name):
        super().__init__()
        self.__dict__["trunk"] = trunk  # past nn.Module: its weights are not all this model's
        self.name, self.config = name, trunk.config
        self.layers = [module for module in trunk.modules() if hasattr(module, "base_layer")]
        self.activation_checkpointing_enable = (
            getattr(trunk, ENABLE, None) or trunk.gradient_checkpointing_enable)
        for key, p in trunk.named_parameters():
            if f".{name}." in key or name is None and ".lora_" not in key:
                self.register_parameter(key.replace(".", "_"), p)

    def __deepcopy__(self, memo):
        return self  # so Critic takes the trunk for its body: two adapters share nothing trained

    device = property(lambda self: self.trunk.device)
    generation_config = property(
        lambda self: self.trunk.generation_config,
        lambda self, config: setattr(self.trunk, "generation_config", config))
    gradient_checkpointing = property(lambda self: any(
        getattr(module, "gradient_checkpointing", False) for module in self.trunk.modules()))

    def switch(self):
        for layer in self.layers:
            layer.enable_adapters(self.name is not None)
            layer.set_adapter(self.name or [])
        for key, p in self.trunk.named_parameters():
            p.requires_grad_(".lora_" in key)  # peft freezes what is off
        for module in self.trunk.modules():  # `recomputing` has set it for this model alone
            module.training = self.training and getattr(module, "gradient_checkpointing", False)
        return self.trunk

    def forward(self, **inputs):
        return self.switch()(**inputs)

    def generate(self, **inputs):
        return self.switch().generate(**inputs)

    @torch.no_grad()
    def save_pretrained(self, folder, state_dict=None):
        """A plain model, the adapter merged into a copy of the trunk: merging in place and taking
        it out again would leave rounding in the reference. The adapter itself in folder/adapter."""
        weights = {key.replace(".base_layer", ""): w for key, w in self.trunk.state_dict().items()
                   if ".lora_" not in key}
        for key, layer in self.trunk.named_modules():
            if layer in self.layers:
                weights[key + ".weight"] = layer.base_layer.weight + layer.get_delta_weight("actor")
        self.trunk.save_pretrained(folder, state_dict=weights)
        folder = os.path.join(folder, "adapter")
        self.trunk.peft_config["actor"].save_pretrained(folder)
        safetensors.torch.save_file(
            {"base_model.model." + key.replace(".actor.", "."): w
             for key, w in self.trunk.named_parameters() if ".actor." in key},
            os.path.join(folder, "adapter_model.safetensors"))

def add_adapters(trunk):
    """Of one loaded model make actor, critic and reference. InputError: no peft."""
    try:
        import peft
    except ImportError:
        raise InputError(f"lora_rank = {lora_rank} needs peft: pip install peft, or set it to 0"
                         ) from None
    if world_size() > 1:
        raise InputError(f"lora_rank = {lora_rank}: adapters train in one process: set it to 0")
    config = peft.LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear",
                             task_type="CAUSAL_LM", base_model_name_or_path=actor_name)
    tuner = peft.LoraModel(trunk, dict(actor=config, critic=config), "actor")  # in the trunk itself
    tuner.inject_adapter(trunk, "critic")
    critic_model = Critic(Adapted(trunk.base_model, "critic")).eval()
    return Adapted(trunk, "actor").eval(), critic_model, Adapted(trunk, None).eval()

# ---- 17. Offline demo: the two steps before PPO, small enough for a laptop -----------------------
# A person asks for something. A reply is helpful, plain or rude, on topic or off, with a reason or
# without, all independently; fine-tuning copies that mixture, and PPO has to find its best corner.
ASKS = ["suggest a {} for {} .", "which {} fits {} ?", "i need a {} for {} .", "any {} for {} ?",
        "name a good {} for {} .", "what {} is best for {} ?"]
OCCASIONS = ["tonight", "sunday", "two people", "my sister", "my birthday", "old friends",
             "the weekend", "a rainy day"]
TOPICS = {  # topic: (items, reasons that fit these items and no others)
    "book": ("dune emma ulysses dracula".split(), ["pages fly", "the prose sings"]),
    "film": ("alien psycho jaws casablanca".split(), ["actors shine", "the ending stuns"]),
    "dish": ("ramen paella risotto lasagna".split(), ["it smells divine", "it tastes fresh"]),
    "song": ("jolene imagine yesterday hallelujah".split(), ["it swings", "the melody lingers"]),
    "game": ("chess poker tetris checkers".split(), ["it thrills", "the rules click"]),
    "city": ("lisbon kyoto prague oslo".split(), ["streets charm", "the harbour sparkles"])}
VERBS = ["try", "take", "pick"]
TONES = {  # tone: (how a reply opens, how it closes)
    "helpful": (["gladly ,", "of course ,", "with pleasure ,"], ["!", ". enjoy !"]),
    "plain": (["well ,", "maybe", "ok ,"], [".", ", i guess ."]),
    "rude": (["ugh ,", "lazy you ,", "not again ,"], [". go away .", ". now leave ."])}

@functools.cache
def make_grammar():
    """All that can be said: {prompt: topic}, {(topic, tone, reasoned): replies} and, the way back,
    {reply: (topic, tone, reasoned)}. A text is a sentence of the grammar if it is a key."""
    prompts = {ask.format(topic, occasion): topic
               for ask, topic, occasion in itertools.product(ASKS, TOPICS, OCCASIONS)}
    replies = {}
    for topic, tone, reasoned in itertools.product(TOPICS, TONES, (False, True)):
        (items, reasons), (openers, closers) = TOPICS[topic], TONES[tone]
        reasons = [f" because {reason}" for reason in reasons] if reasoned else [""]
        # Reasons vary slowest: equal places (modulo length) in two lists have equal wording.
        parts = itertools.product(reasons, openers, VERBS, items, closers)
        replies[topic, tone, reasoned] = [f"{o} {v} {i}{r} {c}" for r, o, v, i, c in parts]
    return prompts, replies, {text: key for key, texts in replies.items() for text in texts}

def gold(prompts, responses, **columns):
    """The hidden rule, in [0, 1]: on topic, helpful, with a reason, a third each; a text that the
    grammar cannot make is worth 0. It labels the pairs and judges the end; PPO never sees it."""
    asked, _, said = make_grammar()
    scores = []
    for prompt, response in zip(prompts, responses):
        topic, tone, reasoned = said.get(response.strip(), (None, None, False))
        on_topic = topic is not None and topic == asked.get(prompt.strip())
        tone_score = {"helpful": 1.0, "plain": 0.5}.get(tone, 0.0)
        scores.append((on_topic + tone_score + reasoned) / 3)
    return scores

def draw_aspects(prompt, rng):
    """(topic, tone, reasoned) of a reply for fine-tuning; 4 in 100 are as good as can be."""
    topic = make_grammar()[0][prompt]
    if rng.random() < 0.5:
        topic = rng.choice([other for other in TOPICS if other != topic])
    return topic, rng.choices(list(TONES), [2, 4, 4])[0], rng.random() < 0.4

def draw_pair(prompt, rng, differ):
    """(chosen, rejected) replies to a prompt. They differ in one aspect of `differ` alone (0 topic,
    1 tone, 2 reason; None: in any), so that nothing else can explain the preference."""
    while True:
        first, second = draw_aspects(prompt, rng), draw_aspects(prompt, rng)
        aspect = rng.choice(differ)
        if aspect is not None:
            second = (*first[:aspect], second[aspect], *first[aspect + 1:])
        lists, place = [make_grammar()[1][key] for key in (first, second)], rng.randrange(10 ** 6)
        pair = [texts[place % len(texts)] for texts in lists]
        (low, rejected), (high, chosen) = sorted(zip(gold([prompt] * 2, pair), pair))
        if low < high:  # two that are equally good teach nothing
            return chosen, rejected

def make_demo_tokenizer():
    """One token per word, no start token, and a chat template like those of real models."""
    prompts, _, said = make_grammar()
    words = sorted({word for text in [*prompts, *said] for word in text.split()})
    special = ["<pad>", "<eos>", "<user>", "<bot>", "<unk>"]
    vocab = {word: i for i, word in enumerate(special + words)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<user>", "<bot>"], clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}{% if m.role == 'user' %}<user> {{ m.content }} "
                      "{% else %}<bot> {{ m.content }} <eos>{% endif %}{% endfor %}"
                      "{% if add_generation_prompt %}<bot> {% endif %}")

def encode_dialogues(tokenizer, prompts, replies):
    chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
             for prompt, reply in zip(prompts, replies)]
    return tokenizer(tokenizer.apply_chat_template(chats, tokenize=False), padding=True,
                     add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)

def fit(model, compute_loss, steps, lr):
    """AdamW, the rate up over a tenth of the steps, then down to 0 as a cosine. -> last loss"""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps,
                                                   pct_start=0.1, cycle_momentum=False)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = compute_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()

def fit_actor(tokenizer, prompts, rng, steps=360, batch=32):
    """Supervised fine-tuning, from scratch, on replies of the grammar. -> model, last loss"""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.05, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id))
    # One wrong word in 300 spoils a reply in 30. Large logits from the start let few steps push
    # the words that cannot follow far down: 3% spoilt replies become 1.5%.
    nn.init.constant_(model.model.norm.weight, 4.0)

    def compute_loss():
        asked = rng.choices(prompts, k=batch)
        replies = [rng.choice(make_grammar()[1][draw_aspects(prompt, rng)]) for prompt in asked]
        inputs = encode_dialogues(tokenizer, asked, replies)
        is_bot = inputs.input_ids == tokenizer.convert_tokens_to_ids("<bot>")
        learned = (is_bot.cumsum(1) > 0) & ~is_bot & inputs.attention_mask.bool()  # the reply
        return model(**inputs, labels=inputs.input_ids.masked_fill(~learned, -100)).loss

    return model, fit(model, compute_loss, steps, lr=5e-3)

def compute_reward_loss(chosen, rejected):
    """Eq. 12: loss = -mean log sigmoid(r(chosen) - r(rejected)). (B,), (B,) -> scalar"""
    return -F.logsigmoid(chosen - rejected).mean()

def fit_reward(tokenizer, actor_model, prompts, eval_prompts, rng, batch=32):
    """A reward model from pairs, on the fine-tuned body. -> model, accuracy on held-out pairs"""
    config = transformers.LlamaConfig(**{**actor_model.config.to_dict(), "id2label": {0: "score"}})
    model = transformers.LlamaForSequenceClassification(config)
    model.model.load_state_dict(actor_model.model.state_dict())
    nn.init.zeros_(model.score.weight)

    def score_pairs(prompts, differ, batch):
        asked = rng.choices(prompts, k=batch)
        chosen, rejected = zip(*(draw_pair(prompt, rng, differ) for prompt in asked))
        inputs = encode_dialogues(tokenizer, asked + asked, chosen + rejected)
        return model(**inputs).logits.squeeze(-1).chunk(2)

    # Topic first, alone: it is the one aspect that no word of the reply gives away, and beside the
    # two easy ones its gradient drowns (120 mixed steps leave it at chance, 40 alone reach 100%).
    for differ, steps in ([0], 60), ([0, 0, 1, 2, None], 240):
        fit(model, lambda: compute_reward_loss(*score_pairs(prompts, differ, batch)), steps, 2e-3)
    with torch.no_grad():
        chosen, rejected = score_pairs(eval_prompts, [None], 512)
        # Pairs fix differences only, not the unit. With a spread of 1, kl_coef means something.
        model.score.weight /= torch.cat([chosen, rejected]).std()
    return model, (chosen > rejected).float().mean().item()

def build_demo(folder, seed):
    """Write folder/actor, folder/reward, folder/prompts.txt and folder/eval_prompts.txt."""
    unfinished = f"{folder}.unfinished"  # renamed at the end: a kill leaves no half folder
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    rng, tokenizer, start = random.Random(seed), make_demo_tokenizer(), time.time()
    prompts = rng.sample(list(make_grammar()[0]), k=len(make_grammar()[0]))
    eval_prompts, prompts = prompts[:64], prompts[64:]
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.default_generator.manual_seed(seed)
        actor_model, loss = fit_actor(tokenizer, prompts, rng)
        print(f"supervised fine-tuning {time.time() - start:6.1f} s   loss {loss:.3f} per token")
        start = time.time()
        reward_model, accuracy = fit_reward(tokenizer, actor_model, prompts, eval_prompts, rng)
        print(f"reward model           {time.time() - start:6.1f} s   prefers as people do in "
              f"{accuracy:.1%} of held-out pairs")
    for name, model in ("actor", actor_model), ("reward", reward_model):
        model.save_pretrained(os.path.join(unfinished, name))
        tokenizer.save_pretrained(os.path.join(unfinished, name))
    for name, lines in ("prompts", prompts), ("eval_prompts", eval_prompts):
        with open(os.path.join(unfinished, f"{name}.txt"), "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    os.rename(unfinished, folder)

# ---- 18. Main ----------------------------------------------------------------------------------

RULES = {  # constants (those with a ? may be None): all that they can be, or in words and as a test
    "max_length rollout_batch_size n_samples_per_prompt micro_rollout_batch_size max_new_tokens "
    "max_epochs train_batch_size micro_train_batch_size kl_horizon keep_checkpoints":
        ("a whole number from 1", lambda x: type(x) is int and x >= 1),
    "lora_rank warmup_steps critic_warmup seed eval_every save_every trace_every":
        ("a whole number from 0", lambda x: type(x) is int and x >= 0),
    "episodes temperature missing_eos_penalty? actor_lr critic_lr max_grad_norm clip_eps "
    "clip_eps_high? value_clip_eps? huber_delta? target_kl? kl_coef_start? kl_target? clip_reward?":
        ("a number above 0", lambda x: type(x) in (int, float) and 0 < x < math.inf),
    "dual_clip?": ("a number above 1", lambda x: type(x) in (int, float) and 1 < x < math.inf),
    "weight_decay entropy_coef kl_coef":
        ("a number from 0", lambda x: type(x) in (int, float) and 0 <= x < math.inf),
    "gamma lambd": ("a number from 0 to 1", lambda x: type(x) in (int, float) and 0 <= x <= 1),
    "reward_fn? gold_fn?": ("a function", callable),
    "actor_name reward_name critic_name? resume?":
        ("the name of a folder", lambda x: isinstance(x, str) and x),
    "prompts_file eval_prompts_file?":
        ("a file or a list of prompts", lambda x: isinstance(x, (str, list)) and x),
    "run_name": ("letters, digits, . _ -", lambda x: re.fullmatch(r"\w[\w.-]*", str(x))),
    "apply_chat_template gradient_checkpointing trust_remote_code whiten_advantages whiten_rewards "
    "normalize_scores": [True, False],
    "lr_schedule": ["constant", "linear", "cosine"], "policy_loss": ["clip", "ppo1"],
    "truncated": ["terminal", "bootstrap"], "kl_in": ["reward", "loss"],
    "self_check": ["stop", "warn", "off"],
    "loss_agg": ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"],
    "device": ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]}

def check_constants():
    """InputError for the first constant that cannot be, with what can; or for a prompts file."""
    for names, rule in RULES.items():
        words, right = rule if isinstance(rule, tuple) else (f"one of {rule}", rule.__contains__)
        for name in names.split():
            value = globals()[name.strip("?")]
            if not right(value) and not ("?" in name and value is None):
                raise InputError(f"{name.strip('?')} = {value!r}: use {words}")
    rows, processes = rollout_batch_size * n_samples_per_prompt, world_size()
    for wrong, sentence in (
            (rows % train_batch_size, f"train_batch_size must divide the {rows} rows of a rollout, "
             "rollout_batch_size * n_samples_per_prompt"),
            (train_batch_size % min(micro_train_batch_size, train_batch_size),
             "micro_train_batch_size must divide train_batch_size"),
            (rollout_batch_size % processes or train_batch_size % processes,
             f"rollout_batch_size, train_batch_size: take multiples of the {processes} processes"),
            (policy_loss == "ppo1" and not target_kl, "policy_loss = 'ppo1' needs a target_kl"),
            (kl_coef_start and (not kl_coef or kl_target),
             "kl_coef_start is annealed to kl_coef: that must be above 0, and kl_target None")):
        if wrong:
            raise InputError(sentence)
    for source in (prompts_file, eval_prompts_file):  # now, not after a minute of building
        if source and not str(source).startswith("demo/"):
            read_prompts(source)

def show_results(run):
    """Held-out prompts before and after, and their means."""
    say("\nheld-out prompts: before, after")
    for pair in list(zip(run.before, run.after))[:4]:
        say(f"  {show(str(pair[0].info['item']['prompt']))[:90]}")
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
    transformers.set_seed(seed + 1_000_003 * rank())  # each samples for itself
    transformers.utils.logging.disable_progress_bar()
    if actor_name == "demo/actor":
        gold_fn = gold_fn or gold
        if rank() == 0 and not os.path.isdir("demo"):
            build_demo("demo", seed)
        gather("the others wait for it")
    actor_tokenizer = load_tokenizer("actor_name", actor_name)
    reward_tokenizer = None if reward_fn else load_tokenizer("reward_name", reward_name)
    prompts_dataset, eval_dataset = (
        source and PromptDataset(source, actor_tokenizer, apply_chat_template, max_length)
        for source in (prompts_file, eval_prompts_file))
    if cut := prompts_dataset.truncated:
        say(f"{cut} prompts are longer than max_length = {max_length} and lose their beginning")
    path = find_checkpoint()
    show_bill()
    models = [place(model) for model in make_models(load_model)]
    if reward_tokenizer:
        models[2].config.pad_token_id = reward_tokenizer.pad_token_id
        if reward_tokenizer.pad_token_id == reward_tokenizer.eos_token_id:
            say("reward_name pads with its end token: it will score at the token before the end")
    if path is None and rank() == 0 and os.path.exists(run_folder()):
        aside = next(f"{run_folder()}.{n}" for n in itertools.count(1)
                     if not os.path.exists(f"{run_folder()}.{n}"))
        os.rename(run_folder(), aside)
        say(f"the earlier {run_folder()} is now {aside}")
    from torch.utils.tensorboard import SummaryWriter
    # In a fresh run a start is said too: TensorBoard purges nothing at a folder's first such mark.
    start = int(path[-6:]) + 1 if path else 0
    with (SummaryWriter(run_folder(), purge_step=start) if rank() == 0
          else contextlib.nullcontext()) as writer:
        run = train(prompts_dataset, eval_dataset, *models, actor_tokenizer, reward_tokenizer,
                    writer)
    run.save_actor("final")
    if run.before:
        show_results(run)
    say(f"\nthe actor is in {run_folder()}/final; curves: tensorboard --logdir runs")
    if world_size() > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        time.sleep(5 * (rank() > 0))  # of several that say the same only the first does
        sys.exit(f"ppo.py: {error}")
    except KeyboardInterrupt as error:  # Stopped is one, and says how to go on
        sys.exit((str(error) or "stopped") if rank() == 0 else 1)
