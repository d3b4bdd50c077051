"""From one command to ranks, whoever starts them: here, torchrun, srun or a submitted SLURM job."""
