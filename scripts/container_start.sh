#!/bin/sh
# Starts wsproxy in its container, or with the argument "health" checks the one that runs there; other arguments are a
# command of wsproxy.
# The flags are those of the start task (start.flags, made at build time); only the network permission is narrower:
# the address to listen on and the Redis that REDIS_URL names, and no other host. So a new REDIS_URL needs no second
# setting, and one that cannot be read is left to wsproxy, which says what is wrong with it.
set -eu
: "${HOST:=0.0.0.0}" "${PORT:=8080}" "${REDIS_URL:=redis://redis:6379}"
export HOST PORT REDIS_URL

# An IPv6 address stands in brackets in a permission.
bracketed() {
  case $1 in \[*) echo "$1" ;; *:*) echo "[$1]" ;; *) echo "$1" ;; esac
}
host=$(bracketed "$HOST")

if [ "${1-}" = health ]; then
  case $HOST in 0.0.0.0) host=127.0.0.1 ;; :: | \[::\]) host='[::1]' ;; esac
  exec deno run --no-prompt --cached-only --allow-env=HOST,PORT --ignore-env --allow-sys=hostname "--allow-net=$host:$PORT" \
    main.ts healthcheck "http://$host:$PORT/health"
fi

# redis://user:password@host:port/db?options; only host and port may show in the list of processes.
redis=${REDIS_URL#*://}
redis=${redis%%[/?#]*}
redis=${redis##*@}
case $redis in
  \[*\]:* | *[!]]:*[0-9]) ;;
  *) redis=$redis:6379 ;;
esac

# A Unix socket is a network address and a file.
files=
case $REDIS_URL in
  redis+unix://*)
    path=${REDIS_URL#*://}
    path=/${path#*/}
    path=${path%%[?#]*}
    redis=unix:$path files="--allow-read=$path --allow-write=$path"
    ;;
esac

# Certificates are files as well, and secrets may be.
for file in "${REDIS_CA_FILE-}" "${REDIS_CERT_FILE-}" "${REDIS_KEY_FILE-}" "${REDIS_PASSWORD_FILE-}" \
  "${JWT_SECRET_FILE-}" "${JWT_SECRET_PREVIOUS_FILE-}" "${JWT_PUBLIC_KEY_FILE-}" "${ADMIN_PASSWORD_FILE-}"; do
  [ -z "$file" ] || files="$files --allow-read=$file"
done

# The identity provider whose keys are fetched; no redirect of its is followed.
keys=
if [ -n "${JWKS_URL-}" ]; then
  keys=${JWKS_URL#*://}
  keys=${keys%%[/?#]*}
  case $keys in
    \[*\]:* | *[!]]:*[0-9]) ;;
    *) case $JWKS_URL in http://*) keys=$keys:80 ;; *) keys=$keys:443 ;; esac ;;
  esac
fi

# Sentinels and a Cluster announce servers that are not known before.
net="--allow-net=$host:$PORT,$redis${keys:+,$keys}"
[ "${ADMIN_PORT:-0}" = 0 ] || net="$net,$(bracketed "${ADMIN_HOST:-127.0.0.1}"):$ADMIN_PORT"
case $REDIS_URL in *+sentinel://* | *+cluster://*) net=--allow-net ;; esac

# shellcheck disable=SC2046,SC2086 # one word for each flag is what is wanted
exec deno $(cat start.flags) $files --cached-only "$net" main.ts "$@"
