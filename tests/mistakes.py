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
