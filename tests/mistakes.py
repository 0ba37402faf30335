"""Mistakes in private learning, and the tests that notice each: ``make mistakes`` tries them.

Every mistake is a change of our own code. The runner makes it in a copy of the checkout, runs the
tests named beside it, and wants them to fail. ``test_mistakes.py`` keeps the table true.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
PACKAGES = ("fedlora", "strategies", "clients", "simulations", "tests")
SECONDS = 600


@dataclass(frozen=True)
class Mistake:
    """A mistake as a change of the code, and the test that must fail with it.

    Attributes:
        name: what is done wrong.
        file: where; ``old`` stands in it once.
        new: what takes its place.
        test: ``file::name`` under ``tests``, as pytest takes it.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


TRAINING = "clients/test_private_training.py::"
LIMITS = "clients/test_private_limits.py::"
PRICES = "fedlora/test_privacy.py::"
LEDGER = "fedlora/test_ledger.py::"
SERVER = "strategies/test_client_privacy.py::"
RUNS = "simulations/test_private_run.py::"
UNITS = "simulations/test_private_units.py::"
ARTEFACTS = "simulations/test_private_artefacts.py::"
PACKS = "clients/test_private_cohort.py::"
RANKS = "clients/test_ranks.py::"
OWN = "clients/test_own_rank.py::"
MASKS = "fedlora/test_masks.py::"
FIXED = "fedlora/test_fixed_point.py::"
MASKING = "clients/test_masking.py::"
MASKED_ROUNDS = "strategies/test_masked.py::"
MASKED_RUNS = "simulations/test_masked_run.py::"

PER_LAYER = """    def clip_and_accumulate(self):
        for p in self.params:
            norms = p.grad_sample.flatten(1).norm(dim=1)
            part = torch.einsum("i,i...", (self.max_grad_norm / norms).clamp(max=1), p.grad_sample)
            p.summed_grad = part if p.summed_grad is None else p.summed_grad + part

"""
WHOLE_BATCH = """    def clip_and_accumulate(self):
        sums = [p.grad_sample.sum(0) for p in self.params]
        norm = torch.stack([s.norm() for s in sums]).norm()
        for p, part in zip(self.params, sums):
            part = part * (self.max_grad_norm * len(p.grad_sample) / norm).clamp(max=1)
            p.summed_grad = part if p.summed_grad is None else p.summed_grad + part

"""
ADD_NOISE = "    def add_noise(self) -> None:\n"

