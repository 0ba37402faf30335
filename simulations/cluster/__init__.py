"""Files that start a run on somebody else's machines: a Slurm script, a KubeRay job."""
