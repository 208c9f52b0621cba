#!/bin/bash
# A run on a Ray cluster that stands: job.sh DASHBOARD (http://head:8265). It goes on when this terminal is closed.
# The cluster's token is RAY_AUTH_TOKEN, or in ~/.ray/auth_token.
set -euo pipefail

dashboard=${1:?give the address of the cluster\'s dashboard, as http://head:8265}

# --working-dir takes the files of this folder along (configuration, plan, your own module); what a run writes there
# is lost with the job, so --run-dir is storage that the hosts share.
exec ray job submit --address "$dashboard" --working-dir . --no-wait -- \
    anabranch train digits --address auto --run-dir /shared/runs/digits --resume auto

# Afterwards, wherever /shared is mounted:
#   anabranch status /shared/runs/digits
#   anabranch stop /shared/runs/digits
