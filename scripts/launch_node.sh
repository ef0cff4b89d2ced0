#!/usr/bin/env bash
# Trains on several machines without a scheduler. Run it on each of them, with the same settings of train.py, and with
# NODE counting from 0; MASTER is an address of the first one that the others reach:
#   NODES=2 NODE=0 MASTER=10.0.0.1 bash scripts/launch_node.sh --config configs/train/finetune.yaml --name clips
#   NODES=2 NODE=1 MASTER=10.0.0.1 bash scripts/launch_node.sh --config configs/train/finetune.yaml --name clips
# All need the same files, and the first one's output folder. When a process fails, all are started anew and go on from
# the newest checkpoint, RESTARTS times (3). PROCESSES is their number on this machine (one a GPU), PORT one that is
# free on the first (29500), ADDRESS this machine's own where its name does not lead to it.
# To stop all: touch outputs/NAME/stop on the first machine, or send SIGUSR1 to any process of train.py.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?is the number of machines}" "${NODE:?is the number of this machine, from 0}" "${MASTER:?is an address of machine 0}"

exec python -m torch.distributed.run \
    --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "${PROCESSES:-gpu}" \
    --rdzv_backend static --master_addr "$MASTER" --master_port "${PORT:-29500}" \
    ${ADDRESS:+--local_addr "$ADDRESS"} --max_restarts "${RESTARTS:-3}" train.py "$@"
