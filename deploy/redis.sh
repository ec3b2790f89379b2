#!/bin/sh
# Becomes a Redis for other machines: password and ACL, TLS where there are certificates, append-only file.
#   REDIS_PASSWORD  of the user "fairshard"; the default user is off
#   REDIS_DATA      folder of the append-only file (/data)
#   REDIS_RUN       folder for the configuration, which holds the password's hash (/run/redis, a tmpfs)
#   REDIS_CERTS     folder with ca.crt, redis.crt and redis.key (/certs); without them there is no TLS
#   REDIS_PORT      (6379)
set -eu
: "${REDIS_PASSWORD:?must be set}"
data=${REDIS_DATA:-/data}
run=${REDIS_RUN:-/run/redis}
certs=${REDIS_CERTS:-/certs}
port=${REDIS_PORT:-6379}
hash=$(printf %s "$REDIS_PASSWORD" | sha256sum | cut -d ' ' -f 1)
umask 077
mkdir -p "$run"
{
  if [ -f "$certs/redis.crt" ]; then
    printf 'port 0\ntls-port %s\ntls-auth-clients no\n' "$port"
    printf 'tls-cert-file "%s/redis.crt"\ntls-key-file "%s/redis.key"\ntls-ca-cert-file "%s/ca.crt"\n' \
      "$certs" "$certs" "$certs"
  else
    printf 'port %s\n' "$port"
  fi
  # Redis has no account without a password here, so its own guess at safety would only refuse other machines.
  printf 'protected-mode no\ndir "%s"\nappendonly yes\nappendfsync everysec\nsave ""\n' "$data"
  printf 'maxmemory-policy noeviction\n'
  printf 'user default off\n'
  # Channels can't be restricted by pattern: Redis matches a subscription's pattern literally, and a worker would say
  # that it is ready and run nothing.
  printf 'user fairshard on #%s ~fairshard:* allchannels +@all -@admin -@dangerous +info\n' "$hash"
  printf 'user health on nopass -@all +ping\n'
} > "$run/redis.conf"
unset REDIS_PASSWORD
exec "${REDIS_SERVER:-redis-server}" "$run/redis.conf"
