#!/bin/bash
# Trains a task on several nodes of a cluster whose scheduler is not Slurm.
#
# `hpctrain submit --site SITE --dry-run` fills in what stands between the lines `#% block` and
# `#% endblock`; submit what it prints as your site says (qsub, bsub, flux batch). Nobody looks
# after such a job: where it was interrupted, or ran out of time, submit it once more to go on.
#
#% block made
# Not filled in by `hpctrain submit`.
#% endblock

#% block options
# Lines for the scheduler.
#% endblock

#% block site
# What it takes here to find hpctrain and MPI, such as:
# module load openmpi
# source "$HOME/venv/bin/activate"
#% endblock

# From here on (a site's own scripts may not bear it), end at the first command that fails, also
# within a pipe, and at a variable that is not set.
set -euo pipefail

# The run's checkpoints, metrics and result: a folder that all nodes see.
#% block run
run=runs/digits
#% endblock

# What starts the ranks.
#% block launch
launch=(mpiexec -n 2)
#% endblock

# What each rank runs.
#% block command
command=(hpctrain train digits --epochs 10 --world-size 2)
#% endblock

exec "${launch[@]}" "${command[@]}" --out "$run" --resume auto
