"""The texts of a deployment: start scripts, systemd units, Flower's configuration, the README."""

from __future__ import annotations

import json
import shlex

from simulations.deploy.certificates import address_of
from simulations.deploy.layout import Deployment

INSTALLED = "/opt/fedlora"  # where the units look for a machine's part
START = """\
#!/bin/sh
# Starts {what} of this deployment and stays with it. Further options are handed on.
set -eu
umask 027 # what clients sent is not everybody's to read
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment"
for option in "$@"; do
    case $option in --in*) # argparse takes it abbreviated too
        echo "fedlora: $0: found $option, allowed: TLS alone, nothing goes in the clear" >&2
        exit 2 ;;
    esac
done
cd "$here"
"""
SUPERLINK = """\
fedlora deploy check "$here" --superlink --quiet
fedlora deploy register "$here" --wait 300 &
exec flower-superlink --host {bind} --port {port} \\
    --ssl-certfile server.crt --ssl-keyfile server.key --ssl-ca-certfile "$here/ca.crt" \\
    --enable-supernode-auth --database "$here/state.db" \\
    --disable-runtime-dependency-installation "$@"
"""
NODE = """\
mkdir -p ledger
fedlora deploy check "$here" --node {node} --quiet --wait 90
exec flower-supernode --superlink {address} --root-certificates ca.crt \\
    --auth-supernode-private-key node.key --host 127.0.0.1 --port {port} \\
    --node-config "{config}" "$@"
"""
TRAINED_NODE = """\
mkdir -p ledger
fedlora deploy check "$here" --node {node} --quiet --wait 90
: > starting
fedlora node --state "$here/trainer.json" --name node-{node} &
trainer=$!
supernode=
trap 'kill $trainer $supernode 2>/dev/null || :; wait || :' EXIT
trap 'exit 143' TERM INT
until [ trainer.json -nt starting ]; do
    kill -0 $trainer 2>/dev/null || exit 1 # it has said why
    sleep 1
done
flower-supernode --superlink {address} --root-certificates ca.crt \\
    --auth-supernode-private-key node.key --host 127.0.0.1 --port {port} \\
    --node-config "{config}" "$@" &
supernode=$!
wait $supernode
"""
ENVIRONMENT = """\
# What the start script runs with on this machine.
PATH={bin}:$PATH # where fedlora is installed
FLWR_HOME=$here/flower
FLWR_TELEMETRY_ENABLED=0
FLWR_DISABLE_UPDATE_CHECK=1
FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
RAY_USAGE_STATS_ENABLED=0
export PATH FLWR_HOME FLWR_TELEMETRY_ENABLED FLWR_DISABLE_UPDATE_CHECK
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION
export RAY_ENABLE_UV_RUN_RUNTIME_ENV RAY_USAGE_STATS_ENABLED
# export HF_HUB_OFFLINE=1 # once all models are here
"""
UNIT = """\
[Unit]
Description=Fedlora {what}
After=network-online.target
Wants=network-online.target

[Service]
User=fedlora
ExecStart={folder}/start
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2
SuccessExitStatus=143
KillMode=control-group

[Install]
WantedBy=multi-user.target
"""
README = """\
# A Fedlora deployment

One SuperLink at {address}, {nodes} nodes. Each machine needs Fedlora installed, the same version,
and its own part of this folder:

| part | copy to | holds |
| --- | --- | --- |
{rows}

`ca.key` signs certificates: keep it away from all of them, best offline. Files that end in `.key`
are secret and readable by their owner alone; copy them over SSH. `environment` in each part says
where Fedlora is installed there, and what it runs with.

1. On the SuperLink's machine: `superlink/start`. It registers the keys in `superlink/nodes`.
2. On each node's machine: `node-K/start`. It checks first and says in one line what is wrong.
3. Here: `fedlora deploy check .`, then `fedlora deploy run . RECIPE --out FOLDER`.

With systemd, put a part into `{installed}/PART`, give it to a user `fedlora`, copy its `.service`
file to `/etc/systemd/system`, then `systemctl enable --now NAME`.

{data}

A run's folder is on the SuperLink's machine: its server app commits every round there. Where
`fedlora deploy run` is called on that machine, it is `--out` itself. Elsewhere it is
`superlink/runs/NAME`, and the finished files come over the connection into `--out`; those above
{largest} MB have to be copied by hand.

When the SuperLink has died: start it again, then `fedlora deploy run . RECIPE --resume FOLDER`.
A node that died may be started again at any time: its script waits until the SuperLink has missed
it, a minute at most.

Who reaches the SuperLink's port may register nodes and send code that runs on every node: Flower's
SuperLink asks nodes for their keys, and those who submit for nothing. Let a firewall pass the
machines above alone.
"""


def superlink_start(deployment: Deployment) -> str:
    """The start script of the SuperLink; on this machine alone, it listens to itself alone."""
    found = address_of(deployment.host)
    local = deployment.host == "localhost" or (found is not None and found.is_loopback)
    every = "::" if found is not None and found.version == 6 else "0.0.0.0"
    bind = deployment.host if local else every
    return START.format(what="the SuperLink") + SUPERLINK.format(bind=bind, port=deployment.port)


def node_start(deployment: Deployment, node: int) -> str:
    """The start script of a node."""
    config = {"partition-id": node, "num-partitions": deployment.nodes, "ledger": "$here/ledger"}
    if deployment.data:
        config["data"] = deployment.rows_of(node)
    if deployment.trainer:
        config["trainer"] = "$here/trainer.json"
    words = [
        f"{key}={value}" if isinstance(value, int) else f"{key}='{value}'"
        for key, value in config.items()
    ]
    body = TRAINED_NODE if deployment.trainer else NODE
    return START.format(what=f"node {node}") + body.format(
        node=node,
        address=shlex.quote(deployment.address),
        port=deployment.ports[node],
        config=" ".join(words),
    )


def environment(bin_folder: str) -> str:
    """What start scripts run with."""
    return ENVIRONMENT.format(bin=shlex.quote(bin_folder))


def unit(part: str) -> str:
    """The systemd unit of a part."""
    return UNIT.format(what=part, folder=f"{INSTALLED}/{part}")


def flower_config(deployment: Deployment, authority: str) -> str:
    """Flower's ``config.toml``, with which ``flwr`` itself reaches the SuperLink."""
    return (
        '[superlink]\ndefault = "deployment"\n\n[superlink.deployment]\n'
        f"address = {json.dumps(deployment.address)}\n"
        f"root-certificates = {json.dumps(authority)}\n"
    )


def readme(deployment: Deployment, largest: int) -> str:
    """What to copy where, and what to start."""
    hosts = deployment.hosts or ("",) * deployment.nodes
    parts = [("superlink/", deployment.host, "certificate and key, public keys of nodes, `start`")]
    for node, host in enumerate(hosts):
        where = host or f"the machine of node {node}"
        parts.append((f"node-{node}/", where, "the node's key, `start`"))
    parts.append(
        ("`flower/`, `nodes/`, `ca.crt`, `deployment.toml`", "who submits", "how to reach it")
    )
    data = (
        f"Each node reads its own rows from a path on its machine: `{deployment.rows_of(0)}` on "
        "node 0, and so on."
        if deployment.data
        else "Each node gets its part of the recipe's task, which must be on its machine."
    )
    return README.format(
        address=deployment.plain,
        nodes=deployment.nodes,
        rows="\n".join(f"| {' | '.join(part)} |" for part in parts),
        installed=INSTALLED,
        data=data,
        largest=largest,
    )
