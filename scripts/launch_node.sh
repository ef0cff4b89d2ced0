#!/usr/bin/env bash
# Train on several machines without a scheduler. Run this on each machine with the same settings of train.py. NODE counts
# the machines from 0; MASTER is an address of machine 0 that the others can reach:
#   NODES=2 NODE=0 MASTER=10.0.0.1 bash scripts/launch_node.sh --config configs/train/own-clips.yaml --name clips
#   NODES=2 NODE=1 MASTER=10.0.0.1 bash scripts/launch_node.sh --config configs/train/own-clips.yaml --name clips
# All machines need the same files and the same output folder. When a process fails, all are restarted and resume from the
# newest checkpoint, at most RESTARTS times (3). PROCESSES is the number of processes on this machine (one per GPU), PORT
# a free port of machine 0 (29500), ADDRESS this machine's own address if its name does not resolve to it.
# To stop all: touch outputs/NAME/stop on the first machine, or send SIGUSR1 to any process of train.py.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?is the number of machines}" "${NODE:?is the number of this machine, from 0}" "${MASTER:?is an address of machine 0}"

exec python -m torch.distributed.run \
    --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "${PROCESSES:-gpu}" \
    --rdzv_backend static --master_addr "$MASTER" --master_port "${PORT:-29500}" \
    ${ADDRESS:+--local_addr "$ADDRESS"} --max_restarts "${RESTARTS:-3}" train.py "$@"
