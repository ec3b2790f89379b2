#!/bin/sh
# Prints a .env with fresh secrets:  (umask 077; deploy/new-env.sh > .env)
set -eu
hex() { head -c "$1" /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }
cat <<EOF
# Made by deploy/new-env.sh. Keep it private; it is read by docker compose and by honcho.
REDIS_PASSWORD=$(hex 24)
FLOWER_BASIC_AUTH=admin:$(hex 16)
# Encrypts users' Hub tokens between the API and the nodes (a Fernet key).
FAIRSHARD_SECRET=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_')
# The service's own Hub token, if it needs one, and the Hub repo for metadata and plans (empty: a shared folder).
HF_TOKEN=
METADATA_REPO=
EOF
