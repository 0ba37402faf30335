#!/bin/bash
# One Fedlora run on a Ray cluster over the nodes of a Slurm job. Submit it with sbatch; a job that
# was stopped goes on where it was when it is submitted again with the same OUT.
#SBATCH --job-name=fedlora
#SBATCH --nodes=@NODES@
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=@CPUS@
#SBATCH --gpus-per-node=@GPUS@
#SBATCH --mem=@MEMORY@G
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --output=fedlora-%j.log
set -eu

# This environment, the data (fedlora fetch) and the model must be on every node, by these paths.
# shellcheck disable=SC1091
source "${VENV:-.venv}/bin/activate"
OUT="${OUT:-runs/slurm-$SLURM_JOB_ID}"
export OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
ip="$(python -c 'import ray; print(ray.util.get_node_ip_address())')" # this script runs on the first
address="$ip:$((20000 + SLURM_JOB_ID % 10000))"

# Ends with the step that it runs in. Other clusters on the machine are left alone.
start_ray() {
    srun --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --overlap --nodelist="$1" \
        ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" "${@:2}" &
}

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
start_ray "${nodes[0]}" --head --node-ip-address="$ip" --port="${address##*:}" --include-dashboard=false
until ray status --address="$address" > /dev/null 2>&1; do sleep 2; done
for node in "${nodes[@]:1}"; do
    start_ray "$node" --address="$address" # whoever comes late is used from then on
done

if [ -e "$OUT/config.toml" ]; then
    run=(fedlora run --resume "$OUT" --address "$address")
else
    run=(fedlora run @RECIPE@ --out "$OUT" --address "$address" --set launch.num_gpus=@EACH@)
fi
"${run[@]}" &
running=$!
trap 'kill -TERM "$running"' TERM # a minute before the time is over, and by scancel --batch
code=0
wait "$running" || code=$?
if kill -0 "$running" 2> /dev/null; then wait "$running" || code=$?; fi
exit "$code"
