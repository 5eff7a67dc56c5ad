#!/bin/bash
# sbatch configs/cluster/slurm.sh --config cifar10/kd_resnet56_resnet20
#SBATCH --job-name=lkd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4        # one process per GPU; --trainer.devices must be the same number
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=SIGUSR1@90        # 90 s before the time limit, the run is saved and the job is requeued
#SBATCH --open-mode=append         # a requeued job appends to the same output file

export OMP_NUM_THREADS=1
export LKD_CACHE=${LKD_CACHE:-$PWD/cache}   # decoded images and teacher logits, on a file system shared by all nodes

srun lkd fit "$@" --config cluster/ddp --resume \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
