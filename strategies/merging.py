"""From a round's replies to the next state, by whichever way the round is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord

from fedlora.base_change import widened
from fedlora.errors import WireError
from fedlora.faults import reach
from fedlora.lowrank import layer_norms, relative_error
from fedlora.ranks import with_spare_rows
from fedlora.rounds import ClientUpdate, GlobalState, LocalPlan, shares
from fedlora.wire import Layout
from strategies.adding import Adding
from strategies.private_round import private_update
from strategies.replies import Reply, as_updates, halved
from strategies.sent_base import check_base
from strategies.server_optimizers import stepped

if TYPE_CHECKING:
    from strategies.base import LoraStrategy


def next_state(
    strategy: LoraStrategy,
    server_round: int,
    state: GlobalState,
    layout: Layout,
    replies: Sequence[Reply],
    adding: Adding | None,
) -> tuple[GlobalState, ArrayRecord, Sequence[Reply]]:
    """The next state, its adapter as arrays, and the good replies.

    With ``adding`` the workers have checked and summed the updates, and there are none here. What
    went wrong, what was sent and the error of what was merged is noted in the strategy's trace.

    Raises:
        WireError: too few good replies, or sums that are not theirs, or what came of them is no
            adapter.
        PrivacyError: the updates cannot be released.
    """
    trace, privacy, plan = strategy.trace, strategy.client_privacy, strategy.plan(server_round)
    needed, updates, good = max(strategy.min_train_nodes, 1), list[ClientUpdate](), replies
    if adding:
        trace.halved = halved(replies)
        check_enough(len(replies), needed)
        merged, trace.bytes_up = adding.merge(state, [reply.client for reply in replies])
    else:
        updates, good, refused = as_updates(replies, layout, plan, state.adapter, strategy.max_norm)
        trace.failures += refused
        trace.halved = halved(good)
        if privacy:
            trace.clip = privacy.bound
            private = private_update(privacy, server_round, layout, plan, state, updates)
            merged = strategy.merge(state, private)
        else:
            check_enough(len(updates), needed)
            merged = strategy.merge(state, updates)
    shown = [] if privacy else updates  # no noise covers the error of these
    return (*concluded(strategy, plan, state, layout, merged, shown), good)


def concluded(
    strategy: LoraStrategy,
    plan: LocalPlan,
    state: GlobalState,
    layout: Layout,
    merged: GlobalState,
    updates: Sequence[ClientUpdate],
) -> tuple[GlobalState, ArrayRecord]:
    """What a rule merged after the server optimiser's step, checked, and its adapter as arrays.

    The error of merging ``updates``, if there are any, is noted in the strategy's trace.

    Raises:
        WireError: it is no adapter.
    """
    if layout.ranks != "one":
        merged = replace(merged, adapter=with_spare_rows(state.adapter, merged.adapter))
    reach("merge")
    after = stepped(strategy, plan.train, state, merged)
    arrays = layout.pack(after.adapter)
    try:
        layout.unpack(arrays)
        check_base(after.memory, layout)
    except WireError as error:
        raise WireError(f"what was merged is no adapter: {error}") from None
    if updates and not plan.personal:  # whose share of it is not known
        norms = layer_norms(
            [update.adapter for update in updates],
            shares(updates),
            widened(merged.adapter, merged.memory, state.memory),
        )
        strategy.trace.aggregation_error = relative_error(norms.values())
        strategy.trace.aggregation_error_by_layer = {
            layer_of(pair): relative_error([one]) for pair, one in norms.items()
        }
    return after, arrays


def layer_of(pair: str) -> str:
    """The name of a pair's layer in its model, by the pair's key; one per pair."""
    return pair.removeprefix("base_model.model.").removesuffix(".lora_{}.weight")


def check_enough(found: int, needed: int) -> None:
    """Refuse to merge too few."""
    if found < needed:
        raise WireError(f"{found} good replies, {needed} needed (min_train_nodes)")