MISTAKES = (
    Mistake(
        "shuffled batches of one size under Poisson accounting",
        "clients/private.py",
        "yield numpy.flatnonzero(rng.random(examples) < rate).tolist()",
        "yield rng.permutation(examples)[: config.batch_size].tolist()",
        TRAINING + "test_batches_are_poisson",
    ),
    Mistake(
        "an accountant that forgets the rounds before",
        "simulations/statement.py",
        "epsilon(events, privacy.delta, privacy.accountant)",
        "epsilon(events[-1:], privacy.delta, privacy.accountant)",
        RUNS + "test_composition_is_over_all_rounds",
    ),
    Mistake(
        "events that are priced one by one",
        "fedlora/privacy.py",
        "+= event.steps",
        "= event.steps",
        PRICES + "test_the_reset_illusion",
    ),
    Mistake(
        "noise for the mean added to the sum",
        "clients/private.py",
        "            noise_multiplier=noise_multiplier,\n",
        "            noise_multiplier=noise_multiplier / (rate * len(rows)),\n",
        TRAINING + "test_noise_is_normal_and_of_the_stated_scale_whatever_was_drawn",
    ),
    Mistake(
        "the expected size of a batch cut to a whole number",
        "clients/private.py",
        "expected_batch_size=rate * len(rows)",
        "expected_batch_size=int(rate * len(rows))",
        TRAINING + "test_the_sum_is_divided_by_the_real_number",
    ),
    Mistake(
        "the sampling rate of a loader: one over its length",
        "fedlora/config_train.py",
        "min(1.0, self.batch_size / examples)",
        "1 / math.ceil(examples / self.batch_size)",
        TRAINING + "test_batches_are_poisson",
    ),
    Mistake(
        "empty batches skipped",
        "clients/private.py",
        "            step_losses, step_norms = [], []\n",
        "            if not picked:\n                continue\n"
        "            step_losses, step_norms = [], []\n",
        TRAINING + "test_an_empty_first_batch_takes_its_noise",
    ),
    Mistake(
        "the same noise for every update",
        "clients/resident.py",
        'stream = (self.config.seed, "client", client, "round", server_round, "noise", release)',
        'stream = (self.config.seed, "noise")',
        RUNS + "test_the_noise_is_of_the_release",
    ),
    Mistake(
        "the same batches in two releases",
        "clients/resident.py",
        'f"poisson {release}"',
        '"poisson"',
        RUNS + "test_the_batches_are_of_the_release_too",
    ),
    Mistake(
        "one release on any base",
        "clients/client_app.py",
        "    settings |= _heeded(order.here)\n",
        "",
        "simulations/test_changed_base_runs.py::test_a_private_release_depends_on_the_base",
    ),
    Mistake(
        "one release for a client alone and in any pack",
        "clients/budget.py",
        "release=in_pack(proposal.release, list(asked))",
        "release=proposal.release",
        "simulations/test_packs.py::test_a_private_pack_is_another_release_than_its_clients_alone",
    ),
    Mistake(
        "one sample of clients told of twice",
        "strategies/client_privacy.py",
        "        if self._sample in told:\n",
        "        if False:\n",
        SERVER + "test_a_sample_is_released_once",
    ),
    Mistake(
        "the same clients in every run on a ledger",
        "strategies/client_privacy.py",
        'self._random("sample", server_round, sent)',
        'self._random("sample", server_round)',
        SERVER + "test_other_settings_draw_other_clients",
    ),
    Mistake(
        "the same noise in every round of the server",
        "strategies/client_privacy.py",
        'self._random("noise", server_round, release)',
        'self._random("noise")',
        SERVER + "test_each_coordinate_and_round_has_noise_of_its_own",
    ),
    Mistake(
        "seeded noise where the system's was asked for",
        "clients/resident.py",
        'if config.privacy.rng == "os":',
        "if False:",
        UNITS + "test_the_systems_noise_follows_from_nothing_that_is_known",
    ),
    Mistake(
        "each tensor clipped by itself",
        "clients/private.py",
        ADD_NOISE,
        PER_LAYER + ADD_NOISE,
        TRAINING + "test_clipped_steps_equal_a_loop_over_examples_and_no_mistaken_one",
    ),
    Mistake(
        "the batch clipped, not each example",
        "clients/private.py",
        ADD_NOISE,
        WHOLE_BATCH + ADD_NOISE,
        LIMITS + "test_a_million_times_larger_example_adds_at_most_the_clip",
    ),
    Mistake(
        "each tensor of a client's update clipped by itself",
        "strategies/client_privacy.py",
        "            total[key] += part * min(1.0, bound / norm if norm else 1.0)\n",
        "            total[key] += part * min(1.0, bound / max(float(part.norm()), 1e-30))\n",
        SERVER + "test_whole_updates_are_clipped_flat_and_short_ones_left_alone",
    ),
    Mistake(
        "clients that weigh by their examples",
        "strategies/private_round.py",
        "*(update.adapter for update in updates)",
        "*(u.adapter for u in updates for _ in range(min(3, int(u.examples))))",
        SERVER + "test_linear_rules_make_of_the_mean_what_they_make_of_all",
    ),
    Mistake(
        "a mean over those who replied",
        "strategies/client_privacy.py",
        "            / self.planned()\n            for",
        "            / max(1, len(uploads))\n            for",
        SERVER + "test_the_noise_is_z_c_over_the_planned_number_whoever_replied",
    ),
    Mistake(
        "one more number from the examples in the reply",
        "clients/client_app.py",
        '"train_loss": done.loss}',
        '"train_loss": done.loss, "least_loss": done.loss}',
        ARTEFACTS + "test_a_client_sends_what_was_noised_and_what_the_statement_names",
    ),
    Mistake(
        "layers that mix the examples of a batch",
        "clients/examples_first.py",
        "return isinstance(layer, _BatchNorm) or type",
        "return type",
        LIMITS + "test_layers_that_mix_examples_and_coarse_numbers_are_refused",
    ),
    Mistake(
        "noise for every part of a batch",
        "clients/private.py",
        "optimizer.signal_skip_step(do_skip=not last)",
        "optimizer.signal_skip_step(do_skip=False)",
        TRAINING + "test_a_step_in_parts_is_one_step_with_one_noise",
    ),
    Mistake(
        "trained tensors that are not noised",
        "clients/supported.py",
        '    same_tensors("the model", [p for p in module.parameters() if p.requires_grad], '
        "parameters)\n",
        "",
        LIMITS + "test_with_a_frozen_only_the_rest_is_noised",
    ),
    Mistake(
        "layers whose gradients the hooks do not see",
        "clients/supported.py",
        "if parameter.requires_grad and not hookable:",
        "if False:",
        LIMITS + "test_adapters_that_hooks_cannot_see_are_refused_by_name",
    ),
    Mistake(
        "layers that are called on what all examples share",
        "clients/private.py",
        "    check_examples_first(module, rows)\n",
        "",
        "clients/test_private_coverage.py::test_what_hooks_get_wrong_is_refused_by_name",
    ),
    Mistake(
        "a gradient that is no number and escapes the clip",
        "clients/private.py",
        "broken = ~norms.isfinite()",
        "broken = torch.zeros_like(norms, dtype=torch.bool)",
        LIMITS + "test_a_gradient_that_is_not_finite_counts_as_zero_in_every_tensor",
    ),
    Mistake(
        "more steps than the noise was planned for",
        "clients/budget.py",
        "if privacy.epsilon is not None and not again:",
        "if False:",
        RUNS + "test_the_gate_closes_before_the_target_and_a_resend_is_free",
    ),
    Mistake(
        "more rounds than the server's noise was planned for",
        "strategies/client_privacy.py",
        "        if self.ledger is not None and self.epsilon is not None:\n",
        "        if False:\n",
        SERVER + "test_the_run_goes_on_to_its_target_and_no_further",
    ),
    Mistake(
        "one noise for clients of different sizes",
        "fedlora/calibration.py",
        "for q, steps in work]\n    if shared_noise",
        "for q, steps in work[:1]] * len(work)\n    if shared_noise",
        PRICES + "test_a_plan_gives_every_client_the_same_epsilon",
    ),
    Mistake(
        "samples of a fixed size at the price of Poisson samples",
        "strategies/client_privacy.py",
        '/ clients, "fixed_size_gaussian"',
        '/ clients, "poisson_gaussian"',
        SERVER + "test_a_replaced_client_is_no_added_one",
    ),
    Mistake(
        "a replaced client counted as an added one",
        "fedlora/privacy.py",
        "GaussianDpEvent(sigma / 2)",
        "GaussianDpEvent(sigma)",
        SERVER + "test_each_way_of_sampling_has_its_own_price",
    ),
    Mistake(
        "an adaptive clip with the wrong sign",
        "strategies/client_privacy.py",
        "math.exp(-self.adaptive.rate",
        "math.exp(self.adaptive.rate",
        SERVER + "test_an_adaptive_clip_finds_the_median",
    ),
    Mistake(
        "noise of the next clip",
        "strategies/client_privacy.py",
        "        std = self.sum_noise() * self.bound\n",
        "        self._adapt(within - len(uploads) / 2, noise)\n"
        "        std = self.sum_noise() * self.bound\n",
        SERVER + "test_an_adaptive_clip_adds_the_noise_of_the_clip_that_was_used",
    ),
    Mistake(
        "the count of an adaptive clip for free",
        "strategies/client_privacy.py",
        "        return float(left**-0.5)\n",
        "        return self.noise_multiplier\n",
        SERVER + "test_an_adaptive_clip_adds_the_noise_of_the_clip_that_was_used",
    ),
    Mistake(
        "a claim by the central limit theorem",
        "fedlora/privacy.py",
        'if accountant == "gdp":',
        "if False:",
        PRICES + "test_gdp_is_refused",
    ),
    Mistake(
        "noise on a coarse grid",
        "clients/supported.py",
        "not in (torch.float32, torch.float64)",
        "not in (torch.float32, torch.float64, torch.bfloat16)",
        LIMITS + "test_layers_that_mix_examples_and_coarse_numbers_are_refused",
    ),
    Mistake(
        "a file more beside the adapter",
        "simulations/server_app.py",
        "        here.model.save(made, whole.pairs)\n",
        "        here.model.save(made, whole.pairs)\n"
        '    torch.save(here.first, folder.parent / "state.pt")\n',
        ARTEFACTS + "test_a_run_leaves_no_gradient_no_examples_and_no_noise",
    ),
    Mistake(
        "runs on the same clients that do not add up",
        "simulations/statement.py",
        'Path(config.privacy.ledger or folder / "ledger")',
        'Path(folder / "ledger")',
        UNITS + "test_runs_that_share_a_ledger_add_up",
    ),
    Mistake(
        "a correction on the server from more than the uploads",
        "strategies/lora_fair.py",
        "corrected_mean(uploads, weights, self.ridge)",
        "corrected_mean(uploads, weights, self.ridge * (1 + (self.node_timeout == 600)"
        " * len(self._clients) / (1 + self.min_evaluate_nodes)))",
        ARTEFACTS + "test_the_server_computes_from_the_uploads_alone",
    ),
    Mistake(
        "an update that leaves before it is charged",
        "fedlora/ledger.py",
        "        os.fsync(file)  # also for a charge that was there: its writer may have died "
        "before this\n",
        "",
        LEDGER + "test_it_is_on_disk_before_the_charge_returns",
    ),
    Mistake(
        "a new draw of noise under an old charge",
        "clients/budget.py",
        'secrets.token_hex(32) if privacy.rng == "os" else proposal.release',
        "proposal.release",
        UNITS + "test_a_resend_under_the_systems_noise_is_charged_again",
    ),
    Mistake(
        "packs whose gradients are not clipped",
        "clients/private_cohort.py",
        "(clip / (norms + 1e-6)).clamp(max=1.0)",
        "torch.ones_like(norms)",
        PACKS + "test_clipped_steps_equal_opacus",
    ),
    Mistake(
        "packs with a clip for each tensor by itself",
        "clients/private_cohort.py",
        "torch.linalg.vector_norm(torch.stack(per_tensor), dim=0)",
        "torch.stack(per_tensor).amax(dim=0)",
        PACKS + "test_clip_factors_bind",
    ),
    Mistake(
        "packs in which an example's gradient goes to another client",
        "clients/private_cohort.py",
        "                0, whose, gradient.mul_(column)",
        "                0, whose.roll(1), gradient.mul_(column)",
        PACKS + "test_clipped_steps_equal_opacus",
    ),
    Mistake(
        "packs in which an example meets another client's tensors",
        "clients/private_cohort.py",
        "v.index_select(0, whose).requires_grad_()",
        "v.index_select(0, whose.roll(1)).requires_grad_()",
        PACKS + "test_clipped_steps_equal_opacus",
    ),
    Mistake(
        "packs that divide by the drawn number",
        "clients/private_cohort.py",
        "            gradients = _noised(total, shapes, active, config, clip)\n",
        "            gradients = _noised(total, shapes, active, config, clip)\n"
        "            for number, (member, size) in enumerate(zip(active, sizes)):\n"
        "                for value in gradients.values():\n"
        "                    n = len(member.rows)\n"
        "                    value[number] *= config.sample_rate(n) * n / max(size, 1)\n",
        PACKS + "test_clipped_steps_equal_opacus",
    ),
    Mistake(
        "one noise for all clients of a pack",
        "clients/private_cohort.py",
        "generator=member.noise)",
        "generator=torch.Generator().manual_seed(0))",
        PACKS + "test_noise_has_the_stated_scale_and_is_each_clients_own",
    ),
    Mistake(
        "packs whose clients draw noise from the first one's stream",
        "clients/private_cohort.py",
        "generator=member.noise)",
        "generator=members[0].noise)",
        PACKS + "test_noise_is_the_same_numbers_as_one_by_one",
    ),
    Mistake(
        "packs with the noise of the mean on the sum",
        "clients/private_cohort.py",
        "std = member.noise_multiplier * clip",
        "std = member.noise_multiplier * clip / config.batch_size",
        PACKS + "test_noise_has_the_stated_scale_and_is_each_clients_own",
    ),
    Mistake(
        "packs with noise on the padding of a smaller rank",
        "clients/private_cohort.py",
        "own_part(padded, own[key])",
        "padded",
        RANKS + "test_noise_is_the_same_numbers_as_one_by_one",
    ),
    Mistake(
        "clients of lower rank that train and release the adapter's rank",
        "clients/own_rank.py",
        "own < config.rank)",
        "False)",
        OWN + "test_privately_its_own_numbers_alone_are_clipped_and_noised",
    ),
    Mistake(
        "packs in which a client's own scale is left out",
        "clients/stacked.py",
        "    if current.ratios is not None and owner.scaled:\n",
        "    if False:\n",
        RANKS + "test_private_training_equals_opacus",
    ),
    Mistake(
        "packs without noise on an empty batch",
        "clients/private_cohort.py",
        "            elif std:\n",
        "            elif std and bool(part.any()):\n",
        PACKS + "test_a_pack_that_draws_nothing_adds_its_noise",
    ),
    Mistake(
        "packs in which a gradient that is no number stays in the sum",
        "clients/private_cohort.py",
        ".nan_to_num_(0.0, 0.0, 0.0)",
        "",
        PACKS + "test_an_example_out_of_bounds_adds_at_most_the_clip",
    ),
    Mistake(
        "packs of layers that have the tokens first",
        "clients/private_cohort.py",
        "    check_examples_first(module, members[0].rows)\n",
        "",
        PACKS + "test_tokens_first_are_refused_even_where_the_sizes_match",
    ),
    Mistake(
        "packs with trained tensors that are not noised",
        "clients/private_cohort.py",
        "    check_supported(module, list(parameters.values()))\n",
        "",
        PACKS + "test_what_is_refused_one_by_one_is_refused_together",
    ),
    Mistake(
        "packs that end when the first client has finished",
        "clients/cohort.py",
        "key=lambda index: -steps[index]",
        "key=lambda index: steps[index]",
        PACKS + "test_every_setting_equals_opacus",
    ),
    Mistake(
        "masked sums without a mask of each client's own",
        "fedlora/masks.py",
        '    found = words + keystream(_derived(mine.own, "own"), len(words), words.dtype.name)\n',
        "    found = words.copy()\n",
        MASKS + "test_an_upload_looks_uniform_to_whoever_lacks_a_mask",
    ),
    Mistake(
        "masked sums without masks between clients",
        "fedlora/masks.py",
        "        if other != node:\n            _add_pair(found, roster, node, other, mine.mask)\n",
        "        pass\n",
        MASKS + "test_an_upload_looks_uniform_to_whoever_lacks_a_mask",
    ),
    Mistake(
        "masked sums whose masks add up",
        "fedlora/masks.py",
        "    if node < other:\n",
        "    if True:\n",
        MASKS + "test_the_sum_of_who_lasts_is_the_sum_in_the_clear",
    ),
    Mistake(
        "masked sums whose masks are the same in every sum",
        "fedlora/masks.py",
        'f"mask {roster.token} {low} {high}"',
        'f"mask {low} {high}"',
        MASKS + "test_every_use_has_a_key_of_its_own",
    ),
    Mistake(
        "masked sums with secrets from a seed",
        "fedlora/masks.py",
        "Secrets(*(secrets.token_bytes(SECRET) for _ in range(3)))",
        "Secrets(*(numpy.random.bytes(SECRET) for _ in range(3)))",
        MASKS + "test_no_seed_decides_a_secret",
    ),
    Mistake(
        "masked sums that a third of the clients can open",
        "fedlora/masks.py",
        "if count < 2 or not 2 * count < 3 * self.threshold <= 3 * count:",
        "if count < 2 or not 1 <= self.threshold <= count:",
        MASKS + "test_a_roster_that_would_tell_of_one_client_is_refused",
    ),
    Mistake(
        "masked sums with shares in the clear",
        "fedlora/masks.py",
        "        found[other] = nonce + text\n",
        "        found[other] = nonce + own + mask + text[-16:]\n",
        MASKS + "test_sealed_shares_open_to_their_receiver_alone_and_as_they_were",
    ),
    Mistake(
        "masked sums that forget who dropped out",
        "fedlora/masks.py",
        "            _add_pair(found, roster, node, other, secret)\n",
        "            pass\n",
        MASKS + "test_the_sum_of_who_lasts_is_the_sum_in_the_clear",
    ),
    Mistake(
        "masked sums that take any recovered key",
        "fedlora/masks.py",
        "        if public_key(secret) != roster.keys[node].mask:\n",
        "        if False:\n",
        MASKS + "test_a_recovered_key_is_held_to_the_public_one",
    ),
    Mistake(
        "masked sums opened with too few shares",
        "fedlora/shares.py",
        "    if len(shares) < threshold:\n",
        "    if not shares:\n",
        MASKS + "test_too_few_shares_open_nothing",
    ),
    Mistake(
        "masked sums of numbers cut to the clip",
        "fedlora/fixed_point.py",
        "        if not largest <= self.clip:\n",
        "        values = values.clip(-self.clip, self.clip)\n        if False:\n",
        FIXED + "test_a_value_beyond_the_clip_is_named_not_cut",
    ),
    Mistake(
        "masked sums rounded down",
        "fedlora/fixed_point.py",
        "numpy.rint(values / self.clip * self.largest)",
        "numpy.floor(values / self.clip * self.largest)",
        FIXED + "test_a_weighted_mean_of_levels_is_off_by_half_a_level",
    ),
    Mistake(
        "masked sums in words that wrap",
        "fedlora/fixed_point.py",
        '"uint32" if self._reach < 2**31 else "uint64"',
        '"uint32" if self._reach < 2**33 else "uint64"',
        FIXED + "test_words_are_as_wide_as_sums_need",
    ),
    Mistake(
        "masked sums for which a client reveals both secrets",
        "clients/masking.py",
        "    if sorted([*lasted, *dropped]) != included:\n",
        "    if {*lasted, *dropped} != {*included}:\n",
        MASKING + "test_one_kind_of_share_of_each_client",
    ),
    Mistake(
        "masked sums in which a client reveals the other secret",
        "clients/masking.py",
        "own if sender in lasted else mask",
        "mask if sender in lasted else own",
        MASKING + "test_one_kind_of_share_of_each_client",
    ),
    Mistake(
        "masked sums that open for a few",
        "clients/masking.py",
        "    if len(lasted) < roster.threshold or node not in lasted:\n",
        "    if node not in lasted:\n",
        MASKING + "test_one_kind_of_share_of_each_client",
    ),
    Mistake(
        "masked sums with two uploads under one mask",
        "clients/masking.py",
        '    if state.get("token") != asked["token"] or state.get("stage") != stage:\n',
        '    if state.get("token") != asked["token"]:\n',
        MASKING + "test_each_step_is_taken_once_and_in_order",
    ),
    Mistake(
        "masked sums whose secrets stay",
        "clients/masking.py",
        "    context.state[STATE] = ConfigRecord({**done})\n",
        "    context.state[STATE] = ConfigRecord({**state, **done})\n",
        MASKING + "test_secrets_last_from_process_to_process_and_no_longer_than_the_sum",
    ),
    Mistake(
        "masked sums with a roster nobody looks at",
        "clients/masking.py",
        "    if roster.keys.get(node) != mine.public():\n",
        "    if False:\n",
        MASKING + "test_a_client_looks_at_the_roster_it_is_given",
    ),
    Mistake(
        "masked sums with few clients to hide among",
        "clients/masked_input.py",
        "or len(included) < roster.threshold:",
        "or not included:",
        MASKING + "test_a_client_looks_at_who_is_to_be_in_the_sum",
    ),
    Mistake(
        "masked sums whose second pass is over fewer clients",
        "clients/masking.py",
        "    if whole and lasted != whole:\n",
        "    if False:\n",
        MASKING + "test_a_second_pass_is_over_the_same_clients_and_their_own_updates",
    ),
    Mistake(
        "masked sums that a node cannot insist on",
        "clients/masked_input.py",
        "            if masking.floor(context):\n",
        "            if False:\n",
        MASKING + "test_a_node_may_refuse_what_is_not_masked_or_of_too_few",
    ),
    Mistake(
        "masked sums beside which examples travel in the clear",
        "clients/masked_input.py",
        "MetricRecord({INPUTS: 1})",
        'MetricRecord({INPUTS: 1, "n": int(words[0])})',
        MASKED_ROUNDS + "test_no_message_to_the_server_tells_an_update_or_its_examples",
    ),
    Mistake(
        "masked sums of updates that nobody checks",
        "clients/masked_input.py",
        "            order.limits.norm,\n",
        "",
        MASKED_ROUNDS + "test_a_client_checks_its_own_update",
    ),
    Mistake(
        "masked sums whose garbage is merged",
        "fedlora/masked_vector.py",
        "    if int(numpy.abs(whole).max(initial=0)) > examples * fixed.largest:\n",
        "    if False:\n",
        MASKED_ROUNDS + "test_garbage_costs_the_round_never_the_adapter",
    ),
    Mistake(
        "masked sums charged after the upload",
        "clients/budget.py",
        "    gate.charge()\n    return done\n",
        "    return done\n",
        MASKED_RUNS + "test_the_ledger_is_charged_before_the_masked_upload_is_made",
    ),
)


def attempt(base: Path, mistake: Mistake) -> tuple[bool, str]:
    """Whether the tests failed with the mistake in the code, and how they ended."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "checkout"
        shutil.copytree(base, copy)
        path = copy / mistake.file
        path.write_text(path.read_text().replace(mistake.old, mistake.new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"tests/{mistake.test}"],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    lines = done.stdout.splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, (failed or lines)[-1]


def main() -> int:
    """Try all mistakes, or those whose name holds a word; 1 if one went unnoticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="only mistakes with this in the name")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    chosen = [mistake for mistake in MISTAKES if given.word in mistake.name]
    console, table = Console(), Table("mistake", "test", "noticed")
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(given.workers) as pool:
        base = Path(scratch)
        for package in PACKAGES:
            shutil.copytree(ROOT / package, base / package)
        shutil.copy(ROOT / "pyproject.toml", base)
        results = []
        for mistake, result in zip(
            chosen, pool.map(lambda one: attempt(base, one), chosen), strict=True
        ):
            results.append(result[0])
            console.print(f"{'noticed' if result[0] else 'MISSED '}  {mistake.name}: {result[1]}")
            table.add_row(mistake.name, mistake.test, "yes" if result[0] else "NO")
    console.print(table)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
